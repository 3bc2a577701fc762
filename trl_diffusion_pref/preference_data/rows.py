"""Rows of pairs and rankings from scored samples, and the count of what is left out."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import List, Value

from ..families.base import Modality
from .candidates import Candidate, Candidates
from .dataset import cell, sample_feature
from .pairing import Strategy, Temperature, check_pairing, choose_pairs, combined_scores, preference_probabilities


# The column of a ranking's samples.
SAMPLES: dict[Modality, str] = {"image": "images", "video": "videos", "audio": "audio"}


@dataclass
class Counts:
    """What became of the prompts and their samples.

    Args:
        prompts: Prompts that were sampled.
        samples: Samples that were generated.
        blank_samples: Black or silent ones, as safety checkers make them, left out.
        short_prompts: Prompts without enough samples that are not blank, left out.
        tied_prompts: Prompts whose samples all have the same score, left out.
        close_pairs: Pairs left out because they differ by less than `min_score_difference` or are equally good.
        further_pairs: Pairs left out because of `max_pairs_per_prompt`.
        rows: Of the data set.
    """

    prompts: int
    samples: int
    blank_samples: int
    short_prompts: int = 0
    tied_prompts: int = 0
    close_pairs: int = 0
    further_pairs: int = 0
    rows: int = 0

    @property
    def left_out(self) -> dict[str, int]:
        """What is left out, by its name in words."""
        names = ("blank_samples", "short_prompts", "tied_prompts", "close_pairs", "further_pairs")
        return {name.replace("_", " "): count for name in names if (count := asdict(self)[name])}

    def __str__(self) -> str:
        text = f"{self.samples} samples for {self.prompts} prompts gave {self.rows} rows"
        left_out = ", ".join(f"{name}: {count}" for name, count in self.left_out.items())
        return f"{text}; left out: {left_out}" if left_out else text


@dataclass(frozen=True)
class Pairing:
    """How samples become pairs; see `make_pairs`.

    Args:
        contrast: What chosen and rejected samples are generated from; None where both are the prompt itself.

    Raises:
        ValueError: An option that cannot be used.
    """

    strategy: Strategy
    min_score_difference: float
    max_pairs_per_prompt: int | None
    temperature: Temperature
    soft_labels: bool
    contrast: tuple[str, str] | None

    def __post_init__(self) -> None:
        check_pairing(self.strategy, self.min_score_difference, self.max_pairs_per_prompt)

    @property
    def options(self) -> dict[str, Any]:
        """For the record and the card."""
        options = asdict(self)
        del options["contrast"]
        if self.contrast is not None:
            options |= {"strategy": "contrast", "chosen_prompt": self.contrast[0], "rejected_prompt": self.contrast[1]}
        return options

    def rows(self, candidates: Candidates, counts: Counts) -> Iterator[dict[str, Any]]:
        """The pairs of all prompts."""
        temperatures = candidates.temperatures(self.temperature)
        for prompt, of, scores in candidates.by_prompt():
            combined = combined_scores(scores, temperatures) if scores and of else None
            choose = self._contrasting if self.contrast is not None else self._better_and_worse
            for pair in choose(of, combined, counts):
                row: dict[str, Any] = dict(prompt)
                for side, index in zip(("chosen", "rejected"), pair, strict=True):
                    sample = of[index]
                    row |= {side: cell(sample.file), f"{side}_model": sample.model, f"{side}_seed": sample.seed}
                    if combined is not None:
                        row[f"{side}_score"] = combined[index]
                        row |= {f"{side}_scores/{name}": values[index] for name, values in scores.items()}
                if self.soft_labels:
                    row["soft_label"] = float(preference_probabilities(scores, temperatures)[pair])
                yield row

    def _better_and_worse(
        self, of: list[Candidate], combined: list[float] | None, counts: Counts
    ) -> list[tuple[int, int]]:
        if combined is None or len(of) < 2:
            counts.short_prompts += 1
            return []
        if len(set(combined)) == 1:
            counts.tied_prompts += 1
            return []
        pairs, too_close, further = choose_pairs(
            combined, self.strategy, self.min_score_difference, self.max_pairs_per_prompt
        )
        counts.close_pairs += too_close
        counts.further_pairs += further
        return pairs

    def _contrasting(self, of: list[Candidate], combined: list[float] | None, counts: Counts) -> list[tuple[int, int]]:
        """Samples of the two sides with the same model and seed."""
        rejected = {(other.model, other.seed): index for index, other in enumerate(of) if not other.chosen_side}
        pairs = [
            (index, rejected[sample.model, sample.seed])
            for index, sample in enumerate(of)
            if sample.chosen_side and (sample.model, sample.seed) in rejected
        ]
        counts.short_prompts += not pairs
        if combined is not None:
            differences = {pair: combined[pair[0]] - combined[pair[1]] for pair in pairs}
            kept = [pair for pair in pairs if differences[pair] > 0 and differences[pair] >= self.min_score_difference]
            counts.close_pairs += len(pairs) - len(kept)
            pairs = sorted(kept, key=lambda pair: -differences[pair])
        kept = pairs[: self.max_pairs_per_prompt]
        counts.further_pairs += len(pairs) - len(kept)
        return kept

    def features(self, modality: Modality, rewards: list[str]) -> dict[str, Any]:
        """The columns' types."""
        features = {"prompt": Value("string"), **{side: sample_feature(modality) for side in ("chosen", "rejected")}}
        for side in ("chosen", "rejected"):
            features |= {f"{side}_model": Value("string"), f"{side}_seed": Value("int64")}
            if rewards:
                features[f"{side}_score"] = Value("float64")
                features |= {f"{side}_scores/{name}": Value("float64") for name in rewards}
        return features | ({"soft_label": Value("float64")} if self.soft_labels else {})

    def columns(self, modality: Modality, rewards: list[str]) -> dict[str, str]:
        """What the columns hold, in words, for the card."""
        columns = {
            "prompt": "the prompt",
            "chosen, rejected": f"the better and the worse {modality}",
            "chosen_model, rejected_model": "the model that generated it",
            "chosen_seed, rejected_seed": "its seed: `torch.Generator().manual_seed(seed)`",
        }
        if rewards:
            columns["chosen_score, rejected_score"] = "its score, by which the pair was made"
            columns["chosen_scores/..., rejected_scores/..."] = "its score by each reward"
        if self.soft_labels:
            columns["soft_label"] = "probability that the chosen one is better"
        return columns


