"""Chroma: Flux's layers without its modulations and without CLIP, a mask over T5's tokens, ordinary guidance."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ChromaPipeline
from torch import Tensor, nn

from .base import Family, call_default, model_inside
from .flux import FluxFamily


class ChromaFamily(Family):
    """`ChromaPipeline`."""

    pipeline_class = "ChromaPipeline"
    denoiser_class = "ChromaTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "separate"
    guided_pipelines = ("ChromaImg2ImgPipeline",)
    # The authors' training code (lodestone-rock/flow) has src/dataloaders/bucketing_logic.py.
    aspect_ratio_buckets = True
    shared_arguments = ("img_ids", "txt_ids")
    # diffusers has no example for Chroma, whose blocks have the layers of Flux's.
    lora_target_modules = FluxFamily.lora_target_modules
    kohya = FluxFamily.kohya
    packing = 4
    flow = True
    # There is no entry in prompt_masks. The pipeline's mask is of floats, which attention adds to its logits: what is
    # masked weighs less, and still counts.

    def conditioning_shapes(self, pipeline: ChromaPipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        width = self.denoiser_config(pipeline).joint_attention_dim
        return {"prompt_embeds": (length, width), "prompt_attention_mask": (length,)}

    def size_step(self, pipeline: ChromaPipeline) -> int:
        # Two by two latents are packed into one token, outside the transformer.
        return 2 * pipeline.vae_scale_factor

    def encode_prompts(self, pipeline: ChromaPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The mask is 1 for a prompt's tokens and for the first token of padding after them."""
        with torch.no_grad():
            prompt_embeds, _, mask, *_ = pipeline.encode_prompt(
                list(prompts),
                device=self.text_device(pipeline),
                do_classifier_free_guidance=False,
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
            )
        return {"prompt_embeds": prompt_embeds.float(), "prompt_attention_mask": mask.float()}

    def token_limits(self, pipeline: ChromaPipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        batch, channels, height, width = x_t.shape
        prompt_embeds = conditioning["prompt_embeds"].to(x_t.dtype)
        tokens = (height // 2) * (width // 2)
        mask = nn.functional.pad(conditioning["prompt_attention_mask"].to(x_t.dtype), (0, tokens), value=1.0)
        with _checkpointing_with_mask(denoiser, mask):
            prediction = denoiser(
                hidden_states=ChromaPipeline._pack_latents(x_t, batch, channels, height, width),
                # The pipeline rounds the time to the latents' dtype before it divides.
                timestep=timestep.to(x_t.dtype) / 1000,
                encoder_hidden_states=prompt_embeds,
                txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=x_t.device, dtype=x_t.dtype),
                img_ids=ChromaPipeline._prepare_latent_image_ids(
                    batch, height // 2, width // 2, x_t.device, x_t.dtype
                ),
                attention_mask=mask,
                return_dict=False,
            )[0]
        # Sizes in latents, so the factor to pixels is 1.
        return ChromaPipeline._unpack_latents(prediction, height, width, vae_scale_factor=1)


@contextmanager
def _checkpointing_with_mask(denoiser: nn.Module, mask: Tensor) -> Iterator[None]:
    """Gives the single blocks their mask, which diffusers 0.42 leaves out under gradient checkpointing.

    The mask becomes an argument of the checkpointed function, so that the backward pass has it too.
    """
    model: Any = model_inside(denoiser)
    if not (torch.is_grad_enabled() and model.is_gradient_checkpointing):
        yield
        return
    single_blocks, checkpoint = set(model.single_transformer_blocks), model._gradient_checkpointing_func

    def with_mask(block: Callable[..., Any], *args: Any) -> Any:
        # Hidden states, modulation and rotations; a fourth argument is the mask.
        return (
            checkpoint(block, *args, mask) if block in single_blocks and len(args) == 3 else checkpoint(block, *args)
        )

    model._gradient_checkpointing_func = with_mask
    try:
        yield
    finally:
        model._gradient_checkpointing_func = checkpoint
