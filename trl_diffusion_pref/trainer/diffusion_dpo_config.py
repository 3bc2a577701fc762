"""Options of `DiffusionDPOTrainer`."""

from dataclasses import dataclass, field

from ..losses import DIFFUSION_DPO_LOSS_TYPES, check_diffusion_dpo_options
from .pairwise_config import PairwiseConfig


REFERENCES = ("auto", "adapter_off", "frozen_adapter", "copy", "precomputed")
GUARDS = ("stop", "warn", "off")
BETA_SCHEDULES = ("constant", "flow")


@dataclass
class DiffusionDPOConfig(PairwiseConfig):
    r"""
    Configuration of [`DiffusionDPOTrainer`]: the options of [`PairwiseConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        beta (`float`, *optional*):
            Strength of the tie to the reference, positive. Default: the model's, see docs/hyperparameters.md. In the
            convention of the authors' code: errors are means over the latent's elements and the pair's logit is
            `-(beta/2) ((l_w - l_l) - (r_w - r_l))`. Released: 5000 (SD 1.5 and SDXL); the paper's main runs 2000;
            good range there 2000 to 5000. For flow models (Flow-DPO) the paper has 500, for video, and searched 100
            to 8000; flow_grpo's code for SD 3.5 has 100. The defaults are for `"sigmoid"`: `loss_type="dspo"` wants
            0.001. See docs/diffusion_dpo.md for other conventions.
        beta_schedule (`str`, *optional*, defaults to `"constant"`):
            How beta depends on a pair's time t: `"constant"`, or `"flow"`, `beta (1 - t)^2`, for flow models alone.
            The second is what Flow-DPO's derivation gives (arXiv 2501.13918); the paper and the released code train
            with the first, since the second led to reward hacking and worse text alignment.
        loss_type (`str`, *optional*, defaults to `"sigmoid"`):
            `"sigmoid"`, `"hinge"`, `"ipo"`, `"dmpo"`, `"irepo"`, `"dspo"` or `"dspo_sdxl"`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Probability, in [0, 0.5), that a label is flipped, for `"sigmoid"` (robust DPO).
        dmpo_alpha (`float`, *optional*, defaults to `0.01`):
            alpha of `"dmpo"`.
        soft_label (`float`, *optional*, defaults to `0.95`):
            Probability that chosen is better, for `"irepo"`, where the data have no column of it.
        soft_label_column (`str`, *optional*, defaults to `"soft_label"`):
            Column with that probability, in (0, 1).
        winner_preserving_mu (`float`, *optional*):
            Switches SDPO's safeguard on, in [0, 1]: 0.9 published for SD 1.5 with DPO and DMPO, 0.2 with DSPO, 0.6 for
            SDXL.
        sft_weight (`float`, *optional*, defaults to `0.0`):
            Adds so many times the chosen image's error (1 in TangoFlux' CRPO).
        margin_clip (`float`, *optional*):
            Margins above it have no gradient.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Switches dropout off, so that policy and reference differ by their weights alone.

    > Parameters that control the reference

        reference (`str`, *optional*, defaults to `"auto"`):
            `"adapter_off"` (auto for a new LoRA), `"frozen_adapter"` (auto for an adapter trained before), `"copy"`
            (auto for full fine-tuning), or `"precomputed"`: the reference's errors are computed once before training
            for `reference_draws` fixed draws of noise and timestep per pair; training holds no second model.
        reference_draws (`int`, *optional*, defaults to `8`):
            K of `"precomputed"`.
        reference_errors_dir (`str`, *optional*):
            Folder that keeps the precomputed errors; refused if they were made from other weights, data, resolution or
            seed. Default: the cache folder.
        sync_ref_model (`bool`, *optional*, defaults to `False`):
            Moves the reference towards the policy every `ref_model_sync_steps` steps (TR-DPO).
        ref_model_mixup_alpha (`float`, *optional*, defaults to `0.6`):
            By how much.
        ref_model_sync_steps (`int`, *optional*, defaults to `512`):
            How often.

    > Parameters that control the divergence guard

        divergence_guard (`str`, *optional*, defaults to `"stop"`):
            `"stop"` saves a checkpoint and raises, `"warn"` logs, `"off"` does nothing when the chosen images' error
            rises above the reference's.
        divergence_margin (`float`, *optional*, defaults to `0.25`):
            By how much, relative to the reference's error, its mean over the window may rise.
        divergence_window (`int`, *optional*, defaults to `5`):
            Steps.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Default: the model's, see docs/hyperparameters.md. For SD 1.5 and SDXL 2e-5: the released launchers' 1e-8
            times accumulation, batch and processes, 2.048e-5, at 2,048 pairs a step, for 2,000 steps with 500 (SDXL:
            200) steps of warm-up. (The paper prints a value a thousand times smaller, which others found to train too
            little.) At smaller batches use less.
        prompt_dropout (`float`, *optional*, defaults to `0.2`):
            Released code.

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]: those of [`DiffusionPreferenceConfig`],
    > `learning_rate`, `weight_decay=1e-2`, `prompt_dropout=0.2` (released code).
    """

    beta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the tie to the reference, for errors that are means and a logit with the factor 1/2. "
            "Default: the model's, see docs/hyperparameters.md."
        },
    )
    beta_schedule: str = field(
        default="constant",
        metadata={
            "help": "How beta depends on time: `constant`, or `flow`, beta (1 - t)^2, for flow models.",
            "choices": list(BETA_SCHEDULES),
        },
    )
    loss_type: str = field(
        default="sigmoid", metadata={"help": "The loss.", "choices": list(DIFFUSION_DPO_LOSS_TYPES)}
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "Probability, in [0, 0.5), that a label is flipped (robust DPO)."}
    )
    dmpo_alpha: float = field(default=0.01, metadata={"help": "alpha of `dmpo`; 0.01 in the released code."})
    soft_label: float = field(
        default=0.95, metadata={"help": "Probability that chosen is better, for `irepo` without a column of it."}
    )
    soft_label_column: str = field(
        default="soft_label", metadata={"help": "Column with the probability that chosen is better."}
    )
    winner_preserving_mu: float | None = field(
        default=None,
        metadata={"help": "Switches SDPO's safeguard on; published 0.9 (SD 1.5), 0.2 (DSPO), 0.6 (SDXL)."},
    )
    sft_weight: float = field(default=0.0, metadata={"help": "Adds so many times the chosen image's error."})
    margin_clip: float | None = field(default=None, metadata={"help": "Margins above it have no gradient."})
    disable_dropout: bool = field(default=True, metadata={"help": "Switches dropout off in policy and reference."})
    reference: str = field(
        default="auto", metadata={"help": "Where the reference's errors come from.", "choices": list(REFERENCES)}
    )
    reference_draws: int = field(default=8, metadata={"help": "Fixed draws per pair of `reference='precomputed'`."})
    reference_errors_dir: str | None = field(
        default=None, metadata={"help": "Folder that keeps precomputed errors. Default: the cache folder."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Moves the reference towards the policy now and then (TR-DPO)."}
    )
    ref_model_mixup_alpha: float = field(default=0.6, metadata={"help": "By how much `sync_ref_model` moves it."})
    ref_model_sync_steps: int = field(default=512, metadata={"help": "How often `sync_ref_model` moves it."})
    divergence_guard: str = field(
        default="stop",
        metadata={"help": "What to do when the chosen images' error rises.", "choices": list(GUARDS)},
    )
    divergence_margin: float = field(
        default=0.25, metadata={"help": "By how much, relative to the reference's error, it may rise."}
    )
    divergence_window: int = field(default=5, metadata={"help": "Steps over which the guard averages."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "The initial learning rate. Default: the model's, see docs/hyperparameters.md."},
    )
    weight_decay: float = field(
        default=1e-2, metadata={"help": "Weight decay of matrices; norms and biases have none."}
    )
    prompt_dropout: float = field(
        default=0.2, metadata={"help": "Share of pairs, in [0, 1), that are trained with the empty prompt."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # Where beta is a weight and not a temperature, the model's published value would be another quantity.
        if self.beta is None and self.loss_type == "dspo":
            self.beta = 0.001
        self.check_filled_in()
        self._check_choices("reference", "divergence_guard", "beta_schedule")
        if self.beta_schedule == "flow" and self.loss_type.startswith("dspo"):
            raise ValueError(
                f"beta_schedule='flow' is not defined for loss_type={self.loss_type!r}, where beta is a weight too. "
                "Use 'constant'."
            )
        if not 0 < self.soft_label < 1:
            raise ValueError(f"soft_label={self.soft_label} is outside (0, 1).")
        if self.winner_preserving_mu is not None and not 0 <= self.winner_preserving_mu <= 1:
            raise ValueError(f"winner_preserving_mu={self.winner_preserving_mu} is outside [0, 1].")
        if self.sft_weight < 0:
            raise ValueError(f"sft_weight={self.sft_weight} is negative.")
        for name in ("reference_draws", "ref_model_sync_steps", "divergence_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1.")
        if not 0 < self.ref_model_mixup_alpha <= 1:
            raise ValueError(f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} is outside (0, 1].")
        if not self.divergence_margin > 0:
            raise ValueError(f"divergence_margin={self.divergence_margin}: it must be positive.")
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
        if self.reference_errors_dir is not None and self.reference != "precomputed":
            raise ValueError("reference_errors_dir belongs to reference='precomputed'.")

    def check_filled_in(self) -> None:
        # While beta is None, any that is allowed stands for it, so that the other options are checked.
        beta = 1.0 if self.beta is None else self.beta
        check_diffusion_dpo_options(self.loss_type, beta, self.label_smoothing, self.dmpo_alpha, self.margin_clip)
