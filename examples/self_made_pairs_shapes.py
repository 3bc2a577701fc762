"""Trains the embedded pipeline on pairs of its own samples, in about three minutes on two CPU cores: no data set.

Its 18 prompts are sampled, a judge scores the samples, the better ones are paired with the worse ones, and MaPO learns
from the pairs to prefer outlined shapes.
"""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import MaPOConfig, MaPOTrainer, make_pairs
from diffusers import DDIMScheduler, DiffusionPipeline
from trl_diffusion_pref.host_libraries import quiet_loading
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    load_pipeline,
    pipeline_folder,
    prompts,
    sample,
    sample_base,
    shapes_reward,
)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="self-made-shapes", help="folder for pairs and the tuned pipeline")
    parser.add_argument("--samples_per_prompt", type=int, default=14)
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args(argv)

    sampler = load_pipeline()
    sampler.scheduler = DDIMScheduler.from_config(sampler.scheduler.config)
    pairs = make_pairs(
        {"base": sampler},
        prompts(),
        shapes_reward,
        Path(options.output_dir) / "data",
        samples_per_prompt=options.samples_per_prompt,
        # One point is a style, a colour or a shape; less is how clean an image is.
        strategy="all",
        min_score_difference=0.9,
        max_pairs_per_prompt=16,
        batch_size=16,
        guidance_scale=3.0,
        num_inference_steps=20,
    )
    config = MaPOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        activation_checkpointing=False,
        save_strategy="no",
    )
    trainer = MaPOTrainer(str(pipeline_folder()), config, pairs)
    trainer.train()
    trainer.save_model()

    with quiet_loading():
        tuned = DiffusionPipeline.from_pretrained(options.output_dir)
    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(tuned, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
