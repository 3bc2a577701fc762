"""What a model family must say: how its pipeline encodes prompts and images, and how it calls its denoiser."""

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# PEFT writes names as seen from PeftModel.
_PEFT_PREFIX = "base_model.model."


class Family(ABC):
    """One kind of pipeline. Stateless: every method gets the pipeline or denoiser it works on.

    Attributes:
        pipeline_class: Name of the diffusers class.
        denoiser_name: The pipeline's attribute that is trained, "unet" or "transformer".
        encoder_names: Attributes needed for encoding only; absent from the device during training.
        optional_encoder_names: Those of them that a pipeline may have been loaded without.
        lora_target_modules: Default targets, those of diffusers' own training examples.
        gradient_checkpointing: Whether the denoiser computes the same with it.
        modality: What a sample is, "image", "video" or "audio".
        lora_format: "diffusers" where the pipeline has `load_lora_weights`; "peft" where it has not, and the folder
            that `save_lora` writes loads with `PeftModel.from_pretrained(pipeline.<denoiser_name>, folder)`.
    """

    pipeline_class: str
    denoiser_name: str
    encoder_names: tuple[str, ...]
    optional_encoder_names: tuple[str, ...] = ()
    lora_target_modules: tuple[str, ...]
    gradient_checkpointing: bool = True
    modality: str = "image"
    lora_format: str = "diffusers"

    def denoiser(self, pipeline: DiffusionPipeline) -> nn.Module:
        """The module that is trained."""
        return getattr(pipeline, self.denoiser_name)

    def encoders(self, pipeline: DiffusionPipeline) -> list[nn.Module]:
        """The modules that encode prompts and images."""
        return [module for name in self.encoder_names if (module := getattr(pipeline, name, None)) is not None]

    def check_complete(self, pipeline: DiffusionPipeline) -> None:
        """Refuses a pipeline that was loaded without a part that encodes.

        Raises:
            ValueError: Names the parts.
        """
        needed = [name for name in self.encoder_names if name not in self.optional_encoder_names]
        missing = [name for name in needed if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The {type(pipeline).__name__} was loaded without {', '.join(missing)}, and prompts and samples are "
                "encoded with all of its parts. Load it whole; the encoders leave the device before training starts."
            )

    def text_device(self, pipeline: DiffusionPipeline) -> torch.device:
        """Where the first text encoder is.

        Raises:
            ValueError: The pipeline was loaded without any.
        """
        for name in self.encoder_names:
            if name.startswith("text_encoder") and (encoder := getattr(pipeline, name, None)) is not None:
                return encoder.device
        names = ", ".join(name for name in self.encoder_names if name.startswith("text_encoder"))
        raise ValueError(
            f"The {type(pipeline).__name__} has no text encoder ({names}), so prompts cannot be encoded. Load it with "
            "at least one."
        )

    @abstractmethod
    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """Side length in pixels of the square images that the pipeline generates by default."""

    def size_step(self, pipeline: DiffusionPipeline) -> int:
        """Pixels that a side must be a multiple of: one latent, or one patch where the denoiser takes patches.

        Default: as the pipeline's `vae_scale_factor` or `vae_scale_factor_spatial` and the denoiser's `patch_size` say
        it; 1 for what is not said.
        """
        factors = (getattr(pipeline, name, None) for name in ("vae_scale_factor_spatial", "vae_scale_factor"))
        factor = next((factor for factor in factors if factor), 1)
        patch = self.denoiser(pipeline).config.get("patch_size") or 1
        return factor * (patch if isinstance(patch, int) else patch[-1])

    def check_side(self, pipeline: DiffusionPipeline, side: int) -> None:
        """Refuses a side in pixels that is no whole number of patches.

        Raises:
            ValueError: Says what `resolution` may be.
        """
        step = self.size_step(pipeline)
        if side % step:
            below = max(side // step, 1) * step
            raise ValueError(
                f"resolution={side}: {type(pipeline).__name__} takes multiples of {step} pixels. Take {below} or "
                f"{below + step}."
            )

    @abstractmethod
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of each prompt as the pipeline's own `__call__` computes it.

        Returns:
            Named tensors `(len(prompts), ...)`, float32, on the encoders' device, everything that `predict` needs
            and `image_conditioning` or `sound_conditioning` does not give. Shapes do not depend on the prompts:
            embeddings are padded to a fixed length, and a mask (1: token, 0: padding) stands beside them where the
            denoiser takes one.
        """

    def encode_unconditional(self, pipeline: DiffusionPipeline) -> dict[str, Tensor]:
        """What the pipeline's sampler puts on the unconditional side where the user gives no negative prompt.

        Returns:
            As `encode_prompts` of one prompt, `(1, ...)`. Default: the empty prompt's.
        """
        return self.encode_prompts(pipeline, [""])

    def token_limits(self, pipeline: DiffusionPipeline) -> dict[str, int]:
        """The most tokens of a prompt that are read, special ones included, by the tokenizer's attribute.

        Default: what each tokenizer says of itself.
        """
        return {
            name: part.model_max_length
            for name, part in pipeline.components.items()
            if isinstance(part, PreTrainedTokenizerBase)
        }

    def tokenized_text(self, pipeline: DiffusionPipeline, prompt: str) -> str:
        """What the pipeline gives its tokenizers for a prompt. Default: the prompt itself."""
        return prompt

    def image_conditioning(
        self,
        pipeline: DiffusionPipeline,
        original_size: tuple[int, int],
        crop_top_left: tuple[int, int],
        target_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Conditioning on how one image was prepared; empty for families without it.

        Args:
            original_size: (height, width) of the image in pixels before it was resized.
            crop_top_left: (top, left) of the crop in pixels of the resized image.
            target_size: (height, width) of what is encoded, in pixels.

        Returns:
            Named float32 tensors without batch dimension; stacked, `predict` reads them from its `conditioning`.
        """
        return {}

    @abstractmethod
    def encode_images(self, pipeline: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the latents, in the scale that the denoiser sees.

        Args:
            pixels: `(B, 3, H, W)` float32 in [-1, 1].

        Returns:
            Two tensors `(B, C, h, w)` float32.
        """

    def image_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """How many tokens the denoiser makes of one sample; flow schedulers that shift by size are told by it.

        Args:
            latent_shape: `(C, h, w)`, or `(C, f, h, w)` for clips.

        Returns:
            One per 2x2 latents, as Flux's, Qwen-Image's and SD 3's pipelines count.
        """
        *frames, height, width = latent_shape[1:]
        return math.prod(frames) * (height // 2) * (width // 2)

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        """Calls the denoiser as the pipeline does, without guidance.

        Args:
            denoiser: Possibly wrapped (PEFT, DDP); its compute dtype is that of `x_t` unless autocast is on.
            x_t: `(B, ...)` noisy latents.
            timestep: `(B,)` from `NoiseProcess.model_time`.
            conditioning: From `encode_prompts`, one row per sample.
        """

    def save_lora(
        self, pipeline: DiffusionPipeline, folder: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        """Writes `pytorch_lora_weights.safetensors` with adapter metadata, without which it loads at a wrong scale."""
        layers, layers_metadata = f"{self.denoiser_name}_lora_layers", f"{self.denoiser_name}_lora_adapter_metadata"
        pipeline.save_lora_weights(folder, **{layers: state_dict, layers_metadata: metadata})


class VideoFamily(Family):
    """For pipelines that generate clips: `encode_images` takes `(B, 3, F, H, W)` and gives `(B, C, f, h, w)`."""

    modality = "video"

    @abstractmethod
    def video_size(self, pipeline: DiffusionPipeline) -> tuple[int, int, int]:
        """Frames, height and width in pixels of the clips that the pipeline generates by default."""

    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """The shorter side of a clip."""
        return min(self.video_size(pipeline)[1:])

    def scaled_size(self, pipeline: DiffusionPipeline, shorter: int) -> tuple[int, int]:
        """Height and width of clips with another shorter side, in the shape of those that the pipeline generates.

        The longer side is rounded to whole patches of the denoiser.

        Raises:
            ValueError: The shorter side is not a whole number of patches.
        """
        self.check_side(pipeline, shorter)
        step = self.size_step(pipeline)
        _, *size = self.video_size(pipeline)
        height, width = (max(round(side * shorter / min(size) / step), 1) * step for side in size)
        return height, width

    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
                device=self.text_device(pipeline),
            )
        return {"prompt_embeds": prompt_embeds.float()}

    def token_limits(self, pipeline: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    @staticmethod
    def check_clips(pipeline: DiffusionPipeline, pixels: Tensor) -> None:
        """Refuses what the VAE would cut short or mistake.

        Raises:
            ValueError: Not clips, or a number of frames that is no multiple of the VAE's temporal factor, plus one.
        """
        if pixels.ndim != 5:
            raise ValueError(
                f"{type(pipeline).__name__} generates clips, but got pixels of shape {tuple(pixels.shape)}. Pass "
                "(batch, 3, frames, height, width); for images take a pipeline that generates images."
            )
        factor, frames = pipeline.vae_scale_factor_temporal, pixels.shape[2]
        if frames % factor != 1 and factor > 1:
            below = max((frames - 1) // factor * factor, 0) + 1
            raise ValueError(
                f"A clip has {frames} frames, but the {type(pipeline.vae).__name__} takes a multiple of {factor} plus "
                f"one. Cut it to {below} frames, or bring {below + factor}."
            )


class AudioFamily(Family):
    """For pipelines that generate sound: `encode_images` takes `(B, channels, samples)` and gives `(B, C, l)`."""

    modality = "audio"

    @abstractmethod
    def sampling_rate(self, pipeline: DiffusionPipeline) -> int:
        """Samples per second."""

    @abstractmethod
    def audio_size(self, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Channels and samples of the waveforms that the denoiser was made for."""

    def normalize(self, samples: Tensor) -> Tensor:
        """Sound as loud as what the model was trained on. Default: as it is.

        Args:
            samples: `(channels, samples)` float32 of one sound, of the model's rate, before silence fills it up.
        """
        return samples

    def sound_conditioning(self, pipeline: DiffusionPipeline, seconds: float) -> dict[str, Tensor]:
        """Conditioning on how one waveform was prepared; empty for families without it.

        Args:
            seconds: How long it sounds before the silence that fills it up to `audio_size`.

        Returns:
            Named float32 tensors without batch dimension; stacked, `predict` reads them from its `conditioning`.
        """
        return {}

    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """Sound has none.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{type(pipeline).__name__} generates sound, which has no resolution in pixels.")

    def check_waveforms(self, pipeline: DiffusionPipeline, waveforms: Tensor) -> None:
        """Refuses waveforms of another size.

        Raises:
            ValueError: Not `(B, channels, samples)` of `audio_size`.
        """
        channels, samples = self.audio_size(pipeline)
        if waveforms.ndim != 3 or waveforms.shape[1:] != (channels, samples):
            raise ValueError(
                f"{type(pipeline).__name__} takes waveforms (batch, {channels}, {samples}), "
                f"{samples / self.sampling_rate(pipeline):g} s at {self.sampling_rate(pipeline)} Hz, but got "
                f"{tuple(waveforms.shape)}. Resample, repeat or mix the channels, and cut or pad with silence."
            )


class PeftFormatFamily(Family):
    """For pipelines without `load_lora_weights`: LoRA is written and loaded as PEFT does it."""

    lora_format = "peft"

    def save_lora(
        self, pipeline: DiffusionPipeline, folder: str | Path, state_dict: dict[str, Tensor], metadata: dict[str, Any]
    ) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors` for `PeftModel.from_pretrained`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        LoraConfig(**metadata).save_pretrained(folder)
        layers = {_PEFT_PREFIX + name: tensor.contiguous() for name, tensor in state_dict.items()}
        save_file(layers, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def call_default(pipeline: DiffusionPipeline, name: str) -> Any:
    """The default of an argument of the pipeline's `__call__`, which `encode_prompt` may have another one for."""
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def square_side(denoiser: nn.Module) -> int:
    """Latents per side of what a denoiser was made for.

    Raises:
        ValueError: Its config does not say, or says a shape that is no square.
    """
    size = denoiser.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise ValueError(
            f"The {type(denoiser).__name__}'s config has sample_size={size!r}, which is no side of a square. Set "
            'resolution, such as 512 or "512x768".'
        )
    return sides.pop()


def model_inside(denoiser: nn.Module) -> ModelMixin:
    """The diffusers model inside whatever wraps it (PEFT, DDP, torch.compile), for its config."""
    return next(module for module in denoiser.modules() if isinstance(module, ModelMixin))


@cache
def _warn_of_non_finite_latents(vae: str, dtype: torch.dtype) -> None:
    # cached, so that each kind of VAE is named once and not at every batch
    logger.warning(
        "%s in %s gave NaN or infinite latents. Such batches are encoded in float32; to save the second attempt, load "
        "the VAE in float32 or bfloat16.",
        vae,
        str(dtype).removeprefix("torch."),
    )


@contextmanager
def _in_float32(module: nn.Module) -> Iterator[None]:
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


def encode_finite(
    vae: ModelMixin,
    pixels: Tensor,
    moments: Callable[[Any], tuple[Tensor, Tensor]],
    *,
    in_float32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Posterior mean and standard deviation, in the VAE's dtype, or in float32 where that overflows.

    Args:
        vae: Has its dtype back afterwards.
        pixels: What its `encode` takes, in [-1, 1].
        moments: Mean and standard deviation from what its `encode` returns.
        in_float32: Do not try the VAE's dtype first.

    Returns:
        Two float32 tensors in the VAE's own scale. Not finite where float32 does not help either; which row that is,
        the caller knows.
    """
    dtype = vae.dtype

    def encode() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            mean, std = moments(vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)))
        return mean.float(), std.float()

    if dtype == torch.float32:
        return encode()
    if not in_float32:
        encoded = encode()
        if all(bool(values.isfinite().all()) for values in encoded):
            return encoded
        _warn_of_non_finite_latents(type(vae).__name__, dtype)
    with _in_float32(vae):
        return encode()


def encode_with_autoencoder_kl(vae: ModelMixin, pixels: Tensor, *, in_float32: bool = False) -> tuple[Tensor, Tensor]:
    """`encode_images` for pipelines with an `AutoencoderKL`: `(z - shift_factor) * scaling_factor`.

    Args:
        in_float32: See `encode_finite`.
    """
    mean, std = encode_finite(
        vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std), in_float32=in_float32
    )
    shift = vae.config.get("shift_factor") or 0.0
    scale = vae.config.scaling_factor
    return (mean - shift) * scale, std * scale


def encode_with_channel_statistics(vae: ModelMixin, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """`(z - latents_mean) / latents_std` per channel, for VAEs of videos, `(B, 3, F, H, W)` to `(B, C, f, h, w)`."""
    mean, std = encode_finite(vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std))
    shift, scale = (
        torch.tensor(values, device=mean.device).reshape(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (mean - shift) / scale, std / scale
