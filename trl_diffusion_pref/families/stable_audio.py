"""Stable Audio Open: a T5 text encoder, durations as numbers, a DiT over one-dimensional latents, an Oobleck VAE."""

from collections.abc import Sequence

import torch
from diffusers import StableAudioPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from .base import AudioFamily, PeftFormatFamily, call_default, encode_finite, model_inside


class StableAudioFamily(PeftFormatFamily, AudioFamily):
    """`StableAudioPipeline`, which has no `load_lora_weights`; waveforms of the full length, 47.6 s as published."""

    pipeline_class = "StableAudioPipeline"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "projection_model")
    # diffusers has no LoRA example for audio; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def sampling_rate(self, pipeline: StableAudioPipeline) -> int:
        return pipeline.vae.config.sampling_rate

    def audio_size(self, pipeline: StableAudioPipeline) -> tuple[int, int]:
        return pipeline.vae.config.audio_channels, pipeline.transformer.config.sample_size * pipeline.vae.hop_length

    def encode_prompts(self, pipeline: StableAudioPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text and duration as tokens, `prompt_embeds`, and the duration once more, `duration_embeds`."""
        device = self.text_device(pipeline)
        with torch.no_grad():
            prompt_embeds = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
            start, end = pipeline.encode_duration(
                call_default(pipeline, "audio_start_in_s"),
                self.audio_size(pipeline)[1] / self.sampling_rate(pipeline),
                device=device,
                do_classifier_free_guidance=False,
                batch_size=len(prompts),
            )
        # As the pipeline's __call__ joins them.
        return {
            "prompt_embeds": torch.cat([prompt_embeds, start, end], dim=1).float(),
            "duration_embeds": torch.cat([start, end], dim=2).float(),
        }

    def encode_unconditional(self, pipeline: StableAudioPipeline) -> dict[str, Tensor]:
        """Zeros for text and duration as tokens; the duration is told once more as with every prompt."""
        encoded = self.encode_prompts(pipeline, [""])
        return {**encoded, "prompt_embeds": torch.zeros_like(encoded["prompt_embeds"])}

    def encode_images(self, pipeline: StableAudioPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_waveforms(pipeline, pixels)
        return encode_finite(pipeline.vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std))

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        duration_embeds = conditioning["duration_embeds"].to(x_t.dtype)
        # The duration stands before the latents as tokens of its own.
        length = x_t.shape[2] + duration_embeds.shape[1]
        rotary_dim = model_inside(denoiser).config.attention_head_dim // 2
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            global_hidden_states=duration_embeds,
            rotary_embedding=get_1d_rotary_pos_embed(rotary_dim, length, use_real=True, repeat_interleave_real=False),
            return_dict=False,
        )[0]
