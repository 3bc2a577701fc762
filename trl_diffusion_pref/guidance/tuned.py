"""A pipeline with the weights of a tuned model for a while: its LoRA, or its whole denoiser."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers import DiffusionPipeline, ModelMixin

from .adapters import NegativeAdapter
from .sources import Model, Negative, read_negatives


@contextmanager
def with_tuned_weights(pipeline: DiffusionPipeline, model: Model) -> Iterator[DiffusionPipeline]:
    """Puts a tuned model into a base pipeline for the duration; VAE, text encoders and scheduler stay the base's.

    Args:
        pipeline: The base.
        model: LoRA file; folder or Hub id with a LoRA, a denoiser or a pipeline; a loaded pipeline or denoiser. A LoRA
            acts at its trained scale, beside the adapters that the pipeline has. Of several denoisers, one for each
            range of noise, those that the model has weights of are replaced.

    Raises:
        ValueError: There are no weights of the base's architecture.
        TypeError: Something else was passed.
    """
    with ExitStack() as stack:
        for read in read_negatives(model, pipeline):
            stack.enter_context(_with_one(pipeline, read))
        yield pipeline


@contextmanager
def _with_one(pipeline: DiffusionPipeline, read: Negative) -> Iterator[None]:
    """One denoiser's part of `with_tuned_weights`."""
    own: ModelMixin = getattr(pipeline, read.attribute)
    if read.denoiser is None:
        adapter = NegativeAdapter(pipeline, own, read)
        try:
            with adapter.negative_side(alpha=1.0, beta=1.0):
                yield
        finally:
            adapter.remove()
        return
    device, training = next(read.denoiser.parameters()).device, read.denoiser.training
    setattr(pipeline, read.attribute, read.denoiser.to(own.device).eval())
    try:
        yield
    finally:
        setattr(pipeline, read.attribute, own)
        # A model that the caller holds goes back to where it was.
        read.denoiser.to(device).train(training)
