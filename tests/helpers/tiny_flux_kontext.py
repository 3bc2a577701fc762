"""Flux Kontext's pipeline with random weights, and the sizes that it brings images to."""

from diffusers import FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from torch import Tensor


# Of a megapixel each: too many tokens for tests, which have sizes of their own.
PUBLISHED_SIZES = list(pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS)
pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS[:] = [(16, 40), (24, 32), (28, 28), (32, 24), (40, 16)]


def kontext_around(flux: FluxPipeline) -> FluxKontextPipeline:
    """The same parts in the editing pipeline."""
    return FluxKontextPipeline(**flux.components)


def noisy_tokens(pipeline: FluxKontextPipeline, latents: Tensor) -> Tensor:
    """The latents of a 16x24 image from its tokens, after which those of the condition image may come."""
    return FluxPipeline._unpack_latents(latents[:, :24], 8, 12, vae_scale_factor=1)
