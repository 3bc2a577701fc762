"""Short fingerprints of weights: enough to tell two models apart, cheap enough for 20B parameters."""

import hashlib
import json

import torch
from torch import nn


_VALUES_PER_TENSOR = 64


def weights_fingerprint(module: nn.Module) -> str:
    """Hexadecimal fingerprint of a module's configuration and state.

    Reads every name, shape and dtype and 64 evenly spaced values of each tensor, not all values: fine-tuning touches
    nearly all of them, so a different checkpoint is told apart, at a cost that does not grow with the model.
    """
    digest = hashlib.sha256()
    config = getattr(module, "config", None)
    if config is not None:
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        # Where the weights came from does not change what they compute.
        described = {key: value for key, value in values.items() if not key.startswith("_")}
        digest.update(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        if flat.numel():
            picks = torch.linspace(0, flat.numel() - 1, min(flat.numel(), _VALUES_PER_TENSOR), dtype=torch.float64)
            digest.update(flat[picks.long().to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
