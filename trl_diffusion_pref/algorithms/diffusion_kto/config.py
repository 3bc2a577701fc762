"""Options of `DiffusionKTOTrainer`."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset, IterableDataset

from ...training.config import AnyDataset
from ...training.documented import documented
from ...training.reference_config import ReferenceConfig
from .loss import DiffusionKTOOptions, KTOUtility


logger = logging.getLogger(__name__)


@documented
@dataclass
class DiffusionKTOConfig(ReferenceConfig):
    r"""
    Configuration of [`DiffusionKTOTrainer`]: the options of [`ReferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        beta (`float`, *optional*):
            Strength of the tie to the reference, positive. Default: the model's, see docs/hyperparameters.md. In the
            convention of the authors' code, which has no factor 1/2: a beta here is twice as much in
            `DiffusionDPOConfig`. Published for Stable Diffusion 1.5: 5000 in the paper; the released script leaves its
            code's default of 1000.
        utility (`str`, *optional*, defaults to `"sigmoid"`):
            How a sample's gain counts: `"sigmoid"`, the paper's choice, which saturates on both sides;
            `"loss_averse"`, log sigmoid, which keeps the full gradient of samples on the wrong side; or
            `"risk_seeking"`, which keeps that of samples on the right side and does not saturate there.
        desirable_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the losses of samples that were liked, at least 0; not 0 together with `undesirable_weight`.
        undesirable_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the losses of samples that were not liked, at least 0. At 0 these count in the baseline alone.

    > Parameters that control the baseline

        kl_estimate (`str`, *optional*, defaults to `"running"`):
            From which gain on a sample counts as better than expected. `"running"`: the mean gain of earlier steps,
            over all processes and accumulated batches, or 0 where that is negative; 0 in the first step. `"batch"`:
            the mean of the present batch over all processes, as in the released code; with accumulation it is that of
            each batch alone, so that four batches of one are not one batch of four. Evaluation takes the running mean.
        kl_decay (`float`, *optional*, defaults to `0.9`):
            Weight of what came before in the running mean, in [0, 1), at each step; the start is corrected for. 0
            takes the last step's mean alone, values near 1 follow a changing model late.

    > Parameters that control the data

        positive_ratio (`float`, *optional*):
            Share of liked samples among those that are trained on, in (0, 1): rows are then drawn with replacement, as
            in the released code, and an epoch draws as many as there are. Published: 0.8. Default: every row once per
            epoch, in the shares that the data have. An error for streams.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: the model's, see docs/hyperparameters.md. For Stable Diffusion
            1.5 1e-7, at 8 images a step in the paper, for 10,000 steps with 1,000 steps of warm-up.
        prompt_dropout (`float`, *optional*, defaults to `0.2`):
            Share of rows, in [0, 1), that are trained with the empty prompt. The default is the released code's.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none. The default is the released code's.
    """

    _ranges = {
        **ReferenceConfig._ranges,
        "desirable_weight": "[0, inf)",
        "undesirable_weight": "[0, inf)",
        "kl_decay": "[0, 1)",
        "positive_ratio": "(0, 1)",
    }
    metric_names = (
        *("loss", "kl", "liked", "rewards/liked", "rewards/disliked", "rewards/accuracies"),
        *("mse/chosen", "mse/rejected", "mse/ref_chosen", "mse/ref_rejected"),
    )

    beta: float | None = None
    utility: KTOUtility = "sigmoid"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    kl_estimate: Literal["running", "batch"] = "running"
    kl_decay: float = 0.9
    positive_ratio: float | None = None
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2
    prompt_dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_filled_in()

    def check_filled_in(self) -> None:
        self.loss_options()

    def loss_options(self) -> DiffusionKTOOptions:
        """The constants of the loss; while beta is None, 1 stands for it, so that the other options are checked."""
        beta = 1.0 if self.beta is None else self.beta
        return DiffusionKTOOptions(self.utility, beta, self.desirable_weight, self.undesirable_weight)

    def check_data(
        self, train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
    ) -> None:
        super().check_data(train_dataset, eval_dataset)
        if not isinstance(train_dataset, IterableDataset):
            return
        if self.positive_ratio is not None:
            raise ValueError(
                f"positive_ratio={self.positive_ratio} draws rows by their labels, and train_dataset is streamed, so "
                "that they are not known. Leave the option out, or store the data."
            )
        logger.warning(
            "train_dataset is streamed, so that it cannot be checked whether its labels are of both kinds. The metric "
            "liked is the share of liked rows."
        )

    def check_rows(self, dataset: Dataset, label: str) -> None:
        super().check_rows(dataset, label)
        # On samples of one kind the metrics of the other are missing, which is no mistake in an evaluation.
        if not label.startswith("eval_dataset"):
            check_both_kinds(dataset["label"], label)


def check_both_kinds(labels: Iterable[Any], label: str) -> None:
    """Raises where all labels are the same; labels that cannot be used are reported by row elsewhere.

    Args:
        labels: Cells of the column `label`.
        label: What messages call the data set.

    Raises:
        ValueError: All rows were liked, or none.
    """
    kinds = {cell == 1 for cell in labels if cell in (0, 1)}
    if kinds == {True}:
        found = "all rows have the label 1 (liked), and Diffusion-KTO also learns from samples that were not liked"
        remedy = "Add rows with label 0; or fine-tune on the liked samples alone with DiffusionSFTTrainer."
    elif kinds == {False}:
        found = "all rows have the label 0 (not liked), and nothing says what to generate instead"
        remedy = "Add rows with label 1."
    else:
        return
    raise ValueError(f"{label}: {found}. {remedy}")
