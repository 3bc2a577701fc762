"""Sana: a Gemma text encoder with an instruction before the prompt, a linear DiT, a deep-compression autoencoder."""

from collections.abc import Sequence

import torch
from diffusers import SanaPipeline
from torch import Tensor, nn

from .autoencoders import decode_finite, encode_finite
from .base import Family, call_default, model_inside


class SanaFamily(Family):
    """`SanaPipeline`. Its autoencoder is deterministic: the standard deviation is 0."""

    pipeline_class = "SanaPipeline"
    denoiser_class = "SanaTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "batched"
    # arXiv 2410.10629; the pipeline's tables of aspect ratios are those of the training.
    aspect_ratio_buckets = True
    prompt_masks = {"prompt_embeds": "prompt_attention_mask"}
    # examples/dreambooth/train_dreambooth_lora_sana.py
    lora_target_modules = ("to_k", "to_q", "to_v")
    flow = True

    def conditioning_shapes(self, pipeline: SanaPipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        width = self.denoiser_config(pipeline).caption_channels
        return {"prompt_embeds": (length, width), "prompt_attention_mask": (length,)}

    def resolution(self, pipeline: SanaPipeline) -> int:
        return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor

    def encode_prompts(self, pipeline: SanaPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self._encode(pipeline, prompts, call_default(pipeline, "complex_human_instruction"))

    def encode_unconditional(self, pipeline: SanaPipeline) -> dict[str, Tensor]:
        """The empty prompt, without the instruction that precedes every other prompt."""
        return self._encode(pipeline, [""], None)

    def _encode(
        self, pipeline: SanaPipeline, prompts: Sequence[str], instruction: list[str] | None
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, prompt_attention_mask, _, _ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                device=self.text_device(pipeline),
                clean_caption=call_default(pipeline, "clean_caption"),
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
                complex_human_instruction=instruction,
            )
        return {"prompt_embeds": prompt_embeds.float(), "prompt_attention_mask": prompt_attention_mask.float()}

    def token_limits(self, pipeline: SanaPipeline) -> dict[str, int]:
        # The pipeline counts the whole instruction, and then so many tokens of the prompt.
        instruction = len(pipeline.tokenizer.encode(self._instruction(pipeline)))
        return {"tokenizer": instruction + call_default(pipeline, "max_sequence_length") - 2}

    def tokenized_text(self, pipeline: SanaPipeline, prompt: str) -> str:
        clean_caption = call_default(pipeline, "clean_caption")
        return self._instruction(pipeline) + pipeline._text_preprocessing(prompt, clean_caption=clean_caption)[0]

    @staticmethod
    def _instruction(pipeline: SanaPipeline) -> str:
        return "\n".join(call_default(pipeline, "complex_human_instruction"))

    def encode_samples(self, pipeline: SanaPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode_finite(
            pipeline.vae, pixels, lambda output: (output.latent, torch.zeros_like(output.latent))
        )
        return mean * pipeline.vae.config.scaling_factor, std

    def decode_samples(self, pipeline: SanaPipeline, latents: Tensor) -> Tensor:
        return decode_finite(pipeline.vae, latents / pipeline.vae.config.scaling_factor).clamp(-1, 1)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prediction = denoiser(
            x_t,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            encoder_attention_mask=conditioning["prompt_attention_mask"].long(),
            timestep=timestep * model_inside(denoiser).config.timestep_scale,
            return_dict=False,
        )[0]
        return prediction[:, : x_t.shape[1]]
