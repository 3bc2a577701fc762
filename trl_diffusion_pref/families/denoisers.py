"""Which modules of a pipeline predict: one for all times, or one for each range of times."""

import copy
from collections.abc import Mapping
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


# What `with_denoiser` changes in a family.
CHOICE = ("denoiser_name", "chosen_denoiser")


class NoiseRouter(ModelMixin):
    """Several denoisers as one: each sample goes to the one that the pipeline's sampler calls at the sample's time.

    The denoisers stay the pipeline's own modules, under the names that they have there, and get no gradient from
    samples at other times. It is called like each of them, with one row per sample in every tensor.

    Args:
        denoisers: By the pipeline's attribute, of one architecture.
        starts: By the same names, the `timestep` from which on each is called; one starts at 0.
    """

    # Of the denoisers inside, each of which says it once more.
    _supports_gradient_checkpointing = True

    def __init__(self, denoisers: Mapping[str, ModelMixin], starts: Mapping[str, float]) -> None:
        super().__init__()
        self.names = tuple(sorted(denoisers, key=lambda name: starts[name]))
        self.starts = tuple(starts[name] for name in self.names)
        for name in self.names:
            setattr(self, name, denoisers[name])
        own = [getattr(denoiser, "hf_quantizer", None) for denoiser in denoisers.values()]
        self.hf_quantizer = next((quantizer for quantizer in own if quantizer is not None), None)
        for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            # PEFT asks for them.
            setattr(self, name, any(getattr(denoiser, name, False) for denoiser in denoisers.values()))
        self._supports_gradient_checkpointing = all(
            getattr(denoiser, "_supports_gradient_checkpointing", True) for denoiser in denoisers.values()
        )

    def parts(self) -> dict[str, ModelMixin]:
        """The denoisers by their names, the one of the clearest samples first."""
        return {name: getattr(self, name) for name in self.names}

    @property
    def config(self) -> Any:
        """Of the first: they have one architecture."""
        return getattr(self, self.names[0]).config

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapters by name, which must be the same in all: one adapter is trained in all of them.

        Raises:
            AttributeError: None has any.
            ValueError: They have different ones.
        """
        found = {name: vars(part).get("peft_config") or {} for name, part in self.parts().items()}
        first, *others = [{key: config.to_dict() for key, config in own.items()} for own in found.values()]
        if any(other != first for other in others):
            described = "; ".join(f"{name}: {', '.join(own) or 'none'}" for name, own in found.items())
            raise ValueError(
                f"The denoisers carry different adapters ({described}). Train one at a time, with "
                f"denoiser={self.names[0]!r} or {self.names[-1]!r}, or load adapters of one name and configuration."
            )
        if not first:
            raise AttributeError("peft_config")
        return vars(getattr(self, self.names[0]))["peft_config"]

    @peft_config.setter
    def peft_config(self, config: dict[str, Any]) -> None:
        for part in self.parts().values():
            vars(part)["peft_config"] = config

    @peft_config.deleter
    def peft_config(self) -> None:
        for part in self.parts().values():
            vars(part).pop("peft_config", None)

    def forward(self, *, timestep: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """The denoisers' outputs, in the order of the samples.

        Args:
            timestep: `(B,)`.
            inputs: Further arguments of the denoisers; tensors have a row per sample.
        """
        outputs: list[tuple[Tensor, ...]] = []
        places = self._places(timestep)
        for part, rows in zip(self.parts().values(), places, strict=True):
            if len(rows):
                own = {name: value[rows] if isinstance(value, Tensor) else value for name, value in inputs.items()}
                outputs.append(part(timestep=timestep[rows], **own))
        order = torch.cat(places).argsort()
        return tuple(torch.cat(tensors)[order] for tensors in zip(*outputs, strict=True))

    def _places(self, timestep: Tensor) -> list[Tensor]:
        """For each denoiser the numbers of its samples."""
        count = len(timestep)
        if isinstance(timestep, FakeTensor):
            # The memory estimate has no values: every denoiser gets samples, since each may.
            return list(torch.arange(count, device=timestep.device).tensor_split(len(self.names)))
        number = torch.stack([timestep >= start for start in self.starts]).sum(dim=0) - 1
        return [(number == place).nonzero()[:, 0] for place in range(len(self.names))]


def parts_of(denoiser: nn.Module, name: str) -> dict[str, ModelMixin]:
    """The denoisers within what is trained, by the pipeline's attribute; `name` is that of a single one."""
    return denoiser.parts() if isinstance(denoiser, NoiseRouter) else {name: denoiser}


