"""Options of `DiffusionDPOTrainer`."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from datasets import Dataset

from ...data import PairOptions
from ...training.config import PAIR_METRICS
from ...training.documented import documented
from ...training.reference_config import ReferenceConfig
from .loss import DiffusionDPOLossType, DiffusionDPOOptions


@documented
@dataclass
class DiffusionDPOConfig(ReferenceConfig):
    r"""
    Configuration of [`DiffusionDPOTrainer`]: the options of [`ReferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        beta (`float`, *optional*):
            Strength of the tie to the reference, positive. Default: the model's, see docs/hyperparameters.md. In the
            convention of the authors' code: errors are means over the latent's elements and the pair's logit is
            `-(beta/2) ((l_w - l_l) - (r_w - r_l))`. Released: 5000 (SD 1.5 and SDXL); the paper's main runs 2000;
            good range there 2000 to 5000. For flow models (Flow-DPO) the paper has 500, for video, and searched 100
            to 8000; flow_grpo's code for SD 3.5 has 100. The defaults are for `"sigmoid"`; `loss_type="dspo"`, where
            it is a weight, has 0.001. See docs/diffusion_dpo.md for other conventions.
        beta_schedule (`str`, *optional*, defaults to `"constant"`):
            How beta depends on a pair's time t: `"constant"`, or `"flow"`, `beta (1 - t)^2`, for flow models alone.
            The second is what Flow-DPO's derivation gives (arXiv 2501.13918); the paper and the released code train
            with the first, since the second led to reward hacking and worse text alignment.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            Loss of a pair: `"sigmoid"` (the paper's), `"hinge"`, `"ipo"`, `"dmpo"`, `"irepo"`, `"dspo"` or
            `"dspo_sdxl"`; docs/diffusion_dpo.md has their formulas.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability, in [0, 0.5), that a label is flipped, for `"sigmoid"` alone (robust DPO). The default trusts
            every label.
        dmpo_alpha (`float`, *optional*, defaults to `0.01`):
            alpha of `"dmpo"`, in (0, 1): the loss is least where chosen wins with probability 1 - alpha. The default
            is the released code's.
        soft_label (`float`, *optional*, defaults to `0.95`):
            Probability that chosen is better, in (0, 1), for `"irepo"` where the data have no column of it, also of
            the pairs that are no ties where `ties="half"`. At the
            default pairs are pulled apart to a margin of 2.9, the logit of 0.95.
        soft_label_column (`str`, *optional*, defaults to `"soft_label"`):
            Column with the probability that chosen is better, in (0, 1) for `"irepo"`, in [0, 1] for
            `weight_by_soft_label`.
        winner_preserving_mu (`float`, *optional*):
            Switches SDPO's safeguard on, in [0, 1]: the larger, the less the rejected image's gradient may hurt the
            chosen one. Published: 0.9 for SD 1.5 with DPO and DMPO, 0.2 with DSPO, 0.6 for SDXL. Default: off.
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the chosen image's error, at least 0, added to the loss to keep chosen images likely (1 in
            TangoFlux' CRPO). The default is the paper's loss.
        margin_clip (`float`, *optional*):
            Largest margin that still has a gradient, positive, so that pairs which are won are not pulled further
            apart. Not for `"dspo"`, whose margins are near 0. Default: none.
        rejected_weight (`float`, *optional*, defaults to `1.0`):
            Factor, in (0, 1], of the rejected image's part `l_l - r_l` of the margin. Below 1, losing the rejected
            image gains less than learning the chosen one; watch `rewards/chosen`, which should rise. Not for
            `"dspo"` and `"dspo_sdxl"`. The default is the paper's margin.
        weight_by_soft_label (`bool`, *optional*, defaults to `False`):
            Multiplies each pair's margin by `2p - 1` (SmPO), for `"sigmoid"` alone, with p from `soft_label_column`,
            which the data must have: a pair at 1/2 has no gradient, and one below exchanges its samples. Watch
            `label_weight`, the mean of `|2p - 1|`, which says how much of the data counts.
        auto_beta (`bool`, *optional*, defaults to `False`):
            Chooses beta after every step, in [1, 1e6], so that the mean gradient factor of the last pairs,
            `sigmoid(-u)`, is `auto_beta_target`, for `"sigmoid"` alone; `beta` is then that of the first steps. beta
            falls as margins grow, so that nothing slows the run down but the learning rate and the divergence guard.
            Watch `gradient_factor` and `beta`.
        auto_beta_target (`float`, *optional*, defaults to `0.2`):
            Mean gradient factor that `auto_beta` keeps, in (0, 0.5). The default is SimpleTuner's.
        anchor_weight (`float`, *optional*, defaults to `0.0`):
            alpha, at least 0, of `alpha/2 (mse(p_w, ref_w) + mse(p_l, ref_l))`, added to the loss to keep predictions
            near the reference's, which must be called (not `reference="precomputed"`). Watch `anchor`, without alpha.
            The default is the paper's loss.
        norm_hinge_weight (`float`, *optional*, defaults to `0.0`):
            Weight, at least 0, of `max(0, |p| / |ref| - 1)`, the mean over both images, added to the loss: a penalty
            where the norm of the prediction exceeds the reference's (NormGuard). Watch `norm_ratio`, the mean of
            `|p| / |ref|`. The default is the paper's loss.
        negative (`bool`, *optional*, defaults to `False`):
            Trains a negative model for `guidance.negative_guidance` (Diffusion-NPO, arXiv 2505.11245): the rejected
            image of each pair is taken as the chosen one and the reverse, in the loss and in every metric.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: the model's, see docs/hyperparameters.md. For SD 1.5 and SDXL
            2e-5: the released launchers' 1e-8 times accumulation, batch and processes, 2.048e-5, at 2,048 pairs a
            step, for 2,000 steps with 500 (SDXL: 200) steps of warm-up. (The paper prints a value a thousand times
            smaller, which others found to train too little.) At smaller batches use less.
        prompt_dropout (`float`, *optional*, defaults to `0.2`):
            Share of pairs, in [0, 1), that are trained with the empty prompt. The default is the released code's.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none. The default is the released code's.
    """

    _ranges = {
        **ReferenceConfig._ranges,
        "label_smoothing": "[0, 0.5)",
        "dmpo_alpha": "(0, 1)",
        "soft_label": "(0, 1)",
        "margin_clip": "(0, inf)",
        "winner_preserving_mu": "[0, 1]",
        "sft_weight": "[0, inf)",
        "rejected_weight": "(0, 1]",
        "auto_beta_target": "(0, 0.5)",
        "anchor_weight": "[0, inf)",
        "norm_hinge_weight": "[0, inf)",
    }
    _effective_with = {
        **ReferenceConfig._effective_with,
        "label_smoothing": ("loss_type", ("sigmoid",)),
        "dmpo_alpha": ("loss_type", ("dmpo",)),
        "soft_label": ("loss_type", ("irepo",)),
        "weight_by_soft_label": ("loss_type", ("sigmoid",)),
        "rejected_weight": ("loss_type", ("sigmoid", "hinge", "ipo", "dmpo", "irepo")),
        "auto_beta": ("loss_type", ("sigmoid",)),
        "auto_beta_target": ("auto_beta", (True,)),
        "margin_clip": ("loss_type", tuple(name for name in get_args(DiffusionDPOLossType) if name != "dspo")),
    }
    metric_names = (*PAIR_METRICS, "mse/ref_chosen", "mse/ref_rejected")

    beta: float | None = None
    beta_schedule: Literal["constant", "flow"] = "constant"
    loss_type: DiffusionDPOLossType = "sigmoid"
    label_smoothing: float = 0.0
    dmpo_alpha: float = 0.01
    soft_label: float = 0.95
    soft_label_column: str = "soft_label"
    winner_preserving_mu: float | None = None
    sft_weight: float = 0.0
    margin_clip: float | None = None
    rejected_weight: float = 1.0
    weight_by_soft_label: bool = False
    auto_beta: bool = False
    auto_beta_target: float = 0.2
    anchor_weight: float = 0.0
    norm_hinge_weight: float = 0.0
    negative: bool = False
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2
    prompt_dropout: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        # Where beta is a weight and not a temperature, the model's published value would be another quantity.
        if self.beta is None and self.loss_type == "dspo":
            self.beta = 0.001
        self.check_filled_in()
        if self.beta_schedule == "flow" and self.loss_type.startswith("dspo"):
            raise ValueError(
                f"beta_schedule='flow' is not defined for loss_type={self.loss_type!r}, where beta is a weight too. "
                "Use 'constant'."
            )
        if self.soft_label_column != "soft_label" and not self._uses_soft_labels:
            raise ValueError(
                f"soft_label_column={self.soft_label_column!r} does nothing with loss_type={self.loss_type!r}, only "
                "with loss_type='irepo' or weight_by_soft_label=True. Leave it out, or set one of these."
            )
        compares_predictions = "winner_preserving_mu" if self.winner_preserving_mu is not None else None
        if self.norm_hinge_weight:
            compares_predictions = "norm_hinge_weight"
        if self.loss_type.startswith("dspo"):
            compares_predictions = f"loss_type={self.loss_type!r}"
        if self.loss_on_mask and compares_predictions is not None:
            raise ValueError(
                f"loss_on_mask=True and {compares_predictions}, which compares predictions of the whole sample. Leave "
                "out one of them."
            )
        if self.reference == "precomputed" and self.loss_type.startswith("dspo"):
            raise ValueError(
                f"loss_type={self.loss_type!r} needs the reference's predictions, and reference='precomputed' keeps "
                "errors only. Use another reference."
            )
        if self.reference == "precomputed" and self.anchor_weight:
            raise ValueError(
                f"anchor_weight={self.anchor_weight} needs the reference's predictions, and reference='precomputed' "
                "keeps numbers only. Use another reference, or norm_hinge_weight, which needs one number of each."
            )

    @property
    def _uses_soft_labels(self) -> bool:
        return self.loss_type == "irepo" or self.weight_by_soft_label

    @property
    def reads_soft_labels(self) -> bool:
        return self._uses_soft_labels and self.soft_label_column == "soft_label"

    def pair_options(self) -> PairOptions:
        options = super().pair_options()
        if self.ties == "half" and self.loss_type == "irepo":
            return replace(options, soft_label=self.soft_label)
        return options

    def check_rows(self, dataset: Dataset, label: str) -> None:
        super().check_rows(dataset, label)
        column = self.soft_label_column
        if self.loss_type == "irepo" and column in dataset.column_names:
            # Others that cannot be used are mistakes; these may be votes without a dissenter.
            certain = [row for row, value in enumerate(dataset[column]) if value in (0, 1)]
            if certain:
                raise ValueError(
                    f"{label}: column {column!r} is 0 or 1 in {len(certain)} pairs, the first {certain[:10]}; "
                    "loss_type='irepo' takes its logit, which would be infinite. Clip the column, say to 0.02..0.98: "
                    f"load_pairs(...).map(lambda row: {{{column!r}: min(max(row[{column!r}], 0.02), 0.98)}})."
                )

    def check_filled_in(self) -> None:
        # While beta is None, any that is allowed stands for it, so that the other options are checked.
        beta = 1.0 if self.beta is None else self.beta
        DiffusionDPOOptions(self.loss_type, beta, self.label_smoothing, self.dmpo_alpha, self.margin_clip)
