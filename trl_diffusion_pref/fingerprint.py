"""Short fingerprints of weights: enough to tell two models apart, cheap enough for 20B parameters."""

import hashlib
import json

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
    digests = {str(dtype): hashlib.sha256() for dtype in (torch.float16, torch.bfloat16)}
    for name, tensor in sorted(own_weights(module).items()):
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
    return {
        name.replace(".base_layer", ""): tensor for name, tensor in module.state_dict().items() if ".lora_" not in name
    }


def different_parameters(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of parameters that only one has, or that have other shapes; empty for the same architecture."""
    shapes, others = (
        {name: tuple(tensor.shape) for name, tensor in own_weights(module).items()} for module in (one, other)
    )
    return sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
