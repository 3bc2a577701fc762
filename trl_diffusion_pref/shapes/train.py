"""Trains the embedded pipelines from nothing and writes their float16 weights.

    python -m trl_diffusion_pref.shapes.train --output trl_diffusion_pref/shapes/weights

Three stages: the VAE; then text encoder and UNet together on filled shapes alone (the `filled_only` base); then a copy
of that UNet on a mixture with 15 % outlined shapes (the `mixed` base). `--save_every` also keeps checkpoints of the
last two stages, for experiments that need a base which has not finished learning to draw.
"""

import argparse
import json
import string
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .drawing import IMAGE_SIZE, draw, prompts, random_scene
from .pipeline import pipeline_folder


OUTLINED_SHARE = 0.15
_EMBEDDING = 64
_PROMPT_LENGTH = 16
_PROMPT_DROPOUT = 0.1


def train_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which each word of the captions is one token."""
    # Single characters are in the corpus so that words outside the captions still become tokens.
    corpus = [*prompts(), *string.ascii_lowercase, *string.digits, *string.punctuation]
    start = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=_PROMPT_LENGTH)
    return start.train_new_from_iterator(corpus, vocab_size=1000, show_progress=False)


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline: Stable Diffusion's classes, small, with random weights."""
    torch.manual_seed(seed)
    # Training a tokenizer breaks ties at random, so the shipped one is used again: same seed, same result.
    shipped = pipeline_folder() / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(shipped) if shipped.is_dir() else train_tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=_EMBEDDING,
            intermediate_size=2 * _EMBEDDING,
            projection_dim=_EMBEDDING,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_PROMPT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        norm_num_groups=8,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
    )
    unet = UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        block_out_channels=(64, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=_EMBEDDING,
        norm_num_groups=16,
    )
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def drawn_pictures(n: int, outlined_share: float, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Random pictures, `(n, 3, IMAGE_SIZE, IMAGE_SIZE)` float32 in [-1, 1], and their captions."""
    scenes = [random_scene(rng, "outlined" if rng.random() < outlined_share else "filled") for _ in range(n)]
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0, [scene.prompt for scene in scenes]


def train_vae(vae: AutoencoderKL, steps: int, batch_size: int = 64) -> None:
    """Mean absolute plus squared reconstruction error with a slight KL term; sets `scaling_factor` to 1 / std."""
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        pixels, _ = drawn_pictures(batch_size, 0.5, rng)
        posterior = vae.encode(pixels).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - pixels
        loss = difference.abs().mean() + difference.square().mean() + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"vae {step} loss {loss.item():.4f} rmse {difference.square().mean().sqrt().item() / 2:.4f}",
                flush=True,
            )
    with torch.inference_mode():
        latents = vae.encode(drawn_pictures(1024, 0.5, rng)[0]).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 5))


def train_denoiser(
    pipeline: StableDiffusionPipeline,
    outlined_share: float,
    steps: int,
    *,
    seed: int,
    learning_rate: float = 2e-3,
    batch_size: int = 128,
    train_text_encoder: bool = False,
    save_every: int = 0,
    checkpoint_folder: Path | None = None,
) -> None:
    """Trains on drawn pictures with prompt dropout; leaves the exponential moving average of the weights in place."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pixels, captions = drawn_pictures(8192, outlined_share, rng)
    with torch.inference_mode():
        latents = torch.cat([pipeline.vae.encode(chunk).latent_dist.mean for chunk in pixels.split(256)])
    latents = latents.clone() * pipeline.vae.config.scaling_factor

    def tokens(texts: list[str]) -> torch.Tensor:
        return pipeline.tokenizer(
            texts, padding="max_length", max_length=_PROMPT_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    input_ids, unconditional = tokens(captions), tokens([""])[0]
    parameters = list(pipeline.unet.parameters())
    if train_text_encoder:
        parameters += list(pipeline.text_encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
    average = EMAModel(parameters, decay=0.995, use_ema_warmup=True, power=0.75)
    started = time.time()
    for step in range(steps):
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        ids = input_ids[rows].clone()
        ids[torch.rand(batch_size, generator=generator) < _PROMPT_DROPOUT] = unconditional
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(pipeline.scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        with torch.set_grad_enabled(train_text_encoder):
            prompt_embeds = pipeline.text_encoder(ids)[0]
        noisy = pipeline.scheduler.add_noise(latents[rows], noise, timesteps)
        prediction = pipeline.unet(noisy, timesteps, prompt_embeds).sample
        loss = (prediction - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        if step % 100 == 0 or step == steps - 1:
            print(f"denoiser {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
        if save_every and checkpoint_folder and (step + 1) % save_every == 0:
            average.store(parameters)
            average.copy_to(parameters)
            pipeline.unet.save_pretrained(checkpoint_folder / f"step-{step + 1}")
            average.restore(parameters)
    average.copy_to(parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to write pipeline/ and filled_only_unet/ to"
    )
    parser.add_argument("--vae_steps", type=int, default=700)
    parser.add_argument("--filled_steps", type=int, default=2000)
    parser.add_argument("--mixed_steps", type=int, default=800)
    parser.add_argument(
        "--save_every", type=int, default=0, help="also keep the UNet every so many steps; 0 keeps none"
    )
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    pipeline = build_pipeline()
    print(
        {
            name: round(sum(p.numel() for p in getattr(pipeline, name).parameters()) / 1e6, 2)
            for name in ("unet", "vae", "text_encoder")
        },
        flush=True,
    )
    train_vae(pipeline.vae, args.vae_steps)
    train_denoiser(
        pipeline,
        0.0,
        args.filled_steps,
        seed=2,
        train_text_encoder=True,
        save_every=args.save_every,
        checkpoint_folder=args.output / "filled_only_checkpoints",
    )
    half = torch.float16
    filled = UNet2DConditionModel.from_config(pipeline.unet.config)
    filled.load_state_dict(pipeline.unet.state_dict())
    filled.to(half).save_pretrained(args.output / "filled_only_unet")
    train_denoiser(
        pipeline,
        OUTLINED_SHARE,
        args.mixed_steps,
        seed=3,
        learning_rate=1e-3,
        save_every=args.save_every,
        checkpoint_folder=args.output / "mixed_checkpoints",
    )
    pipeline.to(half).save_pretrained(args.output / "pipeline")
    # transformers loads in the dtype that this file names, diffusers in float32: a pipeline of both would not run.
    config_file = args.output / "pipeline" / "text_encoder" / "config.json"
    config = {**json.loads(config_file.read_text()), "dtype": "float32"}
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
