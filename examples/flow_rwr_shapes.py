"""Trains the embedded pipeline on scored images of outlined and filled shapes, in a minute or two on two CPU cores.

Half of the images have either style. The judge gives a point more to outlined ones, and a sample counts by the softmax
of its score over the samples of its prompt.
"""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import FlowRWRConfig, FlowRWRTrainer
from datasets import concatenate_datasets
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    load_pipeline,
    preference_pairs,
    prompts,
    sample,
    sample_base,
    shapes_reward,
)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="rwr-shapes", help="folder for the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.25, help="lower values weigh outlined shapes more")
    options = parser.parse_args(argv)

    pairs = preference_pairs(256)
    sides = [pairs.select_columns(["prompt", side]).rename_column(side, "image") for side in ("chosen", "rejected")]
    rows = concatenate_datasets(sides)
    rows = rows.add_column("reward", shapes_reward(rows["prompt"], rows["image"]))
    config = FlowRWRConfig(
        output_dir=options.output_dir,
        weighting="softmax",
        temperature=options.temperature,
        max_steps=options.max_steps,
        per_device_train_batch_size=32,
        learning_rate=2e-4,
        activation_checkpointing=False,
        save_strategy="no",
    )
    trainer = FlowRWRTrainer(load_pipeline(), config, rows)
    trainer.train()
    trainer.save_model()

    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(trainer.pipeline, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
