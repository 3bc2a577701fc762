"""AuraFlow: a UMT5 text encoder, an MMDiT with a table of learned positions, rectified flow, SDXL's VAE."""

import math
from collections.abc import Sequence

import torch
from diffusers import AuraFlowPipeline
from torch import Tensor, nn

from .autoencoders import decode_finite, encode_with_autoencoder_kl
from .base import Family, call_default
from .stable_diffusion_3 import StableDiffusion3Family


class AuraFlowFamily(Family):
    """`AuraFlowPipeline`."""

    pipeline_class = "AuraFlowPipeline"
    denoiser_class = "AuraFlowTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "batched"
    # The model card of 0.3: "now supports various aspect ratio".
    aspect_ratio_buckets = True
    # diffusers has no example for AuraFlow; these are the layers that its example for SD 3 trains.
    lora_target_modules = StableDiffusion3Family.lora_target_modules
    flow = True

    def resolution(self, pipeline: AuraFlowPipeline) -> int:
        # The size in the transformer's config is another one, which __call__ does not use by default.
        return call_default(pipeline, "height")

    def largest_side(self, pipeline: AuraFlowPipeline) -> int | None:
        # A square table of positions, of which the middle is taken.
        return math.isqrt(self.denoiser_config(pipeline).pos_embed_max_size) * self.size_step(pipeline)

    def conditioning_shapes(self, pipeline: AuraFlowPipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).joint_attention_dim
        return {"prompt_embeds": (call_default(pipeline, "max_sequence_length"), width)}

    def encode_prompts(self, pipeline: AuraFlowPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Zeros stand after a prompt's tokens, and the denoiser takes no mask."""
        with torch.no_grad():
            prompt_embeds, *_ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                device=self.text_device(pipeline),
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
            )
        return {"prompt_embeds": prompt_embeds.float()}

    def token_limits(self, pipeline: AuraFlowPipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def encode_samples(self, pipeline: AuraFlowPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return encode_with_autoencoder_kl(pipeline.vae, pixels, in_float32=pipeline.vae.config.force_upcast)

    def decode_samples(self, pipeline: AuraFlowPipeline, latents: Tensor) -> Tensor:
        config = pipeline.vae.config
        return decode_finite(pipeline.vae, latents / config.scaling_factor, in_float32=config.force_upcast).clamp(
            -1, 1
        )

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            x_t,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            # The pipeline divides the time before it rounds it to the latents' dtype.
            timestep=(timestep / 1000).to(x_t.dtype),
            return_dict=False,
        )[0]
