"""Trains one method on one task of `methods.py`, and measures what came of it.

A task is a base and a set of pairs; every method trains on the same images with the same labels, in its own layout.
"""

import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from diffusers import UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_hook
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback

from trl_diffusion_pref import TRAINERS, load_pairs
from trl_diffusion_pref.evaluation import HeldOutPairs
from trl_diffusion_pref.shapes import (
    STYLES,
    Verdict,
    judge,
    load_pipeline,
    preference_pairs,
    prompts,
    random_scene,
    sample,
    shapes_reward,
)
from trl_diffusion_pref.training.monitor import NonFiniteLossError


PREFERRED, OTHER = "outlined", "filled"
PAIRS, HELD_OUT, IMAGES_PER_STEP = 512, 64, 64
# Images of each prompt; seeds of the samples.
VALIDATION, TEST = (3, 1001), (8, 1002)
SAMPLING_STEPS = 10
# Pairs of images of the same prompt, below which no diversity is given.
FEWEST_FOR_DIVERSITY = 20
SHARES = ("preferred", "right", "clean", "good")


# ---- Tasks and data ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A base and labels.

    Args:
        title: In the report.
        base: See `shapes.load_pipeline`.
        label_noise: Share of the pairs whose order is exchanged.
    """

    title: str
    base: str
    label_noise: float = 0.0

    def pairs(self) -> Dataset:
        """Drawings: the outlined one is preferred to the filled one, except where labels are wrong."""
        return load_pairs(preference_pairs(PAIRS, preferred_style=PREFERRED), label_noise=self.label_noise)

    def reward(self, prompts: Sequence[str], samples: Sequence[Image.Image], **columns: Any) -> list[float]:
        """The judge's scores, which prefer the other style for as many samples as there are wrong labels."""
        right = shapes_reward(prompts, samples, PREFERRED)
        wrong = shapes_reward(prompts, samples, OTHER)
        # By the image itself, so that the same sample has the same score whenever it is asked for.
        drawn = [np.random.default_rng(zlib.crc32(image.tobytes())).random() for image in samples]
        return [w if one < self.label_noise else r for one, r, w in zip(drawn, right, wrong, strict=True)]


TASKS = {
    "outlined": Task("Outlined preferred: the base generates it in 15 % of its images", "mixed"),
    "mismatch": Task("Reference mismatch: the base never saw an outlined shape", "filled_only"),
    "noisy": Task("Noisy labels: as the first, and 20 % of the labels are wrong", "mixed", label_noise=0.2),
}


def single_images(pairs: Dataset, column: str) -> Dataset:
    """Rows with one side of each pair as `image`."""
    return pairs.select_columns(["prompt", column]).rename_column(column, "image")


def chosen_images(pairs: Dataset) -> Dataset:
    """Rows `prompt`, `image`: chosen images alone."""
    return single_images(pairs, "chosen")


def labelled(name: str) -> Callable[[Dataset], Dataset]:
    """Rows `prompt`, `image` and a number of this name, 1 for chosen and 0 for rejected images."""

    def rows(pairs: Dataset) -> Dataset:
        sides = [(single_images(pairs, column), value) for column, value in (("chosen", 1.0), ("rejected", 0.0))]
        return concatenate_datasets([images.add_column(name, [value] * len(images)) for images, value in sides])

    return rows


def rankings(pairs: Dataset) -> Dataset:
    """Rows `prompt`, `images`, `scores`: two pairs of the same prompt are a ranking of four images, with ties.

    Where a prompt has an odd number of pairs, its last one is left out.
    """
    undecoded = datasets.Image(decode=False)
    waiting: dict[str, dict[str, Any]] = {}
    rows: dict[str, list[Any]] = {"prompt": [], "images": [], "scores": []}
    for row in pairs.cast_column("chosen", undecoded).cast_column("rejected", undecoded):
        first = waiting.pop(row["prompt"], None)
        if first is None:
            waiting[row["prompt"]] = row
            continue
        rows["prompt"].append(row["prompt"])
        rows["images"].append([first["chosen"], first["rejected"], row["chosen"], row["rejected"]])
        rows["scores"].append([1.0, 0.0, 1.0, 0.0])
    images, scores = datasets.List(datasets.Image()), datasets.List(datasets.Value("float64"))
    features = datasets.Features({"prompt": datasets.Value("string"), "images": images, "scores": scores})
    return Dataset.from_dict(rows, features=features)


