"""Options of `DiffusionSFTTrainer`."""

from dataclasses import dataclass

from ...training.config import DiffusionPreferenceConfig, documented


@documented
@dataclass
class DiffusionSFTConfig(DiffusionPreferenceConfig):
    r"""
    Configuration of [`DiffusionSFTTrainer`]: the options of [`DiffusionPreferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`]. The loss has no options of its own.

    > Parameters with a default of this package

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: 1e-5 for all models, MaPO's, whose loss without its margin this
            is; see docs/hyperparameters.md.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none. The default is that of the other
            trainers.
    """

    metric_names = ("loss", "mse")

    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2
