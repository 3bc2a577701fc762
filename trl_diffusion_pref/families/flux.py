"""Flux.1: CLIP's pooled embedding, T5's states, latents packed in 2x2 patches, rectified flow."""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline, ModelMixin
from torch import Tensor, nn

from .base import Family, GuidanceLayout, call_default
from .kohya import KohyaNames, Rule, joined


_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."


class FluxFamily(Family):
    """`FluxPipeline`.

    Args:
        training_guidance: The guidance that a transformer with a guidance embedding (Flux.1-dev) is conditioned on in
            training. The README of diffusers' training examples passes 1, at which the embedding asks for no guidance
            and the loss's target is what the model should predict; the sampler's default is 3.5. To change it:
            `register_family(FluxFamily(training_guidance=3.5))`.
    """

    pipeline_class = "FluxPipeline"
    denoiser_class = "FluxTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    guidance_layout: GuidanceLayout | None = "separate"
    # Nothing was published on its training; the announcement promises sizes from 0.1 to 2 megapixels in any shape.
    aspect_ratio_buckets = True
    shared_arguments = ("img_ids", "txt_ids")
    # examples/dreambooth/train_dreambooth_lora_flux.py
    lora_target_modules = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    kohya = KohyaNames(
        (
            *joined(_DOUBLE, ("attn.to_q", "attn.to_k", "attn.to_v"), r"double_blocks.\1.img_attn.qkv"),
            *joined(
                _DOUBLE, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), r"double_blocks.\1.txt_attn.qkv"
            ),
            Rule(_DOUBLE + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
            Rule(_DOUBLE + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
            Rule(_DOUBLE + r"ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
            Rule(_DOUBLE + r"ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
            Rule(_DOUBLE + r"ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0"),
            Rule(_DOUBLE + r"ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2"),
            Rule(_DOUBLE + r"norm1\.linear", r"double_blocks.\1.img_mod.lin"),
            Rule(_DOUBLE + r"norm1_context\.linear", r"double_blocks.\1.txt_mod.lin"),
            *joined(
                _SINGLE,
                ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
                r"single_blocks.\1.linear1",
                widths=(1, 1, 1, 4),
            ),
            Rule(_SINGLE + "proj_out", r"single_blocks.\1.linear2"),
            Rule(_SINGLE + r"norm\.linear", r"single_blocks.\1.modulation.lin"),
        )
    )
    packing = 4
    flow = True

    def __init__(self, training_guidance: float = 1.0) -> None:
        self.training_guidance = training_guidance

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        # Fill's is of the same class.
        return super().takes_denoiser(denoiser) and not takes_masked_image(denoiser)

    def distilled(self, pipeline: FluxPipeline) -> str | None:
        if self.denoiser_config(pipeline).guidance_embeds:
            return None
        return "its transformer's config has guidance_embeds=False, as Flux.1-schnell's has"

    def conditioning_shapes(self, pipeline: FluxPipeline) -> dict[str, tuple[int, ...]]:
        config = self.denoiser_config(pipeline)
        shapes: dict[str, tuple[int, ...]] = {
            "prompt_embeds": (call_default(pipeline, "max_sequence_length"), config.joint_attention_dim),
            "pooled_prompt_embeds": (config.pooled_projection_dim,),
        }
        return shapes | ({"guidance": ()} if config.guidance_embeds else {})

    def size_step(self, pipeline: FluxPipeline) -> int:
        # Two by two latents are packed into one token, outside the transformer.
        return 2 * pipeline.vae_scale_factor

    def encode_prompts(self, pipeline: FluxPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Includes `guidance`, `(len(prompts),)`, if the transformer embeds it."""
        with torch.no_grad():
            prompt_embeds, pooled_prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts), device=self.text_device(pipeline)
            )
        conditioning = {"prompt_embeds": prompt_embeds.float(), "pooled_prompt_embeds": pooled_prompt_embeds.float()}
        if pipeline.transformer.config.guidance_embeds:
            conditioning["guidance"] = torch.full((len(prompts),), self.training_guidance, device=prompt_embeds.device)
        return conditioning

    def token_limits(self, pipeline: FluxPipeline) -> dict[str, int]:
        return {
            "tokenizer": pipeline.tokenizer_max_length,
            "tokenizer_2": call_default(pipeline, "max_sequence_length"),
        }

    def tokens(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the transformer reads beside the text: tokens `(B, N, 4 C)` and their positions `(N, 3)`.

        Default: the noisy latents in 2x2 patches.
        """
        batch, channels, height, width = x_t.shape
        return (
            FluxPipeline._pack_latents(x_t, batch, channels, height, width),
            FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x_t.device, x_t.dtype),
        )

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        *_, height, width = x_t.shape
        guidance = conditioning.get("guidance")
        tokens, positions = self.tokens(x_t, conditioning)
        prompt_embeds = conditioning["prompt_embeds"].to(x_t.dtype)
        prediction = denoiser(
            hidden_states=tokens,
            # The pipeline rounds the time to the latents' dtype before it divides.
            timestep=timestep.to(x_t.dtype) / 1000,
            guidance=None if guidance is None else guidance.float(),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(x_t.dtype),
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=positions,
            return_dict=False,
        )[0]
        # Those of the noisy latents come first.
        prediction = prediction[:, : (height // 2) * (width // 2)]
        # Sizes in latents, so the factor to pixels is 1.
        return FluxPipeline._unpack_latents(prediction, height, width, vae_scale_factor=1)


def takes_masked_image(denoiser: ModelMixin) -> bool:
    """Whether a transformer gets a masked image and all pixels of its mask beside the latents, as Fill's does."""
    config = denoiser.config
    return config.in_channels > 2 * (config.out_channels or config.in_channels)
