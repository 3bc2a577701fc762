"""From a row's cells to the tensors that the VAE encodes: one class each for images, videos and audio."""

import math
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image as PILImage
from torch import Tensor

from ..families import AudioFamily, Family, VideoFamily
from .decode.audio import Waveform, decode_audio, fit, mix, resample
from .decode.cell import GENERATED, CellProblem, Kind, kind_of, read_cell, undecoded_feature
from .decode.image import crop_top_left, cropped_share, decode_image, prepare_image, stretch_image
from .decode.video import decode_video
from .resolution import Resolution


Decoded = TypeVar("Decoded")

# More than this is cut from a 4:3 image on its way to a square.
_NOTEWORTHY_CROP = 0.25


class Preparation(ABC, Generic[Decoded]):
    """How the samples of one pipeline are made of cells.

    Attributes:
        shape: Shape of one prepared sample, as `Family.encode_samples` takes it, without the batch dimension.
        key: What the prepared samples depend on besides `shape`, for the cache's key.
        noun: "image", "video" or "audio": what messages call one sample.
    """

    shape: tuple[int, ...]
    key: tuple[int, ...] = ()
    noun: Kind
    # Kinds that `_decode` explains itself if it cannot use the cell.
    _kinds: tuple[Kind, ...]

    def __init__(self, pipeline: DiffusionPipeline, family: Family) -> None:
        self.pipeline, self.family = pipeline, family
        self.pipeline_class = type(pipeline).__name__

    def at(self, size: tuple[int, int]) -> "Preparation":
        """The same for samples of another height and width in pixels."""
        raise NotImplementedError(f"{self.noun}s of several sizes are not supported")

    def feature(self, feature: Any) -> Any:
        """The type of a column in which its cells reach `decode` undecoded, so that errors can name the row."""
        return undecoded_feature(feature)

    def decode(self, cell: object) -> Decoded:
        """Decodes a cell.

        Raises:
            CellProblem: It cannot be used.
        """
        cell = read_cell(cell)
        try:
            return self._decode(cell)
        except CellProblem:
            found = kind_of(cell)
            if found is None or found in self._kinds:
                raise
            article = {"image": "an image", "video": "a video", "audio": "audio"}[found]
            message = f"found {article}, but {self.pipeline_class} generates {GENERATED[self.noun]}"
            raise CellProblem(message, "wrong type") from None

    def decode_condition(self, cell: object) -> PILImage.Image:
        """Decodes a cell with a condition image, which is an image also where samples are videos.

        Raises:
            CellProblem: It cannot be used.
        """
        cell = read_cell(cell)
        if (found := kind_of(cell)) not in (None, "image"):
            raise CellProblem(f"found a {found}, but {self.pipeline_class} is conditioned on images", "wrong type")
        image = decode_image(cell)
        try:
            self.family.check_condition(self.pipeline, image)
        except ValueError as error:
            raise CellProblem(f"the {self.pipeline_class} refuses it: {error}", "wrong format") from error
        return image

    def condition_tensor(self, image: PILImage.Image, count: int, crop_at: tuple[float, float], flip: bool) -> Tensor:
        """A condition image as the pipeline prepares it, `(3, H, W)` float32 in [-1, 1].

        Args:
            count: How many condition images the row has.
        """
        if not self.family.own_condition_sizes:
            return prepare_image(image, (self.shape[-2], self.shape[-1]), crop_at, flip)
        size = self.family.condition_size(self.pipeline, (image.height, image.width), count)
        return stretch_image(self.family.cut_condition(self.pipeline, image, size), size, flip)

    def region(self, mask: PILImage.Image, crop_at: tuple[float, float], flip: bool) -> Tensor:
        """What a mask of a sample marks, cropped and flipped as that is, in the latents' size; see `Family.region_of`.

        Raises:
            CellProblem: It marks nothing.
        """
        # Other ways of scaling make grey of black where white is near.
        box = PILImage.Resampling.BOX
        pixels = prepare_image(mask, (self.shape[-2], self.shape[-1]), crop_at, flip, box)
        region = self.family.region_of(self.pipeline, (pixels.mean(dim=0) + 1) / 2, self.shape)
        if not region.any():
            raise CellProblem(
                "the mask marks nothing, or nothing that remains in the training size, so there is no error to take; "
                "it must be white where errors count, and black elsewhere",
                "empty mask",
            )
        return region

    @abstractmethod
    def _decode(self, cell: object) -> Decoded:
        """Decodes a cell whose file has been read; raises `CellProblem` if it cannot be used."""

    @abstractmethod
    def tensor(self, decoded: Decoded, crop_at: tuple[float, float], flip: bool) -> Tensor:
        """A sample of `shape`, float32; pixels and waveforms are in [-1, 1]."""

    def same(self, one: Decoded, other: Decoded) -> bool:
        """Whether two decoded cells that were prepared to equal tensors would be at any crop. Default: yes."""
        return True

    def conditioning(self, decoded: Decoded, crop_at: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        """`Family.image_conditioning`, or `AudioFamily.audio_conditioning`, of a decoded cell."""
        return {}

    def uncropped_conditioning(self) -> dict[str, Tensor]:
        """The conditioning of a sample that was neither resized, nor cropped, nor padded."""
        return {}

    def notes(self, decoded: Decoded) -> dict[str, str]:
        """Changes to a cell that the user should know of: a kind, of which one is enough, and the message."""
        return {}

    def condition_notes(self, image: PILImage.Image) -> dict[str, str]:
        """The same of a condition image that is brought to the sample's size."""
        return _crop_notes("an image", image.size, (self.shape[-2], self.shape[-1]))


class ImagePreparation(Preparation[PILImage.Image]):
    """Images of one size."""

    noun = "image"
    _kinds = ("image",)

    def __init__(self, pipeline: DiffusionPipeline, family: Family, resolution: Resolution) -> None:
        super().__init__(pipeline, family)
        resolution = resolution or family.resolution(pipeline)
        self.size = (resolution, resolution) if isinstance(resolution, int) else resolution
        for side in self.size:
            family.check_side(pipeline, side)
        self.shape = (3, *self.size)

    def at(self, size: tuple[int, int]) -> "ImagePreparation":
        return ImagePreparation(self.pipeline, self.family, size)

    def _decode(self, cell: object) -> PILImage.Image:
        return decode_image(cell)

    def same(self, one: PILImage.Image, other: PILImage.Image) -> bool:
        return _equal_pixels(one, other)

    def tensor(self, decoded: PILImage.Image, crop_at: tuple[float, float], flip: bool) -> Tensor:
        return prepare_image(decoded, self.size, crop_at, flip)

    def conditioning(self, decoded: PILImage.Image, crop_at: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        top_left = crop_top_left(decoded.size, self.size, crop_at, flip)
        return self.family.image_conditioning(self.pipeline, (decoded.height, decoded.width), top_left, self.size)

    def uncropped_conditioning(self) -> dict[str, Tensor]:
        return self.family.image_conditioning(self.pipeline, self.size, (0, 0), self.size)

    def notes(self, decoded: PILImage.Image) -> dict[str, str]:
        return _crop_notes("an image", decoded.size, self.size)


class VideoPreparation(Preparation[list[PILImage.Image]]):
    """Videos of one size and number of frames; all frames of a row's videos are scaled and cropped alike."""

    noun = "video"
    # An animated image is a video.
    _kinds = ("video", "image")

    def __init__(
        self, pipeline: DiffusionPipeline, family: VideoFamily, resolution: Resolution, num_frames: int | None
    ) -> None:
        super().__init__(pipeline, family)
        frames, height, width = family.video_size(pipeline)
        if isinstance(resolution, tuple):
            for side in resolution:
                family.check_side(pipeline, side)
            self.size = resolution
        else:
            self.size = (height, width) if resolution is None else family.scaled_size(pipeline, resolution)
        self.num_frames = num_frames or frames
        self.shape = (3, self.num_frames, *self.size)

    def _decode(self, cell: object) -> list[PILImage.Image]:
        return decode_video(cell, self.num_frames)

    def same(self, one: list[PILImage.Image], other: list[PILImage.Image]) -> bool:
        return all(map(_equal_pixels, one, other))

    def tensor(self, decoded: list[PILImage.Image], crop_at: tuple[float, float], flip: bool) -> Tensor:
        return torch.stack([prepare_image(frame, self.size, crop_at, flip) for frame in decoded], dim=1)

    def notes(self, decoded: list[PILImage.Image]) -> dict[str, str]:
        return _crop_notes("a video", decoded[0].size, self.size)


class AudioPreparation(Preparation[Waveform]):
    """Audio of the sampling rate, channels and length that the denoiser was trained on."""

    noun = "audio"
    _kinds = ("audio",)
    family: AudioFamily

    def __init__(self, pipeline: DiffusionPipeline, family: AudioFamily) -> None:
        super().__init__(pipeline, family)
        self.shape = family.audio_size(pipeline)
        self.rate = family.sampling_rate(pipeline)
        self.key = (self.rate,)

    def _decode(self, cell: object) -> Waveform:
        waveform = decode_audio(cell)
        # What `tensor` will do is tried here, where an error can still name the row.
        resample(mix(waveform.samples[:, :1], self.shape[0]), waveform.rate, self.rate)
        return waveform

    def tensor(self, decoded: Waveform, crop_at: tuple[float, float], flip: bool) -> Tensor:
        # Samples that will be cut off are not resampled, except for one second, on which the last samples depend.
        needed = math.ceil(self.shape[1] * decoded.rate / self.rate) + decoded.rate
        samples = mix(decoded.samples[:, :needed], self.shape[0])
        samples = resample(samples, decoded.rate, self.rate)[:, : self.shape[1]]
        return fit(self.family.normalize(samples), self.shape[1])

    def conditioning(self, decoded: Waveform, crop_at: tuple[float, float], flip: bool) -> dict[str, Tensor]:
        seconds = min(decoded.samples.shape[1] / decoded.rate, self.shape[1] / self.rate)
        return self.family.audio_conditioning(self.pipeline, seconds)

    def uncropped_conditioning(self) -> dict[str, Tensor]:
        return self.family.audio_conditioning(self.pipeline, self.shape[1] / self.rate)

    def notes(self, decoded: Waveform) -> dict[str, str]:
        notes, (channels, length) = {}, self.shape
        if decoded.rate != self.rate:
            notes["rate"] = f"audio of {decoded.rate} Hz is resampled to {self.rate} Hz"
        if decoded.samples.shape[0] != channels:
            notes["channels"] = f"audio of {decoded.samples.shape[0]} channels is mixed to {channels}"
        mixed = mix(decoded.samples, channels)
        if not torch.equal(self.family.normalize(mixed), mixed):
            notes["loudness"] = f"audio is scaled to the loudness that {self.pipeline_class}'s model was trained on"
        found, wanted = decoded.samples.shape[1] / decoded.rate, length / self.rate
        # Differences below one sample come from rates that do not divide each other.
        if abs(found - wanted) * self.rate >= 1:
            change = "is cut to" if found > wanted else "is padded with silence to"
            notes[change] = f"audio of {found:g} s {change} {wanted:g} s"
        return notes


def _equal_pixels(one: PILImage.Image, other: PILImage.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


def _crop_notes(what: str, size: tuple[int, int], shape: tuple[int, int]) -> dict[str, str]:
    share = cropped_share(size, shape)
    if share <= _NOTEWORTHY_CROP:
        return {}
    return {
        "crop": f"{share:.0%} of {what} of {size[0]}x{size[1]} pixels is cropped to fit {shape[1]}x{shape[0]}; pass "
        "samples closer to this shape, or set resolution to a (height, width) closer to theirs"
    }


def preparation_for(
    pipeline: DiffusionPipeline,
    family: Family,
    resolution: Resolution = None,
    num_frames: int | None = None,
    *,
    cropped_or_mirrored: bool = False,
) -> Preparation:
    """The preparation of the samples that a pipeline generates.

    Args:
        resolution: Pixels of a square image's side or of a video's shorter side, or (height, width); None for what the
            pipeline generates. Audio has none.
        num_frames: Frames of a video; None for what the pipeline generates, and for images and audio.
        cropped_or_mirrored: Whether random crops or flips are asked for, which audio does not have.

    Raises:
        ValueError: An option that samples of this kind do not have, or a size that the model does not support.
    """
    generates = f"{type(pipeline).__name__} generates {GENERATED[family.modality]}"
    if num_frames is not None and family.modality != "video":
        raise ValueError(f"num_frames={num_frames} is for videos, and {generates}. Leave it out.")
    if isinstance(family, VideoFamily):
        return VideoPreparation(pipeline, family, resolution, num_frames)
    if not isinstance(family, AudioFamily):
        return ImagePreparation(pipeline, family, resolution)
    if resolution is not None or cropped_or_mirrored:
        raise ValueError(
            f"resolution, crop='random' and random_flip are for images and videos, and {generates}. Leave them out."
        )
    return AudioPreparation(pipeline, family)
