"""Trains a reward of noisy latents on pairs and samples towards it: the model prefers outlines without training."""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref.guidance import reward_guidance
from trl_diffusion_pref.rewards import latent_reward_accuracy, train_latent_reward
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    load_pipeline,
    preference_pairs,
    prompts,
    sample,
)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="reward-guidance-shapes", help="folder for the reward and the figure")
    parser.add_argument("--base", choices=["mixed", "flow"], default="mixed")
    parser.add_argument("--scales", type=float, nargs="+", default=[2.0])
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    pipeline = load_pipeline(options.base)
    reward = train_latent_reward(pipeline, preference_pairs(options.pairs, options.seed), blocks=2, seed=options.seed)
    reward.save(options.output_dir)
    accuracy = latent_reward_accuracy(reward, pipeline, preference_pairs(256, seed=1000))["preference"]
    print("held-out accuracy: " + ", ".join(f"{share:.1%} at noise level {at:g}" for at, share in accuracy.items()))

    prompted = (4 * prompts())[:64]
    images = {"plain": sample(pipeline, prompted, seed=options.seed)}
    for scale in options.scales:
        with reward_guidance(pipeline, reward, scale=scale):
            images[f"scale {scale:g}"] = sample(pipeline, prompted, seed=options.seed)
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'reward_guidance.png')}")
    return {"accuracy": accuracy, "images": images}


if __name__ == "__main__":
    main()
