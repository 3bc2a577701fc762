"""Trains the embedded pipeline with MaPO to prefer outlined shapes, in a few minutes on two CPU cores."""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from diffusers import DiffusionPipeline
from peft import LoraConfig
from trl_diffusion_pref.host_libraries import quiet_loading
from trl_diffusion_pref.shapes import (
    compare_with_base,
    comparison_picture,
    comparison_table,
    load_pipeline,
    pipeline_folder,
    preference_pairs,
    prompts,
    sample,
    sample_base,
)


def main(argv: list[str] | None = None) -> dict[str, list]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="mapo-shapes", help="folder for the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--lora", action="store_true", help="train a LoRA instead of all weights")
    parser.add_argument("--comparison", action=argparse.BooleanOptionalAction, default=True, help="write the page")
    options = parser.parse_args(argv)

    config = MaPOConfig(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3 if options.lora else 1e-4,
        activation_checkpointing=False,
        save_strategy="no",
    )
    peft_config = LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian") if options.lora else None
    trainer = MaPOTrainer(str(pipeline_folder()), config, preference_pairs(512), peft_config=peft_config)
    trainer.train()
    trainer.save_model()
    with quiet_loading():
        tuned = load_pipeline() if options.lora else DiffusionPipeline.from_pretrained(options.output_dir)
        if options.lora:
            tuned.load_lora_weights(options.output_dir)
    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(tuned, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, Path(options.output_dir) / 'before_after.png')}")
    if options.comparison:
        found = compare_with_base(options.output_dir, Path(options.output_dir) / "comparison")
        print(f"\n{found.to_markdown()}\npage: {options.output_dir}/comparison/index.html")
    return images


if __name__ == "__main__":
    main()
