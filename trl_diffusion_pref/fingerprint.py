"""Short fingerprints of weights: enough to tell two models apart, cheap enough for 20B parameters."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


_VALUES_PER_TENSOR = 64
# What transformers writes into configs that changes no result; tensors say their dtypes themselves.
_NOT_COMPUTED_WITH = ("transformers_version", "architectures", "dtype", "torch_dtype")


def weights_fingerprint(module: nn.Module) -> str:
    """Hexadecimal fingerprint of a module's configuration and state.

    Reads every name, shape and dtype and 64 evenly spaced values of each tensor, not all values: fine-tuning touches
    nearly all of them, so a different checkpoint is recognised, at a cost that does not grow with the model.
    """
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    if config is not None:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # Where the weights came from does not change what they compute.
        described = {
            key: value for key, value in values.items() if not (key.startswith("_") or key in _NOT_COMPUTED_WITH)
        }
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_picked(tensor).cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]


def rounded_fingerprints(module: nn.Module) -> dict[str, str]:
    """Fingerprints of a denoiser's own values, without adapters, after rounding to each half precision, by its name.

    Loading the same weights in another precision keeps one of them: that of the lower precision.
    """
    return _rounded(own_weights(module))


def fingerprints(module: nn.Module) -> dict[str, Any]:
    """What a run's record says of the weights that it starts from, for `has_weights_of`."""
    return {
        "base_fingerprint": weights_fingerprint(module),
        "base_fingerprint_rounded": rounded_fingerprints(module),
        # Of biases and scales of norms, which quantization leaves as they are.
        "base_fingerprint_vectors": _rounded(_vectors(module)),
        "base_quantised": is_quantised(module),
    }


def has_weights_of(module: nn.Module, record: Mapping[str, Any]) -> bool:
    """Whether a denoiser has the weights of a run's base, in whatever precision.

    Where one of the two is quantised, its matrices have other values, and only biases and norms are compared.

    Args:
        record: With `base_fingerprint_rounded`; what `fingerprints` has beside it may be missing.
    """
    # The same weights in another precision agree in one of the two.
    if _agree(rounded_fingerprints(module), record["base_fingerprint_rounded"]):
        return True
    one_is_quantised = record.get("base_quantised", False) or is_quantised(module)
    return one_is_quantised and _agree(_rounded(_vectors(module)), record.get("base_fingerprint_vectors", {}))


def _agree(own: dict[str, str], stored: Mapping[str, str]) -> bool:
    return any(own[precision] == value for precision, value in stored.items())


def is_quantised(module: nn.Module) -> bool:
    """Whether any of a module's weights are quantised, by diffusers or by layers of bitsandbytes."""
    by_diffusers = any(getattr(part, "hf_quantizer", None) is not None for part in module.modules())
    return by_diffusers or any(type(each).__name__ in ("Params4bit", "Int8Params") for each in module.parameters())


def _vectors(module: nn.Module) -> dict[str, Tensor]:
    """A denoiser's own parameters with one dimension, by the names that they have without adapters."""
    return _without_adapters((name, each) for name, each in module.named_parameters() if each.ndim == 1)


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    digests = {str(dtype): hashlib.sha256() for dtype in (torch.float16, torch.bfloat16)}
    for name, tensor in sorted(tensors.items()):
        picked = _picked(tensor)
        for dtype, digest in zip((torch.float16, torch.bfloat16), digests.values(), strict=True):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(picked.to(dtype).cpu().double().numpy().tobytes())
    return {name.removeprefix("torch."): digest.hexdigest()[:16] for name, digest in digests.items()}


def _picked(tensor: Tensor) -> Tensor:
    """Up to `_VALUES_PER_TENSOR` evenly spaced values of a tensor."""
    flat = tensor.detach().reshape(-1)
    count = min(flat.numel(), _VALUES_PER_TENSOR)
    # float64, because the last index of a large tensor is no float32 number
    picks = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64)
    return flat[picks.long().to(flat.device)]


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """A denoiser's own parameters and buffers, by the names that they have without adapters."""
    return _without_adapters(module.state_dict().items())


def _without_adapters(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name.replace(".base_layer", ""): tensor for name, tensor in named if ".lora_" not in name}


def different_parameters(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of parameters that only one has, or that have other shapes; empty for the same architecture.

    Quantised weights have the shapes that they had before.
    """
    shapes, others = _shapes(one), _shapes(other)
    return sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what a denoiser's state holds, without adapters and what belongs to quantised weights."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    saved = module.state_dict().keys()
    tensors = _without_adapters((name, tensor) for name, tensor in named if name in saved)
    return {
        name: tuple(getattr(getattr(tensor, "quant_state", None), "shape", tensor.shape))
        for name, tensor in tensors.items()
    }
