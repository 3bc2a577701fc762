"""The part of a family that is about condition images: those that a pipeline edits, fills in or animates."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from diffusers import DiffusionPipeline
from PIL.Image import Image
from torch import Tensor


# The name in a step's conditioning of the region where errors count, for pipelines that see no mask themselves.
LOSS_REGION = "loss_region"


class Conditions(ABC):
    """What a family says about condition images. By default its pipelines take none.

    Attributes:
        condition_images: Columns of condition images, which are arguments of the pipeline's `__call__` too.
        condition_is_optional: Whether the pipeline also generates from text alone; a data set without the columns is
            then one for that.
        max_condition_images: How many images a cell may have. Above 1 it is one image or a list, in the last of the
            columns, and `predict` finds their encodings under "<column>/0", "<column>/1", ...
        channel_conditions: How many of them stand beside the noisy latents on the channel axis.
        condition_dropout: Of the rows that get the empty prompt, the share whose condition images become zeros.
        own_condition_sizes: Whether condition images are brought to a size of their own, see `condition_size`, and not
            to the sample's.
        mask_column: The one of `condition_images` that is a mask of the one before it, of the same size: white where
            the pipeline generates, black where it keeps the image. None without.
        one_prompt_per_call: Whether the pipeline's `__call__` takes one prompt at a time. Those that take several
            images for it, or whose text encoder sees them, do where they get images.
        tokens_first: Names of text encoders whose hidden states are `(tokens, B, width)`, and not the batch first.
        prompts_see_images: Whether the text encoder sees the condition images: conditioning on the prompt, and on the
            empty prompt, is then the row's, from `encode_prompts_with_images`.
    """

    condition_images: tuple[str, ...] = ()
    condition_is_optional: bool = False
    max_condition_images: int = 1
    channel_conditions: int = 0
    condition_dropout: float = 0.0
    own_condition_sizes: bool = False
    mask_column: str | None = None
    one_prompt_per_call: bool = False
    tokens_first: tuple[str, ...] = ()
    prompts_see_images: bool = False
    packing: int = 1

    @abstractmethod
    def denoiser_config(self, pipeline: DiffusionPipeline) -> Any:
        """See `Family`."""

    @abstractmethod
    def encode_samples(self, pipeline: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See `Family`."""

    @abstractmethod
    def latent_shape(self, pipeline: DiffusionPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family`."""

    def latent_channels(self, pipeline: DiffusionPipeline) -> int:
        """Of the noisy latents. Default: the denoiser's, divided by `packing` and among what stands on that axis."""
        return self.denoiser_config(pipeline).in_channels // (self.packing * (1 + self.channel_conditions))

    def input_channels(self, pipeline: DiffusionPipeline, latent_channels: int) -> int:
        """What the denoiser must take for latents of so many channels, and for what stands beside them."""
        return latent_channels * self.packing * (1 + self.channel_conditions)

    def condition_size(self, pipeline: DiffusionPipeline, size: tuple[int, int], count: int) -> tuple[int, int]:
        """Height and width that the pipeline brings a condition image to, where that is not the sample's size.

        Args:
            size: The image's height and width in pixels.
            count: How many condition images the row has.
        """
        raise NotImplementedError(f"{type(self).__name__} has own_condition_sizes and does not say which")

    def check_condition(self, pipeline: DiffusionPipeline, image: Image) -> None:
        """Raises a ValueError for an image that the pipeline's call refuses. Default: it takes all."""
        return None

    def cut_condition(self, pipeline: DiffusionPipeline, image: Image, size: tuple[int, int]) -> Image:
        """What the pipeline uses of an image, which is then stretched to `condition_size`. Default: all of it.

        Args:
            size: From `condition_size`.
        """
        return image

    def encode_conditions(
        self, pipeline: DiffusionPipeline, images: Mapping[str, Tensor], sample_shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """What `predict` reads of condition images, by name.

        Default: of each image the posterior's mean in the scale that the denoiser sees, under the image's own name.

        Args:
            images: `(B, 3, H, W)` float32 in [-1, 1] by column, or by "<column>/<number>".
            sample_shape: As `encode_samples` takes a sample, without the batch dimension.

        Returns:
            `(B, ...)` float32.
        """
        return {name: self.encode_samples(pipeline, pixels)[0] for name, pixels in images.items()}

    def condition_shapes(
        self, pipeline: DiffusionPipeline, names: Sequence[str], sample_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode_conditions` gives for images of the sample's shape, without the batch dimension.

        Args:
            names: Of the images.
        """
        if not names:
            return {}
        size = (sample_shape[-2], sample_shape[-1])
        if self.own_condition_sizes:
            size = self.condition_size(pipeline, size, len(names))
        shape = self.latent_shape(pipeline, (3, *size))
        return dict.fromkeys(names, shape)

    def mask_problem(self, pipeline: DiffusionPipeline, mask: Tensor) -> str | None:
        """Why a row with this mask cannot be trained on; None if it can.

        Args:
            mask: `(3, H, W)` float32 in [-1, 1], in the sample's size.
        """
        return None

    def region_of(self, pipeline: DiffusionPipeline, mask: Tensor, sample_shape: tuple[int, ...]) -> Tensor:
        """A mask in the size of the latents, each of whose values is the mean over what it stands for of the sample.

        Args:
            mask: `(H, W)` float32 in [0, 1], in the sample's size.
            sample_shape: As `encode_samples` takes a sample, without the batch dimension.

        Returns:
            See `region_shape`.
        """
        shape = self.region_shape(pipeline, sample_shape)
        return F.interpolate(mask[None, None], shape[-2:], mode="area").reshape(shape)

    def region_shape(self, pipeline: DiffusionPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `region_of`: the latents' height and width, and 1 for channels and frames."""
        *others, height, width = self.latent_shape(pipeline, sample_shape)
        return (*[1] * len(others), height, width)

    def loss_region(self, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Where the latents count for the error: `(B, 1, ...)` in [0, 1], with a positive number in each sample.

        Default: what `region_of` made of a mask that the denoiser does not see.

        Args:
            conditioning: As `predict` gets it.
        """
        return conditioning[LOSS_REGION]

    def encode_prompts_with_images(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], images: Sequence[Sequence[Image]]
    ) -> dict[str, Tensor]:
        """As `encode_prompts`, for a text encoder that sees the condition images.

        Args:
            images: Of each prompt, as they are stored.

        Returns:
            Named tensors `(len(prompts), ...)`, float32, padded to the longest.
        """
        raise NotImplementedError(f"{type(self).__name__} has prompts_see_images and does not encode them")


def numbered(conditioning: Mapping[str, Tensor], column: str) -> list[Tensor]:
    """The encodings of a column that may have several images, in their order; none where it has none."""
    count = sum(name.startswith(f"{column}/") for name in conditioning)
    return [conditioning[f"{column}/{number}"] for number in range(count)]
