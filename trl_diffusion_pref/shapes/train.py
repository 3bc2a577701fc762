"""Trains the embedded pipelines from random weights and writes them in float16.

    python -m trl_diffusion_pref.shapes.train --output trl_diffusion_pref/shapes/weights

Stages: the VAE; then text encoder and UNet together on filled shapes only (the `filled_only` base); then a copy of
that UNet on a mixture with 15 % outlined shapes (the `mixed` base); then, with the same VAE and text encoder, a
transformer of Stable Diffusion 3's class on the mixture as a rectified flow (the `flow` base); last a copy of the
mixed base's UNet on edits (the `editing` base). `--stages flow` and `--stages editing` run one of the last two alone,
from the `pipeline/` in the output folder. `--save_every` also keeps checkpoints of the second and third stage, for
experiments that need a base whose training was stopped early.
"""

import argparse
import json
import string
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from .drawing import IMAGE_SIZE, prompts, random_scene
from .pipeline import pipeline_folder
from .silent_tokens import T5_TOKENS, CountedKey
from .train_editing import train_editing_unet
from .training_steps import PROMPT_DROPOUT, as_pixels, minimise


OUTLINED_SHARE = 0.15
_EMBEDDING = 64
_PROMPT_LENGTH = 16


def train_tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which each word of the captions is one token."""
    # With single characters in the corpus, other words become tokens too.
    corpus = [*prompts(), *string.ascii_lowercase, *string.digits, *string.punctuation]
    start = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=_PROMPT_LENGTH)
    return start.train_new_from_iterator(corpus, vocab_size=1000, show_progress=False)


def build_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline: Stable Diffusion's classes, small, with random weights."""
    torch.manual_seed(seed)
    # Training a tokenizer breaks ties at random; with the shipped one the same seed gives the same result.
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


def build_flow_pipeline(base: StableDiffusionPipeline, seed: int = 0) -> StableDiffusion3Pipeline:
    """The untrained flow pipeline: Stable Diffusion 3's classes, small, on another pipeline's encoders.

    Args:
        base: Its text encoder is copied to both CLIP encoders, with an identity as projection. The T5 encoder
            returns zeros, as if it were absent. The base is not changed.
        seed: Of the transformer's weights.
    """
    config = CLIPTextConfig(**{**base.text_encoder.config.to_dict(), "projection_dim": _EMBEDDING})
    text_encoders = []
    for _ in range(2):
        text_encoder = CLIPTextModelWithProjection(config)
        text_encoder.text_model.load_state_dict(base.text_encoder.state_dict())
        nn.init.eye_(text_encoder.text_projection.weight)
        text_encoders.append(text_encoder)
    # diffusers loads a pipeline without a T5 encoder only if the call says so. This one has no layers, and zeros in
    # its last norm.
    silent = T5EncoderModel(T5Config(vocab_size=len(base.tokenizer), d_model=2 * _EMBEDDING, num_layers=0))
    nn.init.zeros_(silent.encoder.final_layer_norm.weight)
    # Options that begin with an underscore say where the base was loaded from. The pipeline adds the shift factor even
    # where it is None.
    options = {name: value for name, value in base.vae.config.items() if not name.startswith("_")}
    vae = AutoencoderKL(**{**options, "shift_factor": 0.0})
    vae.load_state_dict(base.vae.state_dict())
    torch.manual_seed(seed)
    heads, head_dim, sample_size = 4, 24, IMAGE_SIZE // 4
    transformer = SD3Transformer2DModel(
        sample_size=sample_size,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=head_dim,
        num_attention_heads=heads,
        joint_attention_dim=2 * _EMBEDDING,
        caption_projection_dim=heads * head_dim,
        pooled_projection_dim=2 * _EMBEDDING,
        pos_embed_max_size=sample_size,
        qk_norm="rms_norm",
    )
    # Blocks start as identities, as in DiT (arXiv 2212.09748, section 3.2); diffusers does not initialise them so.
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and (".norm1" in name or name.startswith(("norm_out", "proj_out"))):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=base.tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=base.tokenizer,
        text_encoder_3=silent,
        tokenizer_3=base.tokenizer,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def random_drawings(n: int, outlined_share: float, rng: np.random.Generator) -> tuple[torch.Tensor, list[str]]:
    """Random drawings, `(n, 3, IMAGE_SIZE, IMAGE_SIZE)` float32 in [-1, 1], and their captions."""
    scenes = [random_scene(rng, "outlined" if rng.random() < outlined_share else "filled") for _ in range(n)]
    return as_pixels(scenes), [scene.prompt for scene in scenes]


