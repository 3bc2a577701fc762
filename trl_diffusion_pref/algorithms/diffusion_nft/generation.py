"""Samples of a pipeline in the middle of its training: generated, scored and encoded as a data set's would be."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import diffusers
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from diffusers import SchedulerMixin
from torch import Tensor

from ...data.batch import STD
from ...data.decode.audio import Waveform
from ...data.encoding import RowEncoder
from ...data.layouts import Layout, sample_column
from ...evaluation.sample_files import Sample
from ...evaluation.sampling import sample
from ...families import AudioFamily
from ...rewards.scoring import Reward, RewardError, score
from ...training.checkpoint import checkpoint_problem
from ...training.process_state import restored_generators
from ...training.trainer import DiffusionTrainer
from .config import DiffusionNFTConfig


class OnlineRewardError(RuntimeError):
    """A reward failed in the middle of a run; the message names it, the prompt, and how to go on."""


class Generator:
    """Generates, scores and encodes samples with a trainer's pipeline, which is afterwards as it was.

    Args:
        trainer: With its pipeline, encoders and options.
        args: The trainer's.
        rewards: By name.
        save: Writes a checkpoint of the present step.

    Raises:
        ValueError: A scheduler that diffusers does not have, or of another kind of model; another number of weights
            than of rewards.
    """

    def __init__(
        self,
        trainer: DiffusionTrainer,
        args: DiffusionNFTConfig,
        rewards: Mapping[str, Reward],
        save: Callable[[], Path],
    ) -> None:
        self.trainer, self.args, self.rewards, self.save = trainer, args, rewards, save
        self.weights = reward_weights(args, rewards)
        self.scheduler = sampling_scheduler(args, trainer.encoders.pipeline.scheduler)
        self.call_options = call_options(args, trainer)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Has the pipeline's encoders on the device for the duration, where many samples are made one by one."""
        with self.trainer.encoders.on_device(self.args.device, to_sample=True):
            yield

    def samples(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Sample]:
        """One sample of each prompt, of this process alone; weights, random states and modes are as before."""
        if not prompts:
            return []
        pipeline, device = self.trainer.encoders.pipeline, self.args.device
        scheduler = pipeline.scheduler
        # An evaluation calls this within autocast, which would put the VAE in half precision too.
        with self.ready(), torch.autocast(device.type, enabled=False), restored_generators(device):
            try:
                pipeline.scheduler = self.scheduler
                made = sample(
                    pipeline,
                    prompts,
                    seeds,
                    batch_size=self.args.sampling_batch_size,
                    exact=False,
                    all_processes=False,
                    show_progress=False,
                    **self.call_options,
                )
                return list(made)
            finally:
                pipeline.scheduler = scheduler

    def scores(
        self, prompts: Sequence[str], samples: Sequence[Sample], columns: Mapping[str, Sequence[Any]]
    ) -> dict[str, list[float]]:
        """By reward, the score of each of this process's samples, and as "reward" their weighted sum.

        All processes call it together, and all raise if a reward fails in one.

        Args:
            columns: Further columns of the prompts' data set.

        Raises:
            OnlineRewardError: A reward fails; within a training, a checkpoint of the present step is saved first.
        """
        found: dict[str, list[float]] = {name: [] for name in self.rewards}
        failure = None
        with restored_generators(self.args.device):
            try:
                if samples:
                    given = {name: list(values) for name, values in columns.items()}
                    found = score(self.rewards, prompts, samples, **given)
            except RewardError as error:
                failure = _in_words(error, prompts)
        failures = [one for one in gather_object([failure]) if one is not None]
        if failures:
            raise OnlineRewardError(f"{failures[0]} {self._how_to_go_on()}")
        totals = [
            sum(weight * value for weight, value in zip(self.weights, values, strict=True))
            for values in zip(*found.values(), strict=True)
        ]
        return {"reward": totals} | {f"scores/{name}": values for name, values in found.items()}

    def _how_to_go_on(self) -> str:
        trainer, step = self.trainer, self.trainer.state.global_step
        if not trainer.is_in_train or step == 0:
            return "Nothing was trained yet. Correct the reward and start again."
        folder = trainer.checkpointer.folder(step)
        if checkpoint_problem(folder) is not None:
            folder = self.save()
        return (
            f"Training stopped after step {step}; its checkpoint is {folder}. Correct the reward and go on with "
            "train(resume_from_checkpoint=True), which samples these prompts again."
        )

    def encoded(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        """Each sample's tensors on the CPU, by the names of an encoded row's columns.

        Raises:
            ValueError: The pipeline generated samples that its VAE cannot encode.
        """
        encoder, column = self.trainer.encoder, sample_column(self.trainer.family)
        rows = RowEncoder(encoder.preparation, Layout(samples=(column,)), encoder.options)
        encoded: list[dict[str, Tensor]] = []
        size = self.args.encode_batch_size
        with self.trainer.encoders.on_device(self.args.device), torch.no_grad(), ThreadPoolExecutor(4) as pool:
            for first in range(0, len(samples), size):
                numbers = range(first, min(first + size, len(samples)))
                prepared = rows.prepare(pool, numbers, [{column: _as_cell(samples[number])} for number in numbers])
                problems = [problem for row in prepared for problem in row.problems]
                tensors, unusable = rows.encode(prepared) if not problems else ([], [])
                if problems or unusable:
                    raise ValueError(f"A generated sample cannot be trained on: {[*problems, *unusable][0]}.")
                # The sample was a latent, near the posterior's mean; noise would take it away from there.
                encoded += [{name: value for name, value in row.items() if name != STD} for row in tensors]
        return encoded


def columns_of(dataset: Dataset | None, rows: Sequence[int]) -> dict[str, list[Any]]:
    """The columns of a data set of prompts that rewards get beside the prompt, of some rows."""
    if dataset is None or not len(rows):
        return {}
    found = dataset.select(rows)
    return {name: list(found[name]) for name in found.column_names if name != "prompt"}


def reward_weights(args: DiffusionNFTConfig, rewards: Mapping[str, Reward]) -> list[float]:
    """One for each reward.

    Raises:
        ValueError: Another number of them.
    """
    weights = args.reward_weights
    if weights is None:
        return [1.0] * len(rewards)
    if len(weights) != len(rewards) or not all(abs(float(weight)) < float("inf") for weight in weights):
        raise ValueError(
            f"reward_weights={weights}: there must be a finite number for each of the {len(rewards)} reward_funcs "
            f"({', '.join(rewards)})."
        )
    return [float(weight) for weight in weights]


def sampling_scheduler(args: DiffusionNFTConfig, own: SchedulerMixin) -> SchedulerMixin:
    """What samples: the pipeline's own scheduler, or one of the class that was asked for, made from its config.

    Raises:
        ValueError: diffusers has no such class, or its model is of another kind.
    """
    name = args.sampling_scheduler
    if name is None:
        return own
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"sampling_scheduler={name!r}: diffusers has no scheduler of this name.")
    made = cast(Any, kind).from_config(own.config)
    try:
        ours, theirs = args.noise_process(own), args.noise_process(made)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampling_scheduler={name!r} does not suit the {type(own).__name__}: {error}") from error
    if type(ours) is not type(theirs):
        raise ValueError(
            f"sampling_scheduler={name!r} is for another kind of model than the pipeline's {type(own).__name__}: "
            f"{type(theirs).__name__}, not {type(ours).__name__}. Leave it out, or take one that samples such models."
        )
    return made


