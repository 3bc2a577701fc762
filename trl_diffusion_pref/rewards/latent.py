"""A reward of noisy latents: a small head on what the first blocks of the denoiser make of them."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import load_file
from torch import Tensor, nn

from ..export.files import save_tensors, write_whole
from ..families import family_for
from ..families.denoisers import NoiseRouter
from ..families.features import blocks_of, first_features
from ..fingerprint import rounded_fingerprints
from ..guidance.adapters import without_adapters
from ..guidance.noisy_inputs import NoisyInputs


WEIGHTS, SETTINGS = "latent_reward.safetensors", "latent_reward.json"
_FORMAT = 1
# Frequencies of the sines and cosines by which the head knows the time.
_FREQUENCIES = 8


class RewardHead(nn.Module):
    """From the streams of a block to scores: each token is rated, the ratings of a stream are averaged.

    Args:
        widths: Of the streams' features.
        objectives: How many scores each sample gets.
        hidden: Width of the layers in between.
    """

    def __init__(self, widths: Sequence[int], objectives: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for width in widths)
        self.inputs = nn.ModuleList(nn.Linear(width, hidden) for width in widths)
        self.time = nn.Linear(2 * _FREQUENCIES, hidden)
        self.token = nn.ModuleList(nn.Linear(hidden, hidden) for _ in widths)
        self.output = nn.Linear(hidden * len(widths), objectives)

    def forward(self, streams: Sequence[Tensor], time: Tensor) -> Tensor:
        """Scores `(B, objectives)` float32.

        Args:
            streams: `(B, tokens, width)` each, from `first_features`.
            time: `(B,)` in [0, 1], the noisiest 1.
        """
        angles = math.pi * time.float()[:, None] * torch.arange(_FREQUENCIES, device=time.device)
        embedded = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[:, None]
        pooled = []
        for stream, norm, first, second in zip(streams, self.norms, self.inputs, self.token, strict=True):
            hidden = nn.functional.silu(first(norm(stream.float())) + embedded)
            pooled.append(nn.functional.silu(second(hidden)).mean(dim=1))
        return self.output(torch.cat(pooled, dim=1))


class LatentReward:
    """A reward of noisy latents, as [`guidance.reward_guidance`] takes it; made by [`train_latent_reward`].

    The head alone has weights of its own. The features are those of the denoiser with which it was trained: by default
    the guided pipeline's, without its adapters.

    Args:
        head: On the features.
        settings: What the features are of, see `train_latent_reward`; JSON.
        denoiser: Computes the features in the guided pipeline's place, for pipelines whose denoiser was tuned after
            the reward was trained: the one with which it was trained.

    Attributes:
        objectives: Names of what it rates.
    """

    def __init__(self, head: RewardHead, settings: Mapping[str, Any], denoiser: ModelMixin | None = None) -> None:
        self.head, self.settings, self.denoiser = head.eval().requires_grad_(False), dict(settings), denoiser
        self.objectives: tuple[str, ...] = tuple(settings["objectives"])
        if denoiser is not None:
            self._check_denoiser(denoiser, "denoiser")

    def __repr__(self) -> str:
        return (
            f"LatentReward({', '.join(self.objectives)}; {self.settings['blocks']} blocks of a "
            f"{self.settings['denoiser']})"
        )

    def __call__(self, inputs: NoisyInputs) -> dict[str, Tensor]:
        """Scores of noisy samples, `(B,)` float32 by objective, higher is better.

        Raises:
            ValueError: The latents have another size than those that it was trained on.
        """
        sizes = {math.prod(shape) for shape in self.settings["latent_shapes"]}
        if (own := inputs.x_t[0].numel()) not in sizes:
            shapes = ", ".join(str(tuple(shape)) for shape in self.settings["latent_shapes"])
            raise ValueError(
                f"The latent reward was trained on latents of the shape {shapes}, and these have {own} values a "
                f"sample (shape {tuple(inputs.x_t.shape[1:])}). Generate samples of that size, or train a reward on "
                "pairs of this one."
            )
        return self.rate(self.streams(self.denoiser or inputs.denoiser, inputs.run), inputs.time)

    def streams(self, denoiser: ModelMixin, run: Callable[[ModelMixin], object]) -> list[Tensor]:
        """What the head rates of one call: the features of the denoiser's first blocks, see `first_features`.

        Args:
            run: Calls the denoiser on the noisy samples.
        """
        with without_adapters(denoiser):
            return first_features(denoiser, self.settings["blocks"], lambda: run(denoiser))

    def rate(self, streams: Sequence[Tensor], time: Tensor) -> dict[str, Tensor]:
        """Scores `(B,)` float32 by objective.

        Args:
            time: `(B,)` in [0, 1], as a share of the noisiest time.
        """
        scores = self.head.to(streams[0].device)(streams, time.to(streams[0].device))
        return dict(zip(self.objectives, scores.unbind(dim=1), strict=True))

    def check(self, pipeline: DiffusionPipeline) -> None:
        """Raises where a pipeline is not one that the reward is for.

        Raises:
            ValueError: Another family, noise process or denoiser.
        """
        family = family_for(pipeline)
        if family.pipeline_class != self.settings["pipeline"]:
            raise ValueError(
                f"The latent reward was trained for a {self.settings['pipeline']}, and this is a "
                f"{type(pipeline).__name__}. Train one with this pipeline."
            )
        if self.denoiser is None:
            self._check_denoiser(family.denoiser(pipeline), f"the pipeline's {family.denoiser_name}")

    def _check_denoiser(self, denoiser: ModelMixin, name: str) -> None:
        # The same weights in another precision agree in one of the two.
        own, trained = rounded_fingerprints(denoiser), self.settings["denoiser_fingerprint"]
        if all(own[precision] != value for precision, value in trained.items()):
            raise ValueError(
                f"The latent reward was trained on features of a {self.settings['denoiser']} whose weights differ "
                f"from those of {name}. If the pipeline was tuned since, pass the denoiser that it was tuned from: "
                "LatentReward.load(folder, denoiser=base.unet) or base.transformer; else train a reward with this one."
            )

    def record(self) -> dict[str, Any]:
        """What tells it from other rewards, as JSON can hold it."""
        return {**self.settings, "head": rounded_fingerprints(self.head)}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `latent_reward.safetensors` and `latent_reward.json`, which `load` reads."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in self.head.state_dict().items()}
        save_tensors(tensors, Path(folder) / WEIGHTS)
        # Last, so that a folder with it is whole.
        write_whole(Path(folder) / SETTINGS, json.dumps(self.settings, indent=2).encode() + b"\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], denoiser: ModelMixin | None = None) -> "LatentReward":
        """Reads what `save` wrote.

        Args:
            denoiser: See the class.

        Raises:
            ValueError: There is no latent reward in the folder, one of a later version, or the denoiser is not the one
                that it was trained with.
        """
        file = Path(folder) / SETTINGS
        if not file.is_file():
            raise ValueError(f"{folder} holds no {SETTINGS}, so there is no latent reward to load.")
        settings = json.loads(file.read_text())
        if settings.get("format") != _FORMAT:
            raise ValueError(
                f"{file} has the format {settings.get('format')}, and this version reads {_FORMAT}. Install the "
                "version of the package that wrote it."
            )
        head = RewardHead(settings["widths"], len(settings["objectives"]), settings["hidden"])
        head.load_state_dict(load_file(Path(folder) / WEIGHTS))
        return cls(head, settings, denoiser)


def new_settings(
    pipeline: DiffusionPipeline, objectives: Sequence[str], blocks: int | None, hidden: int
) -> dict[str, Any]:
    """The settings of a reward that is to be trained with a pipeline, but for what its data say.

    Args:
        blocks: How many of the denoiser's blocks; None for a third of them, rounded up.

    Raises:
        ValueError: The denoiser has fewer blocks, or the pipeline several denoisers.
        TypeError: The pipeline is not supported, or no blocks are known in its denoiser.
    """
    family = family_for(pipeline)
    denoiser = family.denoiser(pipeline)
    if isinstance(denoiser, NoiseRouter):
        raise ValueError(
            f"This {type(pipeline).__name__} has {' and '.join(denoiser.names)}, each for a range of times, and a "
            "latent reward reads the features of one denoiser at all times. Write a reward function for it."
        )
    count = len(blocks_of(denoiser))
    blocks = -(-count // 3) if blocks is None else blocks
    if not 1 <= blocks <= count:
        raise ValueError(f"blocks={blocks}: the {type(denoiser).__name__} has 1 to {count} of them.")
    return {
        "format": _FORMAT,
        "pipeline": family.pipeline_class,
        "denoiser": type(denoiser).__name__,
        "denoiser_fingerprint": rounded_fingerprints(denoiser),
        "objectives": list(objectives),
        "blocks": blocks,
        "hidden": hidden,
    }
