"""Whether two denoisers have the same parameters."""

from torch import nn


def base_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a denoiser's own parameters and buffers by name, whatever adapters are in it."""
    return {
        name.replace(".base_layer", ""): tuple(tensor.shape)
        for name, tensor in module.state_dict().items()
        if ".lora_" not in name
    }


def different_parameters(one: nn.Module, other: nn.Module) -> list[str]:
    """Names of parameters that only one has, or that have other shapes; empty for the same architecture."""
    shapes, others = base_shapes(one), base_shapes(other)
    return sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
