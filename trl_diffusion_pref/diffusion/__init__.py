"""Noise processes, likelihood bounds, solver steps and random numbers: torch only, no models."""
