"""Qwen-Image-Edit: Qwen-Image whose text encoder sees the images to edit, and whose transformer reads them latents."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image as PILImage
from torch import Tensor, nn

from .base import call_default
from .conditions import numbered
from .qwen_image import QwenImageFamily


# The pipelines have this number in their calls.
_PIXELS = 1024 * 1024


class QwenImageEditFamily(QwenImageFamily):
    """`QwenImageEditPipeline`: one image, brought to a megapixel in its own shape for text encoder and VAE alike.

    Its call takes one prompt at a time. Both sides of its guidance see the image.
    """

    pipeline_class = "QwenImageEditPipeline"
    condition_images = ("image",)
    own_condition_sizes = True
    prompts_see_images = True

    # ---- Sizes ------------------------------------------------------------------------------------------------------

    def condition_size(self, pipeline: QwenImageEditPipeline, size: tuple[int, int], count: int) -> tuple[int, int]:
        width, height, _ = pipeline_qwenimage_edit.calculate_dimensions(_PIXELS, size[1] / size[0])
        return height, width

    def seen_size(self, pipeline: QwenImageEditPipeline, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the text encoder sees an image in."""
        return self.condition_size(pipeline, size, 1)

    def conditioning_shapes(self, pipeline: QwenImageEditPipeline) -> dict[str, tuple[int, ...]]:
        """For a prompt of the default `max_sequence_length`, which nothing is cut to, and one square image."""
        side = self.resolution(pipeline)
        height, width = self.seen_size(pipeline, (side, side))
        # Qwen2.5-VL makes one token of 28x28 pixels.
        length = call_default(pipeline, "max_sequence_length") + (height // 28) * (width // 28)
        of_token = self.denoiser_config(pipeline).joint_attention_dim
        return {"prompt_embeds": (length, of_token), "prompt_embeds_mask": (length,)}

    # ---- Prompts ----------------------------------------------------------------------------------------------------

    def token_limits(self, pipeline: QwenImageEditPipeline) -> dict[str, int]:
        # The processor cuts nothing.
        return {"tokenizer": pipeline.tokenizer.model_max_length}

    def encode_prompts(self, pipeline: QwenImageEditPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        """With a black image, for what must be known before there is a row; padded as `conditioning_shapes` says."""
        side = self.resolution(pipeline)
        black = PILImage.new("RGB", (side, side))
        conditioning = self.encode_prompts_with_images(pipeline, prompts, [[black]] * len(prompts))
        length = self.conditioning_shapes(pipeline)["prompt_embeds"][0]
        return {name: _padded(value, length) for name, value in conditioning.items()}

    def encode_prompts_with_images(
        self, pipeline: QwenImageEditPipeline, prompts: Sequence[str], images: Sequence[Sequence[PILImage.Image]]
    ) -> dict[str, Tensor]:
        embeds = []
        for prompt, own in zip(prompts, images, strict=True):
            sizes = [self.seen_size(pipeline, (image.height, image.width)) for image in own]
            seen = [pipeline.image_processor.resize(image, *size) for image, size in zip(own, sizes, strict=True)]
            with torch.no_grad():
                prompt_embeds, _ = pipeline.encode_prompt(
                    image=self._given(seen), prompt=[prompt], device=self.text_device(pipeline)
                )
            embeds.append(prompt_embeds.float())
        length = max(each.shape[1] for each in embeds)
        # Of one prompt at a time, nothing is padding.
        return {
            "prompt_embeds": torch.cat([_padded(each, length) for each in embeds]),
            "prompt_embeds_mask": torch.cat([_padded(torch.ones_like(each[..., 0]), length) for each in embeds]),
        }

    def _given(self, images: list[PILImage.Image]) -> object:
        """A row's images as the pipeline's `encode_prompt` takes them."""
        return images[0]

    # ---- Images -----------------------------------------------------------------------------------------------------

    def images(self, conditioning: Mapping[str, Tensor]) -> list[Tensor]:
        return [conditioning["image"]]


class QwenImageEditPlusFamily(QwenImageEditFamily):
    """`QwenImageEditPlusPipeline`: one to three images, each of a megapixel for the VAE, 384x384 for the encoder."""

    pipeline_class = "QwenImageEditPlusPipeline"
    # So many the card of Qwen-Image-Edit-2509 advises.
    max_condition_images = 3

    def condition_size(
        self, pipeline: QwenImageEditPlusPipeline, size: tuple[int, int], count: int
    ) -> tuple[int, int]:
        plus = pipeline_qwenimage_edit_plus
        width, height = plus.calculate_dimensions(plus.VAE_IMAGE_SIZE, size[1] / size[0])
        return height, width

    def seen_size(self, pipeline: QwenImageEditPlusPipeline, size: tuple[int, int]) -> tuple[int, int]:
        plus = pipeline_qwenimage_edit_plus
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, size[1] / size[0])
        return height, width

    def _given(self, images: list[PILImage.Image]) -> object:
        return images

    def images(self, conditioning: Mapping[str, Tensor]) -> list[Tensor]:
        return numbered(conditioning, "image")


def _padded(values: Tensor, length: int) -> Tensor:
    """`(B, L, ...)` with zeros up to a length in the second dimension."""
    missing = max(length - values.shape[1], 0)
    return nn.functional.pad(values, (*[0, 0] * (values.ndim - 2), 0, missing))
