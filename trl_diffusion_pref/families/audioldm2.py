"""AudioLDM 2: CLAP and T5 text encoders, a language model between them and a UNet over log-mel spectrograms."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AudioLDM2Pipeline
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from .base import AudioFamily, PeftFormatFamily, encode_with_autoencoder_kl, model_inside


# Of the spectrograms that the VAE and the vocoder were trained on; diffusers, which only samples, does not store them.
# AudioLDM-training-finetuning: config/2023_11_13_vae_autoencoder/16k_64.yaml and utilities/data/dataset.py.
_WINDOW = 1024
_MAX_FREQUENCY = 8000
_FLOOR = 1e-5
_PEAK = 0.5


class AudioLDM2Family(PeftFormatFamily, AudioFamily):
    """`AudioLDM2Pipeline` with a T5 encoder (sound and music), which has no `load_lora_weights`."""

    pipeline_class = "AudioLDM2Pipeline"
    denoiser_name = "unet"
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "projection_model", "language_model")
    # diffusers has no LoRA example for audio; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # diffusers 0.42 leaves an argument out there, and each one after it takes the place of the one before.
    gradient_checkpointing = False

    def sampling_rate(self, pipeline: AudioLDM2Pipeline) -> int:
        return pipeline.vocoder.config.sampling_rate

    def audio_size(self, pipeline: AudioLDM2Pipeline) -> tuple[int, int]:
        frames = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        return 1, frames * math.prod(pipeline.vocoder.config.upsample_rates)

    def encode_prompts(self, pipeline: AudioLDM2Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states, `prompt_embeds`, with their mask, and what the language model adds, `generated_prompt_embeds`.

        Raises:
            ValueError: The pipeline reads transcriptions out (a VITS encoder).
        """
        if pipeline.text_encoder_2.config.model_type == "vits":
            raise ValueError(
                "This AudioLDM2Pipeline speaks: it takes a transcription beside the prompt, which rows do not have. "
                "Only pipelines for sound and music, with a T5 encoder, can be trained."
            )
        length = pipeline.tokenizer_2.model_max_length
        rows = []
        for prompt in prompts:
            # One at a time: the language model counts the padding of a batch as positions, so that a prompt beside a
            # longer one would get other embeddings than alone.
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
        """Around 0, with a peak of 0.5, as AudioLDM was trained; silence stays silence."""
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

    def encode_images(self, pipeline: AudioLDM2Pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_waveforms(pipeline, pixels)
        return encode_with_autoencoder_kl(pipeline.vae, self.spectrograms(pipeline, pixels))

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        if torch.is_grad_enabled() and model_inside(denoiser).is_gradient_checkpointing:
            raise ValueError(
                "AudioLDM 2's UNet passes its masks wrongly under gradient checkpointing (diffusers 0.42), and would "
                "train something else. Set activation_checkpointing=False."
            )
        mask = conditioning["prompt_attention_mask"].long()
        # As the pipeline: as long as the longest prompt.
        length = int(mask.sum(dim=1).max())
        return denoiser(
            x_t,
            timestep,
            encoder_hidden_states=conditioning["generated_prompt_embeds"].to(x_t.dtype),
            encoder_hidden_states_1=conditioning["prompt_embeds"][:, :length].to(x_t.dtype),
            encoder_attention_mask_1=mask[:, :length],
            return_dict=False,
        )[0]
