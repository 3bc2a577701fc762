"""Flux.2: a language model's hidden states, a VAE with batch statistics, and any images to edit as further tokens."""

import math
from collections.abc import Mapping, Sequence

import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, ModelMixin
from diffusers.pipelines.flux2 import pipeline_flux2
from PIL.Image import Image, Resampling
from torch import Tensor, nn

from .autoencoders import decode_finite, encode_finite
from .base import Family, call_default, model_inside
from .conditions import numbered
from .kohya import KohyaNames, Rule, joined


# The pipelines have this number in their calls.
_PIXELS = 1024 * 1024
# And as its default, the number of sampling steps.
_STEPS = 50
# The line of diffusers' schedulers for `use_dynamic_shifting`, which the published configs do not change.
_BASE_SHIFT, _MAX_SHIFT, _BASE_TOKENS, _MAX_TOKENS = 0.5, 1.15, 256, 4096
_DOUBLE, _SINGLE = r"transformer_blocks\.(\d+)\.", r"single_transformer_blocks\.(\d+)\."
_IMAGE_QKV, _TEXT_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")


class Flux2Family(Family):
    """`Flux2Pipeline` (Flux.2-dev), which generates from text and edits up to six images.

    Its pipeline has no classifier-free guidance: guidance is an input of the transformer.

    Args:
        training_guidance: See `FluxFamily`; the sampler's default is 4. To change it:
            `register_family(Flux2Family(training_guidance=4.0))`.
    """

    pipeline_class = "Flux2Pipeline"
    denoiser_class = "Flux2Transformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    condition_images = ("image",)
    condition_is_optional = True
    # docs.bfl.ai, guides/prompting_editing_overview: "Recommended max 6"; diffusers sets no limit.
    max_condition_images = 6
    own_condition_sizes = True
    # Nothing was published on its training; the announcement promises sizes up to 4 megapixels in any shape.
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_flux2.py; see `lora_targets` for the other layers there.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
    kohya = KohyaNames(
        (
            *joined(_DOUBLE + r"attn\.", _IMAGE_QKV, r"double_blocks.\1.img_attn.qkv"),
            *joined(_DOUBLE + r"attn\.", _TEXT_QKV, r"double_blocks.\1.txt_attn.qkv"),
            Rule(_DOUBLE + r"attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
            Rule(_DOUBLE + r"attn\.to_add_out", r"double_blocks.\1.txt_attn.proj"),
            Rule(_DOUBLE + r"ff\.linear_in", r"double_blocks.\1.img_mlp.0"),
            Rule(_DOUBLE + r"ff\.linear_out", r"double_blocks.\1.img_mlp.2"),
            Rule(_DOUBLE + r"ff_context\.linear_in", r"double_blocks.\1.txt_mlp.0"),
            Rule(_DOUBLE + r"ff_context\.linear_out", r"double_blocks.\1.txt_mlp.2"),
            Rule(_SINGLE + r"attn\.to_qkv_mlp_proj", r"single_blocks.\1.linear1"),
            Rule(_SINGLE + r"attn\.to_out", r"single_blocks.\1.linear2"),
        )
    )
    packing = 4
    flow = True

    def __init__(self, training_guidance: float = 1.0) -> None:
        self.training_guidance = training_guidance

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        return super().takes_denoiser(denoiser) and denoiser.config.guidance_embeds

    def lora_targets(self, denoiser: nn.Module) -> list[str]:
        # By number, as in the example: "attn.to_out" alone would also mean the other blocks' lists of that name.
        single = range(model_inside(denoiser).config.num_single_layers)
        return [*self.lora_target_modules, *(f"single_transformer_blocks.{n}.attn.to_out" for n in single)]

    # ---- Sizes -----------------------------------------------------------------------------------------------------

    def size_step(self, pipeline: Flux2Pipeline) -> int:
        # Two by two latents are packed into one token, outside the transformer.
        return 2 * pipeline.vae_scale_factor

    def conditioning_shapes(self, pipeline: Flux2Pipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).joint_attention_dim
        return {"prompt_embeds": (call_default(pipeline, "max_sequence_length"), width), "guidance": ()}

    def image_tokens(self, latent_shape: tuple[int, ...]) -> float:
        """The number at which the schedulers' straight line has the shift that the pipeline computes.

        Up to 4,300 tokens that also depends on the number of sampling steps, here the call's default.
        """
        mu = pipeline_flux2.compute_empirical_mu(int(super().image_tokens(latent_shape)), _STEPS)
        return _BASE_TOKENS + (mu - _BASE_SHIFT) * (_MAX_TOKENS - _BASE_TOKENS) / (_MAX_SHIFT - _BASE_SHIFT)

    # ---- Prompts ---------------------------------------------------------------------------------------------------

    def encode_prompts(self, pipeline: Flux2Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Includes `guidance`, `(len(prompts),)`. Padding is part of the embeddings, since nothing masks it."""
        embeds = self._prompt_embeds(pipeline, prompts)
        return {
            "prompt_embeds": embeds,
            "guidance": torch.full((len(prompts),), self.training_guidance, device=embeds.device),
        }

    def _prompt_embeds(self, pipeline: Flux2Pipeline, prompts: Sequence[str]) -> Tensor:
        options = {name: call_default(pipeline, name) for name in ("max_sequence_length", "text_encoder_out_layers")}
        with torch.no_grad():
            prompt_embeds, _ = pipeline.encode_prompt(list(prompts), device=self.text_device(pipeline), **options)
        return prompt_embeds.float()

    def token_limits(self, pipeline: Flux2Pipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def tokenized_text(self, pipeline: Flux2Pipeline, prompt: str) -> str:
        messages = pipeline_flux2.format_input([prompt], pipeline.system_message)
        (text,) = pipeline.tokenizer.apply_chat_template(messages, add_generation_prompt=False, tokenize=False)
        # The tokenizer puts its own before every text.
        return text.removeprefix(pipeline.tokenizer.tokenizer.bos_token or "")

    # ---- Images ----------------------------------------------------------------------------------------------------

    def encode_samples(self, pipeline: Flux2Pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = encode_finite(
            pipeline.vae, pixels, lambda output: (output.latent_dist.mean, output.latent_dist.std)
        )
        shift, scale = _statistics(pipeline.vae, mean)
        return _latents((_patches(mean) - shift) / scale), _latents(_patches(std) / scale)

    def decode_samples(self, pipeline: Flux2Pipeline, latents: Tensor) -> Tensor:
        shift, scale = _statistics(pipeline.vae, latents)
        return decode_finite(pipeline.vae, _latents(_patches(latents) * scale + shift)).clamp(-1, 1)

    def condition_size(self, pipeline: Flux2Pipeline, size: tuple[int, int], count: int) -> tuple[int, int]:
        step = self.size_step(pipeline)
        height, width = _at_most(_PIXELS, size)
        return height // step * step, width // step * step

    def check_condition(self, pipeline: Flux2Pipeline, image: Image) -> None:
        pipeline.image_processor.check_image_input(image)

    def cut_condition(self, pipeline: Flux2Pipeline, image: Image, size: tuple[int, int]) -> Image:
        """Scales only what has more than a megapixel; the rest that makes no whole token is cut off at the edges."""
        height, width = _at_most(_PIXELS, (image.height, image.width))
        if (width, height) != image.size:
            image = image.resize((width, height), Resampling.LANCZOS)
        return pipeline.image_processor.resize(image, *size, resize_mode="crop")

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        prompt_embeds = conditioning["prompt_embeds"].to(x_t.dtype)
        tokens, positions = self._tokens(x_t, conditioning)
        prediction = denoiser(
            hidden_states=tokens,
            # The pipeline rounds the time to the latents' dtype before it divides.
            timestep=timestep.to(x_t.dtype) / 1000,
            guidance=self._guidance(conditioning),
            encoder_hidden_states=prompt_embeds,
            txt_ids=Flux2Pipeline._prepare_text_ids(prompt_embeds).to(x_t.device),
            img_ids=positions,
            return_dict=False,
        )[0]
        # The noisy latents come first.
        height, width = x_t.shape[2] // 2, x_t.shape[3] // 2
        return _latents(prediction[:, : height * width].transpose(1, 2).unflatten(2, (height, width)))

    def _tokens(self, x_t: Tensor, conditioning: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens `(B, N, 4 C)` of the noisy latents and of the condition images, and their positions `(B, N, 4)`."""
        noisy = _patches(x_t)
        images = [_patches(image.to(x_t.dtype)) for image in numbered(conditioning, "image")]
        positions = [Flux2Pipeline._prepare_latent_ids(noisy)]
        if images:
            of_one = Flux2Pipeline._prepare_image_ids([image[:1] for image in images])
            positions.append(of_one.expand(len(x_t), -1, -1))
        tokens = torch.cat([each.flatten(2).transpose(1, 2) for each in (noisy, *images)], dim=1)
        return tokens, torch.cat(positions, dim=1).to(x_t.device)

    def _guidance(self, conditioning: Mapping[str, Tensor]) -> Tensor | None:
        return conditioning["guidance"].float()


class Flux2KleinFamily(Flux2Family):
    """`Flux2KleinPipeline`: up to four images, a Qwen3 text encoder, and classifier-free guidance."""

    pipeline_class = "Flux2KleinPipeline"
    # docs.bfl.ai, guides/prompting_editing_overview; diffusers sets no limit.
    max_condition_images = 4
    guidance_layout = "separate"

    def __init__(self) -> None:
        # Its transformer embeds no guidance.
        pass

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        return Family.takes_denoiser(self, denoiser) and not denoiser.config.guidance_embeds

    def distilled(self, pipeline: Flux2KleinPipeline) -> str | None:
        return "its config has is_distilled=True" if pipeline.config.is_distilled else None

    def conditioning_shapes(self, pipeline: Flux2KleinPipeline) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": super().conditioning_shapes(pipeline)["prompt_embeds"]}

    def encode_prompts(self, pipeline: Flux2KleinPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Padding is part of the embeddings, since nothing masks it."""
        return {"prompt_embeds": self._prompt_embeds(pipeline, prompts)}

    def tokenized_text(self, pipeline: Flux2KleinPipeline, prompt: str) -> str:
        return pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def _guidance(self, conditioning: Mapping[str, Tensor]) -> None:
        return None


def _patches(latents: Tensor) -> Tensor:
    """`(B, C, h, w)` to `(B, 4 C, h/2, w/2)`, for which the VAE has statistics and of which each place is a token."""
    return Flux2Pipeline._patchify_latents(latents)


def _latents(patches: Tensor) -> Tensor:
    """The inverse of `_patches`."""
    return Flux2Pipeline._unpatchify_latents(patches)


def _statistics(vae: ModelMixin, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the patches' channels, float32 `(1, 4 C, 1, 1)` on the latents' device."""
    mean, variance = (
        buffer.to(latents.device).float()[None, :, None, None] for buffer in (vae.bn.running_mean, vae.bn.running_var)
    )
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


def _at_most(area: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width, scaled to about so many pixels if they are more."""
    height, width = size
    scale = min(math.sqrt(area / (width * height)), 1.0)
    return int(height * scale), int(width * scale)
