"""The samples of a phase: generated at its beginning, then trained on in batches, and part of the checkpoints."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor

from ...data import EncodedDataset
from ...data.batch import PROMPT_NUMBER, SCALAR
from ...diffusion.randomness import ROLLOUT, generator_for
from ...training.references import Reference
from .advantages import liked_by_score
from .config import DiffusionNFTConfig
from .generation import Generator, columns_of
from .old_policy import in_pipeline


# What a sequence of numbers is for, after ROLLOUT in its key.
_PROMPTS, _ORDER, _SEED, _HELD_OUT = range(4)
_SEEDS = 2**31


@dataclass(frozen=True)
class Wanted:
    """A sample of a phase.

    Args:
        number: Among the phase's, of all processes; samples of one prompt are neighbours.
        index: Of its prompt, in the encoded data set.
        prompt: Its text.
        seed: Of its noise.
    """

    number: int
    index: int
    prompt: str
    seed: int


class Rollouts:
    """Batches of generated samples for training, without end: what transformers' loop takes for a data loader.

    A phase's prompts depend on (seed, phase), a sample's noise on (seed, phase, prompt, number), and the order of
    training on (seed, phase): not on the number of processes. Each process generates the samples that it will be
    trained on, and only scores are exchanged.

    Args:
        generator: Generates, scores and encodes.
        dataset: Encoded prompts.
        given: The same rows as the user passed them, with further columns for the rewards; None without.
        old_policy: Generates.

    Attributes:
        phase: Of the samples that are held; -1 before the first.
        rows: This process's samples by number, as rows of an encoded data set.
    """

    description = "generated samples"
    per_process = True

    def __init__(
        self, generator: Generator, dataset: EncodedDataset, given: Dataset | None, old_policy: Reference
    ) -> None:
        self.generator, self.dataset, self.given, self.old_policy = generator, dataset, given, old_policy
        self.trainer, self.args = generator.trainer, generator.args
        self.reset()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Micro-batches, collated; at the beginning of a phase the samples are generated first.

        Raises:
            OnlineRewardError: See `Generator.scores`.
        """
        args = self.args
        # Training has freed the encoders, which each phase needs: reading them once is enough.
        self.trainer.encoders.bring_back()
        while True:
            # Read anew for each step, which also makes a resumed run begin at its place.
            step = self.trainer.state.global_step
            phase, of_phase = divmod(step, args.steps_per_phase)
            if self.phase != phase:
                self._generate(phase)
            numbers = self._numbers(phase, of_phase)
            for first in range(0, len(numbers), args.train_batch_size):
                rows = [self.rows[number] for number in numbers[first : first + args.train_batch_size]]
                yield self.trainer.data_collator(rows)

    def _numbers(self, phase: int, of_phase: int) -> list[int]:
        """Of the samples that this process is trained on in a step of a phase.

        Each pass over the samples has the same steps, so that a sample stays in the process that generated it.
        """
        args: DiffusionNFTConfig = self.args
        count, batch = args.samples_per_phase, args.train_batch_size
        order = torch.randperm(count, generator=generator_for(args.seed, ROLLOUT, _ORDER, phase)).tolist()
        first = of_phase * args.samples_per_step % count
        # Batches of a step go to the processes in turn, as those of stored data do.
        starts = range(first + args.process_index * batch, first + args.samples_per_step, args.world_size * batch)
        return [number for start in starts for number in order[start : start + batch]]

    # ---- The beginning of a phase --------------------------------------------------------------------------------

    def _generate(self, phase: int) -> None:
        args = self.args
        steps = args.samples_per_phase // args.samples_per_step
        numbers = sorted(number for step in range(steps) for number in self._numbers(phase, step))
        wanted = self._wanted(phase, numbers)
        prompts = [one.prompt for one in wanted]
        with in_pipeline(self.old_policy, self.trainer.unwrapped):
            samples = self.generator.samples(prompts, [one.seed for one in wanted])
        columns = columns_of(self.given, [int(self.dataset.rows[one.index]) for one in wanted])
        scores = self.generator.scores(prompts, samples, columns)
        labels = self._labels(numbers, scores["reward"])
        encoded = self.generator.encoded(samples)
        rows = {}
        for position, one in enumerate(wanted):
            scalars = labels[one.number] | {name: values[position] for name, values in scores.items()}
            numbers_of = {SCALAR + name: torch.tensor(value, dtype=torch.float32) for name, value in scalars.items()}
            rows[one.number] = self.dataset[one.index] | encoded[position] | numbers_of
        self.phase, self.rows = phase, rows

    def _wanted(self, phase: int, numbers: Sequence[int]) -> list[Wanted]:
        """What some samples of a phase are made from."""
        args, texts = self.args, self.dataset.prompts.texts
        indices = [self._index(phase * args.prompts_per_rollout + group) for group in range(args.prompts_per_rollout)]
        wanted = []
        for number in numbers:
            group, of_prompt = divmod(number, args.num_generations)
            prompt = texts[self.dataset[indices[group]][PROMPT_NUMBER]]
            wanted.append(Wanted(number, indices[group], prompt, seed(args.seed, _SEED, phase, group, of_prompt)))
        return wanted

    def _index(self, group: int) -> int:
        """The prompt of the run's n-th group: all once in random order, then all again in another."""
        epoch, place = divmod(group, len(self.dataset))
        generator = generator_for(self.args.seed, ROLLOUT, _PROMPTS, epoch)
        return int(torch.randperm(len(self.dataset), generator=generator)[place])

    def _labels(self, numbers: Sequence[int], rewards: Sequence[float]) -> dict[int, dict[str, float]]:
        """By number, how likely each sample of the phase is a liked one, by the scores of all processes."""
        args = self.args
        everywhere = dict(gather_object([*zip(numbers, rewards, strict=True)]))
        scores = np.asarray([everywhere[number] for number in range(args.samples_per_phase)])
        groups = np.arange(args.samples_per_phase) // args.num_generations
        liked, equal = liked_by_score(scores, groups, args.scale_rewards, args.advantage_clip)
        return {
            number: {"label": float(liked[number]), "frac_reward_zero_std": float(equal[number])} for number in numbers
        }

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forgets all samples."""
        self.phase, self.rows = -1, dict[int, dict[str, Any]]()

    def state_dict(self) -> dict[str, Tensor]:
        state = {"phase": torch.tensor(self.phase)}
        if self.rows and self.trainer.state.global_step % self.args.steps_per_phase:
            state["number"] = torch.tensor(list(self.rows))
            rows = list(self.rows.values())
            state |= {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reset()
        if "number" not in state:
            # A phase had ended, and the next one begins with samples of its own.
            return
        self.phase = int(state["phase"])
        for position, number in enumerate(state["number"].tolist()):
            self.rows[number] = {
                name: int(tensor[position]) if name in ("row", PROMPT_NUMBER) else tensor[position]
                for name, tensor in state.items()
                if name not in ("phase", "number")
            }

    def depends_on(self) -> dict[str, Any]:
        args = self.args
        return {
            "seed": args.seed,
            "prompts_per_rollout": args.prompts_per_rollout,
            "num_generations": args.num_generations,
            "num_iterations": args.num_iterations,
            "samples of a step": args.samples_per_step,
            "prompts": self.dataset.fingerprint,
            "size of samples": list(self.trainer.encoder.preparation.shape),
        }


def seed(*key: int) -> int:
    """Of one sample's noise, in [0, 2^31)."""
    run, *rest = key
    return int(torch.randint(_SEEDS, (1,), generator=generator_for(run, ROLLOUT, *rest)))


def held_out_seeds(run_seed: int, rows: Sequence[int]) -> list[int]:
    """Of the samples of held-out prompts, by their rows, the same in every evaluation."""
    return [seed(run_seed, _HELD_OUT, row) for row in rows]
