"""Encoding and decoding with VAEs: scales, shifts, and float32 where half precision overflows."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


logger = logging.getLogger(__name__)

Tensors = TypeVar("Tensors", Tensor, tuple[Tensor, Tensor])


@cache
def _warn_of_non_finite_values(vae: str, dtype: torch.dtype) -> None:
    # Cached, so that each kind of VAE is named once and not at every batch.
    logger.warning(
        "%s in %s gave NaN or infinite values. Such batches are computed in float32; to save the second attempt, load "
        "the VAE in float32 or bfloat16.",
        vae,
        str(dtype).removeprefix("torch."),
    )


@contextmanager
def weights_in_float32(module: nn.Module) -> Iterator[None]:
    """Has a module's weights in float32 for the duration."""
    # The same tensors come back, whatever mixture of dtypes they had. diffusers' own to() warns at every cast.
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    kept = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(tensors, kept, strict=True):
            tensor.data = data


def _finite(vae: ModelMixin, inputs: Tensor, run: Callable[[Tensor], Tensors], in_float32: bool) -> Tensors:
    """`run(inputs)` in the VAE's dtype, or in float32 where that overflows; float32 results."""

    def attempt() -> Tensors:
        with torch.no_grad():
            output = run(inputs.to(device=vae.device, dtype=vae.dtype))
        return output.float() if isinstance(output, Tensor) else (output[0].float(), output[1].float())

    dtype = vae.dtype
    if dtype == torch.float32:
        return attempt()
    if not in_float32:
        result = attempt()
        if all(bool(values.isfinite().all()) for values in ([result] if isinstance(result, Tensor) else result)):
            return result
        _warn_of_non_finite_values(type(vae).__name__, dtype)
    with weights_in_float32(vae):
        return attempt()


def encode_finite(
    vae: ModelMixin, pixels: Tensor, moments: Callable[[Any], tuple[Tensor, Tensor]], *, in_float32: bool = False
) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation, in the VAE's dtype, or in float32 where that overflows.

    Args:
        vae: Has its dtype back afterwards.
        pixels: What its `encode` takes, in [-1, 1].
        moments: Mean and standard deviation from what its `encode` returns.
        in_float32: Do not try the VAE's dtype first.

    Returns:
        Two float32 tensors in the VAE's own scale. They are not finite where float32 overflows too; the caller knows
        which row that is.
    """
    return _finite(vae, pixels, lambda inputs: moments(vae.encode(inputs)), in_float32)


def decode_finite(vae: ModelMixin, latents: Tensor, time: float | None = None, *, in_float32: bool = False) -> Tensor:
    """What the VAE decodes, in its dtype, or in float32 where that overflows.

    Args:
        vae: Has its dtype back afterwards.
        latents: In the VAE's own scale.
        time: The noise that is left in the latents, for a VAE whose `decode` takes it as its second argument.
        in_float32: Do not try the VAE's dtype first.

    Returns:
        A float32 tensor, neither clamped nor scaled.
    """

    def run(inputs: Tensor) -> Tensor:
        times = [] if time is None else [inputs.new_full((len(inputs),), time)]
        return vae.decode(inputs, *times, return_dict=False)[0]

    return _finite(vae, latents, run, in_float32)


def encode_with_autoencoder_kl(vae: ModelMixin, pixels: Tensor, *, in_float32: bool = False) -> tuple[Tensor, Tensor]:
    """`Family.encode_samples` for pipelines with an `AutoencoderKL`: `(z - shift_factor) * scaling_factor`.

    Args:
        in_float32: See `encode_finite`.
    """
    mean, std = encode_finite(
        vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std), in_float32=in_float32
    )
    shift = vae.config.get("shift_factor") or 0.0
    scale = vae.config.scaling_factor
    return (mean - shift) * scale, std * scale


def decode_with_autoencoder_kl(vae: ModelMixin, latents: Tensor) -> Tensor:
    """The inverse of `encode_with_autoencoder_kl`."""
    return decode_finite(vae, latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0))


def encode_with_channel_statistics(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """`(z - latents_mean) / latents_std` per channel, for VAEs of videos, `(B, 3, F, H, W)` to `(B, C, f, h, w)`."""
    mean, std = encode_finite(vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std))
    shift, scale = channel_statistics(vae, mean)
    return (mean - shift) / scale, std / scale


def decode_with_channel_statistics(vae: ModelMixin, latents: Tensor) -> Tensor:
    """The inverse of `encode_with_channel_statistics`."""
    shift, scale = channel_statistics(vae, latents)
    return decode_finite(vae, latents * scale + shift)


def channel_statistics(vae: ModelMixin, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The config's `latents_mean` and `latents_std`, shaped to broadcast over latents `(B, C, ...)`."""
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (
        torch.tensor(values, device=latents.device).reshape(shape)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std
