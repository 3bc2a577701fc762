"""Pipelines with quantised denoisers on a CPU, where bitsandbytes computes and diffusers does not load them."""

from pathlib import Path

import pytest
import torch
from diffusers import BitsAndBytesConfig, DiffusionPipeline, PipelineQuantizationConfig
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from torch import nn

from trl_diffusion_pref.memory.quantised import quantised_layers, scales_of
from trl_diffusion_pref.training.quantised import prepare_layers


CONFIGS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
    "int8, alike": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def load_on_cpu(patch: pytest.MonkeyPatch) -> None:
    """Lets diffusers quantise without a GPU."""
    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        patch.setattr(kind, "validate_environment", lambda self, **options: None)
        patch.setattr(kind, "update_device_map", lambda self, device_map: device_map or {"": "cpu"})


def load_quantised(folder: Path, name: str, part: str = "unet") -> DiffusionPipeline:
    """A saved pipeline with one of `CONFIGS`, within `load_on_cpu`."""
    by_part = PipelineQuantizationConfig(quant_mapping={part: BitsAndBytesConfig(**CONFIGS[name])})
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, quantization_config=by_part)
    pipeline.set_progress_bar_config(disable=True)
    prepare_layers(getattr(pipeline, part))
    return pipeline


def stored_bytes(denoiser: nn.Module) -> int:
    """Of weights, buffers and what belongs to quantised weights."""
    tensors = [*denoiser.parameters(), *denoiser.buffers()]
    tensors += [tensor for layer in quantised_layers(denoiser) for tensor in scales_of(layer)]
    return sum(tensor.nbytes for tensor in tensors)
