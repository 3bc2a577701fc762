"""Wan (text to video): a UMT5 text encoder, a video DiT, a video autoencoder, rectified flow."""

from diffusers import ModelMixin, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor, nn

from .autoencoders import decode_with_channel_statistics, encode_with_channel_statistics
from .base import Recommended, call_default
from .kohya import KohyaNames, Rule
from .modalities import VideoFamily


class WanFamily(VideoFamily):
    """`WanPipeline` with one transformer (Wan 2.1)."""

    pipeline_class = "WanPipeline"
    denoiser_class = "WanTransformer3DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "separate"
    # diffusers has no LoRA example for Wan; these are the attention layers that its other examples train.
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    # With kohya's own prefix diffusers loads only files that have all layers of every block.
    kohya = KohyaNames(
        (
            Rule(r"(blocks\.\d+)\.attn1\.to_([qkv])", r"\1.self_attn.\2"),
            Rule(r"(blocks\.\d+)\.attn1\.to_out\.0", r"\1.self_attn.o"),
            Rule(r"(blocks\.\d+)\.attn2\.to_([qkv])", r"\1.cross_attn.\2"),
            Rule(r"(blocks\.\d+)\.attn2\.to_out\.0", r"\1.cross_attn.o"),
            Rule(r"(blocks\.\d+\.ffn)\.net\.0\.proj", r"\1.0"),
            Rule(r"(blocks\.\d+\.ffn)\.net\.2", r"\1.2"),
        ),
        prefix="diffusion_model.",
    )
    flow = True
    recommended = {
        "Diffusion-DPO": Recommended(
            {"beta": 500.0, "learning_rate": 5e-6},
            "Flow-DPO's paper (arXiv 2501.13918, Table 10), for a video model: LoRA of rank 64, 64 pairs a step",
        ),
    }

    def denoiser(self, pipeline: WanPipeline) -> ModelMixin:
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
                "with one time per video can be trained."
            )
        return pipeline.transformer

    def video_size(self, pipeline: WanPipeline) -> tuple[int, int, int]:
        frames, height, width = (call_default(pipeline, name) for name in ("num_frames", "height", "width"))
        return frames, height, width

    def conditioning_shapes(self, pipeline: WanPipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).text_dim
        return {"prompt_embeds": (call_default(pipeline, "max_sequence_length"), width)}

    def tokenized_text(self, pipeline: WanPipeline, prompt: str) -> str:
        return prompt_clean(prompt)

    def encode_samples(self, pipeline: WanPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_frames(pipeline, pixels)
        return encode_with_channel_statistics(pipeline.vae, pixels)

    def decode_samples(self, pipeline: WanPipeline, latents: Tensor) -> Tensor:
        return decode_with_channel_statistics(pipeline.vae, latents).clamp(-1, 1)

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        return denoiser(
            hidden_states=x_t,
            timestep=timestep,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            return_dict=False,
        )[0]
