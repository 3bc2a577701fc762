"""Options that the trainers on preference pairs share."""

from dataclasses import dataclass, field

from .base_config import DiffusionPreferenceConfig


@dataclass
class PairwiseConfig(DiffusionPreferenceConfig):
    r"""
    Options shared by the trainers on pairs: those of [`DiffusionPreferenceConfig`], and the following.

    > Parameters that control the preference

        negative (`bool`, *optional*, defaults to `False`):
            Trains a negative model for `guidance.negative_guidance` (Diffusion-NPO, arXiv 2505.11245): the rejected
            image of each pair is taken as the chosen one and the reverse, in the loss and in every metric.
    """

    negative: bool = field(
        default=False,
        metadata={"help": "Trains a negative model (Diffusion-NPO): rejected images are taken as chosen."},
    )
