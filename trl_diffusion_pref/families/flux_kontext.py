"""Flux.1 Kontext: Flux whose transformer gets the tokens of the image to edit after those of the noisy one."""

import torch
from diffusers import FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from torch import Tensor

from .base import call_default
from .flux import FluxFamily


class FluxKontextFamily(FluxFamily):
    """`FluxKontextPipeline`.

    Args:
        training_guidance: See `FluxFamily`.
        auto_resize: Whether condition images are brought to that of the published model's 17 sizes, of a megapixel
            each, whose shape is nearest, as the pipeline does unless its call has `_auto_resize=False`. Without, they
            keep their size, rounded down to whole tokens: an image of 512x512 pixels has a fourth of the tokens.
            `register_family(FluxKontextFamily(auto_resize=False))`.
    """

    pipeline_class = "FluxKontextPipeline"
    guided_pipelines = ()
    condition_images = ("image",)
    own_condition_sizes = True

    def __init__(self, training_guidance: float = 1.0, auto_resize: bool = True) -> None:
        super().__init__(training_guidance)
        self.auto_resize = auto_resize

    def distilled(self, pipeline: FluxKontextPipeline) -> str | None:
        """Nothing: Kontext was published with guidance embeddings alone."""
        return None

    def resolution(self, pipeline: FluxKontextPipeline) -> int:
        # Whatever size its call is given, it generates this many pixels unless it is told another number.
        step = self.size_step(pipeline)
        return round(call_default(pipeline, "max_area") ** 0.5) // step * step

    def condition_size(self, pipeline: FluxKontextPipeline, size: tuple[int, int], count: int) -> tuple[int, int]:
        step = self.size_step(pipeline)
        height, width = (side // step * step for side in size)
        if self.auto_resize:
            # Read now, and not when this module is imported.
            sizes = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
            _, width, height = min((abs(width / height - w / h), w, h) for w, h in sizes)
        return height // step * step, width // step * step

    def tokens(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        noisy, positions = super().tokens(x_t, conditioning)
        image, image_positions = super().tokens(conditioning["image"].to(x_t.dtype), conditioning)
        # The first of the three coordinates says to which image a token belongs.
        image_positions[:, 0] = 1
        return torch.cat([noisy, image], dim=1), torch.cat([positions, image_positions])
