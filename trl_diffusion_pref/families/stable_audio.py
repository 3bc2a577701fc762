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
        """The text, `prompt_embeds`, and the `duration_weight`, 1, of the duration beside it."""
        device = self.text_device(pipeline)
        with torch.no_grad():
            prompt_embeds = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds.float(), "duration_weight": torch.ones(len(prompts), 1, device=device)}

    def encode_unconditional(self, pipeline: StableAudioPipeline) -> dict[str, Tensor]:
        """Zeros for the text and for the duration beside it; where it stands alone, the duration stays."""
        return {name: torch.zeros_like(tensor) for name, tensor in self.encode_prompts(pipeline, [""]).items()}

    def sound_conditioning(self, pipeline: StableAudioPipeline, seconds: float) -> dict[str, Tensor]:
        """`duration_embeds`, `(2, d)`: where the sound starts, 0 s, and where it ends, as `audio_end_in_s` says it.

        The authors' stable-audio-tools (data/utils.py) tells whole seconds, rounded up; the sampler takes any, and
        what is asked of it is what training should have told.
        """
        with torch.no_grad():
            start_and_end = pipeline.encode_duration(
                call_default(pipeline, "audio_start_in_s"),
                seconds,
                device=self.text_device(pipeline),
                do_classifier_free_guidance=False,
                batch_size=1,
            )
        return {"duration_embeds": torch.cat(start_and_end, dim=1)[0].float()}

    def encode_images(self, pipeline: StableAudioPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_waveforms(pipeline, pixels)
        return encode_finite(pipeline.vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std))

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        duration = conditioning["duration_embeds"].to(x_t.dtype)
        beside_text = duration * conditioning["duration_weight"].to(x_t.dtype).unsqueeze(-1)
        # Start and end, told once more as one token before the latents.
        alone = duration.flatten(1).unsqueeze(1)
        length = x_t.shape[2] + alone.shape[1]
        rotary_dim = model_inside(denoiser).config.attention_head_dim // 2
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=torch.cat([conditioning["prompt_embeds"].to(x_t.dtype), beside_text], dim=1),
            global_hidden_states=alone,
            rotary_embedding=get_1d_rotary_pos_embed(rotary_dim, length, use_real=True, repeat_interleave_real=False),
            return_dict=False,
        )[0]
