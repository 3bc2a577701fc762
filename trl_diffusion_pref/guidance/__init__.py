"""Sampling from ordinary pipelines with a negative model as the unconditional side of classifier-free guidance."""

from .guide import NegativeGuidance, add_negative_guidance, negative_guidance


__all__ = ["NegativeGuidance", "add_negative_guidance", "negative_guidance"]
