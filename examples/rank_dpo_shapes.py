"""Trains the embedded pipeline with RankDPO on rankings of its own samples, in about three minutes on two CPU cores.

A judge scores samples of its 18 prompts, and RankDPO learns from rankings of four to prefer outlined ones.
"""

import argparse
from pathlib import Path
from random import Random

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import RankDPOConfig, RankDPOTrainer, make_rankings
from datasets import Dataset
from diffusers import DDIMScheduler
from trl_diffusion_pref.shapes import comparison_picture, comparison_table, load_pipeline, prompts
from trl_diffusion_pref.shapes import sample, sample_base, shapes_reward


def whole_points(asked: list[str], images: list, **columns: list) -> list[float]:
    """A point each for style, colour and shape; how clean an image is does not count."""
    return [float(round(score)) for score in shapes_reward(asked, images)]


def rankings_of_four(folder: Path, seed: int = 0) -> Dataset:
    """Rankings of four, drawn from 16 of the base's own samples of each prompt."""
    pipeline = load_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    options = {"samples_per_prompt": 16, "seed": seed, "batch_size": 32, "exact": False}
    options |= {"guidance_scale": 3.0, "num_inference_steps": 20}
    long = make_rankings({"base": pipeline}, prompts(), whole_points, folder, **options)

    def fours(rows: dict[str, list]) -> dict[str, list]:
        draw = Random(seed)
        drawn = [(row, draw.sample(range(16), 4)) for row in range(len(rows["prompt"])) for _ in range(32)]
        lists = {name: [[rows[name][row][n] for n in four] for row, four in drawn] for name in ("images", "scores")}
        return {"prompt": [rows["prompt"][row] for row, _ in drawn], **lists}

    return long.select_columns(["prompt", "images", "scores"]).map(fours, batched=True)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="rank-dpo-shapes", help="folder for rankings and the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=60)
    options = parser.parse_args(argv)

    rankings = rankings_of_four(Path(options.output_dir) / "data")
    common = {"output_dir": options.output_dir, "max_steps": options.max_steps, "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 16, "activation_checkpointing": False, "prompt_dropout": 0.0}
    trainer = RankDPOTrainer(load_pipeline(), RankDPOConfig(**common, learning_rate=5e-5, beta=2000.0), rankings)
    trainer.train()
    trainer.save_model()
    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(trainer.pipeline, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
