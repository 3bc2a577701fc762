"""Reward-weighted regression: the denoising loss, in which better samples count more."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from numbers import Real

import numpy as np
import torch
from datasets import IterableDataset
from torch import Tensor, nn

from ...data import Batch, EncodedDataset, Layout, Mode, check_columns, corrupt
from ...data.layouts import Between, labelled_datasets, sample_column
from ...data.pair_source import RowSource
from ...data.stored import group_numbers, with_column
from ...training.config import AnyDataset
from ...training.trainer import DiffusionTrainer
from .config import FlowRWRConfig
from .loss import constant_groups, effective_share, reward_weights, rwr_loss


logger = logging.getLogger(__name__)

# Of a weight: its square, which is logged, is still a float32 number.
_LARGEST = torch.finfo(torch.float32).max ** 0.5
_NO_NEGATIVE = (
    "with weighting='raw' the reward is the sample's weight, and the loss of a negative one has no lower bound (take "
    "weighting='softmax' or 'exp')"
)


class _RawWeight(Between):
    """Rewards that are weights as they stand."""

    def __str__(self) -> str:
        return f"at least 0: {_NO_NEGATIVE}"


class FlowRWRTrainer(DiffusionTrainer):
    """Trainer for reward-weighted regression, published as Flow-RWR (Improving Video Generation with Human Feedback).

    Arguments are those of [`DiffusionTrainer`], with `args` a [`FlowRWRConfig`]; columns `prompt`, `image` (`video`,
    `audio`; `edited_image` for a model that edits images) and `reward`, any finite number. Weights that depend on the
    other samples of a prompt are computed once, over the rows of each data set; a stream has none of these.

    It works for epsilon models as for flows: the error is that of the model's own target.

    Example:

    ```python
    from datasets import load_dataset
    from trl_diffusion_pref import FlowRWRConfig, FlowRWRTrainer

    trainer = FlowRWRTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        args=FlowRWRConfig(output_dir="rwr", max_steps=2000, weighting="softmax", temperature=0.5),
        train_dataset=load_dataset("imagefolder", data_dir="scored_images", split="train"),
    )
    trainer.train()
    trainer.save_model()
    ```
    """

    args: FlowRWRConfig
    config_class = FlowRWRConfig
    layout = Layout(samples=("image",), scalars=("reward",))
    _tag_names = ["trl", "trl-diffusion-pref", "flow-rwr"]
    _name = "Flow-RWR"
    _paper = {
        "title": "Improving Video Generation with Human Feedback",
        "id": "2501.13918",
        "citation": """\
