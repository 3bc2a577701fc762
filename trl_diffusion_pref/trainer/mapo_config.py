"""Options of `MaPOTrainer`."""

from dataclasses import dataclass, field

from ..losses import MAPO_LOSS_TYPES, check_mapo_options
from .pairwise_config import PairwiseConfig


@dataclass
class MaPOConfig(PairwiseConfig):
    r"""
    Configuration of [`MaPOTrainer`]: the options of [`PairwiseConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        beta (`float`, *optional*, defaults to `0.1`):
            With `loss_type="mapo"` the weight of the margin term, 0.1 in the released code; 0 is supervised
            fine-tuning on the chosen images. With `"mapo_v2"` the exponent of the paper's second version, searched
            there in {8, 32, 64, 128, 1024}: set it.
        snr_value (`float`, *optional*, defaults to `0.5`):
            The released code's constant inside phi. It has nothing to do with a timestep's signal-to-noise ratio.
        loss_type (`str`, *optional*, defaults to `"mapo"`):
            `"mapo"`, what the released code computes, or `"mapo_v2"`, equations 9 to 11 of the paper's second version.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Default: the model's, see docs/hyperparameters.md; 1e-5 for all so far. The released code's README uses
            1e-5, constant, for SDXL, full and LoRA, 2,000 steps at 16 pairs and more; the paper's second version 1e-7
            with a cosine schedule at 2,048 pairs a step.

    > [!NOTE]
    > Defaults that differ from [`~transformers.TrainingArguments`]: those of [`DiffusionPreferenceConfig`] and
    > `learning_rate`, `weight_decay=1e-2` (released code).
    """

    beta: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the margin term (mapo; the released code's 0.1; 0 is supervised fine-tuning on the "
            "chosen images), or exponent (mapo_v2; the paper searched 8, 32, 64, 128, 1024)."
        },
    )
    snr_value: float = field(default=0.5, metadata={"help": "The constant inside phi of the released code."})
    loss_type: str = field(
        default="mapo",
        metadata={
            "help": "`mapo` as in the released code, or `mapo_v2`, the paper's second version.",
            "choices": list(MAPO_LOSS_TYPES),
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "The initial learning rate. Default: the model's, see docs/hyperparameters.md."},
    )
    weight_decay: float = field(
        default=1e-2, metadata={"help": "Weight decay of matrices; norms and biases have none."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mapo_options(self.loss_type, self.beta)
        if self.snr_value <= 0:
            raise ValueError(f"snr_value={self.snr_value}: it must be positive.")