def call_options(args: DiffusionNFTConfig, trainer: DiffusionTrainer) -> dict[str, Any]:
    """Arguments of the pipeline's call: samples have the size that training would bring them to."""
    taken = inspect.signature(type(trainer.encoders.pipeline).__call__).parameters
    options: dict[str, Any] = {"num_inference_steps": args.num_inference_steps}
    # A pipeline without guidance of its own does not have the argument.
    if "guidance_scale" in taken or args.guidance_scale != 1.0:
        options["guidance_scale"] = args.guidance_scale
    if not isinstance(trainer.family, AudioFamily):
        *frames, height, width = trainer.encoder.preparation.shape[1:]
        size = {"height": height, "width": width} | ({"num_frames": frames[0]} if frames else {})
        options |= {name: value for name, value in size.items() if name in taken}
    given = args.sampling_kwargs or {}
    assert isinstance(given, dict)
    return options | given


def _as_cell(one: Sample) -> Any:
    """A sample as a data set's cell."""
    return {"array": one.samples.numpy(), "sampling_rate": one.rate} if isinstance(one, Waveform) else one


def _in_words(error: RewardError, prompts: Sequence[str]) -> str:
    if error.sample is not None:
        return f"The {error}. Its prompt is {prompts[error.sample]!r}."
    shown = ", ".join(repr(shorten(prompt, 60, placeholder="...")) for prompt in dict.fromkeys(prompts[:3]))
    return f"The {error}. It was called with {len(prompts)} samples, the first of the prompts {shown}."
