"""The authors' values on small tensors, and the tensors."""

import json
from pathlib import Path

import torch


VECTORS = json.loads((Path(__file__).parents[1] / "reference" / "loss_vectors.json").read_text())["sets"]


def set_a() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1234)
    noise, e_model, _ = torch.randn(2, 4, 2, 2), torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    target = noise.repeat(2, 1, 1, 1)
    return target + 0.3 * e_model, target


def set_c() -> tuple[torch.Tensor, torch.Tensor]:
    i, k = torch.arange(32), torch.arange(64)
    noise = torch.sin(0.7 * i).reshape(2, 4, 2, 2)
    target = noise.repeat(2, 1, 1, 1)
    chosen = 0.3 * torch.cos(0.3 * i + 0.5)
    rejected = 0.8 * chosen + 0.15 * torch.sin(0.9 * i)
    reference = target + torch.cat([chosen, rejected]).reshape(4, 4, 2, 2)
    return reference + 0.004 * torch.sin(1.1 * k + 0.3).reshape(4, 4, 2, 2), target
