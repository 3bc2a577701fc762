"""Stable Audio Open: a T5 text encoder, durations as numbers, a DiT over one-dimensional latents, an Oobleck VAE."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderOobleck, StableAudioPipeline
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from .autoencoders import decode_finite, encode_finite
from .base import call_default, model_inside
from .modalities import AudioFamily
from .peft_format import PeftFormatFamily
from .records import PartConfig


class StableAudioFamily(PeftFormatFamily, AudioFamily):
    """`StableAudioPipeline`, which has no `load_lora_weights`; waveforms of the full length, 47.6 s as published."""

    pipeline_class = "StableAudioPipeline"
    denoiser_class = "StableAudioDiTModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "projection_model")
    guidance_layout = "batched"
    shared_arguments = ("rotary_embedding",)
    # diffusers has no LoRA example for audio; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def sampling_rate(self, pipeline: StableAudioPipeline) -> int:
        return pipeline.vae.config.sampling_rate

    def audio_size(self, pipeline: StableAudioPipeline) -> tuple[int, int]:
        latents = self.denoiser_config(pipeline).sample_size
        return pipeline.vae.config.audio_channels, latents * pipeline.vae.hop_length

    def published_parts(self) -> dict[str, Any]:
        with torch.device("meta"):
            # Its defaults are those of Stable Audio Open, whose config has 128 tokens.
            return {"vae": AutoencoderOobleck(), "tokenizer": PartConfig(model_max_length=128)}

    def latent_shape(self, pipeline: StableAudioPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.denoiser_config(pipeline).in_channels, sample_shape[1] // pipeline.vae.hop_length

    def conditioning_shapes(self, pipeline: StableAudioPipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).cross_attention_input_dim
        return {
            "prompt_embeds": (pipeline.tokenizer.model_max_length, width),
            "duration_weight": (1,),
            "duration_embeds": (2, width),
        }

    def encode_prompts(self, pipeline: StableAudioPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds` of the text, and `duration_weight`, 1, by which the duration beside it is multiplied."""
        device = self.text_device(pipeline)
        with torch.no_grad():
            prompt_embeds = pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"prompt_embeds": prompt_embeds.float(), "duration_weight": torch.ones(len(prompts), 1, device=device)}

    def encode_unconditional(self, pipeline: StableAudioPipeline) -> dict[str, Tensor]:
        """Zeros for the text and for the duration beside it; the transformer's global token keeps the duration."""
        return {name: torch.zeros_like(tensor) for name, tensor in self.encode_prompts(pipeline, [""]).items()}

    def audio_conditioning(self, pipeline: StableAudioPipeline, seconds: float) -> dict[str, Tensor]:
        """`duration_embeds`, `(2, d)`: where the audio starts, 0 s, and where it ends, the sampler's `audio_end_in_s`.

        The authors' stable-audio-tools (data/utils.py) rounds up to whole seconds. The sampler takes any number, so
        training conditions on any.
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

    def encode_samples(self, pipeline: StableAudioPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_waveforms(pipeline, pixels)
        return encode_finite(pipeline.vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std))

    def decode_samples(self, pipeline: StableAudioPipeline, latents: Tensor) -> Tensor:
        return decode_finite(pipeline.vae, latents)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        duration = conditioning["duration_embeds"].to(x_t.dtype)
        beside_text = duration * conditioning["duration_weight"].to(x_t.dtype).unsqueeze(-1)
        # Start and end once more, as one token before the latents.
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
