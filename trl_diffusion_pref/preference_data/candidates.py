"""Samples of one or several pipelines for each prompt, with their scores: what pairs and rankings are made from."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline

from ..data.shards import key_of
from ..evaluation.condition_images import Conditions, select
from ..evaluation.loading import loaded_pipeline
from ..evaluation.model_record import model_record
from ..evaluation.sample_files import read_sample
from ..evaluation.sampling import described_options, sample, seeds_for
from ..families import family_for
from ..families.base import Modality
from ..rewards.scoring import Reward
from .pairing import Temperature, temperatures_of
from .score_cache import ScoreCache


Pipeline: TypeAlias = str | os.PathLike[str] | DiffusionPipeline
Pipelines: TypeAlias = Pipeline | Mapping[str, Pipeline]

# How many samples are in memory at once while they are scored.
_SCORED_AT_ONCE = 64


@dataclass(frozen=True)
class Candidate:
    """One sample of a prompt.

    Args:
        file: See `sampling.sample`.
        model: Name of the pipeline.
        seed: Of its noise.
        chosen_side: With contrast prompts, whether it was generated from the prompt of the chosen samples.
        key: Of its scores.
    """

    file: Path
    model: str
    seed: int
    chosen_side: bool
    key: str


@dataclass(frozen=True)
class Sampling:
    """How candidates are sampled; see `make_pairs`.

    Args:
        samples_per_prompt: Of each pipeline.
        prompt_templates: What the chosen and the rejected samples are generated from; None where both are generated
            from the prompt itself.
        seed, batch_size, exact: See `sampling.sample`.
        model_init_kwargs, device: See `loaded_pipeline`.
        pipeline_kwargs: Arguments of the pipelines' calls.
    """

    samples_per_prompt: int
    prompt_templates: tuple[str, str] | None
    seed: int
    batch_size: int
    exact: bool
    model_init_kwargs: Mapping[str, Any] | None
    device: str | torch.device | None
    pipeline_kwargs: Mapping[str, Any]

    def __post_init__(self) -> None:
        least = 2 if self.prompt_templates is None else 1
        if self.samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: at least {least} are needed.")
        for template in self.prompt_templates or ():
            if "{prompt}" not in template:
                raise ValueError(f"The prompt template {template!r} has no {{prompt}} in it.")

    def record(self) -> dict[str, Any]:
        """What decides the samples, beside prompts and pipelines."""
        return {
            "samples_per_prompt": self.samples_per_prompt,
            "seed": self.seed,
            "exact": self.exact,
            "arguments of the call": described_options(self.pipeline_kwargs),
        }

    def text(self, prompt: str, chosen_side: bool) -> str:
        """What a sample is generated from."""
        template = "{prompt}" if self.prompt_templates is None else self.prompt_templates[not chosen_side]
        return template.replace("{prompt}", prompt)


def named_pipelines(pipelines: Pipelines) -> dict[str, Pipeline]:
    """Pipelines by the name that the data set's columns show: of a folder its last part, which says nothing private.

    Raises:
        ValueError: None at all.
    """
    if isinstance(pipelines, Mapping):
        if not pipelines:
            raise ValueError("No pipelines to sample from; pass at least one.")
        return {str(name): pipeline for name, pipeline in pipelines.items()}
    name = str(pipelines)
    if isinstance(pipelines, DiffusionPipeline):
        name = str(pipelines.name_or_path or type(pipelines).__name__)
    return {Path(name).resolve().name if Path(name).exists() else name: pipelines}


@dataclass
class Candidates:
    """All candidates, prompt by prompt.

    Args:
        prompts: P prompts.
        of: For each prompt its candidates, blank ones left out, in the order of models and numbers.
        scores: Likewise, by name of the reward.
        blank: How many candidates are left out.
        modality: Of the pipelines.
        models: By name, what decides the samples, see `model_record`.
        images: What was edited, by its column; empty where samples come from text alone.
    """

    prompts: list[str]
    of: list[list[Candidate]]
    scores: list[dict[str, list[float]]]
    blank: int
    modality: Modality
    models: dict[str, Any]
    images: Conditions

    @property
    def per_prompt(self) -> int:
        """How many samples a prompt has, blank ones included."""
        return (sum(map(len, self.of)) + self.blank) // len(self.prompts)

    def by_prompt(self) -> Iterator[tuple[dict[str, Any], list[Candidate], dict[str, list[float]]]]:
        """For each prompt its columns `prompt` and, if something was edited, `image`; its candidates; their scores."""
        columns = {"prompt": self.prompts, **{name: cells.column() for name, cells in self.images.items()}}
        asked = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        yield from zip(asked, self.of, self.scores, strict=True)

    def temperatures(self, temperature: Temperature) -> dict[str, float]:
        """A temperature for each reward, see `temperatures_of`."""
        names = self.scores[0] if self.scores else {}
        return temperatures_of(temperature, {name: [scores[name] for scores in self.scores] for name in names})


def sample_candidates(
    pipelines: Pipelines,
    prompts: Sequence[str],
    rewards: Mapping[str, Reward],
    output: Path,
    options: Sampling,
    images: Conditions,
) -> Candidates:
    """Samples and scores, all processes their share; what is stored in `output` is not made again.

    Args:
        images: What is to be edited, by its column; empty where samples come from text alone.

    Raises:
        ValueError, TypeError: What `sample`, `loaded_pipeline` and `score` refuse; pipelines of several modalities;
            or fewer than two candidates per prompt.
    """
    named = named_pipelines(pipelines)
    sides = [True] if options.prompt_templates is None else [True, False]
    if options.samples_per_prompt * len(named) * len(sides) < 2:
        raise ValueError("samples_per_prompt=1 of one pipeline makes no pairs. Take at least 2, or several pipelines.")
    of: list[list[Candidate]] = [[] for _ in prompts]
    models: dict[str, Any] = {}
    modality: Modality | None = None
    for name, source in named.items():
        pipeline = _loaded(source, options)
        found = family_for(pipeline).modality
        if found != (modality or found):
            raise ValueError(f"The pipeline '{name}' generates {found}, others {modality}; they cannot be compared.")
        modality = found
        models[name] = model_record(pipeline)
        asked = [
            (index, side, number)
            for index in range(len(prompts))
            for side in sides
            for number in range(options.samples_per_prompt)
        ]
        # The two sides of a contrast share their seeds, and so do the pipelines.
        seeds = [seeds_for(prompts, seed=options.seed, number=number) for number in range(options.samples_per_prompt)]
        samples = sample(
            pipeline,
            [options.text(prompts[index], side) for index, side, _ in asked],
            [seeds[number][index] for index, _, number in asked],
            images=select(images, [index for index, _, _ in asked]),
            batch_size=options.batch_size,
            output=output / "samples",
            exact=options.exact,
            description=f"Sampling from {name}",
            **options.pipeline_kwargs,
        )
        for (index, side, number), file in zip(asked, samples.files, strict=True):
            key = key_of(file.name, prompts[index]).hex()
            of[index].append(Candidate(file, name, seeds[number][index], side, key))
        del pipeline, samples
    assert modality is not None
    return _scored(prompts, of, rewards, output, modality, models, images)


def _loaded(source: Pipeline, options: Sampling) -> DiffusionPipeline:
    if isinstance(source, DiffusionPipeline):
        return source
    return loaded_pipeline(source, options.model_init_kwargs, options.device)


def _scored(
    prompts: Sequence[str],
    of: list[list[Candidate]],
    rewards: Mapping[str, Reward],
    output: Path,
    modality: Modality,
    models: dict[str, Any],
    images: Conditions,
) -> Candidates:
    """Looks at all candidates for blank ones and scores the others."""
    flat = [(prompt, candidate) for prompt, candidates in zip(prompts, of, strict=True) for candidate in candidates]
    sources = select(images, [index for index, candidates in enumerate(of) for _ in candidates])
    cache = ScoreCache(output / "scores", rewards, refuse_blank=True)
    cache.fill(
        [candidate.key for _, candidate in flat],
        [prompt for prompt, _ in flat],
        lambda position: read_sample(flat[position][1].file),
        columns=lambda position: {name: cells[position] for name, cells in sources.items()},
        at_once=_SCORED_AT_ONCE,
        describe=lambda position: (
            f"the sample of {flat[position][1].model} for prompt {flat[position][0]!r} with "
            f"seed {flat[position][1].seed} ({flat[position][1].file})"
        ),
    )
    kept = [[candidate for candidate in candidates if not cache.blank[candidate.key]] for candidates in of]
    return Candidates(
        prompts=list(prompts),
        of=kept,
        scores=[cache.of(candidate.key for candidate in candidates) for candidates in kept],
        blank=len(flat) - sum(map(len, kept)),
        modality=modality,
        models=models,
        images=images,
    )
