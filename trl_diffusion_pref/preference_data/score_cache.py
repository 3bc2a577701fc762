"""Scores by reward and sample, kept in files, so that a run that was killed scores what is missing."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.shards import key_of
from ..evaluation.sample_files import is_blank
from ..export.files import write_whole
from ..rewards.scoring import Reward, RewardError, score
from .reward_identity import reward_identity


class ScoreCache:
    """Scores by key of sample and prompt, in one folder per reward; each file is written whole.

    Args:
        folder: None: scores are kept in memory only.
        rewards: By name.
        refuse_blank: Whether samples are looked at first, and blank ones are not scored.

    Attributes:
        values: By name of the reward, scores by key; blank samples have none.
        blank: By key, whether a sample is blank, if they were looked at.
    """

    def __init__(self, folder: Path | None, rewards: Mapping[str, Reward], refuse_blank: bool) -> None:
        self.rewards, self.refuse_blank = dict(rewards), refuse_blank
        self._folders: dict[str, Path] = {}
        if folder is not None:
            self._folders = {name: folder / reward_identity(reward) for name, reward in rewards.items()}
        self._blank_folder = None if folder is None else folder / "blank"
        self.values: dict[str, dict[str, float]] = {name: {} for name in rewards}
        self.blank: dict[str, bool] = {}
        self._read()

    def _read(self) -> None:
        for name, folder in self._folders.items():
            for file in sorted(folder.glob("*.json")):
                self.values[name].update(_read_json(file))
        if self._blank_folder is not None:
            for file in sorted(self._blank_folder.glob("*.json")):
                self.blank.update(_read_json(file))

    def fill(
        self,
        keys: Sequence[str],
        prompts: Sequence[str],
        load: Callable[[int], Any],
        *,
        at_once: int,
        describe: Callable[[int], str],
        columns: Callable[[int], Mapping[str, Any]] | None = None,
    ) -> None:
        """Scores all samples that have no scores yet, every process its share.

        Args:
            keys: One for each sample; samples with the same key are scored once.
            prompts: What each sample is scored for.
            load: Reads a sample by its position.
            at_once: Samples in one call of the rewards.
            describe: How messages call a sample, by its position.
            columns: What else the rewards get of a sample, by its position: the entries of columns.

        Raises:
            RewardError: A reward fails; the message names it and the sample. What was scored before is kept.
        """
        state = PartialState()
        first = {key: position for position, key in reversed([*enumerate(keys)])}
        missing = sorted(position for key, position in first.items() if self._lacks(key))
        parts = [missing[start : start + at_once] for start in range(0, len(missing), at_once)]
        own = parts[state.process_index :: state.num_processes]
        found: list[tuple[str, dict[str, Any]]] = []
        total = sum(map(len, own))
        with tqdm(total=total, desc="Scoring", unit=" samples", disable=not (state.is_main_process and total)) as bar:
            for part in own:
                found += self._score(part, keys, prompts, load, describe, columns)
                bar.update(len(part))
        for name, scores in gather_object(found) if state.num_processes > 1 else found:
            (self.blank if name == "" else self.values[name]).update(scores)

    def _lacks(self, key: str) -> bool:
        if self.refuse_blank:
            if key not in self.blank:
                return True
            if self.blank[key]:
                return False
        return any(key not in scores for scores in self.values.values())

    def _score(
        self,
        part: Sequence[int],
        keys: Sequence[str],
        prompts: Sequence[str],
        load: Callable[[int], Any],
        describe: Callable[[int], str],
        columns: Callable[[int], Mapping[str, Any]] | None,
    ) -> list[tuple[str, dict[str, Any]]]:
        """The scores of some samples by name of the reward; "" for whether they are blank."""
        samples = {position: load(position) for position in part}
        found: list[tuple[str, dict[str, Any]]] = []
        seen = list(part)
        if self.refuse_blank:
            blank = {keys[position]: is_blank(sample) for position, sample in samples.items()}
            self._write(self._blank_folder, blank)
            found.append(("", blank))
            seen = [position for position in part if not blank[keys[position]]]
        for name, reward in self.rewards.items():
            positions = [position for position in seen if keys[position] not in self.values[name]]
            entries = [columns(position) for position in positions] if columns is not None else []
            others = {column: [entry[column] for entry in entries] for column in (entries[0] if entries else ())}
            try:
                values = score(
                    {name: reward},
                    [prompts[position] for position in positions],
                    [samples[position] for position in positions],
                    **others,
                )[name]
            except RewardError as error:
                if error.sample is None:
                    raise
                # The position in this call means nothing to the user.
                raise RewardError(error.reward, f"{describe(positions[error.sample])}: {error.problem}") from error
            scores = {keys[position]: value for position, value in zip(positions, values, strict=True)}
            self._write(self._folders.get(name), scores)
            found.append((name, scores))
        return found

    @staticmethod
    def _write(folder: Path | None, values: Mapping[str, Any]) -> None:
        if folder is not None and values:
            file = folder / f"{key_of(sorted(values)).hex()}.json"
            write_whole(file, json.dumps(values, indent=0).encode())

    def of(self, keys: Iterable[str]) -> dict[str, list[float]]:
        """Scores of samples that are not blank, by name of the reward."""
        listed = list(keys)
        return {name: [scores[key] for key in listed] for name, scores in self.values.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Remove it; its samples are then scored again.") from error
