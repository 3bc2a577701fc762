"""PixArt-Sigma: a T5 text encoder, a DiT that also predicts a variance, an `AutoencoderKL`."""

from collections.abc import Sequence

import torch
from diffusers import PixArtSigmaPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from .base import call_default
from .peft_format import PeftFormatFamily


class PixArtSigmaFamily(PeftFormatFamily):
    """`PixArtSigmaPipeline`, which has no `load_lora_weights`."""

    pipeline_class = "PixArtSigmaPipeline"
    denoiser_class = "PixArtTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "batched"
    # arXiv 2403.04692; the pipeline's tables of aspect ratios are those of the training.
    aspect_ratio_buckets = True
    prompt_masks = {"prompt_embeds": "prompt_attention_mask"}
    # diffusers has no LoRA example for PixArt; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def resolution(self, pipeline: PixArtSigmaPipeline) -> int:
        return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor

    def conditioning_shapes(self, pipeline: PixArtSigmaPipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        width = self.denoiser_config(pipeline).caption_channels
        return {"prompt_embeds": (length, width), "prompt_attention_mask": (length,)}

    def encode_prompts(self, pipeline: PixArtSigmaPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, prompt_attention_mask, _, _ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                device=self.text_device(pipeline),
                clean_caption=self._clean_caption(pipeline),
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
            )
        return {"prompt_embeds": prompt_embeds.float(), "prompt_attention_mask": prompt_attention_mask.float()}

    @staticmethod
    def _clean_caption(pipeline: PixArtSigmaPipeline) -> bool:
        # __call__ cleans captions by default, encode_prompt does not. Without these packages the pipeline would warn
        # and leave captions as they are.
        return call_default(pipeline, "clean_caption") and is_bs4_available() and is_ftfy_available()

    def token_limits(self, pipeline: PixArtSigmaPipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def tokenized_text(self, pipeline: PixArtSigmaPipeline, prompt: str) -> str:
        return pipeline._text_preprocessing(prompt, clean_caption=self._clean_caption(pipeline))[0]

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prediction = denoiser(
            x_t,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            encoder_attention_mask=conditioning["prompt_attention_mask"].long(),
            timestep=timestep,
            # Sigma, unlike Alpha at 1024 pixels, is not conditioned on the size.
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        # The second half of the channels is the learned variance, which the pipeline drops too.
        return prediction[:, : x_t.shape[1]]
