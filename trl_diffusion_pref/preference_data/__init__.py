"""Preference data made from prompts: samples of the user's own models, scored, paired or ranked; and relabelling."""

from .dataset import push_dataset
from .make import make_pairs, make_rankings
from .prompts import read_prompts
from .relabel import relabel


__all__ = ["make_pairs", "make_rankings", "push_dataset", "read_prompts", "relabel"]