def train_vae(vae: AutoencoderKL, steps: int, batch_size: int = 64) -> None:
    """Trains with absolute plus squared error and a small KL term; sets `scaling_factor` to 1 / std of the latents."""
    rng, generator = np.random.default_rng(1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        pixels, _ = random_drawings(batch_size, 0.5, rng)
        posterior = vae.encode(pixels).latent_dist
        difference = vae.decode(posterior.sample(generator)).sample - pixels
        loss = difference.abs().mean() + difference.square().mean() + 1e-5 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            rmse = difference.square().mean().sqrt().item() / 2
            print(f"vae {step} loss {loss.item():.4f} rmse {rmse:.4f}", flush=True)
    with torch.inference_mode():
        latents = vae.encode(random_drawings(1024, 0.5, rng)[0]).latent_dist.mean
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
    """Trains on drawings with prompt dropout; afterwards the weights are their exponential moving average."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pixels, captions = random_drawings(8192, outlined_share, rng)
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

    def loss_of_a_batch() -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        ids = input_ids[rows].clone()
        ids[torch.rand(batch_size, generator=generator) < PROMPT_DROPOUT] = unconditional
        noise = torch.randn(latents[rows].shape, generator=generator)
        timesteps = torch.randint(pipeline.scheduler.config.num_train_timesteps, (batch_size,), generator=generator)
        with torch.set_grad_enabled(train_text_encoder):
            prompt_embeds = pipeline.text_encoder(ids)[0]
        noisy = pipeline.scheduler.add_noise(latents[rows], noise, timesteps)
        prediction = pipeline.unet(noisy, timesteps, prompt_embeds).sample
        return (prediction - noise).square().mean()

    def save(step: int) -> None:
        if checkpoint_folder:
            pipeline.unet.save_pretrained(checkpoint_folder / f"step-{step}")

    minimise(loss_of_a_batch, parameters, steps, learning_rate, save_every=save_every, save=save)


def train_flow_denoiser(
    pipeline: StableDiffusion3Pipeline,
    outlined_share: float,
    steps: int,
    *,
    seed: int,
    learning_rate: float = 2e-3,
    batch_size: int = 64,
) -> None:
    """Trains the transformer on drawings as a rectified flow, with prompt dropout and logit-normal times.

    Afterwards the weights are their exponential moving average.
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    pixels, captions = random_drawings(8192, outlined_share, rng)
    with torch.inference_mode():
        latents = torch.cat([pipeline.vae.encode(chunk).latent_dist.mean for chunk in pixels.split(256)])
        asked = ["", *prompts()]
        embeddings, _, pooled, _ = pipeline.encode_prompt(asked, None, None, do_classifier_free_guidance=False)
        # One of the T5 encoder's equal tokens is enough, see CountedKey.
        embeddings = embeddings[:, : _PROMPT_LENGTH + 1]
    latents = latents.clone() * pipeline.vae.config.scaling_factor
    embeddings, pooled = embeddings.clone(), pooled.clone()
    numbers = torch.tensor([asked.index(caption) for caption in captions])

    def loss_of_a_batch() -> Tensor:
        rows = torch.randint(len(latents), (batch_size,), generator=generator)
        given = numbers[rows].masked_fill(torch.rand(batch_size, generator=generator) < PROMPT_DROPOUT, 0)
        noise = torch.randn(latents[rows].shape, generator=generator)
        times = torch.sigmoid(torch.randn(batch_size, generator=generator))
        noisy = torch.lerp(latents[rows], noise, times.reshape(-1, 1, 1, 1))
        prediction = pipeline.transformer(
            noisy,
            timestep=times * pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=embeddings[given],
            pooled_projections=pooled[given],
        ).sample
        return (prediction - (noise - latents[rows])).square().mean()

    with CountedKey(T5_TOKENS):
        minimise(loss_of_a_batch, list(pipeline.transformer.parameters()), steps, learning_rate)


def save_half(
    pipeline: StableDiffusionPipeline | StableDiffusion3Pipeline, folder: Path, encoders: Iterable[str]
) -> None:
    """Writes float16 weights and prints their numbers; `encoders` are the text encoders' names."""
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    print({name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}, flush=True)
    pipeline.to(torch.float16).save_pretrained(folder)
    # transformers loads in the dtype that this file names and diffusers in float32, and a pipeline of both fails.
    for name in encoders:
        config_file = folder / name / "config.json"
        config = {**json.loads(config_file.read_text()), "dtype": "float32"}
        config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        # transformers before 5.9 gives a CLIPTextModel random weights if their names lack this prefix.
        if isinstance(getattr(pipeline, name), CLIPTextModel):
            file = folder / name / "model.safetensors"
            weights = {f"text_model.{key.removeprefix('text_model.')}": part for key, part in load_file(file).items()}
            save_file(weights, file, {"format": "pt"})


def train_unet_bases(args: argparse.Namespace) -> None:
    """The first three stages; writes pipeline/ and filled_only_unet/."""
    pipeline = build_pipeline()
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
    filled = UNet2DConditionModel.from_config(pipeline.unet.config)
    filled.load_state_dict(pipeline.unet.state_dict())
    filled.to(torch.float16).save_pretrained(args.output / "filled_only_unet")
    train_denoiser(
        pipeline,
        OUTLINED_SHARE,
        args.mixed_steps,
        seed=3,
        learning_rate=1e-3,
        save_every=args.save_every,
        checkpoint_folder=args.output / "mixed_checkpoints",
    )
    save_half(pipeline, args.output / "pipeline", ["text_encoder"])


def train_flow_base(args: argparse.Namespace) -> None:
    """The fourth stage; reads pipeline/ and writes flow_pipeline/."""
    base = StableDiffusionPipeline.from_pretrained(args.output / "pipeline")
    pipeline = build_flow_pipeline(base)
    train_flow_denoiser(pipeline, OUTLINED_SHARE, args.flow_steps, seed=4)
    save_half(pipeline, args.output / "flow_pipeline", ["text_encoder", "text_encoder_2", "text_encoder_3"])


def train_editing_base(args: argparse.Namespace) -> None:
    """The last stage; reads pipeline/ and writes editing_unet/."""
    base = StableDiffusionPipeline.from_pretrained(args.output / "pipeline")
    unet = train_editing_unet(base, args.editing_steps, seed=5)
    unet.to(torch.float16).save_pretrained(args.output / "editing_unet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pipelines and the UNets")
    parser.add_argument(
        "--stages", choices=["all", "unet", "flow", "editing"], default="all", help="flow, editing: from its pipeline/"
    )
    parser.add_argument("--vae_steps", type=int, default=700)
    parser.add_argument("--filled_steps", type=int, default=2000)
    parser.add_argument("--mixed_steps", type=int, default=800)
    parser.add_argument("--flow_steps", type=int, default=2200)
    parser.add_argument("--editing_steps", type=int, default=1800)
    parser.add_argument("--save_every", type=int, default=0, help="also keep the UNet every that many steps; 0: none")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    if args.stages in ("all", "unet"):
        train_unet_bases(args)
    if args.stages in ("all", "flow"):
        train_flow_base(args)
    if args.stages in ("all", "editing"):
        train_editing_base(args)


if __name__ == "__main__":
    main()
