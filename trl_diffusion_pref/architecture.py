"""A denoiser's own parameters, and whether two denoisers have the same."""

from torch import Tensor, nn


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
