"""Teaches the embedded editing pipeline to edit in place, in minutes on a CPU: the base redraws half of the shapes
elsewhere, and MaPO or Diffusion-DPO learns from judged pairs of its own edits."""

import argparse
from pathlib import Path

# Before diffusers and PEFT, whose notices about optional packages it hides.
from trl_diffusion_pref import DiffusionDPOConfig, DiffusionDPOTrainer, MaPOConfig, MaPOTrainer, make_pairs
from diffusers import DDIMScheduler
from trl_diffusion_pref.shapes import EditSummary, edit_prompts, edits_reward, load_pipeline
from trl_diffusion_pref.shapes import sample, sample_base, summarize_edits


def main(argv: list[str] | None = None) -> dict[str, EditSummary]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", choices=["mapo", "dpo"], default="mapo")
    parser.add_argument("--output_dir", default="edits-shapes", help="folder for pairs and the tuned pipeline")
    parser.add_argument("--max_steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    pipeline = load_pipeline("editing")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    instructions, sources = (list(edit_prompts(128, seed=2000)[column]) for column in ("prompt", "image"))
    before = sample_base("editing", instructions, images=sources)
    pairs = make_pairs(
        {"base": pipeline},
        edit_prompts(96, seed=options.seed),
        edits_reward,
        Path(options.output_dir) / "data",
        samples_per_prompt=4,
        strategy="all",
        # One point is an edit made, a shape in place, or the rest kept; less is how clean an image is.
        min_score_difference=0.9,
        seed=options.seed,
        batch_size=16,
        exact=False,
        guidance_scale=3.0,
        num_inference_steps=20,
    )
    common = {"output_dir": options.output_dir, "max_steps": options.max_steps, "seed": options.seed}
    common |= {"per_device_train_batch_size": 32, "activation_checkpointing": False, "save_strategy": "no"}
    if options.method == "mapo":
        trainer = MaPOTrainer(pipeline, MaPOConfig(**common, learning_rate=1e-4), pairs)
    else:
        config = DiffusionDPOConfig(**common, learning_rate=1e-4, beta=500.0, prompt_dropout=0.0)
        trainer = DiffusionDPOTrainer(pipeline, config, pairs)
    trainer.train()
    trainer.save_model()
    edited = {"before": before, "after": sample(trainer.pipeline, instructions, images=sources)}
    found = {name: summarize_edits(images, instructions, sources) for name, images in edited.items()}
    for name, one in found.items():
        print(f"{name}: {one.made_in_place:.0%} made in place (made {one.made:.0%}, in place {one.in_place:.0%})")
    return found


if __name__ == "__main__":
    main()
