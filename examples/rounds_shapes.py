"""Trains the embedded pipeline in rounds on pairs of its own samples: prompts and a judge are all that is needed.

Each round samples the prompts with the model that the round before gave, pairs the better samples with the worse ones,
and trains on them with MaPO. Two rounds take about five minutes on two CPU cores; interrupted, it goes on.
"""

import argparse

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import MaPOConfig, MaPOTrainer, train_in_rounds
from diffusers import DDIMScheduler, UNet2DConditionModel
from trl_diffusion_pref.shapes import Summary, load_pipeline, prompts, sample, sample_base, shapes_reward, summarize


def main(argv: list[str] | None = None) -> list[Summary]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="rounds-shapes", help="folder for the rounds")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--samples_per_prompt", type=int, default=14)
    parser.add_argument("--max_steps", type=int, default=40, help="of each round")
    options = parser.parse_args(argv)

    pipeline = load_pipeline()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    config = MaPOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        activation_checkpointing=False,
        save_strategy="no",
    )
    rounds = train_in_rounds(
        MaPOTrainer,
        pipeline,
        config,
        prompts(),
        shapes_reward,
        rounds=options.rounds,
        samples_per_prompt=options.samples_per_prompt,
        # The largest differences: first of style, colour and shape, later of how clean the images are.
        pair_options={"strategy": "all", "max_pairs_per_prompt": 16, "batch_size": 16},
        guidance_scale=3.0,
        num_inference_steps=20,
    )

    asked = (4 * prompts())[:64]
    found = [summarize(sample_base("mixed", asked), asked)]
    for one in rounds:
        pipeline.unet = UNet2DConditionModel.from_pretrained(one.folder / "unet")
        found.append(summarize(sample(pipeline, asked), asked))
    print(f"{'':10} {'outlined':>9} {'colour':>8} {'shape':>8} {'clean':>8}")
    for number, one in enumerate(found):
        shares = (one.preferred, one.colour, one.shape, one.clean_in_style)
        name = f"round {number}" if number else "base"
        print(
            f"{name:10} " + " ".join(f"{share:{width}.0%}" for share, width in zip(shares, (9, 8, 8, 8), strict=True))
        )
    return found


if __name__ == "__main__":
    main()
