"""Held-out preference accuracy, sampling, and comparison of models."""

from .compare import compare
from .comparison import Comparison, Estimate
from .held_out import HeldOutPreferences, bootstrap_interval, pair_elbos, wins
from .preference import HeldOutPairs, PreferenceAccuracy, preference_accuracy
from .sampling import is_blank, sample, seeds_for


__all__ = [
    "Comparison",
    "Estimate",
    "HeldOutPairs",
    "HeldOutPreferences",
    "PreferenceAccuracy",
    "bootstrap_interval",
    "compare",
    "is_blank",
    "pair_elbos",
    "preference_accuracy",
    "sample",
    "seeds_for",
    "wins",
]
