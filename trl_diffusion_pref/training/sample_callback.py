"""Samples of fixed prompts and seeds while a model is trained, beside those of its start."""

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from PIL import Image, ImageDraw
from transformers import TrainerCallback

from ..data.decode.audio import Waveform
from ..evaluation.condition_images import Conditions, GivenImages, images_of
from ..evaluation.sample_files import Sample, png_bytes, read_sample, write_sample
from ..evaluation.sampling import images_to_edit, sample, seeds_for
from ..export.files import write_whole
from .trainer import DiffusionTrainer


FOLDER = "samples"
_GAP, _LABEL, _CELL = 8, 16, 256
# Nobody samples for so long; the others must not give up before.
_PATIENCE = timedelta(days=7)


class SampleCallback(TrainerCallback):
    """Samples before the first step and every so many steps, and shows both side by side.

    Each time it writes `samples/step-<step>.png` to the output folder, one row for each prompt with the start's sample
    on the left, and left of it the images that were edited, if any were. It passes the picture to TensorBoard, Weights
    & Biases and Trackio, as far as `report_to` names them. Of videos the picture shows the first, a middle and the
    last frame. Videos and audio are also written as files of their own, in `samples/step-<step>/`. The model card
    shows the pictures.

    The first process samples, and the others wait. Training is not affected: random states, training mode, adapters
    and the scheduler are as before.

    Args:
        trainer: To which the callback is added.
        prompts: N texts.
        every: Steps between two times, at least 1.
        seed: The samples' seeds depend on it and on the prompts.
        batch_size: Samples in one call of the pipeline.
        images: For pipelines that edit images: the image of each prompt, or a list of them, see `evaluation.sample`.
        **pipeline_kwargs: Arguments of the pipeline's call, such as `guidance_scale` or `num_inference_steps`.

    Raises:
        ValueError: No prompts, `every` below 1, images that `evaluation.sample` refuses, or FSDP or DeepSpeed, with
            which no process holds all weights.

    Example:

    ```python
    trainer.add_callback(SampleCallback(trainer, ["a cat", "a dog"], every=100, guidance_scale=5.0))
    ```
    """

    def __init__(
        self,
        trainer: DiffusionTrainer,
        prompts: Sequence[str],
        *,
        every: int = 100,
        seed: int = 0,
        batch_size: int = 4,
        images: GivenImages = None,
        **pipeline_kwargs: Any,
    ) -> None:
        if not prompts or isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: pass a list with at least one prompt.")
        if every < 1:
            raise ValueError(f"every={every}: it must be at least 1.")
        if trainer.shards_weights:
            raise ValueError("SampleCallback needs all weights in one process, which FSDP and DeepSpeed do not have.")
        self.trainer, self.prompts, self.every = trainer, list(prompts), every
        self.batch_size, self.pipeline_kwargs = batch_size, pipeline_kwargs
        self.images = images_to_edit(trainer.encoders.pipeline, images, self.prompts)
        self.seeds = seeds_for(self.prompts, seed=seed)
        self._start: list[Sample] | None = None
        self._group: Any = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # A group of its own, since the default one gives up after minutes.
            self._group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
        if state.global_step == 0:
            self._sample(0)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self._sample(state.global_step)

    def _sample(self, step: int) -> None:
        trainer = self.trainer
        if trainer.is_world_process_zero():
            folder = Path(str(trainer.args.output_dir)) / FOLDER
            with trainer.encoders.on_device(trainer.args.device, to_sample=True):
                samples = list(
                    sample(
                        trainer.encoders.pipeline,
                        self.prompts,
                        self.seeds,
                        images=self.images,
                        batch_size=self.batch_size,
                        all_processes=False,
                        exact=False,
                        show_progress=False,
                        **self.pipeline_kwargs,
                    )
                )
            self._keep(folder / "start", samples, step)
            name = f"step-{step:06}"
            for number, one in enumerate(samples):
                if not isinstance(one, Image.Image):
                    suffix = ".wav" if isinstance(one, Waveform) else ""
                    write_sample(folder / name / f"{number:03}{suffix}", one)
            picture = side_by_side(self._start, samples, self.prompts, self.images)
            write_whole(folder / f"{name}.png", png_bytes(picture))
            self._report(picture, step)
        if self._group is not None:
            torch.distributed.barrier(group=self._group)

    def _keep(self, folder: Path, samples: list[Sample], step: int) -> None:
        """Keeps the start's samples for the rest of the run, also for one that is resumed."""
        suffix = ".wav" if isinstance(samples[0], Waveform) else "" if isinstance(samples[0], list) else ".png"
        files = [folder / f"{number:03}{suffix}" for number in range(len(samples))]
        if step == 0:
            for file, one in zip(files, samples, strict=True):
                write_sample(file, one)
            self._start = samples
        elif self._start is None and all(file.exists() for file in files):
            self._start = [read_sample(file) for file in files]

    def _report(self, picture: Image.Image, step: int) -> None:
        """Passes a picture to the trackers that transformers reports to."""
        for callback in self.trainer.callback_handler.callbacks:
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_image(FOLDER, np.asarray(picture), step, dataformats="HWC")
            # Modules of the same interface.
            for tracker in (getattr(callback, name, None) for name in ("_wandb", "_trackio")):
                if tracker is not None:
                    # As transformers' callbacks log: a step of the tracker's own would have to rise with every call.
                    picture_log = tracker.Image(picture, caption=f"step {step}")
                    tracker.log({FOLDER: picture_log, "train/global_step": step})


