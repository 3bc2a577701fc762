"""MaPO."""
