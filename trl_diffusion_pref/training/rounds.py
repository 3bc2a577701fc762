"""Iterated preference optimisation: sample, score, pair, train, with each round's model the next one's sampler."""

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline
from peft import LoraConfig

from ..evaluation.loading import loaded_pipeline
from ..evaluation.sampling import described_options
from ..export.files import write_whole
from ..export.weights import LORA_FILE, load_denoisers
from ..families import Family, family_for
from ..preference_data import make_pairs
from ..preference_data.prompts import Prompts, edits_digest, read_edits
from ..preference_data.reward_identity import reward_identity
from ..rewards.scoring import Rewards, named_rewards
from .checkpoint import last_usable_checkpoint
from .config import DiffusionPreferenceConfig
from .pipelines import family_of
from .quantised import loading_options
from .trainer import DiffusionTrainer


logger = logging.getLogger(__name__)

# In the output folder: what all rounds depend on; and in a round's folder, written last: what it gave.
_RUN, _ROUND = "rounds.json", "round.json"


@dataclass(frozen=True)
class Round:
    """One round of `train_in_rounds`.

    Args:
        number: From 1.
        folder: Its weights: a pipeline, or a LoRA for the base.
        pairs: How many it was trained on.
        scores: By reward, the mean score of the pairs' chosen and of their rejected samples, which the round's
            starting model generated.
        train_loss: Mean of the training.
    """

    number: int
    folder: Path
    pairs: int
    scores: dict[str, dict[str, float]]
    train_loss: float


