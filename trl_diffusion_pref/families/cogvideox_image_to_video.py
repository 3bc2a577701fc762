"""CogVideoX (image to video): the latents of the first frame stand beside the noisy ones on the channel axis."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import CogVideoXImageToVideoPipeline, ModelMixin
from torch import Tensor, nn

from .autoencoders import encode_finite
from .base import call_default, model_inside
from .cogvideox import CogVideoXFamily


# The pipeline's call has this number for every sample.
_OFS = 2.0


class CogVideoXImageToVideoFamily(CogVideoXFamily):
    """`CogVideoXImageToVideoPipeline`, 1.0 and 1.5."""

    pipeline_class = "CogVideoXImageToVideoPipeline"
    condition_images = ("image",)
    channel_conditions = 1

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        config = denoiser.config
        return type(denoiser).__name__ == self.denoiser_class and config.in_channels == 2 * config.out_channels

    def default_frames(self, pipeline: CogVideoXImageToVideoPipeline) -> int:
        return call_default(pipeline, "num_frames")

    def encode_conditions(
        self, pipeline: CogVideoXImageToVideoPipeline, images: Mapping[str, Tensor], sample_shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """`(B, C, f, h, w)`: the image as a video of one frame, and zeros for the frames after it.

        The pipeline samples the VAE's posterior; here it is the mean, since a row is encoded once.
        """
        image = images["image"].unsqueeze(2)
        mean, _ = encode_finite(pipeline.vae, image, lambda output: (output.latent_dist.mean, output.latent_dist.std))
        scale = pipeline.vae_scaling_factor_image
        # The published 1.5 was trained on images that were divided by the factor.
        mean = mean / scale if pipeline.vae.config.invert_scale_latents else mean * scale
        missing = self.latent_shape(pipeline, sample_shape)[1] - mean.shape[2]
        return {"image": nn.functional.pad(mean, (0, 0, 0, 0, 0, missing))}

    def condition_shapes(
        self, pipeline: CogVideoXImageToVideoPipeline, names: Sequence[str], sample_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(names, self.latent_shape(pipeline, sample_shape))

    def inputs(self, denoiser: nn.Module, x_t: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        ofs = None if model_inside(denoiser).config.ofs_embed_dim is None else x_t.new_full((1,), _OFS)
        return {"hidden_states": torch.cat([x_t, conditioning["image"].to(x_t.dtype)], dim=1), "ofs": ofs}
