"""Options of `MaPOTrainer`."""

from dataclasses import dataclass

from ...training.config import PAIR_METRICS, GuardedConfig, documented
from .loss import MaPOLossType, MaPOOptions


@documented
@dataclass
class MaPOConfig(GuardedConfig):
    r"""
    Configuration of [`MaPOTrainer`]: the options of [`GuardedConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        beta (`float`, *optional*):
            With `loss_type="mapo"` the weight of the margin term, at least 0; default 0.1, as in the released code;
            0 is supervised fine-tuning on the chosen images. With `"mapo_v2"` the exponent of the paper's second
            version, positive, searched there in {8, 32, 64, 128, 1024}: it has no default and must be set.
        snr_value (`float`, *optional*, defaults to `0.5`):
            The released code's constant inside phi, positive, for `"mapo"` alone. Lower values make the margin
            softer. It has nothing to do with a timestep's signal-to-noise ratio.
        loss_type (`str`, *optional*, defaults to `"mapo"`):
            `"mapo"`, what the released code computes, or `"mapo_v2"`, equations 9 to 11 of the paper's second version.
        negative (`bool`, *optional*, defaults to `False`):
            Trains a negative model for `guidance.negative_guidance` (Diffusion-NPO, arXiv 2505.11245): the rejected
            image of each pair is taken as the chosen one and the reverse, in the loss and in every metric.

    > Parameters of the divergence guard with another default

        divergence_margin (`float`, *optional*, defaults to `4.0`):
            How far the chosen images' error may rise over that of the run's first steps, since there is no reference,
            positive: with the default to five times the start. It rises in good runs too, before it falls again; see
            benchmarks/results/divergence.md.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: the model's, see docs/hyperparameters.md; 1e-5 for all so far.
            The released code's README uses 1e-5, constant, for SDXL, full and LoRA, 2,000 steps at 16 pairs and more;
            the paper's second version 1e-7 with a cosine schedule at 2,048 pairs a step.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none. The default is the released code's.
    """

    _ranges = {
        **GuardedConfig._ranges,
        "snr_value": "(0, inf)",
    }
    _effective_with = {**GuardedConfig._effective_with, "snr_value": ("loss_type", ("mapo",))}
    metric_names = PAIR_METRICS

    beta: float | None = None
    snr_value: float = 0.5
    loss_type: MaPOLossType = "mapo"
    negative: bool = False
    divergence_margin: float = 4.0
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is None and self.loss_type == "mapo_v2":
            raise ValueError(
                "loss_type='mapo_v2' needs beta, its exponent: set one, such as 64; the paper tried 8 to 1024. The "
                "default beta=0.1 is the weight of loss_type='mapo'."
            )
        if self.beta is None:
            self.beta = 0.1
        MaPOOptions(self.loss_type, self.beta, self.snr_value, num_train_timesteps=1000)

    def divergence_margins(self) -> dict[str, float | None]:
        return {"reference_margin": None, "start_margin": self.divergence_margin}
