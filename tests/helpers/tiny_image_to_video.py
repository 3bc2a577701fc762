"""Pipelines that animate an image, with random weights: those that generate from text, with wider inputs."""

from types import SimpleNamespace

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from trl_diffusion_pref.families import wan_image_to_video as wan_image_to_video_family


try:
    from transformers import CLIPImageProcessorPil
except ImportError:
    # Its name before there was one that needs torchvision.
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


if not hasattr(pipeline_wan_i2v, "ftfy"):
    # The package that diffusers cleans prompts with, without asking whether it is there.
    pipeline_wan_i2v.ftfy = SimpleNamespace(fix_text=str)
    wan_image_to_video_family.is_ftfy_available = lambda: True


def wan_image_to_video(wan: WanPipeline, *, sees_images: bool) -> WanImageToVideoPipeline:
    """Wan 2.1's, whose transformer also reads CLIP's states of the image, or Wan 2.2's, which does not."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    options = {"image_dim": 16, "added_kv_proj_dim": 24} if sees_images else {}
    transformer = WanTransformer3DModel(**{**wan.transformer.config, "in_channels": 36, **options})
    size = {"height": 28, "width": 28}
    return WanImageToVideoPipeline(
        **{**wan.components, "transformer": transformer, "transformer_2": None},
        image_encoder=CLIPVisionModel(vision) if sees_images else None,
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size) if sees_images else None,
    )


def without_deviation(vae: AutoencoderKLCogVideoX) -> None:
    """The sampler draws from the image's posterior, and training takes its mean: the same where it has no width."""
    out = vae.encoder.conv_out.conv
    with torch.no_grad():
        out.weight[len(out.weight) // 2 :] = 0
        out.bias[len(out.bias) // 2 :] = -30


def cogvideox_image_to_video(cogvideox: CogVideoXPipeline) -> CogVideoXImageToVideoPipeline:
    """With `patch_size_t`, what CogVideoX 1.5 changed."""
    config = {**cogvideox.transformer.config}
    of_1_5 = config["patch_size_t"] is not None
    config |= {"in_channels": 8, "ofs_embed_dim": 4 if of_1_5 else None}
    without_deviation(cogvideox.vae)
    cogvideox.vae.register_to_config(invert_scale_latents=of_1_5)
    return CogVideoXImageToVideoPipeline(
        **{**cogvideox.components, "transformer": CogVideoXTransformer3DModel(**config)}
    )


def noisy_channels(channels: int, dim: int):
    """Takes the noisy latents from what the transformer gets, in which the image's stand beside them."""

    def unpack(pipeline: WanImageToVideoPipeline | CogVideoXImageToVideoPipeline, latents: Tensor) -> Tensor:
        noisy = latents.narrow(dim, 0, channels)
        return noisy if dim == 1 else noisy.transpose(1, 2)

    return unpack
