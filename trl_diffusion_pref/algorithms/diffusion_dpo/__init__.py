"""Diffusion-DPO and its relatives."""
