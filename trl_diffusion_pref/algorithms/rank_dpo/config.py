"""Options of `RankDPOTrainer`."""

from dataclasses import dataclass, field
from typing import Literal

from ...training.documented import documented
from ...training.reference_config import ReferenceConfig
from .loss import RankDPOLossType, RankDPOOptions


@documented
@dataclass
class RankDPOConfig(ReferenceConfig):
    r"""
    Configuration of [`RankDPOTrainer`]: the options of [`ReferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        beta (`float`, *optional*):
            Strength of the tie to the reference, positive. Default: the model's, see docs/hyperparameters.md, where it
            is Diffusion-DPO's, since no paper states RankDPO's. In the convention of Diffusion-DPO's authors' code:
            two samples differ by `-(beta/2) ((l_i - l_j) - (r_i - r_j))`, with errors that are means over the latent's
            elements. RankDPO's paper prints no 1/2.
        loss_type (`str`, *optional*, defaults to `"rankdpo"`):
            `"rankdpo"`, the paper's sum over pairs, weighted by gains and ranks; `"dgpo"`, one comparison of the
            better samples with the others, by how far their scores are from the mean; or `"crd"`, a regression of
            implicit rewards on scores, both without their mean. docs/rank_dpo.md has the formulas.
        score_columns (`list[str]`, *optional*, defaults to `["scores"]`):
            Columns of lists with one score per sample, higher is better: one, or one for each of several rewards, such
            as `["scores/hpsv2", "scores/pickscore"]`, as `make_rankings` writes them. What `loss_type` takes of the
            scores is computed for each column and averaged.
        win_fractions (`str`, *optional*, defaults to `"computed"`):
            Where `"rankdpo"` has each sample's share of won comparisons from: `"computed"`, from the order of the
            scores, in which a tie counts half; or `"given"`, the scores are these shares, in [0, 1].
        max_samples (`int`, *optional*, defaults to `4`):
            Most samples that a row may have, at least 2; longer lists are an error, shorter ones are not. It decides
            the size of what is kept of precomputed errors, and the memory estimate. The default is the paper's.
        shared_noise (`bool`, *optional*, defaults to `True`):
            Gives the samples of a row one noise, as released codes for pairs and groups do; False gives each its own,
            as RankDPO's paper writes. The time is one for the row in both cases.

    > Parameters whose default is that of Diffusion-DPO

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: the model's, see docs/hyperparameters.md. RankDPO's paper
            states none; it trained 400 steps of 1,024 prompts with four images each.
        prompt_dropout (`float`, *optional*, defaults to `0.2`):
            Share of rows, in [0, 1), that are trained with the empty prompt.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none.
    """

    _ranges = {**ReferenceConfig._ranges, "max_samples": "[2, inf)"}
    _effective_with = {**ReferenceConfig._effective_with, "win_fractions": ("loss_type", ("rankdpo",))}
    metric_names = (
        "loss",
        *(f"rewards/{name}" for name in ("best", "worst", "margins", "accuracies")),
        *("mse/chosen", "mse/rejected", "mse/ref_chosen"),
    )

    beta: float | None = None
    loss_type: RankDPOLossType = "rankdpo"
    score_columns: list[str] = field(default_factory=lambda: ["scores"])
    win_fractions: Literal["computed", "given"] = "computed"
    max_samples: int = 4
    shared_noise: bool = True
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2
    prompt_dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        columns = self.score_columns
        if not isinstance(columns, list) or not columns or not all(isinstance(name, str) for name in columns):
            raise ValueError(f"score_columns={columns!r}: it must be a list with at least one column's name.")
        if len(set(columns)) < len(columns):
            raise ValueError(f"score_columns={columns!r} names a column twice.")
        self.check_filled_in()

    def check_filled_in(self) -> None:
        # While beta is None, any that is allowed stands for it, so that the other options are checked.
        self.loss_options(1.0 if self.beta is None else self.beta)

    def loss_options(self, beta: float) -> RankDPOOptions:
        """The constants of the loss with this beta."""
        return RankDPOOptions(self.loss_type, beta, self.win_fractions == "given")
