"""Options of `FlowRWRTrainer`."""

from dataclasses import dataclass

from ...training.config import DiffusionPreferenceConfig, documented
from .loss import RewardWeighting, Weighting


@documented
@dataclass
class FlowRWRConfig(DiffusionPreferenceConfig):
    r"""
    Configuration of [`FlowRWRTrainer`]: the options of [`DiffusionPreferenceConfig`] and transformers'
    [`~transformers.TrainingArguments`], and the following.

    > Parameters that control the loss

        weighting (`str`, *optional*, defaults to `"exp"`):
            The weight of a sample's error by its reward r: `"exp"`, `exp(r / temperature)`, equation 9 of the paper;
            `"softmax"`, the softmax of `r / temperature` over the samples of the prompt times their number, so that
            every prompt counts equally; or `"raw"`, r itself, as in the released code, where no reward may be
            negative.
        temperature (`float`, *optional*, defaults to `1.0`):
            Scale of the rewards, positive; has no effect on `"raw"`. Lower values weigh the best samples more. The
            paper prints none, which is 1.
        normalize_rewards (`bool`, *optional*, defaults to `False`):
            Subtracts the mean of the prompt's rewards and divides by their standard deviation before they are
            weighed, so that `temperature` counts in standard deviations. A prompt whose rewards are all equal, or
            with a single sample, gets rewards of 0. An error with `"raw"`, where half of the weights would be
            negative.
        weight_clip (`float`, *optional*):
            The largest weight, positive; larger ones are lowered to it. Default: no limit, as in the paper.

    > Parameters whose default is the authors'

        learning_rate (`float`, *optional*):
            Initial learning rate, at least 0. Default: the model's, see docs/hyperparameters.md; 5e-6 for video models
            of the Wan family, from the paper's table.
        weight_decay (`float`, *optional*, defaults to `1e-2`):
            Weight decay of matrices, at least 0; norms and biases have none.
    """

    _ranges = {
        **DiffusionPreferenceConfig._ranges,
        "temperature": "(0, inf)",
        "weight_clip": "(0, inf)",
    }
    _effective_with = {
        **DiffusionPreferenceConfig._effective_with,
        "temperature": ("weighting", ("exp", "softmax")),
    }
    metric_names = ("loss", "mse", "reward", "weights/mean", "weights/mean_square", "weights/clipped")

    weighting: Weighting = "exp"
    temperature: float = 1.0
    normalize_rewards: bool = False
    weight_clip: float | None = None
    learning_rate: float | None = None  # type: ignore[assignment]  # None until the model is known
    weight_decay: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting == "raw" and self.normalize_rewards:
            raise ValueError(
                "normalize_rewards=True makes about half of the rewards negative, and with weighting='raw' they are "
                "the weights: the error of a sample with a negative weight would be raised without end. Set "
                "weighting='softmax' or 'exp', or leave normalize_rewards out."
            )

    def reward_weighting(self) -> RewardWeighting:
        """How rewards become weights."""
        return RewardWeighting(self.weighting, self.temperature, self.normalize_rewards)
