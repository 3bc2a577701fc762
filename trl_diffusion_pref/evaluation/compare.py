"""Compares tuned models with their base: the same prompts and seeds, scores, win rates, and a report to publish."""

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import DiffusionPipeline
from torch import Tensor

from ..data.shards import key_of
from ..export.files import write_whole
from ..families import family_for
from ..guidance.tuned import with_tuned_weights
from ..rewards.scoring import Rewards, score
from .comparison import Comparison, distances_within
from .comparison_page import comparison_page
from .condition_images import Conditions, GivenImages, condition_images, images_of, keys, select
from .loading import loaded_pipeline
from .page_media import data_url, features
from .preference import HeldOutPairs
from .sample_files import Samples, is_blank
from .sampling import images_to_edit, sample, seeds_for


logger = logging.getLogger(__name__)

# A loaded pipeline or denoiser, or a LoRA or whole weights as a file, a folder or a Hub id.
Tuned: TypeAlias = str | os.PathLike[str] | DiffusionPipeline | torch.nn.Module

REPORT, SECTION, PAGE, SAMPLES = "comparison.json", "comparison.md", "index.html", "samples"
# Samples that are in memory at once while they are scored.
_SCORED_AT_ONCE = 128


def compare(
    base: str | os.PathLike[str] | DiffusionPipeline,
    tuned: Tuned | Mapping[str, Tuned],
    prompts: Sequence[str],
    rewards: Rewards,
    output: str | os.PathLike[str],
    *,
    images: GivenImages = None,
    samples_per_prompt: int = 4,
    seed: int = 0,
    batch_size: int = 4,
    pairs: Dataset | None = None,
    title: str | None = None,
    frames_per_second: int = 16,
    model_init_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    **pipeline_kwargs: Any,
) -> Comparison:
    """Compares tuned models with their base on the same prompts and seeds, and writes a report.

    Every model samples through the base's pipeline: VAE, text encoders and scheduler are the same for all. Under
    `accelerate launch` all processes sample and score. A comparison that was interrupted goes on with the samples that
    are missing.

    Args:
        base: Hub id, folder or loaded pipeline.
        tuned: Models by the name that the report shows, or a single one, which it calls "tuned": LoRAs, denoisers or
            pipelines, each a file, a folder, a Hub id or loaded.
        prompts: P texts, each once; with `images`, once for each image.
        rewards: One, several, or several by name, see `rewards.score`.
        output: Folder for `comparison.json`, `comparison.md` (a section for a model card), `index.html` (a page
            without any other file), and `samples/`.
        images: For pipelines that edit images: for each prompt an image, or a list of them, see `sample`. Rewards get
            them as they are given here, as the column `image` (and `mask_image`), and the page shows them.
        samples_per_prompt: S. With 1, diversity is not measured.
        seed: Of the samples' seeds, which differ between prompts.
        batch_size: Samples in one call of the pipeline.
        pairs: Held-out pairs, for the preference accuracy with the base as reference.
        title: Of the page.
        frames_per_second: Of videos on the page.
        model_init_kwargs: Arguments of `from_pretrained` for a base given by name, such as
            `{"dtype": torch.bfloat16}`; float32 is the default.
        device: For a base given by name. Default: the accelerator, or the CPU.
        **pipeline_kwargs: Arguments of the pipeline's call, such as `guidance_scale` or `num_inference_steps`.

    Returns:
        What was found; `to_markdown()`, `as_dict()` and its estimates say it in several forms.

    Raises:
        ValueError: Prompts that are empty or come twice, two models of one name, `output` has a report of another
            comparison, or what sampling and rewards refuse.
        TypeError: An unsupported pipeline.

    Example:

    ```python
    from trl_diffusion_pref.evaluation import compare
    from trl_diffusion_pref.rewards import PickScore

    found = compare("stable-diffusion-v1-5/stable-diffusion-v1-5", "mapo", prompts, PickScore(), "report")
    print(found.to_markdown())
    ```
    """
    prompts, sources = _checked_prompts(prompts, images)
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt}: at least one sample is needed.")
    if not isinstance(tuned, Mapping):
        tuned = {"tuned": tuned}
    names = ["base", *map(str, tuned)]
    if not tuned or len(set(names)) < len(names):
        raise ValueError(
            f"tuned has the names {', '.join(names[1:]) or 'of no model'}; pass each model once, and none as 'base'."
        )
    pipeline = loaded_pipeline(base, model_init_kwargs, device)
    family, folder, main = family_for(pipeline), Path(output), PartialState().is_main_process
    sources = images_to_edit(pipeline, sources, prompts)
    options = {
        "samples per prompt": samples_per_prompt,
        "seed": seed,
        **{k: repr(v) for k, v in pipeline_kwargs.items()},
        **({"images": key_of(*(key_of(*own) for own in keys(sources, len(prompts)))).hex()} if sources else {}),
    }
    _check_report(folder / REPORT, {"prompts": prompts, "models": names, "options": options})

    seeds = [seeds_for(prompts, seed=seed, number=number) for number in range(samples_per_prompt)]
    asked = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    own_seeds = [seeds[number][index] for index in range(len(prompts)) for number in range(samples_per_prompt)]
    asked_images = select(sources, [index for index in range(len(prompts)) for _ in range(samples_per_prompt)])
    shape = (len(prompts), samples_per_prompt)
    scores: dict[str, dict[str, np.ndarray]] = {}
    diversity, blank, seconds, elbos = {}, {}, {}, {}
    media: dict[str, list[list[str]]] = {}
    with nullcontext() if pairs is None else HeldOutPairs(pipeline, pairs) as held_out:
        for name, model in [("base", None), *tuned.items()]:
            with nullcontext(pipeline) if model is None else with_tuned_weights(pipeline, model):
                began = time.perf_counter()
                samples = sample(
                    pipeline,
                    asked,
                    own_seeds,
                    images=asked_images,
                    batch_size=batch_size,
                    output=folder / SAMPLES,
                    description=f"Sampling with {name}",
                    **pipeline_kwargs,
                )
                if samples.made:
                    seconds[name] = (time.perf_counter() - began) / samples.made
                if held_out is not None:
                    elbos[name] = held_out.elbos(pipeline)
            found, left_out = _scored(samples, asked, rewards, asked_images)
            scores[name] = {reward: values.reshape(shape) for reward, values in found.items()}
            blank[name] = len(left_out)
            if samples_per_prompt > 1:
                diversity[name] = _diversity(samples, left_out, shape)
            if main:
                urls = ["" if n in left_out else data_url(one, frames_per_second) for n, one in enumerate(samples)]
                media[name] = np.array(urls, dtype=object).reshape(shape).tolist()
    comparison = Comparison(
        models=names,
        prompts=prompts,
        seeds=np.array(own_seeds).reshape(shape).tolist(),
        modality=family.modality,
        scores=scores,
        diversity=diversity,
        blank=blank,
        seconds=seconds,
        accuracies=_accuracies(elbos),
        options=options,
    )
    if any(blank.values()):
        counts = ", ".join(f"{count} of {name}" for name, count in blank.items() if count)
        logger.warning("Samples that are blank, as a safety checker makes them, are left out: %s.", counts)
    if main:
        write_whole(folder / SECTION, comparison.to_markdown().encode())
        shown = [[data_url(one) for one in images_of(sources, n)] for n in range(len(prompts))] if sources else None
        page = comparison_page(comparison, media, title or f"{', '.join(names[1:])} against the base", shown)
        write_whole(folder / PAGE, page.encode())
        # Last: a report without it is not finished.
        text = json.dumps(comparison.as_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        write_whole(folder / REPORT, text.encode())
    PartialState().wait_for_everyone()
    return comparison


def _checked_prompts(prompts: Sequence[str], images: GivenImages) -> tuple[list[str], Conditions]:
    """Prompts, and the images to edit."""
    prompts = list(prompts)
    if not prompts:
        raise ValueError("prompts is empty; pass the prompts to compare the models on.")
    sources = condition_images(images, len(prompts))
    counts = Counter(zip(prompts, keys(sources, len(prompts)), strict=True))
    twice = next((prompt for (prompt, _), count in counts.items() if count > 1), None)
    if twice is not None:
        same = " with the same image" if sources else ""
        raise ValueError(
            f"The prompt {twice!r} comes twice{same}; pass each once, and raise samples_per_prompt for more samples."
        )
    return prompts, sources


def _check_report(file: Path, own: Mapping[str, Any]) -> None:
    """Raises where a folder has the report of another comparison, which this one would replace."""
    if not file.exists():
        return
    stored = json.loads(file.read_text())
    stored["models"] = list(stored["models"])
    different = [name for name, value in own.items() if stored.get(name) != value]
    if different:
        raise ValueError(
            f"{file.parent} has the report of another comparison: {', '.join(different)} differ. Choose another "
            f"folder for output, or remove {file.name} to replace it."
        )


def _scored(
    samples: Samples, prompts: Sequence[str], rewards: Rewards, columns: Mapping[str, Sequence[Any]]
) -> tuple[dict[str, np.ndarray], set[int]]:
    """Scores `(N,)` by reward, NaN for blank samples, and which those are; all processes score their share."""
    state, count = PartialState(), len(samples)
    parts: list[tuple[list[int], dict[str, list[float]]]] = []
    for start in range(state.process_index * _SCORED_AT_ONCE, count, _SCORED_AT_ONCE * state.num_processes):
        numbers = range(start, min(start + _SCORED_AT_ONCE, count))
        read = {number: samples[number] for number in numbers}
        kept = [number for number in numbers if not is_blank(read[number])]
        own = {name: [values[number] for number in kept] for name, values in columns.items()}
        found = score(rewards, [prompts[number] for number in kept], [read[number] for number in kept], **own)
        parts.append((kept, found))
    gathered = gather_object(parts)
    scores: dict[str, np.ndarray] = {}
    for kept, found in gathered:
        for name, values in found.items():
            scores.setdefault(name, np.full(count, np.nan))[kept] = values
    if not scores:
        raise ValueError(
            f"All {count} samples are blank, as a safety checker makes them; there is nothing to compare."
        )
    left_out = set(range(count)) - {number for kept, _ in gathered for number in kept}
    return scores, left_out


def _diversity(samples: Samples, left_out: set[int], shape: tuple[int, int]) -> np.ndarray:
    """Mean distance of two samples of each prompt, `(P,)`."""
    found = []
    for prompt in range(shape[0]):
        numbers = [number for number in range(prompt * shape[1], (prompt + 1) * shape[1]) if number not in left_out]
        found.append(distances_within([features(samples[number]) for number in numbers]))
    return np.array(found)


def _accuracies(elbos: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: HeldOutPairs.accuracy(own, elbos["base"]) for name, own in elbos.items() if name != "base"}
