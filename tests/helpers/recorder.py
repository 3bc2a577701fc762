"""Records how a denoiser is called."""

import inspect

import torch
from torch import Tensor, nn


PROMPTS = ["a red circle", "a blue ring on a green ground, far away"]


def stacked(samples: Tensor | list[Tensor]) -> Tensor:
    """What a denoiser takes or returns, also where that is a list with one tensor per sample."""
    return torch.stack(samples) if isinstance(samples, list) else samples


def noisy_latents(call: dict) -> Tensor:
    """Of a recorded call."""
    names = [name for name in ("sample", "hidden_states") if name in call]
    return call[names[0]] if names else stacked([value for name, value in call.items() if name.startswith("x.")])


class Recorder:
    """Keeps each call of a module: its arguments, as they were and by name, and its output."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[dict] = []
        self.raw: list[tuple[tuple, dict]] = []
        self.outputs: list[Tensor] = []
        self._signature = inspect.signature(module.forward)
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(lambda module, args, output: self.outputs.append(output[0]))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.raw.append((args, kwargs))
        self.calls.append(self.named(args, kwargs))

    def named(self, args: tuple, kwargs: dict) -> dict:
        """A call's arguments by name."""
        arguments = self._signature.bind(*args, **kwargs).arguments
        # Dictionaries, lists and tuples are compared entry by entry; an empty one says as much as None.
        for name, value in list(arguments.items()):
            if isinstance(value, dict):
                arguments |= {f"{name}.{key}": entry for key, entry in arguments.pop(name).items()}
            elif isinstance(value, (list, tuple)):
                arguments |= {f"{name}.{key}": entry for key, entry in enumerate(arguments.pop(name))}
        arguments.pop("return_dict", None)
        return {name: value for name, value in arguments.items() if value is not None}
