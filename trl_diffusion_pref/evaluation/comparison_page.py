"""One self-contained HTML page of a comparison: no network, no other file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .comparison import Comparison


_TEMPLATE = Path(__file__).parent / "comparison.html"
# What stands in the template where the data belong.
_PLACE = "/*DATA*/"


def comparison_page(
    comparison: Comparison,
    media: Mapping[str, Sequence[Sequence[str]]],
    title: str,
    sources: Sequence[Sequence[str]] | None = None,
) -> str:
    """The page as text.

    Args:
        comparison: With at least two models.
        media: By model: a `data:` URL for each prompt and seed; empty for samples that are left out.
        title: Its heading.
        sources: For each prompt, `data:` URLs of the images that were edited; None where there are none.

    Raises:
        ValueError: There is no model to compare with the base, or a URL leads elsewhere.
    """
    if len(comparison.models) < 2:
        raise ValueError(f"A page compares models with {comparison.base!r}, and no other model was given.")
    urls = [url for rows in (*media.values(), sources or ()) for row in rows for url in row if url]
    foreign = next((url for url in urls if not url.startswith("data:")), None)
    if foreign is not None:
        raise ValueError(
            f"{foreign[:80]!r} is no data: URL. The page must hold its samples, so that it works offline."
        )
    found = comparison.as_dict()["models"]
    data: dict[str, Any] = {
        "title": title,
        "about": f"{comparison.size}, the same for all models. Means with 95 % bootstrap intervals over prompts. A "
        f"win is a higher score than {comparison.base}'s on the same prompt and seed; equal scores count half.",
        "base": comparison.base,
        "models": comparison.models,
        "rewards": comparison.rewards,
        "prompts": comparison.prompts,
        "seeds": comparison.seeds,
        "scores": {
            model: {reward: entry["scores"] for reward, entry in found[model]["rewards"].items()}
            for model in comparison.models
        },
        "summary": comparison.rows(),
        "media": media,
        "sources": sources,
        # Two players would not stay together below one slider.
        "slider": comparison.modality == "image",
    }
    # Text within a script element ends at "</", whatever it is part of.
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("</", "<\\/").replace("<!--", "<\\u0021--")
    return _TEMPLATE.read_text(encoding="utf-8").replace(_PLACE, text, 1)