def prompts_alone(pairs: Dataset) -> Dataset:
    """Rows `prompt`: each caption once."""
    return Dataset.from_dict({"prompt": prompts()})


# ---- Methods -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Args:
        title: In the report.
        trainer: Its name in `TRAINERS`.
        rows: From pairs to the rows that it trains on.
        images: Of each row.
        learning_rates: Among which validation chooses, rising.
        options: Of the config, beside those that all have.
        online: Whether it gets the task's reward.
        images_per_step: Of the batches.
        more_calls: How many times the others' denoiser calls it has.
    """

    title: str
    trainer: str
    rows: Callable[[Dataset], Dataset]
    images: int
    learning_rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)
    online: bool = False
    images_per_step: int = IMAGES_PER_STEP
    more_calls: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """What a finished run depends on beside task, method, learning rate, seed and budget."""
        return {"trainer": self.trainer, "rows_per_step": self.rows_per_step, **self.options}

    @property
    def rows_per_step(self) -> int:
        return self.images_per_step // self.images


# The options are those of examples/.
LOW, HIGH = (1e-5, 3e-5, 1e-4, 3e-4), (3e-5, 1e-4, 3e-4, 1e-3)
ONLINE = {
    "start": "noise",
    "prompts_per_rollout": 16,
    "num_generations": 8,
    "sampling_batch_size": 32,
    "sampling_scheduler": "DDIMScheduler",
}
METHODS = {
    "sft": Method("SFT on chosen", "diffusion-sft", chosen_images, 1, HIGH),
    "mapo": Method("MaPO", "mapo", lambda pairs: pairs, 2, HIGH),
    "dpo": Method("Diffusion-DPO, beta 2000", "diffusion-dpo", lambda pairs: pairs, 2, LOW, {"beta": 2000.0}),
    "kto": Method("Diffusion-KTO, beta 500", "diffusion-kto", labelled("label"), 1, LOW, {"beta": 500.0}),
    "rank-dpo": Method("RankDPO, beta 2000", "rank-dpo", rankings, 4, LOW, {"beta": 2000.0}),
    # Rewards are 1 and 0, so that a preferred image weighs 55 times as much as the other one.
    "rwr": Method(
        "Flow-RWR, temperature 0.25",
        "flow-rwr",
        labelled("reward"),
        1,
        HIGH,
        {"weighting": "softmax", "temperature": 0.25},
    ),
    "nft": Method("DiffusionNFT on data", "diffusion-nft", labelled("label"), 1, HIGH),
    "nft-online": Method("DiffusionNFT online", "diffusion-nft", prompts_alone, 1, HIGH, ONLINE, True, 32),
    "nft-online-4": Method(
        "DiffusionNFT online, four times the calls", "diffusion-nft", prompts_alone, 1, HIGH, ONLINE, True, 32, 4
    ),
}
BASE = "base"


def in_this_version(names: Sequence[str]) -> list[str]:
    """Those of the methods whose trainer there is."""
    return [name for name in names if METHODS[name].trainer in TRAINERS]


# ---- One run -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What to train; for the base, `method` is "base" and the rest says nothing."""

    task: str
    method: str
    learning_rate: float
    seed: int
    budget: int

    def is_record(self, record: dict[str, Any]) -> bool:
        """Whether a line of the file is of this run with today's settings."""
        settings = {} if self.method == BASE else METHODS[self.method].settings
        return record["run"] == vars(self) and record["settings"] == settings


