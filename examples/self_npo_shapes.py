"""Trains a negative model for the embedded pipeline from prompts alone, and samples with it, on two CPU cores.

It compares three sets of images at the same seeds: plain guidance, the negative model by itself, and guidance with it.
"""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import SelfNPOConfig, SelfNPOTrainer
from datasets import Dataset
from peft import LoraConfig
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.shapes import (
    comparison_picture,
    comparison_table,
    load_pipeline,
    pipeline_folder,
    prompts,
    sample,
    sample_base,
)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="self-npo-shapes", help="folder for the negative model")
    parser.add_argument("--max_steps", type=int, default=80)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="for sampling")
    parser.add_argument("--beta", type=float, default=0.5, help="strength of the negative model")
    parser.add_argument("--lora", action="store_true", help="train a LoRA instead of all weights")
    options = parser.parse_args(argv)

    config = SelfNPOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        per_device_train_batch_size=32,
        activation_checkpointing=False,
        save_strategy="no",
    )
    data = Dataset.from_dict({"prompt": 16 * prompts()})
    lora = LoraConfig(r=16, lora_alpha=16) if options.lora else None
    trainer = SelfNPOTrainer(str(pipeline_folder()), config, data, peft_config=lora)
    trainer.train()
    trainer.save_model()

    prompted, pipeline, scale = (8 * prompts())[:64], load_pipeline(), options.guidance_scale
    images = {
        "plain": sample_base("mixed", prompted, guidance_scale=scale),
        "negative": sample(trainer.pipeline, prompted, guidance_scale=1.0),
    }
    with negative_guidance(pipeline, options.output_dir, beta=options.beta):
        images["guided"] = sample(pipeline, prompted, guidance_scale=scale)
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    return images


if __name__ == "__main__":
    main()
