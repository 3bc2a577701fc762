"""Drawn shapes, small trained pipelines that generate them, and a judge of the generated images.

With them the quickstart aligns a real model on a laptop, and tests can check what a model generates instead of whether
some weights changed. Nothing else in the package imports this part.
"""

from .drawing import COLOURS, IMAGE_SIZE, SHAPES, STYLES, Scene, draw, prompts, random_scene
from .edit_judge import EditSummary, EditVerdict, edits_reward, judge_edits, summarize_edits
from .edits import Edit, edit_pairs, edit_prompts, random_edit
from .judge import Summary, Verdict, judge, summarize
from .pairs import preference_pairs
from .pipeline import load_pipeline, pipeline_folder, sample, sample_base
from .report import compare_with_base, comparison_picture, comparison_table
from .reward import shapes_reward


__all__ = [
    "COLOURS",
    "IMAGE_SIZE",
    "SHAPES",
    "STYLES",
    "Edit",
    "EditSummary",
    "EditVerdict",
    "Scene",
    "Summary",
    "Verdict",
    "compare_with_base",
    "comparison_picture",
    "comparison_table",
    "draw",
    "edit_pairs",
    "edit_prompts",
    "edits_reward",
    "judge",
    "judge_edits",
    "load_pipeline",
    "pipeline_folder",
    "preference_pairs",
    "prompts",
    "random_edit",
    "random_scene",
    "sample",
    "sample_base",
    "shapes_reward",
    "summarize",
    "summarize_edits",
]
