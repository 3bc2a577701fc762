"""Commands that sample and score: make-pairs, make-rankings, score, compare, evaluate."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline

from ..evaluation import HeldOutPairs, compare, preference_accuracy
from ..evaluation.loading import loaded_pipeline
from ..export.files import write_whole
from ..guidance.tuned import with_tuned_weights
from ..preference_data import make_pairs, make_rankings, push_dataset, relabel
from ..preference_data.prompts import read_edits
from ..training.documented import documented
from .command import Command
from .data_sets import one_data_set
from .functions import argument_helps, arguments_from, as_mapping, options_of
from .parser import Parsed, UsageError
from .rewards import rewards_named
from .run_options import ModelOptions, model_named


_MODELS = {"pipelines": "model_name_or_path"}
_HOW = {"model_init_kwargs": dict[str, Any] | str | None, "device": str | None}


@documented
@dataclass(kw_only=True)
class PipelineOptions:
    """
    > How the pipeline is called

        pipeline_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the pipeline's call, as JSON or a mapping in YAML: `{"num_inference_steps": 20}`.
    """

    pipeline_kwargs: dict[str, Any] | str | None = None


@documented
@dataclass(kw_only=True)
class HubDatasetOptions:
    """
    > The Hub

        hub_dataset_id (`str`, *optional*):
            Uploads the data set with its card under this name, "user/name".
        hub_private (`bool`, *optional*, defaults to `False`):
            Whether a new repository is private.
    """

    hub_dataset_id: str | None = None
    hub_private: bool = False


@documented
@dataclass(kw_only=True)
class RewardOptions:
    """
    > Rewards

        rewards (`list[str]`, *optional*):
            PickScore, CLIPScore, HPS, ImageReward, Aesthetic or another class of `trl_diffusion_pref.rewards`;
            package.module:name for your own; shapes for drawn shapes.
        reward_kwargs (`dict[str, Any]`, *optional*):
            Arguments of the rewards' classes, as JSON or a mapping in YAML: `{"HTTPReward": {"url": "..."}}`.
    """

    rewards: list[str] | None = None
    reward_kwargs: dict[str, Any] | str | None = None

    def named(self) -> list[Any] | None:
        arguments = as_mapping("reward_kwargs", self.reward_kwargs)
        return None if self.rewards is None else rewards_named(self.rewards, arguments)

    def required(self) -> list[Any]:
        if not self.rewards:
            raise UsageError("rewards is missing: add --rewards PickScore, or your own as package.module:name.")
        return self.named() or []


# Where the functions take more than a flag can have.
_PLAIN_HELPS = {
    "prompts": "A file of prompts: .txt with one on each line; .csv, .json, .jsonl or .parquet with a column "
    "`prompt`, or the folder of a stored data set. For pipelines that edit images also with a column `image`.",
    "temperature": "Divides differences of scores before the sigmoid. Default: each reward's standard deviation "
    "within prompts, so that all rewards count alike.",
    "model_init_kwargs": 'Arguments of `from_pretrained` as JSON: {"dtype": "bfloat16"}; float32 is the default.',
}


def _named_models(words: Sequence[str]) -> dict[str, str]:
    """Models as "name=model", or by the last part of their path; as the functions take them."""
    named: dict[str, str] = {}
    for word in words:
        name, separator, model = word.partition("=")
        # A folder may be called lr=1e-4.
        if not separator or "/" in name or Path(word).exists():
            name, model = Path(word).resolve().name if Path(word).exists() else word.rpartition("/")[2], word
            name = name.partition(":")[0]
        if not name or not model or name in named:
            raise UsageError(f"{word!r}: name each model once, as name=model.")
        named[name] = model_named(model)
    return named


def _arguments(options: Any, rename: Mapping[str, str]) -> dict[str, Any]:
    """A function's arguments, with `model_init_kwargs` as a mapping."""
    arguments = arguments_from(options, rename)
    return arguments | {"model_init_kwargs": as_mapping("model_init_kwargs", arguments["model_init_kwargs"]) or None}


