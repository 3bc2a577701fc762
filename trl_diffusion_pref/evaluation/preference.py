"""How often a model prefers the chosen image of a held-out pair, by the likelihood that it gives both images.

Noise and times are fixed by the seed and the row, stratified over times and shared by the two images, so that two
evaluations differ by the weights alone.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data import (
    EncodingOptions,
    RowCollator,
    as_resolution,
    check_columns,
    encode_prompt_table,
    encode_rows,
    on_device,
    pair_conditioning,
    pair_latents,
    truncation_report,
)
from ..families import Family, family_for
from ..likelihood import estimate_elbo
from ..noise import NoiseProcess, noise_process
from ..randomness import LIKELIHOOD, generator_for


# Not accelerate's, which needs an accelerator to have been made.
logger = logging.getLogger(__name__)
_BOOTSTRAP_RESAMPLES = 2000


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


def wins(margins: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where it is negative, 1/2 where it is 0."""
    return (margins.sign() + 1) / 2


def bootstrap_interval(values: np.ndarray, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `(N,)` values."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(_BOOTSTRAP_RESAMPLES)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def pair_elbos(
    predict: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    batch: dict[str, Tensor],
    process: NoiseProcess,
    *,
    seed: int,
    draws: int = 8,
    sampling: str = "stratified",
    weighting: str = "simple",
    shared: bool = True,
) -> Tensor:
    """ELBO estimates `(B, 2)` of the chosen and rejected images of a collated batch, at the posteriors' means.

    Args:
        predict: Called as `predict(x_t, model_time, conditioning)` with 2B samples.
        seed: Noise and times depend on (seed, row).
        draws, sampling, weighting: See `likelihood.estimate_elbo`.
        shared: Whether both images of a pair get the same noise and times.
    """
    rows = batch["row"].tolist()
    images = [0] * len(rows) + ([0] if shared else [1]) * len(rows)
    generators = [generator_for(seed, LIKELIHOOD, row, image) for row, image in zip(rows + rows, images, strict=True)]
    conditioning = pair_conditioning(batch)
    with torch.no_grad():
        elbos = estimate_elbo(
            lambda x_t, model_time: predict(x_t, model_time, conditioning),
            pair_latents(batch),
            process,
            generators,
            draws=draws,
            sampling=sampling,
            weighting=weighting,
        )
    return torch.stack(elbos.chunk(2), dim=1)


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
        draws, sampling, weighting: See `likelihood.estimate_elbo`.
        shared: Whether both images of a pair get the same noise and times.
        seed: Of noise and times.
        batch_size: Pairs at once.
        resolution: Side length in pixels, of clips the shorter side; or height and width, as "768x1360" or two
            numbers; default what the pipeline generates.
        num_frames: Of clips; default what the pipeline generates.
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
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cache_folder or temporary)
        options = EncodingOptions(resolution=as_resolution(resolution), num_frames=num_frames)
        with on_device(pipeline, family, family.denoiser(pipeline).device):
            common = {"cache_folder": folder, "batch_size": batch_size}
            report = truncation_report(dataset["prompt"], pipeline, family)
            if report:
                logger.warning(report)
            table = encode_prompt_table(dataset["prompt"], pipeline, family, **common)
            encoded = encode_rows(dataset, pipeline, family, options, what="dataset", **common)
        settings = {"seed": seed, "draws": draws, "sampling": sampling, "weighting": weighting, "shared": shared}
        elbos, reference_elbos = (
            None if model is None else _all_elbos(model, family, encoded, RowCollator(table), batch_size, settings)
            for model in (pipeline, reference)
        )
    likelihood = wins(elbos[:, 0] - elbos[:, 1])
    if reference_elbos is None:
        return PreferenceAccuracy(
            None, bootstrap_interval(likelihood.numpy()), likelihood.mean().item(), None, len(dataset)
        )
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
    collate: RowCollator,
    batch_size: int,
    settings: dict,
) -> Tensor:
    denoiser, process = family.denoiser(pipeline), noise_process(pipeline.scheduler)
    was_training = denoiser.training
    denoiser.eval()

    def predict(x_t: Tensor, model_time: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return family.predict(denoiser, x_t.to(denoiser.dtype), model_time, conditioning)

    parts = []
    for start in range(0, len(encoded), batch_size):
        batch = collate([encoded[row] for row in range(start, min(start + batch_size, len(encoded)))])
        batch = {name: tensor.to(denoiser.device) for name, tensor in batch.items()}
        parts.append(pair_elbos(predict, batch, process, **settings).cpu())
    denoiser.train(was_training)
    return torch.cat(parts)
