"""The embedded default: drawn shapes, a small trained pipeline that draws them, and a judge of its pictures.

It makes the quickstart real alignment on a laptop and lets tests check behaviour instead of "some weights changed".
Nothing in the package's trainers knows of it.
"""

from .drawing import COLOURS, IMAGE_SIZE, SHAPES, STYLES, Scene, draw, prompts, random_scene
from .judge import Summary, Verdict, judge, summarize
from .pairs import preference_pairs
from .pipeline import load_pipeline, pipeline_folder, sample, sample_base
from .report import comparison_picture, comparison_table


__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "SHAPES",
    "STYLES",
    "Scene",
    "Summary",
    "Verdict",
    "comparison_picture",
    "comparison_table",
    "draw",
    "judge",
    "load_pipeline",
    "pipeline_folder",
    "preference_pairs",
    "prompts",
    "random_scene",
    "sample",
    "sample_base",
    "summarize",
]
