"""Pipelines of the published sizes with random weights, for gpu.py: nothing is downloaded.

Denoiser and VAE have the sizes of the published configs. A text encoder has one narrow layer, and its published width
and length of outputs, so that prompt embeddings have their real shapes: encoding is done before what is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from trl_diffusion_pref.shapes import pipeline_folder


@dataclass(frozen=True)
class Model:
    """A pipeline's sizes, and how its parts are made; `make` is called under the device and dtype of the weights.

    Args:
        resolution: Side of the images in pixels.
        denoiser_name: The pipeline's attribute that is trained.
        make: The denoiser.
        make_others: All other parts of the pipeline, by name.
        heavy: Whether its steps take seconds, so that fewer are taken.
    """

    name: str
    pipeline_class: type[DiffusionPipeline]
    resolution: int
    denoiser_name: str
    make: Callable[[], ModelMixin]
    make_others: Callable[[], dict[str, Any]]
    heavy: bool = False

    def denoiser(self, device: torch.device, dtype: torch.dtype) -> ModelMixin:
        """With random weights, made on the device: on the CPU 12 billion of them would take minutes."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device:
                denoiser = self.make()
        finally:
            torch.set_default_dtype(before)
        # Tables of positions are computed from arrays, on the CPU in float32. diffusers' to() warns at every cast.
        return nn.Module.to(denoiser, device, dtype)

    def pipeline(self, denoiser: ModelMixin, others: dict[str, Any]) -> DiffusionPipeline:
        pipeline = self.pipeline_class(**others, **{self.denoiser_name: denoiser})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def in_4_bit(denoiser: ModelMixin) -> ModelMixin:
    """Stores the weights of all linear layers as nf4, in place, as diffusers does while it loads them.

    Raises:
        ImportError: Without bitsandbytes.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in list(denoiser.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear:
                continue
            with torch.device("meta"):
                own = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    compute_dtype=layer.weight.dtype,
                    compress_statistics=False,
                    quant_type="nf4",
                )
            own.bias = layer.bias
            weight = Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=False, quant_type="nf4", module=own
            )
            # A weight is quantised when it is moved to a device, also to the one that it is on.
            own.weight = weight.to(layer.weight.device)
            setattr(parent, name, own)
    denoiser.is_loaded_in_4bit = True  # PEFT looks at it
    return denoiser


def pairs_of(resolution: int, rows: int) -> Dataset:
    """Pairs of two different images each, four images in all, as often as rows are needed."""
    generator = np.random.default_rng(0)
    images = [
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((resolution, resolution))
        for _ in range(4)
    ]
    two = Dataset.from_dict({"prompt": ["one", "two"], "chosen": images[:2], "rejected": images[2:]})
    return two.select([row % 2 for row in range(rows)])


def _tokenizer(length: int) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer", model_max_length=length)


def _clip(kind: type[PreTrainedModel], width: int) -> PreTrainedModel:
    tokenizer = _tokenizer(77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return kind(config)


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=len(_tokenizer(77)), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )


def _vae(channels: int, tiny: bool, **options: Any) -> AutoencoderKL:
    widths = (8, 8) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        norm_num_groups=4 if tiny else 32,
        layers_per_block=1 if tiny else 2,
        latent_channels=channels,
        mid_block_add_attention=not tiny,
        **options,
    )


def stable_diffusion_xl(tiny: bool) -> Model:
    """The UNet of stabilityai/stable-diffusion-xl-base-1.0; `tiny`: of the same kind, for a CPU."""
    width, pooled, time = (48, 16, 8) if tiny else (2048, 1280, 256)
    sizes: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
    }
    if tiny:
        sizes = {
            "sample_size": 8,
            "block_out_channels": (32,),
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "layers_per_block": 1,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
        }

    def make() -> UNet2DConditionModel:
        return UNet2DConditionModel(
            **sizes,
            cross_attention_dim=width,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=time,
            projection_class_embeddings_input_dim=6 * time + pooled,
        )

    def make_others() -> dict[str, Any]:
        return {
            "vae": _vae(4, tiny, scaling_factor=0.13025, force_upcast=True),
            "text_encoder": _clip(CLIPTextModel, width - pooled),
            "text_encoder_2": _clip(CLIPTextModelWithProjection, pooled),
            "tokenizer": _tokenizer(77),
            "tokenizer_2": _tokenizer(77),
            "scheduler": DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
            "add_watermarker": False,
        }

    return Model("SDXL", StableDiffusionXLPipeline, 16 if tiny else 1024, "unet", make, make_others)


def stable_diffusion_3_5_medium(tiny: bool) -> Model:
    """The transformer of stabilityai/stable-diffusion-3.5-medium."""
    width, clips = (64, (32, 16)) if tiny else (4096, (768, 1280))
    channels, layers = (4, 2) if tiny else (16, 24)

    def make() -> SD3Transformer2DModel:
        return SD3Transformer2DModel(
            sample_size=8 if tiny else 128,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=layers,
            attention_head_dim=8 if tiny else 64,
            num_attention_heads=4 if tiny else 24,
            joint_attention_dim=width,
            caption_projection_dim=32 if tiny else 1536,
            pooled_projection_dim=sum(clips),
            pos_embed_max_size=16 if tiny else 384,
            dual_attention_layers=(0,) if tiny else tuple(range(13)),
            qk_norm="rms_norm",
        )

    def make_others() -> dict[str, Any]:
        return {
            "vae": _flow_vae(channels, tiny, scaling_factor=1.5305, shift_factor=0.0609),
            "text_encoder": _clip(CLIPTextModelWithProjection, clips[0]),
            "text_encoder_2": _clip(CLIPTextModelWithProjection, clips[1]),
            "text_encoder_3": _t5(width),
            "tokenizer": _tokenizer(77),
            "tokenizer_2": _tokenizer(77),
            "tokenizer_3": _tokenizer(256),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        }

    resolution = 16 if tiny else 1024
    return Model("SD 3.5-medium", StableDiffusion3Pipeline, resolution, "transformer", make, make_others)


def flux_dev(tiny: bool) -> Model:
    """The transformer of black-forest-labs/FLUX.1-dev."""
    width, pooled, channels = (32, 32, 4) if tiny else (4096, 768, 16)

    def make() -> FluxTransformer2DModel:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4 * channels,
            num_layers=1 if tiny else 19,
            num_single_layers=1 if tiny else 38,
            attention_head_dim=16 if tiny else 128,
            num_attention_heads=2 if tiny else 24,
            joint_attention_dim=width,
            pooled_projection_dim=pooled,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8) if tiny else (16, 56, 56),
        )

    def make_others() -> dict[str, Any]:
        return {
            "vae": _flow_vae(channels, tiny, scaling_factor=0.3611, shift_factor=0.1159),
            "text_encoder": _clip(CLIPTextModel, pooled),
            "text_encoder_2": _t5(width),
            "tokenizer": _tokenizer(77),
            "tokenizer_2": _tokenizer(512),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        }

    resolution = 16 if tiny else 1024
    return Model("Flux-dev", FluxPipeline, resolution, "transformer", make, make_others, heavy=True)


def _flow_vae(channels: int, tiny: bool, **scale: float) -> AutoencoderKL:
    return _vae(channels, tiny, use_quant_conv=False, use_post_quant_conv=False, **scale)
