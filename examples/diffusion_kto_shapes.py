"""Trains the embedded pipeline with Diffusion-KTO on single votes: outlined shapes are liked, in minutes on a CPU."""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import DiffusionKTOConfig, DiffusionKTOTrainer
from datasets import Dataset, concatenate_datasets
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    pipeline_folder,
    preference_pairs,
    prompts,
    sample,
    sample_base,
)


def votes(count: int) -> Dataset:
    """One image and one vote for each prompt, half of them liked: of every other pair the chosen, or the rejected."""
    pairs, parts = preference_pairs(count), []
    for first, (column, liked) in enumerate((("chosen", True), ("rejected", False))):
        images = pairs.select(range(first, count, 2)).select_columns(["prompt", column])
        parts.append(images.rename_column(column, "image").add_column("label", [liked] * len(images)))
    return concatenate_datasets(parts)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="diffusion-kto-shapes", help="folder for the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args(argv)

    config = DiffusionKTOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        seed=options.seed,
        learning_rate=1e-4,
        per_device_train_batch_size=32,
        beta=500.0,
        prompt_dropout=0.0,
        activation_checkpointing=False,
        save_strategy="no",
    )
    trainer = DiffusionKTOTrainer(str(pipeline_folder()), config, votes(512))
    trainer.train()
    trainer.save_model()

    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(trainer.pipeline, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