# ---- Making data ---------------------------------------------------------------------------------------------------


def _making(function: Any, folder: str) -> tuple[type, Any]:
    types_of = {"pipelines": list[str], "prompts": str, "temperature": float | None, **_HOW}
    # make_rankings refers to make_pairs.
    helps = {**argument_helps(make_pairs), **_PLAIN_HELPS}
    kind = options_of(
        function, leave_out=("rewards",), rename=_MODELS, types_of=types_of, helps=helps, subject="What is made"
    )

    def run(parsed: Parsed, words: Sequence[str]) -> int:
        options, rewards, pipeline, hub = parsed.options
        arguments = _arguments(options, _MODELS)
        models = _named_models(arguments.pop("pipelines"))
        rows = function(
            next(iter(models.values())) if len(models) == 1 else models,
            arguments.pop("prompts"),
            rewards.named(),
            **arguments,
            **as_mapping("pipeline_kwargs", pipeline.pipeline_kwargs),
        )
        where = Path(options.output) / folder
        if PartialState().is_main_process:
            print(f"{len(rows):,} {folder} in {where}")
            _push(where, hub)
        return 0

    return kind, run


def _push(folder: Path, hub: HubDatasetOptions) -> None:
    if hub.hub_dataset_id:
        print(push_dataset(folder, hub.hub_dataset_id, private=hub.hub_private))


_MAKE_PAIRS, _run_make_pairs = _making(make_pairs, "pairs")
_MAKE_RANKINGS, _run_make_rankings = _making(make_rankings, "rankings")


# ---- Scoring -------------------------------------------------------------------------------------------------------


@documented
@dataclass(kw_only=True)
class RowsOptions:
    """
    > Data

        dataset_name (`str`):
            Pairs or rankings: a name on the Hub, a file, a folder or a glob of what `load_pairs` takes.
        dataset_split (`str`, *optional*, defaults to `"train"`):
            Its split.
    """

    dataset_name: str
    dataset_split: str = "train"

    def read(self) -> Dataset:
        rows = one_data_set(self.dataset_name, self.dataset_split, None)
        if not isinstance(rows, Dataset):
            raise UsageError(
                f"{self.dataset_name} is encoded already; rewards and models need the samples themselves."
            )
        return rows


_SCORE = options_of(
    relabel,
    leave_out=("dataset", "rewards", "output"),
    types_of={"temperature": float | None},
    helps={"temperature": _PLAIN_HELPS["temperature"]},
    subject="How labels are made",
)


@documented
@dataclass(kw_only=True)
class ScoreOutput:
    """
    > Output

        output (`str`):
            Folder for the scored data set and for the scores, so that a run that was killed goes on.
    """

    output: str


def _run_score(parsed: Parsed, words: Sequence[str]) -> int:
    rows, rewards, how, target = parsed.options
    folder = Path(target.output)
    there = next((name for name in ("pairs", "rankings") if (folder / name).exists()), None)
    if there is not None:
        raise UsageError(f"{folder / there} exists already. Name another --output.")
    scored = relabel(rows.read(), rewards.required(), output=folder, **arguments_from(how))
    name = "pairs" if "chosen" in scored.column_names else "rankings"
    if PartialState().is_main_process:
        scored.save_to_disk(str(folder / name))
        columns = ", ".join(column for column in scored.column_names if "score" in column or column == "soft_label")
        print(f"{len(scored):,} {name} with {columns} in {folder / name}")
    return 0


# ---- Verdicts ------------------------------------------------------------------------------------------------------

_BASE = {"base": "model_name_or_path"}
_COMPARE = options_of(
    compare,
    leave_out=("rewards", "pairs", "images"),
    rename=_BASE,
    types_of={"base": str, "tuned": list[str], "prompts": str, **_HOW},
    helps={
        "prompts": _PLAIN_HELPS["prompts"],
        "model_init_kwargs": _PLAIN_HELPS["model_init_kwargs"],
        "tuned": "Tuned models, each as name=model, or as a model that is named after the last part of its path: "
        "LoRAs, denoisers or pipelines, by file, folder or Hub id.",
    },
    subject="What is compared",
)


