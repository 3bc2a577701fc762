"""Sampling from ordinary pipelines with a negative model on the unconditional side, or towards a reward."""

from .guide import NegativeGuidance, add_negative_guidance, negative_guidance
from .noisy_inputs import NoisyInputs
from .reward_guidance import reward_guidance


__all__ = ["NegativeGuidance", "NoisyInputs", "add_negative_guidance", "negative_guidance", "reward_guidance"]
