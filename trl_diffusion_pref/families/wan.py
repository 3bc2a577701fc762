"""Wan (text to video): a UMT5 text encoder, a video DiT, a video autoencoder, rectified flow."""

from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from .base import VideoFamily, call_default, encode_with_channel_statistics


class WanFamily(VideoFamily):
    """`WanPipeline` with one transformer (Wan 2.1)."""

    pipeline_class = "WanPipeline"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    # diffusers has no LoRA example for Wan; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def denoiser(self, pipeline: WanPipeline) -> nn.Module:
        """The transformer.

        Raises:
            ValueError: The pipeline has two, or gives each token a time of its own (Wan 2.2).
        """
        if pipeline.transformer is None or pipeline.transformer_2 is not None:
            raise ValueError(
                "This WanPipeline has two transformers, one per range of noise (Wan 2.2). Only pipelines with one, "
                "`transformer`, can be trained."
            )
        if pipeline.config.expand_timesteps:
            raise ValueError(
                "This WanPipeline gives each token a time of its own (expand_timesteps, Wan 2.2 5B). Only pipelines "
                "with one time per clip can be trained."
            )
        return pipeline.transformer

    def video_size(self, pipeline: WanPipeline) -> tuple[int, int, int]:
        return tuple(call_default(pipeline, name) for name in ("num_frames", "height", "width"))

    def tokenized_text(self, pipeline: WanPipeline, prompt: str) -> str:
        return prompt_clean(prompt)

    def encode_images(self, pipeline: WanPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_clips(pipeline, pixels)
        return encode_with_channel_statistics(pipeline.vae, pixels)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]
