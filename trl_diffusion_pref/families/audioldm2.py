"""AudioLDM 2: CLAP and T5 text encoders, a language model between them and a UNet over log-mel spectrograms."""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AudioLDM2Pipeline
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from .autoencoders import decode_with_autoencoder_kl, encode_with_autoencoder_kl
from .base import model_inside
from .modalities import AudioFamily
from .peft_format import PeftFormatFamily
from .records import PartConfig


# Settings of the spectrograms that the VAE and the vocoder were trained on. diffusers only samples and has no such
# settings.
# AudioLDM-training-finetuning: config/2023_11_13_vae_autoencoder/16k_64.yaml and utilities/data/dataset.py.
_WINDOW = 1024
_MAX_FREQUENCY = 8000
_FLOOR = 1e-5
_PEAK = 0.5


class AudioLDM2Family(PeftFormatFamily, AudioFamily):
    """`AudioLDM2Pipeline` with a T5 encoder (general audio and music), which has no `load_lora_weights`."""

    pipeline_class = "AudioLDM2Pipeline"
    denoiser_class = "AudioLDM2UNet2DConditionModel"
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "projection_model", "language_model")
    guidance_layout = "batched"
    # diffusers has no LoRA example for audio; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # Under gradient checkpointing diffusers 0.42 leaves an argument out, so that each one after it moves up by one.
    gradient_checkpointing = False
    read_by_value = ("prompt_attention_mask",)
    prompt_masks = {"prompt_embeds": "prompt_attention_mask"}
    pads_to_longest = True

    def sampling_rate(self, pipeline: AudioLDM2Pipeline) -> int:
        return pipeline.vocoder.config.sampling_rate

    def audio_size(self, pipeline: AudioLDM2Pipeline) -> tuple[int, int]:
        frames = self.denoiser_config(pipeline).sample_size * pipeline.vae_scale_factor
        return 1, frames * math.prod(pipeline.vocoder.config.upsample_rates)

    def published_parts(self) -> dict[str, Any]:
        return {
            "vae": PartConfig(config=SimpleNamespace(block_out_channels=(128, 256, 512))),
            "tokenizer_2": PartConfig(model_max_length=512),
            "language_model": PartConfig(config=SimpleNamespace(max_new_tokens=8)),
            "vocoder": PartConfig(
                config=SimpleNamespace(sampling_rate=16000, model_in_dim=64, upsample_rates=(5, 4, 2, 2, 2))
            ),
        }

    def latent_shape(self, pipeline: AudioLDM2Pipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(C, frames, mels)`."""
        config = pipeline.vocoder.config
        frames = sample_shape[1] // math.prod(config.upsample_rates)
        sides = (side // pipeline.vae_scale_factor for side in (frames, config.model_in_dim))
        return self.denoiser_config(pipeline).in_channels, *sides

    def conditioning_shapes(self, pipeline: AudioLDM2Pipeline) -> dict[str, tuple[int, ...]]:
        length = pipeline.tokenizer_2.model_max_length
        # Of each block: self-attention, attention to the language model's output, attention to T5's.
        _, generated, text = self.denoiser_config(pipeline).cross_attention_dim[0]
        return {
            "prompt_embeds": (length, text),
            "prompt_attention_mask": (length,),
            "generated_prompt_embeds": (pipeline.language_model.config.max_new_tokens, generated),
        }

    def encode_prompts(self, pipeline: AudioLDM2Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states, `prompt_embeds`, with their mask, and what the language model adds, `generated_prompt_embeds`.

        Raises:
            ValueError: The pipeline reads transcriptions out (a VITS encoder).
        """
        if pipeline.text_encoder_2.config.model_type == "vits":
            raise ValueError(
                "This AudioLDM2Pipeline generates speech: it takes a transcription beside the prompt, which rows do "
                "not have. Only pipelines for general audio and music, with a T5 encoder, can be trained."
            )
        length = pipeline.tokenizer_2.model_max_length
        rows = []
        for prompt in prompts:
            # One at a time: the language model counts the padding of a batch as positions, so that a prompt next to a
            # longer one would get other embeddings than by itself.
            with torch.no_grad():
                prompt_embeds, mask, generated = pipeline.encode_prompt(
                    [prompt],
                    device=self.text_device(pipeline),
                    num_waveforms_per_prompt=1,
                    do_classifier_free_guidance=False,
                )
            padding = length - prompt_embeds.shape[1]
            rows.append(
                {
                    "prompt_embeds": nn.functional.pad(prompt_embeds.float(), (0, 0, 0, padding)),
                    "prompt_attention_mask": nn.functional.pad(mask.float(), (0, padding)),
                    "generated_prompt_embeds": generated.float(),
                }
            )
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def normalize(self, samples: Tensor) -> Tensor:
        """Mean 0 and a peak of 0.5, as AudioLDM was trained; silence stays silence."""
        centred = samples - samples.mean()
        return centred * (_PEAK / centred.abs().max().clamp(min=1e-8))

    def spectrograms(self, pipeline: AudioLDM2Pipeline, waveforms: Tensor) -> Tensor:
        """Log-mel spectrograms `(B, 1, frames, mels)` of waveforms `(B, 1, samples)`, one frame per hop.

        Magnitudes of a Hann window's Fourier transform, Slaney's mel filters, natural logarithm, no less than 1e-5.
        Each frame is centred on its hop, as HiFi-GAN's are.
        """
        config = pipeline.vocoder.config
        hop = math.prod(config.upsample_rates)
        filters = mel_filter_bank(
            num_frequency_bins=_WINDOW // 2 + 1,
            num_mel_filters=config.model_in_dim,
            min_frequency=0.0,
            max_frequency=min(_MAX_FREQUENCY, config.sampling_rate / 2),
            sampling_rate=config.sampling_rate,
            norm="slaney",
            mel_scale="slaney",
        )
        before = (_WINDOW - hop) // 2
        spectrum = torch.stft(
            nn.functional.pad(waveforms.float(), (before, _WINDOW - hop - before), mode="reflect")[:, 0],
            _WINDOW,
            hop_length=hop,
            window=torch.hann_window(_WINDOW, device=waveforms.device),
            center=False,
            return_complex=True,
        ).abs()
        mel = torch.from_numpy(filters.astype(np.float32)).to(waveforms.device).T @ spectrum
        return mel.clamp(min=_FLOOR).log().transpose(1, 2).unsqueeze(1)

    def encode_samples(self, pipeline: AudioLDM2Pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_waveforms(pipeline, pixels)
        return encode_with_autoencoder_kl(pipeline.vae, self.spectrograms(pipeline, pixels))

    def decode_samples(self, pipeline: AudioLDM2Pipeline, latents: Tensor) -> Tensor:
        """Through the VAE and the vocoder; the vocoder does not invert `spectrograms` exactly."""
        spectrograms = decode_with_autoencoder_kl(pipeline.vae, latents).to(pipeline.vocoder.dtype)
        with torch.no_grad():
            waveforms = pipeline.mel_spectrogram_to_waveform(spectrograms.to(pipeline.vocoder.device))
        _, samples = self.audio_size(pipeline)
        return waveforms.reshape(len(latents), 1, -1)[:, :, :samples].float()

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled() and model_inside(denoiser).is_gradient_checkpointing:
            raise ValueError(
                "AudioLDM 2's UNet passes its masks to the wrong arguments under gradient checkpointing (diffusers "
                "0.42), so its gradients would be wrong. Set activation_checkpointing=False."
            )
        mask = conditioning["prompt_attention_mask"].long()
        # The pipeline cuts to the longest prompt of the batch.
        length = int(mask.sum(dim=1).max())
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=conditioning["generated_prompt_embeds"].to(x_t.dtype),
            encoder_hidden_states_1=conditioning["prompt_embeds"][:, :length].to(x_t.dtype),
            encoder_attention_mask_1=mask[:, :length],
            return_dict=False,
        )[0]
