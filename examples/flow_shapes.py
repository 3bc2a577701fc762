"""Trains the embedded flow pipeline with MaPO or Flow-DPO to prefer outlined shapes, in minutes on two CPU cores.

The base is a rectified flow of Stable Diffusion 3's classes, which the trainers see from its scheduler.
"""

import argparse
from pathlib import Path

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    load_pipeline,
    preference_pairs,
    prompts,
    sample,
    sample_base,
)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["mapo", "dpo"], default="mapo")
    parser.add_argument("--output_dir", default="flow-shapes", help="folder for the tuned pipeline")
    parser.add_argument("--max_steps", type=int, help="default: 25 for MaPO, 40 for DPO")
    parser.add_argument("--learning_rate", type=float, help="default: 1e-4 for MaPO, 2e-4 for DPO")
    parser.add_argument("--beta", type=float, default=100.0, help="DPO's beta")
    parser.add_argument(
        "--sft_weight", type=float, default=1.0, help="DPO's weight of the chosen error; keeps colours"
    )
    options = parser.parse_args(argv)

    common = {
        "output_dir": options.output_dir,
        "max_steps": options.max_steps or {"mapo": 25, "dpo": 40}[options.method],
        "learning_rate": options.learning_rate or {"mapo": 1e-4, "dpo": 2e-4}[options.method],
        "per_device_train_batch_size": 32,
        # The base was trained on posterior means; the noise of its wide posterior would hide the preference.
        "latent_sampling": "mean",
        "activation_checkpointing": False,
        "save_strategy": "no",
    }
    pipeline, pairs = load_pipeline("flow"), preference_pairs(512)
    if options.method == "mapo":
        config = MaPOConfig(**common)
        trainer = MaPOTrainer(pipeline, config, pairs)
    else:
        config = DiffusionDPOConfig(
            **common, beta=options.beta, sft_weight=options.sft_weight, prompt_dropout=0.0, divergence_guard="off"
        )
        trainer = DiffusionDPOTrainer(pipeline, config, pairs)
    trainer.train()
    trainer.save_model()

    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("flow", prompted), "after": sample(trainer.pipeline, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
