"""What families of videos and of audio share."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .base import Family, Modality, call_default


class VideoFamily(Family):
    """For pipelines that generate videos: `encode_samples` takes `(B, 3, F, H, W)` and gives `(B, C, f, h, w)`."""

    modality: Modality = "video"

    @abstractmethod
    def video_size(self, pipeline: DiffusionPipeline) -> tuple[int, int, int]:
        """Frames, height and width in pixels of the videos that the pipeline generates by default."""

    def frames_per_latent(self, pipeline: DiffusionPipeline) -> int:
        """Of all latent frames but the first. Default: the pipeline's `vae_scale_factor_temporal`."""
        return pipeline.vae_scale_factor_temporal

    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """The shorter side of a video in pixels."""
        return min(self.video_size(pipeline)[1:])

    def latent_shape(self, pipeline: DiffusionPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        channels, _, *sides = super().latent_shape(pipeline, sample_shape)
        # The first frame has a latent frame of its own.
        return channels, (sample_shape[1] - 1) // self.frames_per_latent(pipeline) + 1, *sides

    def scaled_size(self, pipeline: DiffusionPipeline, shorter: int) -> tuple[int, int]:
        """Height and width of videos with another shorter side, in the shape of those that the pipeline generates.

        The longer side is rounded to whole patches of the denoiser.

        Raises:
            ValueError: The shorter side is not a whole number of patches.
        """
        self.check_side(pipeline, shorter)
        step = self.size_step(pipeline)
        _, *size = self.video_size(pipeline)
        height, width = (max(round(side * shorter / min(size) / step), 1) * step for side in size)
        return height, width

    def encode_prompts(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> dict[str, Tensor]:
        with torch.no_grad():
            prompt_embeds, _ = pipeline.encode_prompt(
                list(prompts),
                do_classifier_free_guidance=False,
                max_sequence_length=call_default(pipeline, "max_sequence_length"),
                device=self.text_device(pipeline),
            )
        return {"prompt_embeds": prompt_embeds.float()}

    def token_limits(self, pipeline: DiffusionPipeline) -> dict[str, int]:
        return {"tokenizer": call_default(pipeline, "max_sequence_length")}

    def check_frames(self, pipeline: DiffusionPipeline, pixels: Tensor) -> None:
        """Raises where the VAE would cut a video short, or take something else for a video.

        Raises:
            ValueError: Not videos, or a number of frames that is no multiple of the VAE's temporal factor, plus one.
        """
        if pixels.ndim != 5:
            raise ValueError(
                f"{type(pipeline).__name__} generates videos, but got pixels of shape {tuple(pixels.shape)}. Pass "
                "(batch, 3, frames, height, width); for images take a pipeline that generates images."
            )
        factor, frames = self.frames_per_latent(pipeline), pixels.shape[2]
        if frames % factor != 1 and factor > 1:
            below = max((frames - 1) // factor * factor, 0) + 1
            raise ValueError(
                f"A video has {frames} frames, but the {type(pipeline.vae).__name__} takes a multiple of {factor} "
                f"plus one. Cut it to {below} frames, or pass {below + factor}."
            )


class AudioFamily(Family):
    """For pipelines that generate audio: `encode_samples` takes waveforms `(B, channels, samples)`.

    Its latents have the layout of the VAE, and `latent_shape` must be overridden.
    """

    modality: Modality = "audio"

    @abstractmethod
    def sampling_rate(self, pipeline: DiffusionPipeline) -> int:
        """Samples per second."""

    @abstractmethod
    def audio_size(self, pipeline: DiffusionPipeline) -> tuple[int, int]:
        """Channels and samples of the waveforms that the denoiser was made for."""

    def normalize(self, samples: Tensor) -> Tensor:
        """A waveform at the loudness that the model was trained on. Default: unchanged.

        Args:
            samples: `(channels, samples)` float32 at the model's rate, before it is padded with silence.
        """
        return samples

    @abstractmethod
    def latent_shape(self, pipeline: DiffusionPipeline, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        """See `Family.latent_shape`."""

    def audio_conditioning(self, pipeline: DiffusionPipeline, seconds: float) -> dict[str, Tensor]:
        """Conditioning on how one waveform was prepared; empty for families without it.

        Args:
            seconds: Its length before it is padded with silence up to `audio_size`.

        Returns:
            Named float32 tensors without batch dimension; stacked, `predict` reads them from its `conditioning`.
        """
        return {}

    def _any_sample_conditioning(self, pipeline: DiffusionPipeline) -> dict[str, Tensor]:
        return self.audio_conditioning(pipeline, 1.0)

    def resolution(self, pipeline: DiffusionPipeline) -> int:
        """Audio has none.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"{type(pipeline).__name__} generates audio, which has no resolution in pixels.")

    def check_waveforms(self, pipeline: DiffusionPipeline, waveforms: Tensor) -> None:
        """Raises for waveforms of another size.

        Raises:
            ValueError: Not `(B, channels, samples)` of `audio_size`.
        """
        channels, samples = self.audio_size(pipeline)
        if waveforms.ndim != 3 or waveforms.shape[1:] != (channels, samples):
            raise ValueError(
                f"{type(pipeline).__name__} takes waveforms (batch, {channels}, {samples}), "
                f"{samples / self.sampling_rate(pipeline):g} s at {self.sampling_rate(pipeline)} Hz, but got "
                f"{tuple(waveforms.shape)}. Resample, repeat or mix the channels, and cut or pad with silence."
            )
