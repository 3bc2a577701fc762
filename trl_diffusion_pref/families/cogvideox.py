"""CogVideoX (text to video): a T5 text encoder, a video DiT with v prediction, a video autoencoder."""

from types import SimpleNamespace

from diffusers import CogVideoXPipeline
from torch import Tensor, nn

from .base import VideoFamily, encode_with_autoencoder_kl, model_inside


# What CogVideoX 1.5's config has for the size of its latents is the extent of its table of positions; the size that it
# was made for, height and width in pixels, is in its model card alone.
_TABLE_OF_POSITIONS = (300, 300)
_SIZE_OF_1_5 = (768, 1360)


class CogVideoXFamily(VideoFamily):
    """`CogVideoXPipeline`, 1.0 and 1.5."""

    pipeline_class = "CogVideoXPipeline"
    denoiser_name = "transformer"
    encoder_names = ("vae", "text_encoder")
    # examples/cogvideo/train_cogvideox_lora.py
    lora_target_modules = ("to_k", "to_q", "to_v", "to_out.0")

    def video_size(self, pipeline: CogVideoXPipeline) -> tuple[int, int, int]:
        """For CogVideoX 1.5 with the frames that the pipeline adds to fill the last patch, at 768x1360."""
        config, factor = pipeline.transformer.config, pipeline.vae_scale_factor_spatial
        frames = config.sample_frames
        latent_frames = (frames - 1) // pipeline.vae_scale_factor_temporal + 1
        frames += -latent_frames % (config.patch_size_t or 1) * pipeline.vae_scale_factor_temporal
        size = (config.sample_height, config.sample_width)
        if size == _TABLE_OF_POSITIONS:
            return frames, *_SIZE_OF_1_5
        return frames, size[0] * factor, size[1] * factor

    def encode_images(self, pipeline: CogVideoXPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
        self.check_clips(pipeline, pixels)
        mean, std = encode_with_autoencoder_kl(pipeline.vae, pixels)
        patch = pipeline.transformer.config.patch_size_t or 1
        if mean.shape[2] % patch:
            # When sampling, the pipeline generates frames that it throws away; here nothing could stand for them.
            raise ValueError(
                f"A clip of {pixels.shape[2]} frames has {mean.shape[2]} latent frames, but this transformer takes "
                f"multiples of {patch}. Cut it to {pixels.shape[2] - pipeline.vae_scale_factor_temporal} frames, or "
                f"bring {pixels.shape[2] + pipeline.vae_scale_factor_temporal}."
            )
        return mean, std

    def predict(self, denoiser: nn.Module, x_t: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        frames, height, width = x_t.shape[2:]
        model = model_inside(denoiser)
        rotary = None
        if model.config.use_rotary_positional_embeddings:
            # The pipeline's method, of which it only asks these two; sizes in latents, so the factor to pixels is 1.
            sizes = SimpleNamespace(transformer=model, vae_scale_factor_spatial=1)
            rotary = CogVideoXPipeline._prepare_rotary_positional_embeddings(
                sizes, height=height, width=width, num_frames=frames, device=x_t.device
            )
        prediction = denoiser(
            # The transformer wants frames before channels.
            hidden_states=x_t.transpose(1, 2),
            encoder_hidden_states=conditioning["prompt_embeds"].to(x_t.dtype),
            timestep=timestep,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]
        return prediction.transpose(1, 2)
