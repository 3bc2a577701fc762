"""The parts of a pipeline that encode prompts and samples: on a device while they encode, and out of memory after."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..families import Family
from ..fingerprint import weights_fingerprint


logger = logging.getLogger(__name__)

# Reads the parts of these names once more from where the pipeline came from.
Load = Callable[[Sequence[str]], Mapping[str, nn.Module]]


@contextmanager
def on_device(pipeline: DiffusionPipeline, family: Family, device: torch.device) -> Iterator[None]:
    """Keeps the pipeline's encoders on a device for the duration, then puts them back where they were."""
    with _all_on(family.encoders(pipeline), device):
        yield


@contextmanager
def _all_on(modules: Sequence[ModelMixin], device: torch.device) -> Iterator[None]:
    before = [(module.device, module.training) for module in modules]
    try:
        for module in modules:
            module.to(device).eval()
        yield
    finally:
        for module, (source, training) in zip(modules, before, strict=True):
            module.to(source).train(training)


class Encoders:
    """The encoders of a pipeline, which may leave memory while they are not needed.

    So may denoisers that are not trained. The modules stay in the pipeline, with their configs, so that whoever holds
    them needs not know; only their weights go, and come back from where they were loaded.

    Args:
        load: None for a pipeline whose owner holds it, and whose encoders therefore stay.
        kept: Names of encoders that stay, since the user brought them.
    """

    def __init__(
        self, pipeline: DiffusionPipeline, family: Family, load: Load | None = None, kept: Sequence[str] = ()
    ) -> None:
        self.pipeline, self.family, self.load, self.kept = pipeline, family, load, kept
        self._stay = False
        # By name, while they are out of memory: their fingerprints.
        self._released: dict[str, str] = {}
        self._device: torch.device | None = None

    @property
    def released(self) -> bool:
        """Whether any is out of memory."""
        return bool(self._released)

    def whole_pipeline(self) -> DiffusionPipeline:
        """The pipeline with all of its encoders in memory."""
        self.bring_back()
        return self.pipeline

    def stay_on(self, device: torch.device) -> None:
        """Moves them for good, for data that are encoded as they are read."""
        self.bring_back()
        for encoder in self.family.encoders(self.pipeline):
            encoder.to(device).eval()
        self._device, self._stay = device, True

    def leave_device(self) -> None:
        """Moves them to the CPU, unless they stay."""
        if not self._stay:
            self.move(torch.device("cpu"))

    def move(self, device: torch.device) -> None:
        """Moves them, in evaluation mode; those that are out of memory come back there."""
        self._device = device
        for name, module in self._modules().items():
            if name not in self._released:
                module.to(device).eval()

    def release(self) -> None:
        """Frees the memory of all weights that can be read again, unless they stay."""
        if self.load is None or self._stay:
            return
        for name, module in self._modules().items():
            if name not in self._released and name not in self.kept:
                self._released[name] = weights_fingerprint(module)
                self._device = next(module.parameters()).device
                _free(module)
        gc.collect()

    def bring_back(self) -> None:
        """Reads again what is out of memory.

        Raises:
            ValueError: What is found is not what was there.
        """
        if not self._released:
            return
        assert self.load is not None
        fresh = self.load(list(self._released))
        for name, fingerprint in self._released.items():
            if weights_fingerprint(fresh[name]) != fingerprint:
                raise ValueError(
                    f"The {name} was read again from where the pipeline came from, and it has changed there since the "
                    "run began. Put the old files back, or load the pipeline yourself and pass it as model, which "
                    "keeps its encoders in memory."
                )
        for name in self._released:
            module = self._modules()[name]
            # All that a module is stands in its dictionary; whoever holds the module keeps it.
            vars(module).clear()
            vars(module).update(vars(fresh[name]))
            module.requires_grad_(False).eval()
        self._released.clear()
        if self._device is not None:
            self.move(self._device)

    @contextmanager
    def present(self) -> Iterator[None]:
        """Has them in memory for the duration; what was out of it goes again."""
        were_released = self.released
        self.bring_back()
        try:
            yield
        finally:
            if were_released:
                self.release()

    @contextmanager
    def on_device(self, device: torch.device, *, to_sample: bool = False) -> Iterator[None]:
        """Has them on a device for the duration, then puts them back where they were.

        Args:
            to_sample: Also the denoisers that are not trained.
        """
        with self.present():
            modules = list(self._modules().values()) if to_sample else self.family.encoders(self.pipeline)
            with _all_on(modules, device):
                yield

    def _modules(self) -> dict[str, nn.Module]:
        names = (*self.family.encoder_names, *self.family.idle_denoisers)
        return {name: module for name in names if (module := getattr(self.pipeline, name, None)) is not None}


def _free(module: nn.Module) -> None:
    """Puts tensors without memory in place of all weights. Quantised ones cannot be moved to the meta device."""
    # Both, since the number of an object that is gone may be given again.
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for part in module.modules():
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            if id(tensor) not in replaced:
                empty = torch.empty_like(tensor.data, device="meta")
                if isinstance(tensor, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=False)
                replaced[id(tensor)] = (tensor, empty)
            setattr(part, name, replaced[id(tensor)][1])
