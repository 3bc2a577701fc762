"""Qwen-Image-Edit's pipelines with random weights, whose text encoder sees images, at sizes for tests."""

import transformers
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline, QwenImagePipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)

from helpers.tiny_parts import qwen_vl_text_encoder


try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
except ImportError:
    # Its name before there was one that needs torchvision.
    from transformers import Qwen2VLImageProcessor as Qwen2VLImageProcessorPil


# A megapixel is too many tokens for tests: a 256th of the area, 64x64 pixels.
_AREA = 256
calculate_dimensions = pipeline_qwenimage_edit.calculate_dimensions
calculate_dimensions_plus = pipeline_qwenimage_edit_plus.calculate_dimensions
pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: calculate_dimensions(area / _AREA, ratio)
pipeline_qwenimage_edit_plus.calculate_dimensions = lambda area, ratio: calculate_dimensions_plus(
    max(area / _AREA, 48 * 48), ratio
)

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")


class ImagesOnlyProcessor(transformers.Qwen2VLProcessor):
    """The processor without its part for videos, which needs torchvision; loaded from folders in the other's place."""

    def __init__(
        self, image_processor: Qwen2VLImageProcessorPil, tokenizer: Qwen2Tokenizer, **options: object
    ) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(
            [self.image_token, self.video_token]
        )
        transformers.ProcessorMixin.__init__(self, image_processor, tokenizer, **options)


ImagesOnlyProcessor.__name__ = "Qwen2VLProcessor"
ImagesOnlyProcessor.__module__ = "transformers"
transformers.Qwen2VLProcessor = ImagesOnlyProcessor


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    numbers = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    return qwen_vl_text_encoder(
        tokenizer,
        vision={"fullatt_block_indexes": [0]},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=len(tokenizer) - 1,
        vision_start_token_id=numbers["vision_start"],
        vision_end_token_id=numbers["vision_end"],
    )


def edit_around(
    pipeline: QwenImagePipeline, kind: type[QwenImageEditPipeline | QwenImageEditPlusPipeline]
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """VAE, transformer and scheduler of the pipeline that generates from text, with an encoder that sees images."""
    tokens = [*_SPECIAL, *sorted(ByteLevel.alphabet()), "<|video_pad|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=[],
        additional_special_tokens=[*_SPECIAL, "<|video_pad|>"],
    )
    processor = ImagesOnlyProcessor(Qwen2VLImageProcessorPil(min_pixels=28 * 28), tokenizer)
    parts = {**pipeline.components, "tokenizer": tokenizer, "text_encoder": _text_encoder(tokenizer)}
    return kind(**parts, processor=processor)


def noisy_tokens(pipeline: QwenImageEditPipeline, latents: Tensor) -> Tensor:
    """The latents of a 16x24 image from its tokens, after which those of the condition images may come."""
    return QwenImagePipeline._unpack_latents(latents[:, :24], 8, 12, vae_scale_factor=1).squeeze(2)