@misc{liu2025videoalign,
    title         = {{Improving Video Generation with Human Feedback}},
    author        = {Jie Liu and Gongye Liu and Jiajun Liang and others},
    year          = 2025,
    eprint        = {2501.13918},
    archivePrefix = {arXiv}
}""",
    }

    def make_layout(self) -> Layout:
        options = self.args.reward_weighting()
        scalars = ("reward", self._weight_column) if options.needs_groups else ("reward",)
        ranges = {"reward": _RawWeight(0, math.inf)} if options.weighting == "raw" else {}
        return Layout(samples=(sample_column(self.family),), scalars=scalars, ranges=ranges)

    @cached_property
    def _weight_column(self) -> str:
        """Where weights by groups stand. An encoded data set has them, so that its name says how they were made."""
        options = self.args.reward_weighting()
        how = f"{options.weighting}, temperature {options.temperature}"
        return f"weight ({how}{', normalized rewards' * options.normalize_rewards})"

    def prepare_rows(self, dataset: AnyDataset, label: str) -> tuple[AnyDataset, RowSource | None]:
        """Adds the weights that depend on groups, and reports what the weights of the data set are.

        Raises:
            ValueError: No reward column; groups in a stream; weights that are all 0, or too large for float32.
        """
        given = replace(self.layout, scalars=("reward",))
        check_columns(dataset, label, given)
        options = self.args.reward_weighting()
        if isinstance(dataset, IterableDataset):
            if options.needs_groups:
                option = "normalize_rewards=True" if options.normalize_rewards else "weighting='softmax'"
                raise ValueError(
                    f"{option} needs all samples of a prompt together, and {label} is streamed. Load it without "
                    "streaming, or set weighting='exp' or 'raw' without normalize_rewards."
                )
            return dataset, None
        cells, least = dataset.with_format(None)["reward"], 0 if options.weighting == "raw" else -math.inf
        # Rows without a usable reward are reported with all other bad rows; they take no part in the groups.
        numbers = np.array([float(cell) if isinstance(cell, Real) else math.nan for cell in cells])
        good = np.flatnonzero(np.isfinite(numbers) & (numbers >= least))
        weights = np.zeros(len(dataset))
        if len(good):
            rewards = torch.from_numpy(numbers[good])
            groups = torch.from_numpy(group_numbers(dataset)[good])
            found = reward_weights(rewards, groups if options.needs_groups else None, options)
            self._check_weights(found, rewards, good, label)
            self._report(found, rewards, groups, label)
            weights[good] = found.numpy()
        return (with_column(dataset, self._weight_column, weights) if options.needs_groups else dataset), None

    def _check_weights(self, weights: Tensor, rewards: Tensor, rows: np.ndarray, label: str) -> None:
        """Raises where the largest weight is too large for float32, or so small that nothing is learnt."""
        largest = int(weights.argmax())
        weight = float(weights[largest])
        if 1 / _LARGEST <= weight <= _LARGEST:
            return
        problem = "too large for float32" if weight > 1 else "too small to learn from"
        raise ValueError(
            f"{label}, row {rows[largest]}, column 'reward': the largest weight, of the reward {rewards[largest]:g}, "
            f"is {weight:.3g}, {problem}. Set weighting='softmax', or rescale the rewards, as temperature and "
            "normalize_rewards do."
        )

    def _report(self, weights: Tensor, rewards: Tensor, groups: Tensor, label: str) -> None:
        """Logs what the weights of a data set are, as a warning where groups have nothing to choose from."""
        used = self._clipped(weights)
        clipped = int((weights > used).sum())
        text = (
            f"{label}: {len(weights)} samples of {len(torch.unique(groups))} prompts have weights of mean "
            f"{used.mean():.3g}, at most {used.max():.3g}; they count as much as {effective_share(used):.1%} of them "
            "with equal weights would"
        )
        text += f"; weight_clip lowers {clipped}" * bool(clipped)
        level = logging.INFO
        if self.args.reward_weighting().needs_groups:
            constant = constant_groups(rewards, groups)
            sizes = torch.bincount(groups)
            single = int((sizes == 1).sum())
            equal = len(torch.unique(groups[constant])) - single
            for count, what in ((single, "with a single sample"), (equal, "with equal rewards")):
                text += f"; prompts {what}, whose samples all weigh 1: {count}" * bool(count)
            if bool(constant.all()):
                text += "; so this is supervised fine-tuning"
            level = logging.WARNING if bool(constant.any()) else level
        logger.log(level, "%s.", text)

    def setup_step(self) -> None:
        # Rows were checked when they were read; data sets that were encoded for other options come without.
        raw = self.args.weighting == "raw"
        for label, dataset in [("train_dataset", self.train_dataset), *labelled_datasets(self.eval_dataset)]:
            if raw and isinstance(dataset, EncodedDataset) and (dataset.scalars["reward"] < 0).any():
                raise ValueError(f"{label} has negative rewards: {_NO_NEGATIVE}.")

    def _weights(self, scalars: Mapping[str, Tensor]) -> Tensor:
        """`(B,)`, before they are clipped."""
        options = self.args.reward_weighting()
        if options.needs_groups:
            return scalars[self._weight_column]
        return reward_weights(scalars["reward"], None, options)

    def _clipped(self, weights: Tensor) -> Tensor:
        return weights.clamp(max=math.inf if self.args.weight_clip is None else self.args.weight_clip)

    def compute_losses(self, model: nn.Module, batch: Batch, mode: Mode) -> dict[str, Tensor]:
        noisy = corrupt(batch, mode, self.noise_process)
        error = self.denoise.error(self.denoise(model, noisy), noisy)
        weights = self._weights(batch.scalars)
        used = self._clipped(weights)
        return {
            "loss": rwr_loss(error, used),
            "mse": error.detach(),
            "reward": batch.scalars["reward"],
            "weights/mean": used,
            "weights/mean_square": used.square(),
            "weights/clipped": (used < weights).float(),
        }
