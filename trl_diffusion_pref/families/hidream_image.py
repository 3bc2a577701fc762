"""HiDream-I1: two CLIP, T5 and Llama text encoders, a DiT that sends each token through some of its experts."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import HiDreamImagePipeline
from diffusers.models.transformers.transformer_hidream_image import MOEFeedForwardSwiGLU
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .base import Family, call_default, model_inside


# The published denoiser's, by which its pipeline shifts times whatever the image's size.
_TOKENS = 4096
_CLIP_TOKENS = 218
# The authors' code samples these without guidance, in 28 and 16 steps.
_DISTILLED = ("HiDream-I1-Dev", "HiDream-I1-Fast")


class HiDreamImageFamily(Family):
    """`HiDreamImagePipeline`.

    Gradients need the denoiser in training mode, where it returns patches; in evaluation mode its routed experts get
    none with gradient checkpointing.
    """

    pipeline_class = "HiDreamImagePipeline"
    denoiser_class = "HiDreamImageTransformer2DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")
    guidance_layout = "batched"
    batch_second = ("encoder_hidden_states_llama3",)
    # The authors' inference code generates seven shapes of one area.
    aspect_ratio_buckets = True
    # examples/dreambooth/train_dreambooth_lora_hidream.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out")
    flow = True

    def check_complete(self, pipeline: HiDreamImagePipeline) -> None:
        """See `Family.check_complete`.

        Raises:
            ValueError: Also where the denoiser's config keeps gradients from its experts.
        """
        super().check_complete(pipeline)
        if self.denoiser_config(pipeline).force_inference_output:
            raise ValueError(
                f"The transformer of this {type(pipeline).__name__} has force_inference_output=True, with which its "
                "experts, and what comes before them, get no gradient. Load it with "
                "force_inference_output=False; it computes the same."
            )

    def distilled(self, pipeline: HiDreamImagePipeline) -> str | None:
        scheduler, name = type(pipeline.scheduler).__name__, str(pipeline.name_or_path or "")
        if scheduler == "FlowMatchLCMScheduler":
            return f"its scheduler is {scheduler}"
        return f"its name is {name}" if any(each in name for each in _DISTILLED) else None

    def conditioning_shapes(self, pipeline: HiDreamImagePipeline) -> dict[str, tuple[int, ...]]:
        config, length = self.denoiser_config(pipeline), call_default(pipeline, "max_sequence_length")
        t5, llama = config.caption_channels
        return {
            "prompt_embeds_t5": (length, t5),
            "prompt_embeds_llama3": (_llama_layers(config.llama_layers), length, llama),
            "pooled_prompt_embeds": (config.text_emb_dim,),
        }

    def latent_shape(self, pipeline: HiDreamImagePipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.latent_shape`.

        Raises:
            ValueError: An image that is not square and has more tokens than the denoiser has room for.
        """
        channels, height, width = super().latent_shape(pipeline, sample_shape)
        config = self.denoiser_config(pipeline)
        tokens, room = height * width // config.patch_size**2, config.max_resolution[0] * config.max_resolution[1]
        room //= config.patch_size**2
        if height != width and tokens > room:
            raise ValueError(
                f"resolution={sample_shape[1]}x{sample_shape[2]} makes {tokens} tokens, and the transformer of this "
                f"{type(pipeline).__name__} has room for {room} of an image that is not square. Take smaller sides."
            )
        return channels, height, width

    def image_tokens(self, latent_shape: tuple[int, ...]) -> int:
        """Those of the largest image, by which the pipeline shifts the times of all."""
        return _TOKENS

    def encode_prompts(self, pipeline: HiDreamImagePipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Llama's states are `(B, layers, tokens, width)`; the pipeline has the layers first."""
        with torch.no_grad():
            t5, _, llama, _, pooled, _ = pipeline.encode_prompt(
                list(prompts),
                device=self.text_device(pipeline),
                do_classifier_free_guidance=False,
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
            )
        # Layers past the last that the denoiser reads are not stored.
        layers = _llama_layers(self.denoiser_config(pipeline).llama_layers)
        return {
            "prompt_embeds_t5": t5.float(),
            "prompt_embeds_llama3": llama[:layers].transpose(0, 1).float(),
            "pooled_prompt_embeds": pooled.float(),
        }

    def token_limits(self, pipeline: HiDreamImagePipeline) -> dict[str, int]:
        length = call_default(pipeline, "max_sequence_length")
        clip = min(length, _CLIP_TOKENS)
        return {
            "tokenizer": clip,
            "tokenizer_2": clip,
            "tokenizer_3": min(length, pipeline.tokenizer_3.model_max_length),
            "tokenizer_4": min(length, pipeline.tokenizer_4.model_max_length),
        }

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        model = model_inside(denoiser)
        if isinstance(next(model.parameters()), FakeTensor):
            _route_without_values(model)
        with _experts_as_in_training(model):
            prediction = denoiser(
                hidden_states=x_t,
                timesteps=timestep,
                encoder_hidden_states_t5=conditioning["prompt_embeds_t5"].to(x_t.dtype),
                encoder_hidden_states_llama3=conditioning["prompt_embeds_llama3"].to(x_t.dtype).transpose(0, 1),
                pooled_embeds=conditioning["pooled_prompt_embeds"].to(x_t.dtype),
                return_dict=False,
            )[0]
        if model.training and not model.config.force_inference_output:
            prediction = _from_patches(prediction, *x_t.shape[2:])
        # The pipeline negates it too.
        return -prediction


def _llama_layers(read: Sequence[int]) -> int:
    """How many of Llama's layers are stored, of which a denoiser reads these."""
    return max(read) + 1


@contextmanager
def _experts_as_in_training(model: nn.Module) -> Iterator[None]:
    """Lets experts add up their outputs in one way in both modes.

    Under CUDA's autocast the two ways round differently, and a policy, in training mode, would begin away from its
    reference, in evaluation mode.
    """
    changed = [part for part in model.modules() if isinstance(part, MOEFeedForwardSwiGLU) and not part.training]
    for part in changed:
        part.training = True
    try:
        yield
    finally:
        for part in changed:
            part.training = False


def _from_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """Latents of what the denoiser returns in training mode.

    Args:
        patches: `(B, C, tokens, p * p)`; of images that are not square, padding comes last.
        height, width: Of the latents.

    Returns:
        `(B, C, height, width)`.
    """
    side = round(patches.shape[-1] ** 0.5)
    rows, columns = height // side, width // side
    grid = patches[:, :, : rows * columns].unflatten(2, (rows, columns)).unflatten(-1, (side, side))
    return grid.transpose(3, 4).flatten(4).flatten(2, 3)


def _route_without_values(model: nn.Module) -> None:
    """For the memory estimate, whose denoiser is a copy without values: each expert gets as many tokens as the others.

    Of the module's own forward, since gradient checkpointing calls it again outside of `predict`.
    """
    for part in model.modules():
        if isinstance(part, MOEFeedForwardSwiGLU):
            part.forward = functools.partial(_evenly, part)


def _evenly(part: MOEFeedForwardSwiGLU, states: Tensor) -> Tensor:
    """As `MOEFeedForwardSwiGLU.forward` in training mode."""
    _, weights, _ = part.gate(states)
    tokens = states.view(-1, states.shape[-1]).repeat_interleave(part.num_activated_experts, dim=0)
    routed = torch.empty_like(tokens)
    numbers = torch.arange(len(tokens), device=tokens.device).tensor_split(len(part.experts))
    for expert, rows in zip(part.experts, numbers, strict=True):
        routed[rows] = expert(tokens[rows]).to(states.dtype)
    routed = (routed.view(*weights.shape, -1) * weights.unsqueeze(-1)).sum(dim=1)
    return routed.view(states.shape).to(states.dtype) + part.shared_experts(states)
