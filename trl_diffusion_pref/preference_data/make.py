"""From prompts alone to pairs or rankings: samples of the user's own models, scored by rewards."""

import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, Image, List

from ..rewards.scoring import Rewards, named_rewards
from .candidates import Pipelines, Sampling, sample_candidates
from .dataset import check_stored, load_stored, write_dataset
from .pairing import Strategy, Temperature
from .prompts import Prompts, edits_digest, read_edits
from .reward_identity import reward_identity
from .rows import Counts, Pairing, Ranking


logger = logging.getLogger(__name__)


def make_pairs(
    pipelines: Pipelines,
    prompts: Prompts,
    rewards: Rewards | None,
    output: str | os.PathLike[str],
    *,
    samples_per_prompt: int = 4,
    strategy: Strategy = "best_worst",
    min_score_difference: float = 0.0,
    max_pairs_per_prompt: int | None = None,
    temperature: Temperature = None,
    soft_labels: bool = False,
    chosen_prompt: str = "{prompt}",
    rejected_prompt: str = "{prompt}",
    seed: int = 0,
    batch_size: int = 4,
    exact: bool = True,
    model_init_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    **pipeline_kwargs: Any,
) -> Dataset:
    """Makes preference pairs from prompts: samples each prompt, scores the samples, and pairs better with worse ones.

    Under `accelerate launch` all processes sample and score. A run that was killed goes on with the samples and scores
    that are missing, and a run that is complete gives its data set again.

    *Contrast prompts* need no rewards: with `chosen_prompt="{prompt}, watercolour"` the chosen sample of a pair is
    generated from the longer prompt and the rejected one from the prompt itself, with the same seed, and both are
    stored under the prompt itself. MaPO's data sets Pick-Style and Pick-Safety were made so (arXiv:2406.06424).

    Args:
        pipelines: A pipeline, loaded or by its folder or Hub id, or several by the name that the columns show. The
            samples of all of them compete.
        prompts: See `read_prompts`: a list, a file, or a data set with a column `prompt`. For pipelines that edit
            images, a file or data set that also has the column `image`: what is to be edited, an image or a list of
            them. Rewards get it as the column `image`, and the pairs have it too.
        rewards: One, several, or several by name, see `rewards.score`. With several, samples are compared by their
            Bradley-Terry strengths, see `temperature`. None only with contrast prompts.
        output: Folder for `pairs/` (the data set, its options and card), `samples/` and `scores/`.
        samples_per_prompt: Of each pipeline, and with contrast prompts of each side.
        strategy: "best_worst", the best sample of a prompt with the worst, or "all", each two samples.
        min_score_difference: Pairs whose scores differ by less are left out. In the unit of the score: the only
            reward's own, or for several rewards that of their log odds.
        max_pairs_per_prompt: Those with the largest differences are kept.
        temperature: Divides differences of scores before the sigmoid, for `soft_labels` and for several rewards: a
            number, or one by name of the reward. None: each reward's standard deviation within prompts, so that all
            rewards count alike.
        soft_labels: Whether to add `soft_label`, the probability that the chosen sample is better: the mean over
            rewards of `sigmoid(difference / temperature)`.
        chosen_prompt, rejected_prompt: What samples are generated from, with `{prompt}` in it. If they differ, pairs
            are of samples with the same seed; with rewards, both are scored for the prompt itself, and pairs whose
            chosen sample is not better are left out.
        seed: Of the samples' seeds, which depend on the prompt.
        batch_size, exact: See `evaluation.sampling.sample`.
        model_init_kwargs: Arguments of `from_pretrained` for pipelines given by name, such as
            `{"dtype": torch.bfloat16}`; float32 is the default.
        device: For pipelines given by name. Default: the accelerator, or the CPU.
        **pipeline_kwargs: Arguments of the pipelines' call, such as `guidance_scale` or `num_inference_steps`.

    Returns:
        Rows of `prompt`, `chosen`, `rejected`; `chosen_model`, `chosen_seed`; with rewards `chosen_score`, by which
        pairs were made, and `chosen_scores/<reward>`; likewise for `rejected`; and `soft_label`. Trainers take it as
        it is, and so does `load_pairs(f"{output}/pairs")`. Videos are lists of images, audio is WAV files.

    Raises:
        ValueError: No prompts, no pairs, options that contradict each other, or `output` has pairs that were made with
            other options.
        RewardError: A reward fails; the message names it and the sample.
        TypeError: An unsupported pipeline.

    Example:

    ```python
    from trl_diffusion_pref import MaPOConfig, MaPOTrainer, make_pairs
    from trl_diffusion_pref.rewards import PickScore

    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    pairs = make_pairs(model, "prompts.txt", PickScore(), "self-made", samples_per_prompt=4)
    MaPOTrainer(model, MaPOConfig(output_dir="mapo"), pairs).train()
    ```
    """
    contrast = None if chosen_prompt == rejected_prompt else (chosen_prompt, rejected_prompt)
    if contrast is None and chosen_prompt != "{prompt}":
        raise ValueError("chosen_prompt and rejected_prompt are equal; put their text into the prompts instead.")
    if rewards is None and contrast is None:
        raise ValueError("rewards is None: pass at least one, or contrast prompts (chosen_prompt, rejected_prompt).")
    if rewards is None and (min_score_difference or soft_labels):
        raise ValueError("min_score_difference and soft_labels need rewards.")
    sampling = Sampling(
        samples_per_prompt, contrast, seed, batch_size, exact, model_init_kwargs, device, pipeline_kwargs
    )
    rule = Pairing(strategy, min_score_difference, max_pairs_per_prompt, temperature, soft_labels, contrast)
    return _make(rule, "pairs", pipelines, prompts, rewards, Path(output), sampling)


