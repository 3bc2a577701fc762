"""Held-out preference accuracy."""

from .held_out import HeldOutPreferences, bootstrap_interval, pair_elbos, wins
from .preference import PreferenceAccuracy, preference_accuracy


__all__ = [
    "HeldOutPreferences",
    "PreferenceAccuracy",
    "bootstrap_interval",
    "pair_elbos",
    "preference_accuracy",
    "wins",
]
