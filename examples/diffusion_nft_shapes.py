"""Trains the embedded flow pipeline with DiffusionNFT from its prompts and a judge alone, in minutes on a CPU.

The model generates its own samples, the judge prefers outlined shapes of the right colour, and no data set is needed.
"""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import DiffusionNFTConfig, DiffusionNFTTrainer
from datasets import Dataset
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    load_pipeline,
    prompts,
    sample,
    sample_base,
    shapes_reward,
)


def trainer_for(output_dir: str, max_steps: int, seed: int) -> DiffusionNFTTrainer:
    """Phases of 16 prompts with 8 samples, trained on in four steps."""
    config = DiffusionNFTConfig(
        output_dir=output_dir,
        start="noise",
        max_steps=max_steps,
        seed=seed,
        learning_rate=2e-4,
        per_device_train_batch_size=32,
        prompts_per_rollout=16,
        num_generations=8,
        sampling_batch_size=32,
        activation_checkpointing=False,
    )
    asked = Dataset.from_dict({"prompt": prompts()})
    return DiffusionNFTTrainer(load_pipeline("flow"), config, asked, reward_funcs=shapes_reward)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="diffusion-nft-shapes", help="folder for the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(argv)

    trainer = trainer_for(options.output_dir, options.max_steps, options.seed)
    trainer.train()
    trainer.save_model()

    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("flow", prompted), "after": sample(trainer.pipeline, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