def make_rankings(
    pipelines: Pipelines,
    prompts: Prompts,
    rewards: Rewards,
    output: str | os.PathLike[str],
    *,
    samples_per_prompt: int = 4,
    temperature: Temperature = None,
    seed: int = 0,
    batch_size: int = 4,
    exact: bool = True,
    model_init_kwargs: Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
    **pipeline_kwargs: Any,
) -> Dataset:
    """Makes rankings from prompts: all samples of a prompt with their scores.

    Samples and scores are those of `make_pairs` with the same `output` and options, and are not made twice.

    Args:
        pipelines, prompts, rewards, output: See `make_pairs`; the data set is in `rankings/`.
        samples_per_prompt, temperature, seed, batch_size, exact, model_init_kwargs, device: See `make_pairs`.
        **pipeline_kwargs: See `make_pairs`.

    Returns:
        Rows of `prompt`; `images` (`videos`, `audio`), as many for each prompt; `scores`, the only reward's own or the
        Bradley-Terry strengths of several; `scores/<reward>`, `models` and `seeds`. Prompts that have a blank sample,
        or whose samples all have the same score, are left out and counted. Rankings of edits have the column `image`,
        as pairs have it.

    Raises:
        ValueError, RewardError, TypeError: See `make_pairs`.
    """
    sampling = Sampling(samples_per_prompt, None, seed, batch_size, exact, model_init_kwargs, device, pipeline_kwargs)
    return _make(Ranking(temperature), "rankings", pipelines, prompts, rewards, Path(output), sampling)


def _make(
    rule: Pairing | Ranking,
    kind: str,
    pipelines: Pipelines,
    prompts: Prompts,
    rewards: Rewards | None,
    output: Path,
    sampling: Sampling,
) -> Dataset:
    """Samples, scores, and stores the rows that a rule makes of them."""
    edits = read_edits(prompts)
    texts, images = edits.prompts, edits.images
    named = {} if rewards is None else named_rewards(rewards)
    folder = output / kind
    record = {
        "prompts": {"number": len(texts), "digest": edits_digest(edits)},
        "rewards": {name: reward_identity(reward) for name, reward in named.items()},
        **sampling.record(),
        **rule.options,
    }
    # Before hours of sampling; the models are known after they were loaded.
    check_stored(folder, record)
    candidates = sample_candidates(pipelines, texts, named, output, sampling, images)
    record["models"] = candidates.models
    # As the first process sees it: it may have begun to write when another one looks.
    if gather_object([folder.exists()])[0]:
        check_stored(folder, record)
        return load_stored(folder)
    counts = Counts(len(texts), candidates.per_prompt * len(texts), candidates.blank)
    rows = list(rule.rows(candidates, counts))
    counts.rows = len(rows)
    logger.log(logging.WARNING if counts.left_out else logging.INFO, "%s: %s.", folder, counts)
    if not rows:
        raise ValueError(
            f"There are no {kind}: {counts}. Sample more per prompt, or other prompts, or lower min_score_difference."
        )
    columns = dict(rule.columns(candidates.modality, list(named)))
    features = rule.features(candidates.modality, list(named))
    for column, cells in images.items():
        features[column] = List(Image()) if cells.in_lists else Image()
        columns[column] = "what was to be edited" if column == "image" else "given beside it"
    card = {
        "kind": kind,
        "modality": candidates.modality,
        "models": candidates.models,
        "rewards": list(named),
        "contrast": rule.contrast,
        "counts": asdict(counts),
        "options": {
            **{name: value for name, value in record.items() if name not in ("models", "prompts", "rewards")},
            **({"temperature": candidates.temperatures(rule.temperature)} if named else {}),
        },
        "columns": columns,
    }
    return write_dataset(folder, rows, features, record, card)
