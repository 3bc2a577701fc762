"""Held-out preference accuracy of any pipeline, without a trainer."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data import PAIRS, Batch, Collator, DatasetEncoder, EncodingOptions, as_resolution, check_columns, on_device
from ..diffusion.noise import noise_process
from ..families import Family, family_for
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
    check_columns(dataset, "dataset")
    family = family_for(pipeline)
    family.check_complete(pipeline)
    if reference is not None and family_for(reference) is not family:
        raise TypeError(f"reference is a {type(reference).__name__}, the pipeline a {type(pipeline).__name__}.")
    options = EncodingOptions(resolution=as_resolution(resolution), num_frames=num_frames)
    settings = {"seed": seed, "draws": draws, "sampling": sampling, "weighting": weighting, "shared": shared}
    with tempfile.TemporaryDirectory() as temporary:
        encoder = DatasetEncoder(
            pipeline, family, PAIRS, options, cache_folder=Path(cache_folder or temporary), batch_size=batch_size
        )
        with on_device(pipeline, family, family.denoiser(pipeline).device):
            encoder.add_prompts([dataset])
            encoded = encoder.encode(dataset, "dataset")
        fixed = (family, encoded, encoder.collator, batch_size, settings)
        elbos = _all_elbos(pipeline, *fixed)
        reference_elbos = None if reference is None else _all_elbos(reference, *fixed)
    likelihood = wins(elbos[:, 0] - elbos[:, 1])
    if reference_elbos is None:
        interval = bootstrap_interval(likelihood.numpy())
        return PreferenceAccuracy(None, interval, likelihood.mean().item(), None, len(dataset))
    gains = elbos - reference_elbos
    won = wins(gains[:, 0] - gains[:, 1])
    return PreferenceAccuracy(
        accuracy=won.mean().item(),
        interval=bootstrap_interval(won.numpy()),
        likelihood_accuracy=likelihood.mean().item(),
        reference_likelihood_accuracy=wins(reference_elbos[:, 0] - reference_elbos[:, 1]).mean().item(),
        count=len(dataset),
    )


def _all_elbos(
    pipeline: DiffusionPipeline,
    family: Family,
    encoded: Dataset,
    collate: Collator,
    batch_size: int,
    settings: Mapping[str, Any],
) -> Tensor:
    denoiser, process = family.denoiser(pipeline), noise_process(pipeline.scheduler)
    was_training = denoiser.training
    denoiser.eval()

    def predict(x_t: Tensor, model_time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return family.predict(denoiser, x_t.to(denoiser.dtype), model_time, conditioning)

    parts = []
    for start in range(0, len(encoded), batch_size):
        collated = collate([encoded[row] for row in range(start, min(start + batch_size, len(encoded)))])
        batch = Batch.from_collated(send_to_device(collated, denoiser.device))
        parts.append(pair_elbos(predict, batch, process, **settings).cpu())
    denoiser.train(was_training)
    return torch.cat(parts)
