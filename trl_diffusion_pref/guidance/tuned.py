"""A pipeline with the weights of a tuned model for a while: its LoRA, or its whole denoiser."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import DiffusionPipeline, ModelMixin

from .adapters import NegativeAdapter
from .sources import Model, denoiser_name, read_negative


@contextmanager
def with_tuned_weights(pipeline: DiffusionPipeline, model: Model) -> Iterator[DiffusionPipeline]:
    """Puts a tuned model into a base pipeline for the duration; VAE, text encoders and scheduler stay the base's.

    Args:
        pipeline: The base.
        model: LoRA file; folder or Hub id with a LoRA, a denoiser or a pipeline; a loaded pipeline or denoiser. A LoRA
            acts at its trained scale, beside the adapters that the pipeline has.

    Raises:
        ValueError: There are no weights of the base's architecture.
        TypeError: Something else was passed.
    """
    name = denoiser_name(pipeline)
    own: ModelMixin = getattr(pipeline, name)
    read = read_negative(model, pipeline)
    if read.denoiser is None:
        adapter = NegativeAdapter(pipeline, own, read)
        try:
            with adapter.negative_side(alpha=1.0, beta=1.0):
                yield pipeline
        finally:
            adapter.remove()
        return
    device, training = next(read.denoiser.parameters()).device, read.denoiser.training
    setattr(pipeline, name, read.denoiser.to(own.device).eval())
    try:
        yield pipeline
    finally:
        setattr(pipeline, name, own)
        # A model that the caller holds goes back to where it was.
        read.denoiser.to(device).train(training)
