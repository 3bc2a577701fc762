"""InstructPix2Pix: Stable Diffusion whose UNet gets the latents of the image to edit beside the noisy ones."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import ModelMixin, StableDiffusionInstructPix2PixPipeline
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from .autoencoders import encode_finite
from .stable_diffusion import StableDiffusionFamily


class InstructPix2PixFamily(StableDiffusionFamily):
    """`StableDiffusionInstructPix2PixPipeline`.

    Its sampler has two unconditional sides: the empty prompt with the image, and the empty prompt with zeros. Of the
    rows that training gives the empty prompt, each side gets half, as in diffusers' own training example.
    """

    pipeline_class = "StableDiffusionInstructPix2PixPipeline"
    guidance_layout = "positive_of_three"
    guided_pipelines = ()
    condition_images = ("image",)
    channel_conditions = 1
    condition_dropout = 0.5
    # Nothing was published for preference training.
    recommended = {}

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        config = denoiser.config
        return type(denoiser).__name__ == self.denoiser_class and config.in_channels == 2 * config.out_channels

    def encode_prompts(
        self, pipeline: StableDiffusionInstructPix2PixPipeline, prompts: Sequence[str]
    ) -> dict[str, Tensor]:
        # The pipeline has no public method for it.
        with torch.no_grad():
            prompt_embeds = pipeline._encode_prompt(
                list(prompts), self.text_device(pipeline), num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return {"prompt_embeds": prompt_embeds.float()}

    def encode_conditions(
        self,
        pipeline: StableDiffusionInstructPix2PixPipeline,
        images: Mapping[str, Tensor],
        sample_shape: tuple[int, ...],
    ) -> dict[str, Tensor]:
        """The posterior's mode, which the pipeline does not multiply by the VAE's scaling factor."""

        def moments(output: AutoencoderKLOutput) -> tuple[Tensor, Tensor]:
            return output.latent_dist.mode(), output.latent_dist.std

        return {name: encode_finite(pipeline.vae, pixels, moments)[0] for name, pixels in images.items()}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return super().predict(
            denoiser, torch.cat([x_t, conditioning["image"].to(x_t.dtype)], dim=1), timestep, conditioning
        )