@documented
@dataclass(kw_only=True)
class HeldOutOptions:
    """
    > Held-out pairs

        dataset_name (`str`, *optional*):
            Held-out pairs, for the preference accuracy: what `load_pairs` takes.
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Their split.
    """

    dataset_name: str | None = None
    dataset_split: str = "test"

    def read(self) -> Dataset | None:
        if self.dataset_name is None:
            return None
        return RowsOptions(dataset_name=self.dataset_name, dataset_split=self.dataset_split).read()


def _run_compare(parsed: Parsed, words: Sequence[str]) -> int:
    options, rewards, pipeline, held_out = parsed.options
    arguments = _arguments(options, _BASE)
    tuned = _named_models(arguments.pop("tuned"))
    edits = read_edits(arguments.pop("prompts"))
    found = compare(
        model_named(arguments.pop("base")),
        tuned,
        edits.prompts,
        rewards.required(),
        images=edits.images,
        pairs=held_out.read(),
        **arguments,
        **as_mapping("pipeline_kwargs", pipeline.pipeline_kwargs),
    )
    if PartialState().is_main_process:
        print(found.to_markdown())
        print(f"page: {Path(options.output) / 'index.html'}")
    return 0


_EVALUATE = options_of(
    preference_accuracy,
    leave_out=("pipeline", "dataset", "reference"),
    types_of={"resolution": str | None},
    subject="How likelihoods are estimated",
)


@documented
@dataclass(kw_only=True)
class EvaluatedRows(RowsOptions):
    """
    > Data

        dataset_split (`str`, *optional*, defaults to `"test"`):
            Their split.
    """

    dataset_split: str = "test"


@documented
@dataclass(kw_only=True)
class EvaluateOptions:
    """
    > What is evaluated

        tuned (`str`, *optional*):
            A tuned model: LoRA, denoiser or pipeline, by folder or Hub id. `model_name_or_path` is then its reference.
        output (`str`, *optional*):
            JSON file for the result.
    """

    tuned: str | None = None
    output: str | None = None


def _run_evaluate(parsed: Parsed, words: Sequence[str]) -> int:
    model, evaluated, rows, how = parsed.options
    held_out = rows.read()
    pipeline: DiffusionPipeline = loaded_pipeline(model.model)
    with HeldOutPairs(pipeline, held_out, **arguments_from(how)) as pairs:
        elbos, reference = pairs.elbos(pipeline), None
        if evaluated.tuned is not None:
            reference = elbos
            with with_tuned_weights(pipeline, evaluated.tuned):
                elbos = pairs.elbos(pipeline)
        found = HeldOutPairs.accuracy(elbos, reference)
    text = json.dumps(vars(found), indent=2)
    if not PartialState().is_main_process:
        return 0
    print(text)
    if evaluated.output:
        write_whole(Path(evaluated.output), f"{text}\n".encode())
    return 0


SAMPLING_COMMANDS = [
    Command(
        "make-pairs",
        "makes pairs from prompts: samples of models, scored and paired",
        [_MAKE_PAIRS, RewardOptions, PipelineOptions, HubDatasetOptions],
        _run_make_pairs,
    ),
    Command(
        "make-rankings",
        "makes rankings from prompts: samples of models, scored",
        [_MAKE_RANKINGS, RewardOptions, PipelineOptions, HubDatasetOptions],
        _run_make_rankings,
    ),
    Command(
        "score",
        "scores pairs or rankings by rewards, and labels them again",
        [RowsOptions, RewardOptions, _SCORE, ScoreOutput],
        _run_score,
        positional=("dataset_name",),
    ),
    Command(
        "compare",
        "compares tuned models with their base, and writes a page",
        [_COMPARE, RewardOptions, PipelineOptions, HeldOutOptions],
        _run_compare,
    ),
    Command(
        "evaluate",
        "measures the preference accuracy on held-out pairs",
        [ModelOptions, EvaluateOptions, EvaluatedRows, _EVALUATE],
        _run_evaluate,
    ),
]