def side_by_side(
    start: Sequence[Sample] | None,
    current: Sequence[Sample],
    prompts: Sequence[str],
    images: Conditions | None = None,
) -> Image.Image:
    """One row for each prompt, which stands above it: what was edited, the start's sample, and the current one.

    Args:
        start: The start's samples; None where they are not known.
        images: What was edited; None where samples come from text alone.
    """
    columns = {"now": [_picture(one) for one in current]}
    if start is not None:
        columns = {"start": [_picture(one) for one in start]} | columns
    if images:
        columns = {"source": [_strip(images_of(images, row)) for row in range(len(prompts))]} | columns
    # Edits may differ in size.
    widths = [max(one.width for one in pictures) for pictures in columns.values()]
    heights = [max(pictures[row].height for pictures in columns.values()) for row in range(len(prompts))]
    canvas = Image.new(
        "RGB",
        (
            _GAP + sum(width + _GAP for width in widths),
            _LABEL + sum(height + _LABEL + _GAP for height in heights) + _GAP,
        ),
        "white",
    )
    pen = ImageDraw.Draw(canvas)
    left = _GAP
    for (name, pictures), width in zip(columns.items(), widths, strict=True):
        pen.text((left, 2), name, fill="black")
        top = _LABEL
        for one, height in zip(pictures, heights, strict=True):
            canvas.paste(one, (left, top + _LABEL))
            top += height + _LABEL + _GAP
        left += width + _GAP
    top = _LABEL
    for prompt, height in zip(prompts, heights, strict=True):
        pen.text((_GAP, top), " ".join(prompt.split()), fill="black")
        top += height + _LABEL + _GAP
    return canvas


def _picture(one: Sample) -> Image.Image:
    """A sample as a picture of moderate size: of a video three frames, of audio its waveform."""
    if isinstance(one, Waveform):
        return _waveform(one)
    return _strip([one] if isinstance(one, Image.Image) else [one[0], one[len(one) // 2], one[-1]])


def _strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, each scaled so that its longer side is 256 pixels."""
    scaled = []
    for one in pictures:
        scale = _CELL / max(one.size)
        size = (max(round(one.width * scale), 1), max(round(one.height * scale), 1))
        kind = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        scaled.append(one.convert("RGB").resize(size, kind))
    strip = Image.new("RGB", (sum(one.width for one in scaled), max(one.height for one in scaled)), "white")
    left = 0
    for one in scaled:
        strip.paste(one, (left, 0))
        left += one.width
    return strip


def _waveform(audio: Waveform) -> Image.Image:
    """The range of a waveform's values in each of 512 parts."""
    width, height = 2 * _CELL, _CELL // 4
    parts = np.array_split(audio.samples.mean(dim=0).numpy(), width)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    for x, part in enumerate(parts):
        if len(part):
            low, high = ((1 - value) / 2 * (height - 1) for value in (part.min(), part.max()))
            pen.line((x, high, x, low), fill="black")
    return picture
