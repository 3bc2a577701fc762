"""LTX-Video (text to video): T5's states with a mask, a video DiT on a row of latents, a VAE of 32 pixels a latent."""

from collections.abc import Sequence

import torch
from diffusers import LTXPipeline
from torch import Tensor, nn

from .autoencoders import decode_finite, encode_finite
from .base import call_default
from .modalities import VideoFamily


# The VAE's frames and pixels per latent, by which the denoiser scales positions. All published VAEs have these.
_FRAMES_PER_LATENT, _PIXELS_PER_LATENT = 8, 32


class LTXFamily(VideoFamily):
    """`LTXPipeline`.

    Args:
        frame_rate: Frames per second of the training videos, by which the denoiser scales the positions of frames.
            Default: the sampler's. To change it: `register_family(LTXFamily(frame_rate=30))`.
    """

    pipeline_class = "LTXPipeline"
    denoiser_class = "LTXVideoTransformer3DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "batched"
    # diffusers has no LoRA example for LTX-Video; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    flow = True
    prompt_masks = {"prompt_embeds": "prompt_attention_mask"}

    def __init__(self, frame_rate: float = 25) -> None:
        self.frame_rate = frame_rate

    def distilled(self, pipeline: LTXPipeline) -> str | None:
        # The distilled weights have the base's configs.
        name = str(pipeline.name_or_path or "")
        return f"its name is {name}" if "distilled" in name.lower() else None

    def _check_parts(self, pipeline: LTXPipeline) -> None:
        super()._check_parts(pipeline)
        factors = (self.frames_per_latent(pipeline), self.pixels_per_latent(pipeline))
        if factors != (_FRAMES_PER_LATENT, _PIXELS_PER_LATENT):
            raise ValueError(
                f"The VAE of this LTXPipeline has {factors[0]} frames and {factors[1]} pixels per latent, but "
                f"LTX-Video's have {_FRAMES_PER_LATENT} and {_PIXELS_PER_LATENT}. Load the VAE that was published "
                "with the transformer."
            )

    def video_size(self, pipeline: LTXPipeline) -> tuple[int, int, int]:
        frames, height, width = (call_default(pipeline, name) for name in ("num_frames", "height", "width"))
        return frames, height, width

    def frames_per_latent(self, pipeline: LTXPipeline) -> int:
        return pipeline.vae_temporal_compression_ratio

    def pixels_per_latent(self, pipeline: LTXPipeline) -> int:
        return pipeline.vae_spatial_compression_ratio

    def image_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """One per latent."""
        _, frames, height, width = latent_shape
        return frames * height * width

    def conditioning_shapes(self, pipeline: LTXPipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        width = self.denoiser_config(pipeline).caption_channels
        return {"prompt_embeds": (length, width), "prompt_attention_mask": (length,)}

    def encode_prompts(self, pipeline: LTXPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, mask, *_ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
                device=self.text_device(pipeline),
            )
        return {"prompt_embeds": prompt_embeds.float(), "prompt_attention_mask": mask.float()}

    def encode_samples(self, pipeline: LTXPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_frames(pipeline, pixels)
        mean, std = encode_finite(
            pipeline.vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std)
        )
        shift, scale = self._statistics(pipeline, mean)
        return (mean - shift) / scale, std / scale

    def decode_samples(self, pipeline: LTXPipeline, latents: Tensor) -> Tensor:
        """At the sampler's default `decode_timestep`, which is 0, if the VAE is conditioned on it (from 0.9.1)."""
        shift, scale = self._statistics(pipeline, latents)
        time = call_default(pipeline, "decode_timestep") if pipeline.vae.config.timestep_conditioning else None
        return decode_finite(pipeline.vae, latents * scale + shift, time).clamp(-1, 1)

    @staticmethod
    def _statistics(pipeline: LTXPipeline, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel, which this VAE has as buffers instead of in its config."""
        vae = pipeline.vae
        shift, scale = (values.to(latents).reshape(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
        return shift, scale / vae.config.scaling_factor

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        _, _, frames, height, width = x_t.shape
        prediction = denoiser(
            hidden_states=LTXPipeline._pack_latents(x_t),
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            timestep=timestep,
            encoder_attention_mask=conditioning["prompt_attention_mask"].bool(),
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(
                _FRAMES_PER_LATENT / self.frame_rate,
                _PIXELS_PER_LATENT,
                _PIXELS_PER_LATENT,
            ),
            return_dict=False,
        )[0]
        return LTXPipeline._unpack_latents(prediction, frames, height, width)
