"""Reward-weighted regression."""
