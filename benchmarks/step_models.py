"""Models for step_time.py: narrow Stable Diffusion 1.5 and SDXL, with the real ones' ratio of UNet to VAE."""

from dataclasses import dataclass

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trl_diffusion_pref.shapes import load_pipeline


# The forward pass of the real UNets, and encoding by their VAE, in TFLOP of one image of 512 and of 1024 pixels.
REAL = {"sd15": (0.80, 1.12), "sdxl": (6.76, 4.88)}


@dataclass(frozen=True)
class Cost:
    """What one image takes, in GFLOP, and the UNet's parameters in millions."""

    unet: float
    vae: float
    text: float
    parameters: float


def build(kind: str) -> DiffusionPipeline:
    """A pipeline with random weights: "sd15", "sdxl", or the trained "shapes"."""
    if kind == "shapes":
        return load_pipeline()
    torch.manual_seed(0)
    tokenizer = load_pipeline().tokenizer
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)
    if kind == "sd15":
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(64, 128, 256, 256),
            attention_head_dim=8,
            cross_attention_dim=160,
            norm_num_groups=16,
        )
        return StableDiffusionPipeline(
            vae=_vae((24, 48, 96, 96), 8),
            text_encoder=CLIPTextModel(_text_config(tokenizer, 160)).eval(),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    unet = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(48, 96, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(3, 6, 12),
        cross_attention_dim=320,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 192,
        use_linear_projection=True,
        norm_num_groups=16,
    )
    return StableDiffusionXLPipeline(
        vae=_vae((24, 40, 56, 56), 8),
        text_encoder=CLIPTextModel(_text_config(tokenizer, 128)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 192)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
    )


def _vae(widths: tuple[int, ...], groups: int) -> AutoencoderKL:
    blocks = len(widths)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=groups,
        sample_size=256,
    ).eval()


def _text_config(tokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=6,
        num_attention_heads=4,
        projection_dim=width,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@torch.no_grad()
def cost(pipeline: DiffusionPipeline, conditioning: dict[str, torch.Tensor], family, latents: tuple[int, ...]) -> Cost:
    """Counted on one image; `conditioning` is that of a batch of one."""
    size = latents[-1] * pipeline.vae_scale_factor

    def counted(run) -> float:
        counter = FlopCounterMode(display=False)
        with counter:
            run()
        return counter.get_total_flops() / 1e9

    unet, ids = pipeline.unet, torch.zeros(1, pipeline.tokenizer.model_max_length, dtype=torch.int64)
    encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
    return Cost(
        unet=counted(lambda: family.predict(unet, torch.zeros(1, *latents), torch.zeros(1), conditioning)),
        vae=counted(lambda: pipeline.vae.encode(torch.zeros(1, 3, size, size))),
        text=counted(lambda: [encoder(ids) for encoder in encoders if encoder is not None]),
        parameters=sum(parameter.numel() for parameter in unet.parameters()) / 1e6,
    )
