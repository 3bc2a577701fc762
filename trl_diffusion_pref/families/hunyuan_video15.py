"""HunyuanVideo 1.5 (text to video): Qwen2.5-VL's states of a chat, ByT5's of quoted words, an MMDiT, a video VAE."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Pipeline
from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from .base import call_default, model_inside
from .modalities import VideoFamily
from .peft_format import PeftFormatFamily


# Of the image to start from, which text to video gives as zeros; a constant of the pipeline.
_IMAGE_TOKENS = 729


class HunyuanVideo15Family(PeftFormatFamily, VideoFamily):
    """`HunyuanVideo15Pipeline`, which has no `load_lora_weights`, and takes its guidance from its `guider`."""

    pipeline_class = "HunyuanVideo15Pipeline"
    denoiser_class = "HunyuanVideo15Transformer3DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder", "text_encoder_2")
    guidance_layout = "separate"
    # diffusers has no LoRA example for HunyuanVideo; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    flow = True
    # In diffusers 0.42 the VAE's attention gives a batch a mask of the wrong shape.
    one_prompt_per_call = True
    prompt_masks = {"prompt_embeds": "prompt_embeds_mask", "prompt_embeds_2": "prompt_embeds_mask_2"}

    def published_parts(self) -> dict[str, Any]:
        with torch.device("meta"):
            return {"vae": AutoencoderKLHunyuanVideo15()}

    def distilled(self, pipeline: HunyuanVideo15Pipeline) -> str | None:
        if self.denoiser_config(pipeline).use_meanflow:
            return "its transformer's config has use_meanflow=True"
        name = str(pipeline.name_or_path or "")
        return f"its name is {name}" if "distilled" in name.lower() else None

    def _check_channels(self, pipeline: HunyuanVideo15Pipeline) -> None:
        latent, channels = pipeline.vae.config.latent_channels, self.denoiser_config(pipeline).in_channels
        if channels != 2 * latent + 1:
            raise ValueError(
                f"The transformer of this HunyuanVideo15Pipeline takes {channels} channels, but noisy latents, the "
                f"latents of an image and a mask of its {type(pipeline.vae).__name__} have {2 * latent + 1}. Load the "
                "checkpoint in the class of pipeline that it was published for. If that class cannot be trained "
                "(inpainting, image to video), use the checkpoint that generates from text alone."
            )

    def video_size(self, pipeline: HunyuanVideo15Pipeline) -> tuple[int, int, int]:
        across, down = pipeline.default_aspect_ratio
        size = pipeline.video_processor.calculate_default_height_width(down, across, pipeline.target_size)
        return call_default(pipeline, "num_frames"), *size

    def latent_shape(self, pipeline: HunyuanVideo15Pipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        # Beside the noisy latents are an image's and a mask.
        _, *sides = super().latent_shape(pipeline, sample_shape)
        return (self.denoiser_config(pipeline).in_channels - 1) // 2, *sides

    def conditioning_shapes(self, pipeline: HunyuanVideo15Pipeline) -> dict[str, tuple[int, ...]]:
        config = self.denoiser_config(pipeline)
        length, length_2 = pipeline.tokenizer_max_length, pipeline.tokenizer_2_max_length
        return {
            "prompt_embeds": (length, config.text_embed_dim),
            "prompt_embeds_mask": (length,),
            "prompt_embeds_2": (length_2, config.text_embed_2_dim),
            "prompt_embeds_mask_2": (length_2,),
        }

    def encode_prompts(self, pipeline: HunyuanVideo15Pipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`prompt_embeds_2` are of the words within quotation marks, which the video shows as text."""
        with torch.no_grad():
            tensors = pipeline.encode_prompt(
                list(prompts),
                device=self.text_device(pipeline),
                dtype=self.text_dtype(pipeline),
                batch_size=len(prompts),
            )
        names = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
        return {name: tensor.float() for name, tensor in zip(names, tensors, strict=True)}

    def token_limits(self, pipeline: HunyuanVideo15Pipeline) -> dict[str, int]:
        # Words within quotation marks have a limit of their own.
        return {"tokenizer": pipeline.tokenizer_max_length + pipeline.prompt_template_encode_start_idx}

    def tokenized_text(self, pipeline: HunyuanVideo15Pipeline, prompt: str) -> str:
        (chat,) = format_text_input([prompt], pipeline.system_message)
        return pipeline.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def encode_samples(self, pipeline: HunyuanVideo15Pipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_frames(pipeline, pixels)
        # One by one, for the same reason as in sampling.
        encode = super().encode_samples
        means, stds = zip(*(encode(pipeline, video) for video in pixels.split(1)), strict=True)
        return torch.cat(means), torch.cat(stds)

    def decode_samples(self, pipeline: HunyuanVideo15Pipeline, latents: Tensor) -> Tensor:
        decode = super().decode_samples
        return torch.cat([decode(pipeline, video) for video in latents.split(1)])

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        width = model_inside(denoiser).config.image_embed_dim
        with _MasksWithoutValues() if isinstance(x_t, FakeTensor) else nullcontext():
            return denoiser(
                # Without an image to start from, its latents and the mask are zeros.
                hidden_states=torch.cat([x_t, torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])], dim=1),
                image_embeds=x_t.new_zeros(len(x_t), _IMAGE_TOKENS, width),
                timestep=timestep.to(x_t.dtype),
                encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
                encoder_attention_mask=conditioning["prompt_embeds_mask"].to(x_t.dtype),
                encoder_hidden_states_2=conditioning["prompt_embeds_2"].to(x_t.dtype),
                encoder_attention_mask_2=conditioning["prompt_embeds_mask_2"].to(x_t.dtype),
                return_dict=False,
            )[0]


class _MasksWithoutValues(TorchFunctionMode):
    """For the memory estimate, whose tensors have no values: the transformer sorts tokens by their masks.

    A mask takes everything here and its inverse nothing, so that all sizes are those of whole prompts.
    """

    def __init__(self) -> None:
        super().__init__()
        self._inverses: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0][:0] if any(args[1] is mask for mask in self._inverses) else args[0]
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__invert__:
            self._inverses.append(result)
        return result
