"""From a row's cells to the tensors that the VAE takes: one way for images, one for clips, one for sound."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from datasets import Audio, Image, List, Video
from diffusers import DiffusionPipeline
from PIL import Image as PILImage
from torch import Tensor

from ..families import AudioFamily, Family, VideoFamily
from .cells import check_kind, undecoded_feature
from .clips import decode_clip
from .images import ImageProblem, crop_top_left, decode_image, prepare_image
from .resolution import Resolution
from .waveforms import Waveform, decode_waveform, fit, mix, resample


class Preparation(ABC):
    """How the samples of one pipeline are made of cells.

    Args:
        resolution: Pixels of a square image, or of a clip's shorter side; or (height, width); None for what the
            pipeline generates.
        num_frames: Of a clip; None for what the pipeline generates.

    Attributes:
        shape: Of one prepared sample, as `Family.encode_images` takes it without the batch.
        key: What the prepared samples depend on besides that, for the cache.
        noun: What one sample is called in messages.

    Raises:
        ValueError: An option that this kind of sample does not have, or a size that the model cannot take.
    """

    shape: tuple[int, ...]
    key: tuple = ()
    noun: str

    def __init__(self, pipeline: DiffusionPipeline, family: Family) -> None:
        self.pipeline, self.family = pipeline, family
        self.pipeline_class = type(pipeline).__name__

    def feature(self, feature: Any) -> Any:
        """The type of a column in which its cells reach `decode` as bytes, paths or lists of them."""
        return undecoded_feature(feature)

    @abstractmethod
    def decode(self, cell: Any) -> Any:
        """What a cell holds; raises `CellProblem` where that cannot be used."""

    @abstractmethod
    def tensor(self, decoded: Any, crop_at: tuple[float, float], flip: bool) -> Tensor:
        """A sample of `shape`, float32; pixels and waveforms are in [-1, 1]."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two decoded cells that were prepared to equal tensors would be at any crop. Default: yes."""
        return True

    def conditioning(self, decoded: Any, crop_at: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        """`Family.image_conditioning`, or of sound `AudioFamily.sound_conditioning`, of a decoded cell."""
        return {}

    def uncropped_conditioning(self) -> dict[str, Tensor]:
        """The same of a sample that was neither resized, nor cropped, nor filled up."""
        return {}

    def notes(self, decoded: Any) -> dict[str, str]:
        """What was changed about a cell that is worth saying once: by what it is, the words for it."""
        return {}


class ImagePreparation(Preparation):
    """Images, square unless told otherwise."""

    noun = "image"

    def __init__(
        self, pipeline: DiffusionPipeline, family: Family, resolution: Resolution, num_frames: int | None
    ) -> None:
        super().__init__(pipeline, family)
        _refuse_frames(num_frames, self.pipeline_class, "images")
        resolution = resolution or family.resolution(pipeline)
        sides = (resolution, resolution) if isinstance(resolution, int) else resolution
        for side in sides:
            family.check_side(pipeline, side)
        self.shape = (3, *sides)

    def feature(self, feature: Any) -> Any:
        # Clips and sound are refused by row, so they are left what they are.
        other = isinstance(feature, (Audio, Video, List)) or (isinstance(feature, dict) and "array" in feature)
        return undecoded_feature(feature) if other else Image(decode=False)

    def decode(self, cell: Any) -> PILImage.Image:
        try:
            return decode_image(cell)
        except ImageProblem:
            # Only now, since it reads the file once more.
            check_kind(cell, "image", self.pipeline_class)
            raise

    def same(self, one: PILImage.Image, other: PILImage.Image) -> bool:
        return one.size == other.size and one.tobytes() == other.tobytes()

    def tensor(self, decoded: PILImage.Image, crop_at: tuple[float, float], flip: bool) -> Tensor:
        return prepare_image(decoded, self.shape[1:], crop_at, flip)

    def conditioning(self, decoded: PILImage.Image, crop_at: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        return self.family.image_conditioning(
            self.pipeline,
            (decoded.height, decoded.width),
            crop_top_left(decoded.size, self.shape[1:], crop_at, flip),
            self.shape[1:],
        )

    def uncropped_conditioning(self) -> dict[str, Tensor]:
        return self.family.image_conditioning(self.pipeline, self.shape[1:], (0, 0), self.shape[1:])


class ClipPreparation(Preparation):
    """Clips of one number of frames, every frame of both clips scaled and cropped alike."""

    noun = "clip"

    def __init__(
        self, pipeline: DiffusionPipeline, family: VideoFamily, resolution: Resolution, num_frames: int | None
    ) -> None:
        super().__init__(pipeline, family)
        frames, height, width = family.video_size(pipeline)
        if isinstance(resolution, int):
            height, width = family.scaled_size(pipeline, resolution)
        elif resolution is not None:
            height, width = resolution
            for side in resolution:
                family.check_side(pipeline, side)
        self.num_frames = num_frames or frames
        self.shape = (3, self.num_frames, height, width)

    def decode(self, cell: Any) -> list[PILImage.Image]:
        return decode_clip(cell, self.num_frames, self.pipeline_class)

    def same(self, one: list[PILImage.Image], other: list[PILImage.Image]) -> bool:
        return all(a.size == b.size and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))

    def tensor(self, decoded: list[PILImage.Image], crop_at: tuple[float, float], flip: bool) -> Tensor:
        return torch.stack([prepare_image(frame, self.shape[2:], crop_at, flip) for frame in decoded], dim=1)


class WaveformPreparation(Preparation):
    """Sound of the rate, channels and length that the denoiser was made for."""

    noun = "sound"

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        family: AudioFamily,
        resolution: Resolution,
        num_frames: int | None,
        cropped_or_mirrored: bool,
    ) -> None:
        super().__init__(pipeline, family)
        _refuse_frames(num_frames, self.pipeline_class, "sound")
        if resolution is not None or cropped_or_mirrored:
            raise ValueError(
                f"resolution, crop='random' and random_flip are for what is seen, and {self.pipeline_class} generates "
                "sound. Leave them out."
            )
        self.shape = family.audio_size(pipeline)
        self.rate = family.sampling_rate(pipeline)
        self.key = (self.rate,)

    def decode(self, cell: Any) -> Waveform:
        waveform = decode_waveform(cell, self.pipeline_class)
        # Here, since it can be refused.
        return Waveform(mix(waveform.samples, self.shape[0]), waveform.rate, waveform.samples.shape[0])

    def tensor(self, decoded: Waveform, crop_at: tuple[float, float], flip: bool) -> Tensor:
        # What is cut off in the end need not be resampled, but for a second beyond the end, which the end depends on.
        needed = math.ceil(self.shape[1] * decoded.rate / self.rate) + decoded.rate
        samples = resample(decoded.samples[:, :needed], decoded.rate, self.rate)[:, : self.shape[1]]
        return fit(self.family.normalize(samples), self.shape[1])

    def conditioning(self, decoded: Waveform, crop_at: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        seconds = min(decoded.samples.shape[1] / decoded.rate, self.shape[1] / self.rate)
        return self.family.sound_conditioning(self.pipeline, seconds)

    def uncropped_conditioning(self) -> dict[str, Tensor]:
        return self.family.sound_conditioning(self.pipeline, self.shape[1] / self.rate)

    def notes(self, decoded: Waveform) -> dict[str, str]:
        notes, (channels, length) = {}, self.shape
        if decoded.rate != self.rate:
            notes["rate"] = f"sound of {decoded.rate} Hz is resampled to {self.rate} Hz"
        if decoded.channels_before != channels:
            notes["channels"] = f"sound of {decoded.channels_before} channels is mixed to {channels}"
        if not torch.equal(self.family.normalize(decoded.samples), decoded.samples):
            notes["loudness"] = f"sound is brought to the loudness that {self.pipeline_class}'s model was trained on"
        found, wanted = decoded.samples.shape[1] / decoded.rate, length / self.rate
        # To the sample, since rates need not divide.
        if abs(found - wanted) * self.rate >= 1:
            what = "is cut to" if found > wanted else "is followed by silence up to"
            notes[what] = f"sound of {found:g} s {what} {wanted:g} s"
        return notes


def _refuse_frames(num_frames: int | None, pipeline_class: str, generated: str) -> None:
    if num_frames is not None:
        raise ValueError(
            f"num_frames={num_frames} is for clips, and {pipeline_class} generates {generated}. Leave it out."
        )


def preparation_for(
    pipeline: DiffusionPipeline,
    family: Family,
    resolution: Resolution = None,
    num_frames: int | None = None,
    *,
    cropped_or_mirrored: bool = False,
) -> Preparation:
    """The preparation of what a pipeline generates; see `Preparation`.

    Args:
        cropped_or_mirrored: Whether random crops or flips are asked for.

    Raises:
        ValueError: An option that samples of this kind do not have, or a size that the model cannot take.
    """
    if family.modality == "audio":
        return WaveformPreparation(pipeline, family, resolution, num_frames, cropped_or_mirrored)
    kinds = {"image": ImagePreparation, "video": ClipPreparation}
    return kinds[family.modality](pipeline, family, resolution, num_frames)
