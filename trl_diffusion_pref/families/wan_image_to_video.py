"""Wan (image to video): the first frame's latents and a mask beside the noisy ones, and CLIP's view of the image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import ModelMixin, WanImageToVideoPipeline
from diffusers.utils import is_ftfy_available
from PIL import Image as PILImage
from torch import Tensor, nn

from .autoencoders import channel_statistics, encode_finite
from .wan import WanFamily


class WanImageToVideoFamily(WanFamily):
    """`WanImageToVideoPipeline`: Wan 2.1, and Wan 2.2 A14B with its two transformers.

    Its call takes one prompt at a time. Both sides of its guidance see the image.
    """

    pipeline_class = "WanImageToVideoPipeline"
    optional_encoder_names = ("image_encoder",)
    encoder_names = ("vae", "text_encoder", "image_encoder")
    condition_images = ("image",)
    one_prompt_per_call = True

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        config = denoiser.config
        return type(denoiser).__name__ == self.denoiser_class and config.in_channels == 2 * config.out_channels + 4

    def check_complete(self, pipeline: WanImageToVideoPipeline) -> None:
        """See `Family.check_complete`.

        Raises:
            ValueError: Also for Wan 2.2 5B.
        """
        if pipeline.config.expand_timesteps:
            raise ValueError(
                "This WanImageToVideoPipeline takes the first frame from the image and gives its tokens the time 0 "
                "(expand_timesteps, Wan 2.2 5B), so that the loss would have to leave it out, which it cannot yet. "
                "Train Wan 2.1, Wan 2.2 A14B, or the 5B model from text alone in WanPipeline."
            )
        if self._sees_images(pipeline) and pipeline.image_encoder is None:
            raise ValueError(
                "This WanImageToVideoPipeline was loaded without its image_encoder, and its transformer reads what "
                "that makes of the image (image_dim in the transformer's config). Load it whole."
            )
        if not is_ftfy_available():
            raise ValueError(
                "diffusers' WanImageToVideoPipeline cleans prompts with the package ftfy, which is not installed: pip "
                "install ftfy."
            )
        super().check_complete(pipeline)

    def _sees_images(self, pipeline: WanImageToVideoPipeline) -> bool:
        return self.denoiser_config(pipeline).image_dim is not None

    def latent_channels(self, pipeline: WanImageToVideoPipeline) -> int:
        return self.denoiser_config(pipeline).out_channels

    def input_channels(self, pipeline: WanImageToVideoPipeline, latent_channels: int) -> int:
        # Noisy latents; for each frame that a latent frame stands for, whether it is given; and what is given.
        return 2 * latent_channels + pipeline.vae_scale_factor_temporal

    def encode_conditions(
        self, pipeline: WanImageToVideoPipeline, images: Mapping[str, Tensor], sample_shape: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """`image` `(B, 4 + C, f, h, w)`: the mask and the latents of the image with black frames after it.

        And `image_embeds` `(B, N, D)` where the transformer reads CLIP's states of the image.
        """
        pixels = images["image"]
        video = nn.functional.pad(pixels.unsqueeze(2), (0, 0, 0, 0, 0, sample_shape[1] - 1))
        mode, std = encode_finite(
            pipeline.vae, video, lambda output: (output.latent_dist.mode(), output.latent_dist.std)
        )
        shift, scale = channel_statistics(pipeline.vae, mode)
        latents = (mode - shift) / scale
        given = torch.zeros(len(mode), pipeline.vae_scale_factor_temporal, *mode.shape[2:], device=mode.device)
        given[:, :, 0] = 1
        conditions = {"image": torch.cat([given, latents], dim=1)}
        if self._sees_images(pipeline):
            conditions["image_embeds"] = self._seen(pipeline, pixels)
        return conditions

    def _seen(self, pipeline: WanImageToVideoPipeline, pixels: Tensor) -> Tensor:
        shown = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
        with torch.no_grad():
            return pipeline.encode_image(
                [PILImage.fromarray(image) for image in shown], pipeline.image_encoder.device
            ).float()

    def condition_shapes(
        self, pipeline: WanImageToVideoPipeline, names: Sequence[str], sample_shape: tuple[int, ...]
    ) -> dict[str, tuple[int, ...]]:
        if not names:
            return {}
        channels, *sizes = self.latent_shape(pipeline, sample_shape)
        shapes: dict[str, tuple[int, ...]] = {"image": (channels + pipeline.vae_scale_factor_temporal, *sizes)}
        if self._sees_images(pipeline):
            config = self.denoiser_config(pipeline)
            # The published encoder is CLIP's ViT-H/14 at 224 pixels: 16x16 patches and the class.
            vision = getattr(pipeline.image_encoder, "config", None)
            tokens = (vision.image_size // vision.patch_size) ** 2 + 1 if vision is not None else 257
            shapes["image_embeds"] = (tokens, config.image_dim)
        return shapes

    def inputs(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        embeds = conditioning.get("image_embeds")
        return {
            "hidden_states": torch.cat([x_t, conditioning["image"].to(x_t.dtype)], dim=1),
            "encoder_hidden_states_image": None if embeds is None else embeds.to(x_t.dtype),
        }