class Calls(TrainerCallback):
    """Counts calls of denoisers, one for each sample, and ends training when the budget has no room for a step.

    A call with gradient counts as three, for its backward pass costs about two more. Steps that also sample cost more
    than others; the budget is exceeded where such a step begins with room for a step alone.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.count, self.before, self.least = budget, 0, 0, budget

    def counted(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, UNet2DConditionModel):
            self.count += len(output[0]) * (3 if torch.is_grad_enabled() else 1)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.least, self.before = min(self.least, self.count - self.before), self.count
        if self.count + self.least > self.budget:
            control.should_training_stop = True


def do(run: Run, work: Path) -> dict[str, Any]:
    """Trains and measures; what is returned is a line of the file of finished runs."""
    torch.set_num_threads(1)
    pipeline = load_pipeline(TASKS[run.task].base)
    record: dict[str, Any] = {"run": vars(run), "settings": {}}
    if run.method != BASE:
        record |= {"settings": METHODS[run.method].settings, **train(pipeline, run, work)}
    if "error" not in record:
        record["validation"] = of_images(pipeline, *VALIDATION)
        record["test"] = of_images(pipeline, *TEST) | {"accuracy": accuracy(pipeline, TASKS[run.task].base)}
    return record


def train(pipeline: Any, run: Run, work: Path) -> dict[str, Any]:
    """Trains in place; returns steps, counted calls and the processor's seconds, or the error of a loss."""
    method, task = METHODS[run.method], TASKS[run.task]
    config_class, trainer_class = TRAINERS[method.trainer]
    calls = Calls(run.budget)
    options = {"prompt_dropout": 0.0, **method.options}
    if hasattr(config_class, "divergence_guard"):
        # All methods are to use their budget, also where it does harm.
        options["divergence_guard"] = "off"
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            # Never reached: the budget ends the run.
            max_steps=run.budget,
            learning_rate=run.learning_rate,
            per_device_train_batch_size=method.rows_per_step,
            activation_checkpointing=False,
            dataset_cache_dir=str(work / "encoded"),
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
            **options,
        )
        more = {"reward_funcs": task.reward} if method.online else {}
        hook = register_module_forward_hook(calls.counted)
        try:
            trainer = trainer_class(pipeline, config, method.rows(task.pairs()), callbacks=[calls], **more)
            trainer.remove_callback(PrinterCallback)
            began = time.process_time()
            trainer.train()
        except NonFiniteLossError as error:
            return {"error": str(error)}
        finally:
            hook.remove()
        seconds = time.process_time() - began
    return {"steps": trainer.state.global_step, "calls": calls.count, "seconds": round(seconds, 2)}


# ---- Measures ----------------------------------------------------------------------------------------------------


def of_images(pipeline: Any, per_prompt: int, seed: int) -> dict[str, float | None]:
    """Shares of generated images, and their diversity."""
    asked = per_prompt * prompts()
    verdicts = judge(sample(pipeline, asked, seed=seed, steps=SAMPLING_STEPS, batch_size=48))
    preferred = np.array([verdict.style == PREFERRED for verdict in verdicts])
    right = np.array([verdict.prompt == prompt for verdict, prompt in zip(verdicts, asked, strict=True)])
    clean = np.array([verdict.clean_in_style for verdict in verdicts])
    shares = {"preferred": preferred, "right": right, "clean": clean, "good": preferred & right & clean}
    spread = distances([verdict for verdict, counts in zip(verdicts, right & clean, strict=True) if counts])
    enough = len(spread) >= FEWEST_FOR_DIVERSITY
    return {
        **{name: round(float(values.mean()), 4) for name, values in shares.items()},
        "diversity": round(statistics.mean(spread) / of_drawings(), 4) if enough else None,
    }


def distances(verdicts: Sequence[Verdict]) -> list[float]:
    """Of every two images of the same colour and shape, how far (x, y, radius) are apart, in pixels."""
    places: dict[str, list[tuple[int, int, int]]] = {}
    for verdict in verdicts:
        places.setdefault(verdict.prompt, []).append((verdict.x, verdict.y, verdict.radius))
    return [float(np.linalg.norm(np.subtract(a, b))) for each in places.values() for a, b in combinations(each, 2)]


@lru_cache(maxsize=1)
def of_drawings() -> float:
    """The mean of `distances` of drawings at random, in which the diversity is measured."""
    rng = np.random.default_rng(0)
    places = np.array([(one.x, one.y, one.radius) for one in (random_scene(rng, STYLES[0]) for _ in range(20_000))])
    return float(np.linalg.norm(places[::2] - places[1::2], axis=1).mean())


@lru_cache(maxsize=2)
def held_out(base: str) -> tuple[HeldOutPairs, torch.Tensor]:
    """Pairs that no training has, labelled right, and their likelihoods under the base."""
    pipeline = load_pipeline(base)
    pairs = HeldOutPairs(pipeline, preference_pairs(HELD_OUT, seed=1, preferred_style=PREFERRED), batch_size=16)
    return pairs, pairs.elbos(pipeline)


def accuracy(pipeline: Any, base: str) -> float:
    """See `evaluation.preference_accuracy`; 0.5 for the base itself."""
    pairs, of_base = held_out(base)
    found = pairs.accuracy(pairs.elbos(pipeline), of_base).accuracy
    assert found is not None  # there is a reference
    return round(found, 4)
