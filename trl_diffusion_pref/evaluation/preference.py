"""Held-out preference accuracy of any pipeline, without a trainer."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data import PAIRS, Batch, DatasetEncoder, EncodingOptions, as_resolution, check_columns, on_device
from ..data.layouts import column_names, with_condition_column
from ..diffusion.noise import noise_process
from ..families import family_for
from .held_out import bootstrap_interval, pair_elbos, wins


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Shares of N held-out pairs, each in [0, 1], ties counted half.

    Args:
        accuracy: Pairs whose chosen image gained more likelihood over the reference than the rejected one (the
            implicit reward of Diffusion-DPO); 0.5 for the reference itself. None without a reference.
        interval: 95 % bootstrap interval of `accuracy`, or of `likelihood_accuracy` without a reference.
        likelihood_accuracy: Pairs whose chosen image is likelier than the rejected one under the model.
        reference_likelihood_accuracy: The same under the reference. None without one.
        count: N.
    """

    accuracy: float | None
    interval: tuple[float, float]
    likelihood_accuracy: float
    reference_likelihood_accuracy: float | None
    count: int


def preference_accuracy(
    pipeline: DiffusionPipeline,
    dataset: Dataset,
    *,
    reference: DiffusionPipeline | None = None,
    draws: int = 8,
    sampling: str = "stratified",
    weighting: str = "simple",
    shared: bool = True,
    seed: int = 0,
    batch_size: int = 8,
    resolution: int | str | tuple[int, int] | None = None,
    num_frames: int | None = None,
    cache_folder: str | Path | None = None,
) -> PreferenceAccuracy:
    """Accuracy of any pipeline on held-out pairs, without a trainer.

    Args:
        pipeline: Evaluated where its denoiser is.
        dataset: Columns `prompt`, `chosen`, `rejected`.
        reference: What the pipeline was trained from; its VAE and text encoders must be the pipeline's.
        draws, sampling, weighting: See `diffusion.elbo.estimate_elbo`.
        shared: Whether both images of a pair get the same noise and times.
        seed: Of noise and times.
        batch_size: Pairs at once.
        resolution: Side length in pixels, of videos the shorter side; or height and width, as "768x1360" or two
            numbers; default what the pipeline generates.
        num_frames: Of videos; default what the pipeline generates.
        cache_folder: Keeps encoded pairs; default a temporary folder.

    Raises:
        ValueError: The data set is missing, empty, lacks columns or has unusable rows; the pipeline lacks a part.
        TypeError: Unsupported pipeline, or a reference of another class.
    """
    with HeldOutPairs(
        pipeline,
        dataset,
        draws=draws,
        sampling=sampling,
        weighting=weighting,
        shared=shared,
        seed=seed,
        batch_size=batch_size,
        resolution=resolution,
        num_frames=num_frames,
        cache_folder=cache_folder,
    ) as pairs:
        if reference is not None and family_for(reference) is not pairs.family:
            raise TypeError(f"reference is a {type(reference).__name__}, the pipeline a {type(pipeline).__name__}.")
        return pairs.accuracy(pairs.elbos(pipeline), None if reference is None else pairs.elbos(reference))


class HeldOutPairs:
    """Held-out pairs, encoded once, on which the preferences of several models are measured.

    A context manager; arguments and errors are those of [`preference_accuracy`].

    Args:
        pipeline: Its VAE and text encoders, which all models share, encode the pairs.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        dataset: Dataset,
        *,
        draws: int = 8,
        sampling: str = "stratified",
        weighting: str = "simple",
        shared: bool = True,
        seed: int = 0,
        batch_size: int = 8,
        resolution: int | str | tuple[int, int] | None = None,
        num_frames: int | None = None,
        cache_folder: str | Path | None = None,
    ) -> None:
        self.family, self.batch_size = family_for(pipeline), batch_size
        dataset = with_condition_column(dataset, self.family)
        layout = PAIRS.conditioned_on(self.family, column_names(dataset))
        check_columns(dataset, "dataset", layout)
        self.family.check_complete(pipeline)
        options = EncodingOptions(resolution=as_resolution(resolution), num_frames=num_frames)
        self._settings: dict[str, Any] = {
            "seed": seed,
            "draws": draws,
            "sampling": sampling,
            "weighting": weighting,
            "shared": shared,
        }
        self._temporary = tempfile.TemporaryDirectory()
        encoder = DatasetEncoder(
            pipeline,
            self.family,
            layout,
            options,
            cache_folder=Path(cache_folder or self._temporary.name),
            batch_size=batch_size,
        )
        with on_device(pipeline, self.family, self.family.denoiser(pipeline).device):
            encoder.add_prompts([dataset])
            self._encoded = encoder.encode(dataset, "dataset")
        self._collate = encoder.collator

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def elbos(self, pipeline: DiffusionPipeline) -> Tensor:
        """`(N, 2)` estimates of the chosen and rejected samples' likelihoods under a pipeline's denoiser."""
        denoiser, process = self.family.denoiser(pipeline), noise_process(pipeline.scheduler)
        was_training = denoiser.training
        denoiser.eval()

        def predict(x_t: Tensor, model_time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
            return self.family.predict(denoiser, x_t.to(denoiser.dtype), model_time, conditioning)

        parts, count = [], len(self._encoded)
        for start in range(0, count, self.batch_size):
            rows = [self._encoded[row] for row in range(start, min(start + self.batch_size, count))]
            batch = Batch.from_collated(send_to_device(self._collate(rows), denoiser.device))
            parts.append(pair_elbos(predict, batch, process, **self._settings).cpu())
        denoiser.train(was_training)
        return torch.cat(parts)

    @staticmethod
    def accuracy(elbos: Tensor, reference: Tensor | None) -> PreferenceAccuracy:
        """Accuracies from what `elbos` gives for a model and, where there is one, for its reference."""
        likelihood = wins(elbos[:, 0] - elbos[:, 1])
        if reference is None:
            interval = bootstrap_interval(likelihood.numpy())
            return PreferenceAccuracy(None, interval, likelihood.mean().item(), None, len(elbos))
        gains = elbos - reference
        won = wins(gains[:, 0] - gains[:, 1])
        return PreferenceAccuracy(
            accuracy=won.mean().item(),
            interval=bootstrap_interval(won.numpy()),
            likelihood_accuracy=likelihood.mean().item(),
            reference_likelihood_accuracy=wins(reference[:, 0] - reference[:, 1]).mean().item(),
            count=len(elbos),
        )
