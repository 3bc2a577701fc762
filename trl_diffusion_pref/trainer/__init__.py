"""Trainers: transformers' loop, one file per algorithm on a common base."""
