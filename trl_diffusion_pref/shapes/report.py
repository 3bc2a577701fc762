"""Compares sets of images side by side and by the judge's shares."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler
from PIL import Image, ImageDraw

from ..evaluation.compare import Tuned, compare
from ..evaluation.comparison import Comparison
from .drawing import IMAGE_SIZE, prompts
from .judge import Summary, summarize
from .pipeline import load_pipeline
from .reward import shapes_reward


_SCALE = 2
_GAP = 4
_LABEL = 14


def comparison_table(sets: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str], preferred_style: str) -> str:
    """A table with one line per set of images: shares of preferred style, right colour, right shape, and clean.

    An image is clean here if it is as close to a drawing as nine of ten of the base's own images in its style.

    Args:
        sets: Images by the name of the model that generated them, one per prompt.
        prompts: The prompts, in the order of the images.
        preferred_style: "outlined" or "filled".
    """
    lines = [f"{'':8} {preferred_style:>9} {'colour':>8} {'shape':>8} {'clean':>8}"]
    for name, images in sets.items():
        lines.append(f"{name:8} {_shares(summarize(images, prompts, preferred_style))}")
    return "\n".join(lines)


def _shares(summary: Summary) -> str:
    values = (summary.preferred, summary.colour, summary.shape, summary.clean_in_style)
    return " ".join(f"{value:{width}.0%}" for value, width in zip(values, (9, 8, 8, 8), strict=True))


def comparison_picture(
    sets: Mapping[str, Sequence[Image.Image]], path: str | Path, *, count: int = 32, columns: int = 8
) -> Path:
    """Writes a PNG with the first `count` images of each set as a block, the blocks side by side."""
    cell = IMAGE_SIZE * _SCALE + _GAP
    rows = -(-count // columns)
    block = columns * cell + 3 * _GAP
    canvas = Image.new("RGB", (len(sets) * block, rows * cell + _LABEL + _GAP), (225, 225, 225))
    pen = ImageDraw.Draw(canvas)
    for position, (name, images) in enumerate(sets.items()):
        left = position * block + _GAP
        pen.text((left, 1), name, fill="black")
        for index, image in enumerate(images[:count]):
            enlarged = image.resize((IMAGE_SIZE * _SCALE,) * 2, Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + index % columns * cell, _LABEL + index // columns * cell + _GAP))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    return path


def compare_with_base(tuned: Tuned, folder: str | Path) -> Comparison:
    """`evaluation.compare` of the base "mixed" with a tuned model: all captions, four samples each, by the judge.

    Args:
        tuned: A folder, a LoRA or a loaded pipeline.
        folder: For the report, whose page is `index.html`.
    """
    base = load_pipeline()
    base.scheduler = DDIMScheduler.from_config(base.scheduler.config)
    call: dict[str, Any] = {"guidance_scale": 3.0, "num_inference_steps": 20, "batch_size": 32}
    return compare(base, tuned, prompts(), shapes_reward, folder, samples_per_prompt=4, **call)
