"""CogVideoX (text to video): a T5 text encoder, a video DiT with v prediction, a video autoencoder."""

from types import SimpleNamespace
from typing import Any

from diffusers import CogVideoXPipeline, ModelMixin
from torch import Tensor, nn

from .base import call_default, model_inside
from .modalities import VideoFamily


# In CogVideoX 1.5's config the size of the latents is the extent of its table of positions. Only its model card has
# the size that it was made for, height and width in pixels.
_TABLE_OF_POSITIONS = (300, 300)
_SIZE_OF_1_5 = (768, 1360)


class CogVideoXFamily(VideoFamily):
    """`CogVideoXPipeline`, 1.0 and 1.5.

    An odd number of latent frames decodes to what was encoded; an even one (1.5) to four each, as sampling does.
    """

    pipeline_class = "CogVideoXPipeline"
    denoiser_class = "CogVideoXTransformer3DModel"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    guidance_layout = "batched"
    shared_arguments = ("image_rotary_emb",)
    # examples/cogvideo/train_cogvideox_lora.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def takes_denoiser(self, denoiser: ModelMixin) -> bool:
        return super().takes_denoiser(denoiser) and denoiser.config.in_channels == denoiser.config.out_channels

    def video_size(self, pipeline: CogVideoXPipeline) -> tuple[int, int, int]:
        """CogVideoX 1.5: 768x1360, with the frames that the pipeline adds to fill the last patch."""
        config, factor = self.denoiser_config(pipeline), pipeline.vae_scale_factor_spatial
        frames = self.default_frames(pipeline)
        latent_frames = (frames - 1) // pipeline.vae_scale_factor_temporal + 1
        frames += -latent_frames % (config.patch_size_t or 1) * pipeline.vae_scale_factor_temporal
        size = (config.sample_height, config.sample_width)
        if size == _TABLE_OF_POSITIONS:
            return frames, *_SIZE_OF_1_5
        return frames, size[0] * factor, size[1] * factor

    def default_frames(self, pipeline: CogVideoXPipeline) -> int:
        """Frames that the pipeline generates by default, before it fills the last patch."""
        return self.denoiser_config(pipeline).sample_frames

    def conditioning_shapes(self, pipeline: CogVideoXPipeline) -> dict[str, tuple[int, ...]]:
        width = self.denoiser_config(pipeline).text_embed_dim
        return {"prompt_embeds": (call_default(pipeline, "max_sequence_length"), width)}

    def encode_samples(self, pipeline: CogVideoXPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_frames(pipeline, pixels)
        mean, std = super().encode_samples(pipeline, pixels)
        patch = self.denoiser_config(pipeline).patch_size_t or 1
        if mean.shape[2] % patch:
            # When sampling, the pipeline generates more frames and drops them; in training nothing could replace them.
            raise ValueError(
                f"A video of {pixels.shape[2]} frames has {mean.shape[2]} latent frames, but this transformer takes "
                f"multiples of {patch}. Cut it to {pixels.shape[2] - pipeline.vae_scale_factor_temporal} frames, or "
                f"pass {pixels.shape[2] + pipeline.vae_scale_factor_temporal}."
            )
        return mean, std

    def inputs(self, denoiser: nn.Module, x_t: Tensor, conditioning: dict[str, Tensor]) -> dict[str, Any]:
        """The transformer's arguments that are about the video: `hidden_states` `(B, C, f, h, w)`."""
        return {"hidden_states": x_t}

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        frames, height, width = x_t.shape[2:]
        model = model_inside(denoiser)
        rotary = None
        if model.config.use_rotary_positional_embeddings:
            # The pipeline's method reads only these two of its attributes. Sizes are in latents, so the factor is 1.
            sizes = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
            rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                sizes, height=height, width=width, num_frames=frames, device=x_t.device
            )
        inputs = self.inputs(denoiser, x_t, conditioning)
        # The transformer takes frames before channels.
        inputs["hidden_states"] = inputs["hidden_states"].transpose(1, 2)
        prediction = denoiser(
            **inputs,
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)
