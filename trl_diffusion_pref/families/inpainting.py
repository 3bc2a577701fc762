"""What the families of inpainting pipelines share: an image, and a mask of the part that is generated.

The denoiser gets the mask and the latents of the image without that part, as channels beside the noisy latents.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image as PILImage
from torch import Tensor

from .base import Family


class InpaintingFamily(Family):
    """Base of the families whose pipelines take `image` and `mask_image`.

    Guidance keeps both on its unconditional side, so a dropped prompt keeps them in training.
    """

    condition_images = ("image", "mask_image")
    mask_column = "mask_image"
    # None of the base family's: they have no mask.
    guided_pipelines: tuple[str, ...] = ()
    # Nothing was published on the shapes of the images that inpainting models were trained on.
    aspect_ratio_buckets: bool = False
    # Nothing was published for preference training.
    recommended = {}

    @abstractmethod
    def mask_channels(self, pipeline: DiffusionPipeline) -> int:
        """Channels of the mask beside the latents."""

    @abstractmethod
    def mask_of_latents(self, pipeline: DiffusionPipeline, mask: Tensor) -> Tensor:
        """The mask in the size of the latents, `(B, mask_channels, h, w)`.

        Args:
            mask: `(B, 1, H, W)` float32, 1 where the image is generated, else 0.
        """

    def encode_conditions(
        self, pipeline: DiffusionPipeline, images: Mapping[str, Tensor], sample_shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """`image`, the latents of the image without its masked part, and `mask_image`, see `mask_of_latents`.

        The pipelines draw these latents from the VAE's posterior. Here they are its mean: they are encoded once and
        stored, and one draw, stored, would be no better an example of the draws than their mean.
        """
        mask = _binary(pipeline, images["mask_image"])
        # Mid-grey, 0, where the image is generated.
        masked = images["image"] * (mask < 0.5).to(images["image"])
        latents = self.encode_masked(pipeline, masked)
        return {"image": latents, "mask_image": self.mask_of_latents(pipeline, mask).to(latents)}

    def encode_masked(self, pipeline: DiffusionPipeline, pixels: Tensor) -> Tensor:
        """Latents of the image without its masked part, `(B, C, h, w)`. Default: as those of samples."""
        return self.encode_samples(pipeline, pixels)[0]

    def condition_shapes(
        self, pipeline: DiffusionPipeline, names: Sequence[str], sample_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        if not names:
            return {}
        channels, *sides = self.latent_shape(pipeline, sample_shape)
        return {"image": (channels, *sides), "mask_image": (self.mask_channels(pipeline), *sides)}

    def mask_problem(self, pipeline: DiffusionPipeline, mask: Tensor) -> str | None:
        if self.mask_of_latents(pipeline, _binary(pipeline, mask[None])).any():
            return None
        return (
            "the mask marks nothing, or nothing that remains in the training size, so there is no part of the image "
            "to generate; it must be white (from grey 128 on) where the image is generated, and black elsewhere"
        )

    def loss_region(self, conditioning: Mapping[str, Tensor]) -> Tensor:
        """Where the latents are generated and not kept, 1 there and 0 elsewhere."""
        return conditioning["mask_image"].amax(dim=1, keepdim=True)

    def latent_channels(self, pipeline: DiffusionPipeline) -> int:
        return self.denoiser_config(pipeline).out_channels // self.packing

    def input_channels(self, pipeline: DiffusionPipeline, latent_channels: int) -> int:
        return self.packing * (2 * latent_channels + self.mask_channels(pipeline))

    def _check_channels(self, pipeline: DiffusionPipeline) -> None:
        name, kind, latent = self.denoiser_name, type(pipeline).__name__, pipeline.vae.config.latent_channels
        if (found := self.denoiser_config(pipeline).in_channels) == self.packing * latent:
            raise ValueError(
                f"The {name} of this {kind} takes {found} channels, those of the noisy latents alone: it was made to "
                "generate from text, and sees neither image nor mask. The pipeline inpaints with it by putting the "
                "image back around the mask after every step. Train the checkpoint in the class of pipeline that "
                f"generates from text, and load the result in {kind}; or take an inpainting checkpoint, whose {name} "
                f"takes {self.input_channels(pipeline, latent)} channels."
            )
        super()._check_channels(pipeline)


def _binary(pipeline: DiffusionPipeline, mask: Tensor) -> Tensor:
    """`(B, 1, H, W)` of 0 and 1 as the pipeline makes it of `(B, 3, H, W)` in [-1, 1]: 1 from grey 128 on."""
    pixels = ((mask.cpu() + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    images = [PILImage.fromarray(np.ascontiguousarray(image)) for image in pixels]
    height, width = mask.shape[-2:]
    return pipeline.mask_processor.preprocess(images, height=height, width=width)
