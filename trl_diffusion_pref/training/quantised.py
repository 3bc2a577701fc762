"""A quantised denoiser under a LoRA: how it is loaded, what it cannot do, and how it computes on a CPU."""

import os
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from diffusers import BitsAndBytesConfig, DiffusionPipeline, ModelMixin, PipelineQuantizationConfig
from diffusers.quantizers import DiffusersAutoQuantizer
from torch import nn

from ..families import Family
from ..fingerprint import is_quantised
from .config import DiffusionPreferenceConfig


def bitsandbytes_config(args: DiffusionPreferenceConfig) -> BitsAndBytesConfig:
    """What `args.quantize` stands for; 4-bit layers compute in the dtype of mixed precision."""
    if args.quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def check_quantize(model: str | os.PathLike | DiffusionPipeline, args: DiffusionPreferenceConfig, lora: bool) -> None:
    """Raises where `args.quantize` cannot be followed.

    Args:
        lora: Whether a LoRA is trained.

    Raises:
        ValueError: A loaded pipeline, another quantization beside it, or full fine-tuning.
    """
    label = f"quantize={args.quantize!r}"
    if args.quantize is not None and not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"{label} is for a model given by name, but a loaded one was passed. Leave it out; a pipeline that was "
            "loaded with a quantization_config is trained as it is."
        )
    if args.quantize is not None and args.loading.get("quantization_config") is not None:
        raise ValueError(f"{label} and model_init_kwargs' quantization_config both say how to quantise. Set one.")
    if args.quantize is not None and not lora:
        raise ValueError(
            f"{label}: quantised weights have no gradients, so they cannot be fine-tuned. Train a LoRA with "
            "peft_config=LoraConfig(...), or leave the option out."
        )


def loading_options(
    model: str | os.PathLike | DiffusionPipeline, args: DiffusionPreferenceConfig, family: Family, *, lora: bool = True
) -> dict[str, Any]:
    """`args.loading`, with what `args.quantize` asks for: the trained denoisers quantised, all else as it is.

    Args:
        lora: Whether a LoRA is trained.

    Raises:
        ValueError: See `check_quantize`; or bitsandbytes cannot quantise on this machine.
    """
    check_quantize(model, args, lora)
    if args.quantize is None:
        return args.loading
    config = bitsandbytes_config(args)
    try:
        DiffusersAutoQuantizer.from_config(config).validate_environment(torch_dtype=None, device_map=None)
    except (ImportError, RuntimeError) as error:
        raise ValueError(
            f"quantize={args.quantize!r}: weights cannot be quantised here ({error}). Leave the option out, or train "
            "on a GPU."
        ) from error
    names = [family.chosen_denoiser] if family.chosen_denoiser else family.denoiser_names or [family.denoiser_name]
    by_part = PipelineQuantizationConfig(quant_mapping=dict.fromkeys(names, config))
    return {**args.loading, "quantization_config": by_part}


def check_quantised(
    base: ModelMixin, family: Family, args: DiffusionPreferenceConfig, *, lora: bool, device_type: str | None = None
) -> None:
    """Raises for what a quantised denoiser cannot do, most of which fails deep inside other libraries.

    Args:
        device_type: That is trained on; None for the config's.

    Raises:
        ValueError: Full fine-tuning, a kind of quantization without gradients, or 4 bit in bfloat16 on a CPU.
    """
    if not is_quantised(base):
        return
    if not lora:
        raise ValueError(
            f"The {family.denoiser_name} is quantised, and quantised weights have no gradients, so they cannot be "
            "fine-tuned. Train a LoRA with peft_config=LoraConfig(...), or load the pipeline without quantization."
        )
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"The {family.denoiser_name} is quantised by {getattr(method, 'value', method)}, through which diffusers "
            "computes no gradients. Load it with bitsandbytes, for example by quantize='nf4'."
        )
    four_bit = any(type(parameter).__name__ == "Params4bit" for parameter in base.parameters())
    if four_bit and args.bf16 and (device_type or args.device.type) == "cpu":
        raise ValueError(
            "4-bit weights cannot be trained through with bf16=True on a CPU: bitsandbytes' CPU kernels compute them "
            "in float32. Set bf16=False."
        )


def check_reference(base: nn.Module, *, precomputed: bool, moved: bool) -> None:
    """Raises where a quantised denoiser does not give the reference that a run asks for.

    Args:
        precomputed: Whether the reference's errors are computed before training, in other batches.
        moved: Whether all weights of a copy are moved towards the trained ones.

    Raises:
        ValueError: 8-bit layers whose results depend on the batch, or weights that cannot be moved.
    """
    if moved and is_quantised(base):
        raise ValueError(
            "sync_ref_model moves the weights of reference='copy', and quantised ones cannot be moved. Use "
            "reference='frozen_adapter', which is a copy of the LoRA alone."
        )
    states = [layer.state for layer in base.modules() if isinstance(layer, Linear8bitLt)]
    if precomputed and any(state.threshold > 0 for state in states):
        raise ValueError(
            "reference='precomputed' does not suit these 8-bit weights: bitsandbytes chooses for each batch which "
            "columns it computes in half precision, so that the same row has other errors in another batch. Use "
            "reference='adapter_off', which costs no memory, or load with llm_int8_threshold=0.0, or in 4 bit."
        )


def prepare_layers(base: nn.Module) -> None:
    """Has bitsandbytes' layers compute as torch's do under autocast, and in evaluation as in training.

    Under autocast a linear layer's result is in half precision. One of bitsandbytes' gives back its input's dtype,
    which after a norm is float32, so that activations would take twice the memory.

    On a CPU, `eval()` has 8-bit layers round their inputs, so that a reference would differ from the model at its
    start; and with AVX-512 for bfloat16 it has 4-bit layers pack their weights anew, after which no gradient passes.
    """
    for layer in base.modules():
        if (
            not isinstance(layer, (Linear4bit, Linear8bitLt))
            or _in_autocast_dtype in layer._forward_pre_hooks.values()
        ):
            continue
        layer.register_forward_pre_hook(_in_autocast_dtype)
        if isinstance(layer, Linear4bit):
            vars(layer)["support_avx512bf16_for_cpu"] = False
        else:
            layer.register_forward_pre_hook(_as_in_training)


def _in_autocast_dtype(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    x, *others = inputs
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return x.to(torch.get_autocast_dtype(x.device.type)), *others


def _as_in_training(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
    layer.training = True
