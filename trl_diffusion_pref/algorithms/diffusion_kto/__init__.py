"""Diffusion-KTO."""
