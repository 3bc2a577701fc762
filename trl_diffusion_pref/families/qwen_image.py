"""Qwen-Image: a vision-language model as text encoder, an MMDiT on packed latents, a video autoencoder."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import QwenImagePipeline
from torch import Tensor, nn

from .autoencoders import decode_with_channel_statistics, encode_with_channel_statistics
from .base import Family, call_default
from .kohya import DIFFUSERS_NAMES


class QwenImageFamily(Family):
    """`QwenImagePipeline`."""

    pipeline_class = "QwenImagePipeline"
    denoiser_class = "QwenImageTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "separate"
    # arXiv 2508.02324; the model card lists the shapes to generate.
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_qwen_image.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    kohya = DIFFUSERS_NAMES
    packing = 4
    flow = True
    read_by_value = ("prompt_embeds_mask",)
    prompt_masks = {"prompt_embeds": "prompt_embeds_mask"}
    pads_to_longest = True

    def conditioning_shapes(self, pipeline: QwenImagePipeline) -> dict[str, tuple[int, ...]]:
        length = call_default(pipeline, "max_sequence_length")
        width = self.denoiser_config(pipeline).joint_attention_dim
        return {"prompt_embeds": (length, width), "prompt_embeds_mask": (length,)}

    def encode_prompts(self, pipeline: QwenImagePipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Padded to the pipeline's default `max_sequence_length`; the mask says how much of it is tokens."""
        length = call_default(pipeline, "max_sequence_length")
        with torch.no_grad():
            prompt_embeds, mask = pipeline.encode_prompt(
                list(prompts), device=self.text_device(pipeline), max_sequence_length=length
            )
        if mask is None:
            # No prompt of the batch is shorter than the others.
            mask = torch.ones(prompt_embeds.shape[:2], device=prompt_embeds.device)
        padding = length - prompt_embeds.shape[1]
        return {
            "prompt_embeds": nn.functional.pad(prompt_embeds.float(), (0, 0, 0, padding)),
            "prompt_embeds_mask": nn.functional.pad(mask.float(), (0, padding)),
        }

    def token_limits(self, pipeline: QwenImagePipeline) -> dict[str, int]:
        # The pipeline drops the beginning of its template, and everything past the length.
        return {"tokenizer": pipeline.prompt_template_encode_start_idx + call_default(pipeline, "max_sequence_length")}

    def tokenized_text(self, pipeline: QwenImagePipeline, prompt: str) -> str:
        return pipeline.prompt_template_encode.format(prompt)

    def encode_samples(self, pipeline: QwenImagePipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        # An image is a video of one frame.
        mean, std = encode_with_channel_statistics(pipeline.vae, pixels.unsqueeze(2))
        return mean.squeeze(2), std.squeeze(2)

    def decode_samples(self, pipeline: QwenImagePipeline, latents: Tensor) -> Tensor:
        return decode_with_channel_statistics(pipeline.vae, latents.unsqueeze(2)).squeeze(2).clamp(-1, 1)

    def images(self, conditioning: Mapping[str, Tensor]) -> list[Tensor]:
        """Latents `(B, C, h, w)` of the condition images. Default: none."""
        return []

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        batch, *_, height, width = x_t.shape
        latents = [x_t, *(image.to(x_t.dtype) for image in self.images(conditioning))]
        mask = conditioning["prompt_embeds_mask"].long()
        # The pipeline cuts to the longest prompt of the batch, and passes no mask if all are equally long.
        length = int(mask.sum(dim=1).max())
        mask = mask[:, :length]
        prediction = denoiser(
            hidden_states=torch.cat([QwenImagePipeline._pack_latents(each, *each.shape) for each in latents], dim=1),
            # The pipeline rounds the time to the latents' dtype before it divides.
            timestep=timestep.to(x_t.dtype) / 1000,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            encoder_hidden_states=conditioning["prompt_embeds"][:, :length].to(x_t.dtype),
            img_shapes=[[(1, each.shape[2] // 2, each.shape[3] // 2) for each in latents]] * batch,
            return_dict=False,
        )[0]
        # The noisy latents come first.
        prediction = prediction[:, : (height // 2) * (width // 2)]
        # Sizes in latents, so the factor to pixels is 1; the pipeline's layout has a frame dimension.
        return QwenImagePipeline._unpack_latents(prediction, height, width, vae_scale_factor=1).squeeze(2)
