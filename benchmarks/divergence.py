"""How far MaPO's chosen error rises over the run's start, in runs that end well and in runs that do not.

    python benchmarks/divergence.py

The divergence guard of methods without a reference allows `divergence_margin`. The runs here are not stopped; at their
end the model is judged by what it generates.
"""

import argparse
import tempfile
from pathlib import Path

from peft import LoraConfig
from transformers import TrainerCallback

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts, sample, summarize


RESULTS = Path(__file__).parent / "results"
# Base, learning rate, steps, LoRA or all weights, further options.
RUNS = {
    "examples/mapo_shapes.py": ("mixed", 1e-4, 60, False, {}),
    "the same, 3 times its learning rate": ("mixed", 3e-4, 60, False, {}),
    "the same, 10 times": ("mixed", 1e-3, 60, False, {}),
    "the same, 100 times": ("mixed", 1e-2, 30, False, {}),
    "examples/mapo_shapes.py --lora": ("mixed", 1e-3, 60, True, {}),
    "a negative LoRA, 3 times its learning rate": ("mixed", 3e-3, 30, True, {"negative": True, "prompt_dropout": 0.2}),
    "examples/flow_shapes.py": ("flow", 1e-4, 25, False, {"latent_sampling": "mean"}),
    "the same, 10 times its learning rate": ("flow", 1e-3, 25, False, {"latent_sampling": "mean"}),
    "the same flow, 100 times": ("flow", 1e-2, 25, False, {"latent_sampling": "mean"}),
}


class Rises(TrainerCallback):
    """Keeps the highest rise that the guard has seen."""

    def __init__(self, trainer: MaPOTrainer) -> None:
        self.guard, self.highest = trainer.monitor.guard, 0.0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.highest = max(self.highest, self.guard.rise or 0.0)


def run(name: str, folder: str) -> str:
    base, learning_rate, steps, lora, options = RUNS[name]
    config = MaPOConfig(
        output_dir=folder,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=32,
        divergence_margin=1e6,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    adapter = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian") if lora else None
    trainer = MaPOTrainer(load_pipeline(base), config, preference_pairs(512), peft_config=adapter)
    rises = Rises(trainer)
    trainer.add_callback(rises)
    trainer.train()
    asked = (4 * prompts())[:64]
    end = summarize(sample(trainer.pipeline, asked), asked)
    shares = " | ".join(f"{share:.0%}" for share in (end.preferred, end.colour, end.shape, end.clean))
    return f"| {name} | {learning_rate:g} | {rises.highest:+.0%} | {shares} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines = [
        "# The chosen error in good and bad runs of MaPO",
        "",
        "Written by `benchmarks/divergence.py`. The rise of the chosen error over the run's first steps, averaged "
        "over five steps, at its highest; then 64 images of the model at the end. The guard stops at +400 %.",
        "",
        "| run | learning rate | highest rise | outlined | colour | shape | clean |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(run(name, folder))
        print(lines[-1], flush=True)
    (RESULTS / "divergence.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
