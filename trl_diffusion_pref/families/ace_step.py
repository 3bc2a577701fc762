"""ACE-Step 1.5 (text to music): Qwen3's states of a caption, a condition encoder, a DiT on one-dimensional latents."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AceStepPipeline, AutoencoderOobleck
from torch import Tensor, nn

from .autoencoders import decode_finite, encode_finite
from .base import call_default
from .modalities import AudioFamily
from .records import PartConfig


# Room for the tokens that the condition encoder puts before the caption's: of the empty lyrics, and one of the timbre.
_TOKENS_BEFORE_TEXT = 32
# Of the silence that stands for the timbre where no reference is given.
_SECONDS_OF_TIMBRE = 30
# -1 dBFS, to which the pipeline scales what it generates.
_PEAK = 10 ** (-1 / 20)


class AceStepFamily(AudioFamily):
    """`AceStepPipeline`, text to music without lyrics.

    The denoiser's attention has no mask for prompts, so prompts of different length are predicted one after the other.

    Args:
        audio_duration: Seconds of the training waveforms, which the caption's metadata name too. Default: the
            sampler's. To change it: `register_family(AceStepFamily(audio_duration=30))`.
    """

    pipeline_class = "AceStepPipeline"
    denoiser_class = "AceStepTransformer1DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "condition_encoder")
    guidance_layout = "positive_first"
    # diffusers has no LoRA example for audio; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    flow = True
    read_by_value = ("prompt_embeds_mask",)
    prompt_masks = {"prompt_embeds": "prompt_embeds_mask"}
    pads_to_longest = True
    # With several prompts the pipeline of diffusers 0.42 wants as many lyrics, and has one by default.
    one_prompt_per_call = True

    def __init__(self, audio_duration: float = 60.0) -> None:
        self.audio_duration = audio_duration

    def distilled(self, pipeline: AceStepPipeline) -> str | None:
        return "its transformer's config says turbo" if pipeline.is_turbo else None

    def _check_channels(self, pipeline: AceStepPipeline) -> None:
        latent, channels = pipeline.vae.config.decoder_input_channels, self.denoiser_config(pipeline).in_channels
        if channels != 3 * latent:
            raise ValueError(
                f"The transformer of this AceStepPipeline takes {channels} channels, but noisy latents, the latents "
                f"of silence and a mask of its {type(pipeline.vae).__name__} have {3 * latent}. Load the VAE that was "
                "published with the transformer, and instead of one for inpainting the one that generates from text "
                "alone."
            )

    def sampling_rate(self, pipeline: AceStepPipeline) -> int:
        return pipeline.vae.config.sampling_rate

    def audio_size(self, pipeline: AceStepPipeline) -> tuple[int, int]:
        return pipeline.vae.config.audio_channels, self._latents(pipeline, self.audio_duration) * self._hop(pipeline)

    def published_parts(self) -> dict[str, Any]:
        with torch.device("meta"):
            vae = AutoencoderOobleck(downsampling_ratios=[2, 4, 4, 6, 10], sampling_rate=48000)
        return {"vae": vae, "tokenizer": PartConfig()}

    def latent_shape(self, pipeline: AceStepPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.denoiser_config(pipeline).audio_acoustic_hidden_dim, sample_shape[1] // self._hop(pipeline)

    def conditioning_shapes(self, pipeline: AceStepPipeline) -> dict[str, tuple[int, ...]]:
        config, length = self.denoiser_config(pipeline), self._longest_prompt(pipeline)
        return {
            "prompt_embeds": (length, config.encoder_hidden_size or config.hidden_size),
            "prompt_embeds_mask": (length,),
            "silence_latents": (self._latents(pipeline, self.audio_duration), config.audio_acoustic_hidden_dim),
        }

    def encode_prompts(self, pipeline: AceStepPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """With empty lyrics and no reference for the timbre. `silence_latents` stand for the absent source audio."""
        # One by one: the denoiser would look at the padding.
        return self._padded(pipeline, [self._encode(pipeline, prompt) for prompt in prompts])

    def encode_unconditional(self, pipeline: AceStepPipeline) -> dict[str, Tensor]:
        """A learned embedding in place of every token; attention gives the same for any number of them."""
        null = pipeline.condition_encoder.null_condition_emb.detach()[0].float()
        return self._padded(pipeline, [null.expand_as(self._encode(pipeline, ""))])

    def _encode(self, pipeline: AceStepPipeline, prompt: str) -> Tensor:
        """`(tokens, d)` of lyrics, timbre and caption, without padding."""
        encoder, device = pipeline.condition_encoder, self.text_device(pipeline)
        with torch.no_grad():
            text, text_mask, lyrics, lyrics_mask = pipeline.encode_prompt(
                [prompt],
                [call_default(pipeline, "lyrics")],
                device=device,
                vocal_language=call_default(pipeline, "vocal_language"),
                audio_duration=self.audio_duration,
                max_text_length=call_default(pipeline, "max_text_length"),
                max_lyric_length=call_default(pipeline, "max_lyric_length"),
            )
            tokens, _ = encoder(
                text_hidden_states=text,
                text_attention_mask=text_mask,
                lyric_hidden_states=lyrics,
                lyric_attention_mask=lyrics_mask,
                refer_audio_acoustic_hidden_states_packed=encoder.silence_latent[
                    :, : self._latents(pipeline, _SECONDS_OF_TIMBRE)
                ],
                refer_audio_order_mask=torch.zeros(1, dtype=torch.long, device=device),
            )
        return tokens[0].float()

    def _padded(self, pipeline: AceStepPipeline, rows: list[Tensor]) -> dict[str, Tensor]:
        longest, latents = self._longest_prompt(pipeline), self._latents(pipeline, self.audio_duration)
        silence, _ = pipeline.prepare_src_latents(
            rows[0].device, torch.float32, batch_size=len(rows), latent_length=latents
        )
        ones = [torch.ones(len(row), device=row.device) for row in rows]
        return {
            "prompt_embeds": torch.stack([nn.functional.pad(row, (0, 0, 0, longest - len(row))) for row in rows]),
            "prompt_embeds_mask": torch.stack([nn.functional.pad(row, (0, longest - len(row))) for row in ones]),
            "silence_latents": silence,
        }

    def _longest_prompt(self, pipeline: AceStepPipeline) -> int:
        return call_default(pipeline, "max_text_length") + _TOKENS_BEFORE_TEXT

    def _latents(self, pipeline: AceStepPipeline, seconds: float) -> int:
        return math.ceil(seconds * self.sampling_rate(pipeline) / self._hop(pipeline))

    @staticmethod
    def _hop(pipeline: AceStepPipeline) -> int:
        """Samples per latent."""
        return math.prod(pipeline.vae.config.downsampling_ratios)

    def token_limits(self, pipeline: AceStepPipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_text_length")}

    def tokenized_text(self, pipeline: AceStepPipeline, prompt: str) -> str:
        text, _ = pipeline._format_prompt(prompt, audio_duration=self.audio_duration)
        return text

    def encode_samples(self, pipeline: AceStepPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_waveforms(pipeline, pixels)
        return encode_finite(pipeline.vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std))

    def decode_samples(self, pipeline: AceStepPipeline, latents: Tensor) -> Tensor:
        """Scaled to a peak of -1 dBFS, as the pipeline does it."""
        audio = decode_finite(pipeline.vae, latents)
        return audio * (_PEAK / audio.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-6))

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        rows_of: dict[int, list[int]] = {}
        for row, count in enumerate(conditioning["prompt_embeds_mask"].sum(dim=1).int().tolist()):
            rows_of.setdefault(count, []).append(row)
        silence = conditioning["silence_latents"].to(x_t.dtype)
        # Latents of silence, and a mask that has all of them generated.
        context = torch.cat([silence, torch.ones_like(silence)], dim=-1)
        embeds, time = conditioning["prompt_embeds"].to(x_t.dtype), timestep.to(x_t.dtype)
        predictions = [
            denoiser(
                hidden_states=x_t[rows].transpose(1, 2),
                timestep=time[rows],
                timestep_r=time[rows],
                encoder_hidden_states=embeds[rows, :count],
                context_latents=context[rows],
                return_dict=False,
            )[0]
            for count, rows in rows_of.items()
        ]
        order = torch.tensor([row for rows in rows_of.values() for row in rows], device=x_t.device)
        return torch.cat(predictions)[order.argsort()].transpose(1, 2)
