"""A small Stable Diffusion pipeline, image data sets, and comparisons of weights."""

import io

import torch
from datasets import Dataset, Features, Image, Value
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image as PILImage
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from trl_diffusion_pref.shapes import pipeline_folder


RESOLUTION = 16


def build_tiny_pipeline(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion's classes with random weights: 16x16 images, 8x8 latents."""
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(pipeline_folder() / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        scaling_factor=0.7,
    )
    unet = UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def png(image: PILImage.Image) -> dict:
    """An image cell as `datasets.Image` stores it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def image_pairs(rows: list[tuple]) -> Dataset:
    """A data set from (prompt, chosen cell, rejected cell) rows."""
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows, strict=True)), strict=True))
    return Dataset.from_dict(
        columns, features=Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    )


def weights_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a module's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_equal_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, f"{len(different)} of {len(left)} tensors differ, first {different[0]}"