@dataclass(frozen=True)
class Ranking:
    """How samples become rankings; see `make_rankings`."""

    temperature: Temperature
    contrast: None = None

    @property
    def options(self) -> dict[str, Any]:
        """For the record and the card."""
        return {"temperature": asdict(self)["temperature"]}

    def rows(self, candidates: Candidates, counts: Counts) -> Iterator[dict[str, Any]]:
        """The rankings of all prompts that have all of their samples."""
        temperatures, column = candidates.temperatures(self.temperature), SAMPLES[candidates.modality]
        for prompt, of, scores in candidates.by_prompt():
            # Trainers on rankings need as many samples in each row.
            if len(of) < candidates.per_prompt:
                counts.short_prompts += 1
                continue
            combined = combined_scores(scores, temperatures)
            if len(set(combined)) == 1:
                counts.tied_prompts += 1
                continue
            yield {
                **prompt,
                column: [cell(sample.file) for sample in of],
                "scores": combined,
                **{f"scores/{name}": values for name, values in scores.items()},
                "models": [sample.model for sample in of],
                "seeds": [sample.seed for sample in of],
            }

    def features(self, modality: Modality, rewards: list[str]) -> dict[str, Any]:
        """The columns' types."""
        numbers = List(Value("float64"))
        return {
            "prompt": Value("string"),
            SAMPLES[modality]: List(sample_feature(modality)),
            "scores": numbers,
            **dict.fromkeys([f"scores/{name}" for name in rewards], numbers),
            "models": List(Value("string")),
            "seeds": List(Value("int64")),
        }

    def columns(self, modality: Modality, rewards: list[str]) -> Mapping[str, str]:
        """What the columns hold, in words, for the card."""
        return {
            "prompt": "the prompt",
            SAMPLES[modality]: "the samples",
            "scores": "their scores, higher is better",
            "scores/...": "their scores by each reward",
            "models": "the models that generated them",
            "seeds": "their seeds: `torch.Generator().manual_seed(seed)`",
        }
