"""What a model family must say: how its pipeline encodes prompts and samples, and how it calls its denoiser."""

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .autoencoders import decode_with_autoencoder_kl, encode_with_autoencoder_kl
from .conditions import Conditions
from .denoisers import Denoisers
from .kohya import KohyaNames
from .records import InputShapes, Recommended


logger = logging.getLogger(__name__)

Modality = Literal["image", "video", "audio"]
LoraFormat = Literal["diffusers", "peft"]
GuidanceLayout = Literal["batched", "positive_first", "positive_of_three", "separate"]


class Family(Conditions, Denoisers, ABC):
    """One kind of pipeline. Stateless: every method gets the pipeline or denoiser it works on.

    Methods about sizes and shapes read configs and call no module, so that a `weightless` pipeline is enough for them.

    Attributes:
        pipeline_class: Name of the diffusers class.
        denoiser_class: Name of the denoiser's class, for a denoiser that comes without its pipeline.
        denoiser_name: The pipeline's attribute that is trained, "unet" or "transformer"; see also `Denoisers`.
        encoder_names: Attributes needed for encoding only; absent from the device during training.
        optional_encoder_names: Those of them that a pipeline may have been loaded without.
        lora_target_modules: Default targets, those of diffusers' own training examples.
        packing: How many latents the pipeline packs into one input vector of the denoiser, whose `in_channels` is that
            many times the latents' channels.
        flow: Whether the published models are rectified flows.
        read_by_value: Conditioning whose values, not only shapes, decide how `predict` calls the denoiser.
        recommended: Published values of options that depend on the model, by the algorithm's name. Where nothing was
            published, leave the algorithm out: the values of the nearest model are taken.
        gradient_checkpointing: Whether the denoiser computes the same with it.
        modality: What a sample is, "image", "video" or "audio".
        lora_format: "diffusers" where the pipeline has `load_lora_weights`; "peft" where it has not, and the folder
            that `save_lora` writes loads with `PeftModel.from_pretrained(pipeline.<denoiser_name>, folder)`.
        kohya: How kohya's scripts and ComfyUI name the denoiser's layers, for `export_lora`; None where they have no
            names for it.
        guidance_layout: How the pipeline calls its denoiser for classifier-free guidance. "batched": once, on
            [negative; positive]. "positive_first": once, on [positive; negative]; "positive_of_three": on [positive;
            negative; negative without condition images]. "separate": twice, inside diffusers' `cache_context("cond")`
            and `cache_context("uncond")`, or the second time with its own `negative_prompt_embeds`. None: none, or
            unknown, and `guidance.negative_guidance` asks for it.
        guided_pipelines: Names of further diffusers classes around the same denoiser that call it in this layout.
        aspect_ratio_buckets: Whether the published models were trained on images of several shapes.
        prompt_masks: Which of `encode_prompts`' masks says which tokens of an embedding the denoiser looks at, by the
            embedding's name. What is masked is not stored.
        pads_to_longest: Whether the pipeline's `__call__` pads the prompts of a batch to the longest of them, so that
            a sample depends on the other prompts of its batch. Prompts of different text are then sampled apart.
        shared_arguments: Names of the denoiser's arguments that are the same for all samples, such as positions of
            tokens; their first dimension is never a batch.
    """

    pipeline_class: str
    denoiser_class: str = ""
    denoiser_name: str
    encoder_names: tuple[str, ...]
    optional_encoder_names: tuple[str, ...] = ()
    lora_target_modules: tuple[str, ...]
    flow: bool = False
    read_by_value: tuple[str, ...] = ()
    recommended: ClassVar[Mapping[str, Recommended]] = {}
    gradient_checkpointing: bool = True
    modality: Modality = "image"
    lora_format: LoraFormat = "diffusers"
    kohya: ClassVar[KohyaNames | None] = None
    guidance_layout: GuidanceLayout | None = None
    guided_pipelines: tuple[str, ...] = ()
    aspect_ratio_buckets: bool = False
    prompt_masks: ClassVar[Mapping[str, str]] = {}
    pads_to_longest: bool = False
    shared_arguments: tuple[str, ...] = ()

    def encoders(self, pipeline: DiffusionPipeline) -> list[Any]:
        """The modules that encode prompts and samples."""
        return [module for name in self.encoder_names if (module := getattr(pipeline, name, None)) is not None]

    def denoiser_config(self, pipeline: DiffusionPipeline) -> Any:
        """The denoiser's config, whatever the denoiser is wrapped in."""
        return model_inside(self.denoiser(pipeline)).config

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        """Whether a denoiser that comes without its pipeline belongs to this family."""
        return type(denoiser).__name__ == self.denoiser_class

    def published_parts(self) -> dict[str, Any]:
        """Stand-ins for parts of the published pipeline, of which sizes are read where a denoiser comes alone.

        Default: none, since most pipelines take the published autoencoder where they have none.
        """
        return {}

    def check_complete(self, pipeline: DiffusionPipeline) -> None:
        """Raises where a pipeline cannot be trained as it was loaded, and warns once of what training would lose.

        Raises:
            ValueError: A part that encodes is missing, or the denoiser takes other channels than the pipeline gives it
                (control checkpoints).
        """
        self._check_parts(pipeline)
        self._check_channels(pipeline)
        if (reason := self.distilled(pipeline)) is not None:
            _warn_of_distillation(type(pipeline).__name__, reason)

    def distilled(self, pipeline: DiffusionPipeline) -> str | None:
        """What in the configs shows that the checkpoint was distilled to a few sampling steps. Default: nothing."""
        return None

    def _check_parts(self, pipeline: DiffusionPipeline) -> None:
        needed = [name for name in self.encoder_names if name not in self.optional_encoder_names]
        missing = [name for name in needed if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The {type(pipeline).__name__} was loaded without {', '.join(missing)}, and prompts and samples are "
                "encoded with all of its parts. Load it whole; the encoders leave the device before training starts."
            )

    def _check_channels(self, pipeline: DiffusionPipeline) -> None:
        # Autoencoders name their latents' channels in three ways; one that does so in none cannot be checked.
        names = ("latent_channels", "z_dim", "decoder_input_channels")
        latent = next((size for name in names if (size := pipeline.vae.config.get(name))), None)
        channels = self.denoiser_config(pipeline).get("in_channels")
        if latent is not None and channels is not None and channels != (own := self.input_channels(pipeline, latent)):
            beside = " and condition images" if own > latent * self.packing else ""
            raise ValueError(
                f"The {self.denoiser_name} of this {type(pipeline).__name__} takes {channels} channels, but noisy "
                f"latents{beside} of its {type(pipeline.vae).__name__} have {own}. Load "
                "the checkpoint in the class of pipeline that it was published for. If that class cannot be trained "
                "(depth, control, image to video), use the checkpoint that generates from text alone."
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

    def text_dtype(self, pipeline: DiffusionPipeline) -> torch.dtype:
        """The widest dtype that a text encoder computes in."""
        names = [name for name in self.encoder_names if name.startswith("text_encoder")]
        dtypes = [encoder.dtype for name in names if (encoder := getattr(pipeline, name, None)) is not None]
        return max(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32)

    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """Side length in pixels of the square images that the pipeline generates by default.

        Default: the pipeline's `default_sample_size`, which counts latents.
        """
        return pipeline.default_sample_size * pipeline.vae_scale_factor

    def size_step(self, pipeline: DiffusionPipeline) -> int:
        """Pixels that a side must be a multiple of: one latent, or one patch where the denoiser takes patches.

        Default: `pixels_per_latent` times the denoiser's `patch_size`, or 1 where its config has none.
        """
        patch = self.denoiser_config(pipeline).get("patch_size") or 1
        return self.pixels_per_latent(pipeline) * (patch if isinstance(patch, int) else patch[-1])

    def pixels_per_latent(self, pipeline: DiffusionPipeline) -> int:
        """Along one side. Default: the pipeline's `vae_scale_factor_spatial` or `vae_scale_factor`, else 1."""
        factors = (getattr(pipeline, name, None) for name in ("vae_scale_factor_spatial", "vae_scale_factor"))
        return next((factor for factor in factors if factor), 1)

    def largest_side(self, pipeline: DiffusionPipeline) -> int | None:
        """Pixels that a side may have at most. Default: None, any."""
        return None

    def check_side(self, pipeline: DiffusionPipeline, side: int) -> None:
        """Raises where a side in pixels is no whole number of patches, or more than the denoiser takes.

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
        largest = self.largest_side(pipeline)
        if largest is not None and side > largest:
            raise ValueError(
                f"resolution={side}: the {self.denoiser_name} of this {type(pipeline).__name__} has positions for "
                f"{largest} pixels a side. Take {largest} at most."
            )

    def input_shapes(self, pipeline: DiffusionPipeline, sample_shape: tuple[int, ...]) -> InputShapes:
        """What the denoiser is given for one sample.

        Args:
            sample_shape: As `encode_samples` takes it, without the batch dimension.
        """
        return InputShapes(self.latent_shape(pipeline, sample_shape), self.conditioning_shapes(pipeline))

    def latent_shape(self, pipeline: DiffusionPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of one sample, without the batch dimension.

        Args:
            sample_shape: As `encode_samples` takes it, without the batch dimension.
        """
        factor = self.pixels_per_latent(pipeline)
        return self.latent_channels(pipeline), *(side // factor for side in sample_shape[1:])

    def conditioning_shapes(self, pipeline: DiffusionPipeline) -> dict[str, tuple[int, ...]]:
        """Shapes of everything that `predict` reads, without the batch dimension.

        Default: found by encoding one prompt, for which the pipeline must be loaded; override it to do without.

        Raises:
            TypeError: The pipeline has no weights.
        """
        present = self.encoders(pipeline)
        if not present or not all(isinstance(part, nn.Module) for part in present):
            raise TypeError(
                f"{type(self).__name__} does not say what it conditions on without encoding a prompt. Pass the loaded "
                "pipeline, or let the family override conditioning_shapes."
            )
        conditioning = self.encode_prompts(pipeline, [""])
        shapes = {name: tuple(tensor.shape[1:]) for name, tensor in conditioning.items()}
        return shapes | {name: tuple(tensor.shape) for name, tensor in self._any_sample_conditioning(pipeline).items()}

    def _any_sample_conditioning(self, pipeline: DiffusionPipeline) -> dict[str, Tensor]:
        return self.image_conditioning(pipeline, (8, 8), (0, 0), (8, 8))

    @abstractmethod
    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Conditioning of each prompt as the pipeline's own `__call__` computes it.

        Returns:
            Named tensors `(len(prompts), ...)`, float32, on the encoders' device, everything that `predict` needs
            and `image_conditioning` or `audio_conditioning` does not give. Shapes do not depend on the prompts:
            embeddings are padded to a fixed length, and a mask (1: token, 0: padding) stands beside them where the
            denoiser takes one.
        """

    def encode_unconditional(self, pipeline: DiffusionPipeline) -> dict[str, Tensor]:
        """What the pipeline's sampler puts on the unconditional side if the user gives no negative prompt.

        Returns:
            As `encode_prompts` of one prompt, `(1, ...)`. Default: the empty prompt's.
        """
        return self.encode_prompts(pipeline, [""])

    def token_limits(self, pipeline: DiffusionPipeline) -> dict[str, int]:
        """How many tokens of a prompt are read, special ones included, by the tokenizer's attribute.

        Default: each tokenizer's `model_max_length`.
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

    def encode_samples(self, pipeline: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation of the latents, in the scale that the denoiser sees.

        Default: an `AutoencoderKL`'s.

        Args:
            pixels: Images `(B, 3, H, W)`, videos `(B, 3, F, H, W)` or waveforms `(B, channels, samples)`, float32 in
                [-1, 1].

        Returns:
            Two float32 tensors `(B, C, h, w)` of images, `(B, C, f, h, w)` of videos; of audio as its VAE has them.

        Raises:
            ValueError: Samples of a shape that the VAE would cut short or mistake.
        """
        return encode_with_autoencoder_kl(pipeline.vae, pixels)

    def decode_samples(self, pipeline: DiffusionPipeline, latents: Tensor) -> Tensor:
        """The inverse of `encode_samples`, through the VAE and whatever the pipeline puts after it.

        Args:
            latents: `(B, C, ...)` in the scale that the denoiser sees.

        Returns:
            float32, as `encode_samples` takes them: images and videos clamped to [-1, 1], waveforms as they come.
        """
        return decode_with_autoencoder_kl(pipeline.vae, latents).clamp(-1, 1)

    def image_tokens(self, latent_shape: tuple[int, ...]) -> float:
        """How many tokens the denoiser makes of one sample, by which some flow schedulers shift their times.

        Args:
            latent_shape: `(C, h, w)`, or `(C, f, h, w)` for videos.

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


def call_default(pipeline: DiffusionPipeline, name: str) -> Any:
    """The default of an argument of the pipeline's `__call__`.

    Sampling passes it on to `encode_prompt`, whose own default for the same argument may be another one.
    """
    return inspect.signature(type(pipeline).__call__).parameters[name].default


def model_inside(denoiser: nn.Module) -> ModelMixin:
    """The diffusers model inside whatever wraps it (PEFT, DDP, torch.compile), for its config."""
    return next(module for module in denoiser.modules() if isinstance(module, ModelMixin))


@cache
def _warn_of_distillation(pipeline_class: str, reason: str) -> None:
    # Cached, so that each kind of pipeline is named once.
    logger.warning(
        f"This {pipeline_class} looks distilled to a few sampling steps ({reason}). The losses here know nothing of "
        "the distillation: training makes samples from few steps worse, and the model needs the steps and guidance of "
        "an undistilled one again. Train the model that it was distilled from instead."
    )