def train_in_rounds(
    trainer_class: type[DiffusionTrainer],
    model: str | os.PathLike[str] | DiffusionPipeline,
    args: DiffusionPreferenceConfig,
    prompts: Prompts,
    rewards: Rewards,
    *,
    rounds: int = 2,
    samples_per_prompt: int = 4,
    soft_labels: bool | None = None,
    pair_options: Mapping[str, Any] | None = None,
    eval_dataset: Dataset | None = None,
    peft_config: LoraConfig | None = None,
    **pipeline_kwargs: Any,
) -> list[Round]:
    """Trains on self-made pairs, several times over: prompts are all that is needed.

    Each round samples the prompts with the model that the round before gave, makes pairs by the rewards' scores, and
    trains on them. The round's start is also its reference, where the algorithm has one.

    The call goes on where it was interrupted, in any phase: with the samples and scores that are missing, or from the
    last checkpoint of a training. It ends with the same weights as a call that was not.

    Args:
        trainer_class: Of an algorithm on pairs, such as `MaPOTrainer`.
        model: Hub id, folder or loaded pipeline. A loaded one is trained in place, and ends with the last round's
            weights.
        args: Of each round's training. Round k is in `<output_dir>/round-<k>`, and its seed is `seed + k - 1`.
        prompts: See `make_pairs`; for pipelines that edit images, with the images.
        rewards: See `rewards.score`.
        rounds: How often, at least 1. More can be added later by another call.
        samples_per_prompt: In each round.
        soft_labels: Whether pairs have the probability that chosen is better, the mean over the rewards of
            `sigmoid(difference / temperature)`, see `make_pairs`. Default: where the loss reads it, which is iREPO's
            (`DiffusionDPOConfig(loss_type="irepo")`): rounds of its regression on the answers of several rewards.
        pair_options: Further arguments of `make_pairs`, such as `{"strategy": "all", "batch_size": 16}`.
        eval_dataset: Held-out pairs for the trainers.
        peft_config: Trains one LoRA through all rounds.
        **pipeline_kwargs: Arguments of the pipeline's call when it samples, such as `num_inference_steps`.

    Returns:
        What each round gave.

    Raises:
        ValueError: An algorithm without pairs, `output_dir` holds rounds with other options, a LoRA of a pipeline
            without `load_lora_weights`, or what `make_pairs` and the trainer refuse.
        RewardError: A reward fails.

    Example:

    ```python
    from trl_diffusion_pref import MaPOConfig, MaPOTrainer, train_in_rounds
    from trl_diffusion_pref.rewards import PickScore

    args = MaPOConfig(output_dir="rounds", max_steps=500)
    train_in_rounds(MaPOTrainer, "stable-diffusion-v1-5/stable-diffusion-v1-5", args, "prompts.txt", PickScore())
    ```
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one is needed.")
    if not trainer_class.layout.is_pairs:
        raise ValueError(f"{trainer_class.__name__} does not train on pairs, which rounds make. Use one that does.")
    edits, named, output = read_edits(prompts), named_rewards(rewards), Path(str(args.output_dir))
    options = {"samples_per_prompt": samples_per_prompt, **(pair_options or {}), **pipeline_kwargs}
    if soft_labels or (soft_labels is None and args.reads_soft_labels):
        options.setdefault("soft_labels", True)
    _check_run(
        output,
        {
            "trainer": trainer_class.__name__,
            "seed": args.seed,
            "prompts": {"number": len(edits.prompts), "digest": edits_digest(edits)},
            "rewards": {name: reward_identity(reward) for name, reward in named.items()},
            "sampling and pairs": described_options(options),
        },
    )
    loading = args.loading
    if args.quantize is not None:
        loading = loading_options(model, args, family_of(model, loading), lora=peft_config is not None)
    pipeline = loaded_pipeline(model, loading or None)
    family = family_for(pipeline).with_denoiser(args.denoiser)
    if peft_config is not None and family.lora_format == "peft":
        raise ValueError(
            f"{type(pipeline).__name__} has no load_lora_weights, with which the next round would go on training the "
            "LoRA. Leave peft_config out, or call make_pairs and the trainer by yourself."
        )
    results: list[Round] = []
    for number in range(1, rounds + 1):
        folder = output / f"round-{number}"
        if not (folder / _ROUND).exists():
            if results:
                _load_weights(pipeline, family, results[-1].folder)
            pairs = make_pairs(
                {f"start of round {number}": pipeline},
                edits,
                named,
                folder / "data",
                seed=args.seed + number - 1,
                **options,
            )
            loss = _train(trainer_class, pipeline, args, number, folder, pairs, eval_dataset, peft_config)
            found = Round(number, folder, len(pairs), _mean_scores(pairs, list(named)), loss)
            if PartialState().is_main_process:
                stored = {name: value for name, value in asdict(found).items() if name != "folder"}
                write_whole(folder / _ROUND, json.dumps(stored, indent=1).encode())
            PartialState().wait_for_everyone()
        results.append(Round(folder=folder, **json.loads((folder / _ROUND).read_text())))
        logger.warning("Round %d of %d: %d pairs, %s.", number, rounds, results[-1].pairs, results[-1].scores)
    _load_weights(pipeline, family, results[-1].folder)
    return results


def _check_run(output: Path, record: dict[str, Any]) -> None:
    """Raises where a folder has rounds of another call; else notes what this one depends on."""
    file, wanted = output / _RUN, json.loads(json.dumps(record))
    stored = json.loads(file.read_text()) if file.exists() else wanted
    different = [
        f"{name} (there {stored.get(name)}, now {value})"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if different:
        raise ValueError(f"{output} holds rounds of another call: {'; '.join(different)}. Choose another output_dir.")
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        write_whole(file, json.dumps(wanted, indent=1).encode())


def _train(
    trainer_class: type[DiffusionTrainer],
    pipeline: DiffusionPipeline,
    args: DiffusionPreferenceConfig,
    number: int,
    folder: Path,
    pairs: Dataset,
    eval_dataset: Dataset | None,
    peft_config: LoraConfig | None,
) -> float:
    """The training of one round, from its last usable checkpoint where there is one; returns the mean loss."""
    own = copy.copy(args)
    # Else every round would draw the same noise and order.
    own.seed = args.seed + number - 1
    own.data_seed = None if args.data_seed is None else args.data_seed + number - 1
    own.output_dir = str(folder)
    # They belong to pipelines that are given by name.
    own.model_init_kwargs = own.quantize = None
    # A pipeline that carries the LoRA goes on training it.
    lora = peft_config if number == 1 else None
    trainer = trainer_class(pipeline, own, pairs, eval_dataset, peft_config=lora)
    checkpoint, _ = last_usable_checkpoint(folder)
    found = trainer.train(resume_from_checkpoint=checkpoint is not None)
    trainer.save_model()
    return float(found.training_loss)


def _load_weights(pipeline: DiffusionPipeline, family: Family, folder: Path) -> None:
    """Puts the weights that a round has saved into the pipeline, as they come back from disk."""
    each = [family.with_denoiser(name) for name in family.trained_ranges(pipeline)]
    with_lora = [own for own in each if (folder / own.own_file(LORA_FILE)).is_file()]
    if with_lora:
        pipeline.unload_lora_weights()
        for own in with_lora:
            pipeline.load_lora_weights(folder, **own.lora_arguments())
        return
    load_denoisers(family.denoiser(pipeline), family.denoiser_name, folder)


def _mean_scores(pairs: Dataset, rewards: list[str]) -> dict[str, dict[str, float]]:
    """By reward, the mean scores of chosen and of rejected samples."""

    def means(reward: str) -> Iterator[tuple[str, float]]:
        for side in ("chosen", "rejected"):
            values = pairs[f"{side}_scores/{reward}"]
            yield side, sum(values) / len(values)

    return {reward: dict(means(reward)) for reward in rewards}
