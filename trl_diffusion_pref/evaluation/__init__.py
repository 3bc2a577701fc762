"""Held-out preference accuracy."""

from .preference import PreferenceAccuracy, bootstrap_interval, pair_elbos, preference_accuracy, wins


__all__ = ["PreferenceAccuracy", "bootstrap_interval", "pair_elbos", "preference_accuracy", "wins"]
