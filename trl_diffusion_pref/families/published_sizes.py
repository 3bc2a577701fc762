"""Published pipelines as far as their sizes go, on the meta device, to compute what encoding takes before a download.

The sizes of VAEs and text encoders are those of the published configs. Of the denoisers only what decides the inputs'
shapes is published; their layers are few and small.
"""

from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)


def _tokenizer(length: int) -> PreTrainedTokenizerFast:
    """One of which only the limit is read."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"": 0}, "")), model_max_length=length)


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=channels,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
    )


def _clip_l(kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection]) -> torch.nn.Module:
    """OpenAI's ViT-L/14."""
    return kind(
        CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
        )
    )


def _clip_g() -> torch.nn.Module:
    """OpenCLIP's ViT-bigG/14."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
    )


def _t5_xxl() -> torch.nn.Module:
    return T5EncoderModel(
        T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
    )


def _unet(side: int, width: int, **options: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(32,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=width,
        **options,
    )


def stable_diffusion_1_5() -> DiffusionPipeline:
    """512 pixels."""
    return StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_clip_l(CLIPTextModel),
        tokenizer=_tokenizer(77),
        unet=_unet(64, 768),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    """1024 pixels."""
    return StableDiffusionXLPipeline(
        vae=_vae(4),
        text_encoder=_clip_l(CLIPTextModel),
        text_encoder_2=_clip_g(),
        tokenizer=_tokenizer(77),
        tokenizer_2=_tokenizer(77),
        unet=_unet(
            128,
            2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + 1280,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def stable_diffusion_3_5() -> DiffusionPipeline:
    """1024 pixels; medium and large take the same inputs."""
    return StableDiffusion3Pipeline(
        vae=_vae(16),
        text_encoder=_clip_l(CLIPTextModelWithProjection),
        text_encoder_2=_clip_g(),
        text_encoder_3=_t5_xxl(),
        tokenizer=_tokenizer(77),
        tokenizer_2=_tokenizer(77),
        tokenizer_3=_tokenizer(512),
        transformer=SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=4096,
            caption_projection_dim=32,
            pooled_projection_dim=2048,
            pos_embed_max_size=192,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def flux_1_dev() -> DiffusionPipeline:
    """1024 pixels."""
    return FluxPipeline(
        vae=_vae(16),
        text_encoder=_clip_l(CLIPTextModel),
        text_encoder_2=_t5_xxl(),
        tokenizer=_tokenizer(77),
        tokenizer_2=_tokenizer(512),
        transformer=FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=4096,
            pooled_projection_dim=768,
            guidance_embeds=True,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


PUBLISHED: dict[str, Callable[[], DiffusionPipeline]] = {
    "Stable Diffusion 1.5, 512 px": stable_diffusion_1_5,
    "SDXL, 1024 px": stable_diffusion_xl,
    "Stable Diffusion 3.5, 1024 px": stable_diffusion_3_5,
    "Flux.1-dev, 1024 px": flux_1_dev,
}


def published_pipeline(name: str) -> DiffusionPipeline:
    """A pipeline of `PUBLISHED` without weights."""
    with torch.device("meta"):
        return PUBLISHED[name]()
