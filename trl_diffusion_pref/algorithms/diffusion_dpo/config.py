"""Options of `DiffusionDPOTrainer`."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from datasets import Dataset, IterableDataset

from ...data import PairOptions
from ...data.layouts import labelled_datasets
from ...training.config import PAIR_METRICS, AnyDataset, GuardedConfig, documented
from .loss import DiffusionDPOLossType, DiffusionDPOOptions


# Margins that the comparison with the run's own start allows.
_START_MARGINS = 6


@documented
@dataclass
class DiffusionDPOConfig(GuardedConfig):
    r"""
    Configuration of [`DiffusionDPOTrainer`]: the options of [`GuardedConfig`] and transformers'
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
            Column with the probability that chosen is better, in (0, 1), for `"irepo"`.
        winner_preserving_mu (`float`, *optional*):
            Switches SDPO's safeguard on, in [0, 1]: the larger, the less the rejected image's gradient may hurt the
            chosen one. Published: 0.9 for SD 1.5 with DPO and DMPO, 0.2 with DSPO, 0.6 for SDXL. Default: off.
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Weight of the chosen image's error, at least 0, added to the loss to keep chosen images likely (1 in
            TangoFlux' CRPO). The default is the paper's loss.
        margin_clip (`float`, *optional*):
            Largest margin that still has a gradient, positive, so that pairs which are won are not pulled further
            apart. Not for `"dspo"`, whose margins are near 0. Default: none.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switches dropout off, so that policy and reference differ by their weights alone.
        negative (`bool`, *optional*, defaults to `False`):
            Trains a negative model for `guidance.negative_guidance` (Diffusion-NPO, arXiv 2505.11245): the rejected
            image of each pair is taken as the chosen one and the reverse, in the loss and in every metric.

    > Parameters that control the reference

        reference (`str`, *optional*, defaults to `"auto"`):
            Where the reference's errors come from: `"adapter_off"` (auto for a new LoRA), `"frozen_adapter"` (auto for
            an adapter trained before), `"copy"` (auto for full fine-tuning), or `"precomputed"`: the reference's
            errors are computed once before training for `reference_draws` fixed draws of noise and timestep per pair;
            training holds no second model.
        reference_draws (`int`, *optional*, defaults to `8`):
            Fixed draws per pair of `"precomputed"`, at least 1. Each costs one forward pass per pair before training;
            with few the model learns them by heart, and the training loss no longer says anything.
        reference_errors_dir (`str`, *optional*):
            Folder that keeps the errors of `"precomputed"`; an error if they were made from other weights, data,
            resolution or seed. Default: the cache folder.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Moves the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO), so that it can leave
            the starting weights further. Needs a reference with weights of its own.
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            Share of the policy's weights in the moved reference, in (0, 1]; 1 copies them. The default is TRL's and
            TR-DPO's.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            Steps between two moves of the reference, at least 1. The default is TRL's and TR-DPO's.

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
        **GuardedConfig._ranges,
        "label_smoothing": "[0, 0.5)",
        "dmpo_alpha": "(0, 1)",
        "soft_label": "(0, 1)",
        "margin_clip": "(0, inf)",
        "winner_preserving_mu": "[0, 1]",
        "sft_weight": "[0, inf)",
        "reference_draws": "[1, inf)",
        "ref_model_mixup_alpha": "(0, 1]",
        "ref_model_sync_steps": "[1, inf)",
    }
    _effective_with = {
        **GuardedConfig._effective_with,
        "label_smoothing": ("loss_type", ("sigmoid",)),
        "dmpo_alpha": ("loss_type", ("dmpo",)),
        "soft_label": ("loss_type", ("irepo",)),
        "soft_label_column": ("loss_type", ("irepo",)),
        "margin_clip": ("loss_type", tuple(name for name in get_args(DiffusionDPOLossType) if name != "dspo")),
        "reference_draws": ("reference", ("precomputed",)),
        "reference_errors_dir": ("reference", ("precomputed",)),
        "ref_model_mixup_alpha": ("sync_ref_model", (True,)),
        "ref_model_sync_steps": ("sync_ref_model", (True,)),
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
    disable_dropout: bool = True
    negative: bool = False
    reference: Literal["auto", "adapter_off", "frozen_adapter", "copy", "precomputed"] = "auto"
    reference_draws: int = 8
    reference_errors_dir: str | None = None
    sync_ref_model: bool = False
    ref_model_mixup_alpha: float = 0.6
    ref_model_sync_steps: int = 512
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
        compares_predictions = "winner_preserving_mu" if self.winner_preserving_mu is not None else None
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
        if self.sync_ref_model and self.reference in ("precomputed", "adapter_off"):
            raise ValueError(
                f"sync_ref_model moves the reference's weights, which reference={self.reference!r} does not have. Use "
                "reference='copy' or 'frozen_adapter'."
            )

    def check_data(
        self, train_dataset: AnyDataset | None, eval_dataset: AnyDataset | dict[str, AnyDataset] | None
    ) -> None:
        super().check_data(train_dataset, eval_dataset)
        for label, dataset in [("train_dataset", train_dataset), *labelled_datasets(eval_dataset)]:
            if self.reference == "precomputed" and isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"reference='precomputed' needs data sets of known rows, and {label} is streamed. Use another "
                    "reference, or store the data."
                )

    @property
    def reads_soft_labels(self) -> bool:
        return self.loss_type == "irepo" and self.soft_label_column == "soft_label"

    def pair_options(self) -> PairOptions:
        options = super().pair_options()
        return replace(options, soft_label=self.soft_label) if self.ties == "half" else options

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

    def divergence_margins(self) -> dict[str, float | None]:
        # A reference that moves hides that the model gets worse slowly; the run's own start does not. Other samples
        # stand on the two sides of that comparison, so more is allowed.
        start_margin = _START_MARGINS * self.divergence_margin if self.sync_ref_model else None
        return {"reference_margin": self.divergence_margin, "start_margin": start_margin}

    def check_filled_in(self) -> None:
        # While beta is None, any that is allowed stands for it, so that the other options are checked.
        beta = 1.0 if self.beta is None else self.beta
        DiffusionDPOOptions(self.loss_type, beta, self.label_smoothing, self.dmpo_alpha, self.margin_clip)
