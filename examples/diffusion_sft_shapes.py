"""Fine-tunes the embedded pipeline on outlined shapes, in a minute or two on two CPU cores.

The pairs are those of mapo_shapes.py; supervised fine-tuning takes their chosen images.
"""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import DiffusionSFTConfig, DiffusionSFTTrainer
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
    parser.add_argument("--output_dir", default="sft-shapes", help="folder for the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args(argv)

    config = DiffusionSFTConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        activation_checkpointing=False,
        save_strategy="no",
    )
    trainer = DiffusionSFTTrainer(load_pipeline(), config, preference_pairs(512))
    trainer.train()
    trainer.save_model()

    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(trainer.pipeline, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