class Denoisers:
    """The part of `Family` about which modules predict.

    Attributes:
        denoiser_names: The pipeline's attributes that predict, where there are several; see `time_ranges`.
        chosen_denoiser: The only one of them to train, see `with_denoiser`; None for all.
        batch_second: Names of the denoiser's arguments whose second dimension is the batch.
    """

    pipeline_class: str
    denoiser_name: str
    lora_target_modules: tuple[str, ...]
    denoiser_names: tuple[str, ...] = ()
    chosen_denoiser: str | None = None
    batch_second: tuple[str, ...] = ()

    def with_denoiser(self, name: str | None) -> Self:
        """This family for the training of one of several denoisers, which is then its `denoiser_name`.

        Args:
            name: The pipeline's attribute; None for all.

        Raises:
            ValueError: The pipeline has none of this name.
        """
        names = self.denoiser_names or (self.denoiser_name,)
        if name is None:
            return self
        if name not in names:
            known = " and ".join(names)
            raise ValueError(f"denoiser={name!r}: a {self.pipeline_class} has {known}. Take one of them.")
        family = copy.copy(self)
        family.denoiser_name = family.chosen_denoiser = name
        return family

    @property
    def idle_denoisers(self) -> tuple[str, ...]:
        """The pipeline's attributes that sampling needs and training does not."""
        return tuple(name for name in self.denoiser_names if self.chosen_denoiser not in (None, name))

    def time_ranges(self, pipeline: DiffusionPipeline) -> dict[str, tuple[float, float]]:
        """When the sampler calls which denoiser: (from, to), as shares of the noisiest time, by attribute.

        Default: the only one always.
        """
        return {self.denoiser_name: (0.0, 1.0)}

    def trained_ranges(self, pipeline: DiffusionPipeline) -> dict[str, tuple[float, float]]:
        """`time_ranges` of the denoisers that are trained.

        Raises:
            ValueError: The sampler never calls the chosen one, or one was not loaded.
        """
        ranges, kind = self.time_ranges(pipeline), type(pipeline).__name__
        if self.chosen_denoiser is not None:
            if self.chosen_denoiser not in ranges:
                raise ValueError(
                    f"denoiser={self.chosen_denoiser!r}: this {kind} samples with {' and '.join(ranges)} alone, as "
                    "its config says, so training another one would change nothing. Leave the option out."
                )
            ranges = {self.chosen_denoiser: ranges[self.chosen_denoiser]}
        absent = [name for name in ranges if getattr(pipeline, name, None) is None]
        if absent:
            there = [name for name in ranges if name not in absent]
            advice = f", or train the other one alone (denoiser={there[0]!r})" if there else ""
            raise ValueError(
                f"This {kind} was loaded without {' and '.join(absent)}, which its sampler calls. Load it too{advice}."
            )
        return ranges

    def trained_times(self, pipeline: DiffusionPipeline) -> tuple[float, float]:
        """(from, to) of all times at which a trained denoiser is called, as shares of the noisiest."""
        firsts, lasts = zip(*self.trained_ranges(pipeline).values(), strict=True)
        return min(firsts), max(lasts)

    def denoiser(self, pipeline: DiffusionPipeline) -> ModelMixin:
        """The module that is trained: a `NoiseRouter` where several denoisers are."""
        ranges = self.trained_ranges(pipeline)
        parts = {name: getattr(pipeline, name) for name in ranges}
        if len(parts) == 1:
            return next(iter(parts.values()))
        noisiest = pipeline.scheduler.config.num_train_timesteps
        return NoiseRouter(parts, {name: first * noisiest for name, (first, _) in ranges.items()})

    def lora_targets(self, denoiser: nn.Module) -> list[str]:
        """The layers of a denoiser that a LoRA is for where the user names none. Default: `lora_target_modules`."""
        return list(self.lora_target_modules)

    def lora_arguments(self) -> dict[str, Any]:
        """What the pipeline's `load_lora_weights` takes, beside the folder, to load the LoRA of this denoiser.

        Default: nothing.
        """
        return {}

    def own_file(self, name: str) -> str:
        """The name of a file about a denoiser's LoRA: `name`, for a second denoiser with its attribute at the end."""
        if self.denoiser_name == (self.denoiser_names or (self.denoiser_name,))[0]:
            return name
        stem, dot, suffix = name.rpartition(".")
        return f"{stem}_{self.denoiser_name}{dot}{suffix}"
