"""From prompts and seeds to samples, for every family, through the pipeline's own `__call__`."""

import copy
import difflib
import inspect
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.content import cell_key
from ..data.shards import key_of
from ..families import Family, editing_pipelines, family_for
from ..families.modalities import AudioFamily
from .batch_invariance import batch_invariant
from .condition_images import Conditions, GivenImages, condition_images, keys
from .model_record import model_record
from .sample_files import SUFFIXES, Sample, Samples, as_waveform, is_blank, remove_unfinished, write_sample


__all__ = ["Sample", "Samples", "is_blank", "sample", "seeds_for"]

logger = logging.getLogger(__name__)

# Part of every key: raise it when the same key would mean another sample.
_VERSION = 1
# Arguments of the pipelines' calls that `sample` sets itself.
_OWN = {"prompt", "generator", "output_type", "return_dict"}
_OWN |= {f"num_{noun}_per_prompt" for noun in ("images", "videos", "waveforms")}
# Arguments that are texts, one for each prompt of a batch.
_TEXTS = ("prompt_", "negative_prompt")


def seeds_for(prompts: Sequence[str], *, seed: int = 0, number: int = 0) -> list[int]:
    """One seed for each prompt, which depends on `seed`, `number` and the prompt's text, not on the other prompts.

    Args:
        prompts: N prompts.
        seed: Of the whole.
        number: To have several samples of a prompt, call this with 0, 1, 2, ...

    Returns:
        N integers in [0, 2^31).
    """
    keys = [key_of("seed of a sample", seed, number, prompt) for prompt in prompts]
    return [int.from_bytes(key[:4], "little") >> 1 for key in keys]


def sample(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    images: GivenImages = None,
    batch_size: int = 4,
    output: str | Path | None = None,
    exact: bool = True,
    all_processes: bool = True,
    show_progress: bool = True,
    description: str = "Sampling",
    **pipeline_kwargs: Any,
) -> Samples:
    """Generates one sample for each prompt and its seed.

    Sample i starts from `torch.Generator().manual_seed(seeds[i])`, so that
    `pipeline(prompts[i], generator=torch.Generator().manual_seed(seeds[i]), ...)` generates it too, up to rounding.
    Under `accelerate launch` or `torchrun` each process generates its share.

    With `output` each sample is written when its batch is done, whole or not at all. A second call with the same
    folder generates what is missing: after the process was killed, or when prompts were added.

    The pipeline is left as it was: scheduler, training mode, adapters, progress bar, and torch's random numbers.

    Args:
        pipeline: Of a supported family, on the device where it should run; negative guidance and LoRAs stay active.
        prompts: N prompts.
        seeds: N integers from 0 on.
        images: For pipelines that edit images: for each prompt the image to edit, as a data set's cells have it (a PIL
            image, a path or bytes), or a list of them where the pipeline takes several. Inpainting needs masks too:
            `{"image": images, "mask_image": masks}`. Images of different sizes are in different calls; pipelines that
            take several images, or whose text encoder sees them, are called for each prompt.
        batch_size: Samples in one call of the pipeline.
        output: Folder for the samples, `<key>.png`, `<key>.wav`, or for a video a folder `<key>` of PNG files. The key
            depends on the pipeline's weights, scheduler and adapters, the prompt, the seed, and the call's arguments;
            a folder can hold the samples of several models. Must be on a disk that all processes see.
        exact: Whether a sample has the same bytes whatever the batch and the number of processes. Matrix products and
            convolutions are then computed sample by sample, and on a CPU in one thread, which takes about 1.3 times as
            long for small models. With False, rounding depends on the batch, and a few bytes differ by 1. In both
            cases the device, the precision and the versions of the libraries have an influence.
        all_processes: Whether all processes call this together. False: this process generates everything alone and
            waits for no other.
        show_progress: Whether the main process shows a bar.
        description: Of the bar.
        **pipeline_kwargs: Arguments of the pipeline's call, such as `guidance_scale`, `num_inference_steps`, `height`;
            a negative prompt is a string for all prompts.

    Returns:
        N samples in order, in every process: RGB images, lists of RGB frames, or `Waveform`s. With `output` they are
        read from their files when they are asked for.

    Raises:
        TypeError: An unsupported pipeline.
        ValueError: Numbers of prompts, seeds and images differ, a prompt that is empty or no string, an image that
            cannot be decoded, images that the pipeline does not take or lacks, or more for a prompt than it takes, an
            argument that the pipeline does not take or that is set here, a folder that processes do not share, or
            weights that are not in memory.
    """
    family = family_for(pipeline)
    prompts, seeds = list(prompts), [int(seed) for seed in seeds]
    sources = images_to_edit(pipeline, images, prompts)
    _check(pipeline, prompts, seeds, batch_size, pipeline_kwargs)
    state = PartialState()
    index, count = (state.process_index, state.num_processes) if all_processes else (0, 1)
    together = count > 1
    # Each once, also where a prompt comes twice with the same seed and image.
    first: dict[tuple[Any, ...], int] = {}
    asked = [
        (prompt, seed, *own_keys)
        for prompt, seed, own_keys in zip(prompts, seeds, keys(sources, len(prompts)), strict=True)
    ]
    places = [first.setdefault(one, number) for number, one in enumerate(asked)]
    wanted = list(first.values())
    files: list[Path] = []
    if output is not None:
        folder = Path(output)
        if index == 0:
            folder.mkdir(parents=True, exist_ok=True)
            remove_unfinished(folder)
        options = described_options(pipeline_kwargs) | {"exact": exact}
        model = key_of(_VERSION, model_record(pipeline), options).hex()
        suffix = SUFFIXES[family.modality]
        files = [folder / f"{key_of(model, *one).hex()}{suffix}" for one in asked]
        if together:
            state.wait_for_everyone()
        wanted = [number for number in wanted if not files[number].exists()]
        if together:
            # No process may write before all have looked.
            state.wait_for_everyone()
    own = wanted[index::count]
    made: dict[int, Sample] = {}
    bar = tqdm(total=len(own), desc=description, unit=" samples", disable=not (show_progress and index == 0 and own))
    with bar, _ready(pipeline, family, exact) if own else nullcontext():
        kinds = [
            (prompt if family.pads_to_longest and exact else "", *(cells.sizes[number] for cells in sources.values()))
            for number, prompt in enumerate(prompts)
        ]
        # Pipelines that take several images, or whose text encoder sees them, take one prompt in a call.
        several = family.max_condition_images > 1
        alone = family.one_prompt_per_call or (bool(sources) and (several or family.prompts_see_images))
        for batch in _batches(own, kinds, 1 if alone else batch_size):
            generators = [torch.Generator().manual_seed(seeds[number]) for number in batch]
            options = dict(pipeline_kwargs)
            for column, cells in sources.items():
                given = [image for number in batch for image in cells.of(number)]
                # A list would not be brought to the size that the text encoder sees.
                one = alone and not several
                options[column] = given[0] if one else given
            samples = _call(pipeline, family, [prompts[number] for number in batch], generators, options)
            for number, generated in zip(batch, samples, strict=True):
                if files:
                    write_sample(files[number], generated)
                else:
                    made[number] = generated
            bar.update(len(batch))
    if files:
        if together:
            state.wait_for_everyone()
        _check_files(files)
        return Samples([files[place] for place in places], len(wanted))
    if together:
        made = dict(gather_object([*made.items()]))
    return Samples([made[place] for place in places], len(wanted))


def _check(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    pipeline_kwargs: Mapping[str, Any],
) -> None:
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds; pass one seed for each prompt.")
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt {number} is {prompt!r}; it must be a text that is not empty.")
    for number, seed in enumerate(seeds):
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed {number} is {seed}; it must be an integer from 0 to 2^63 - 1.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; it must be a positive integer.")
    taken = [name for name in inspect.signature(type(pipeline).__call__).parameters if name not in _OWN | {"self"}]
    edited = family_for(pipeline).condition_images
    for name in pipeline_kwargs:
        if name in edited:
            raise ValueError(f"{name}: pass images=, one for each prompt; sample() hands them to the pipeline.")
        if name in _OWN:
            raise ValueError(f"{name} cannot be passed on to the {type(pipeline).__name__}: sample() sets it itself.")
        if name not in taken:
            near = difflib.get_close_matches(name, taken, n=1)
            hint = f" Did you mean {near[0]}?" if near else f" It takes {', '.join(taken)}."
            raise ValueError(f"{type(pipeline).__name__} has no argument {name}.{hint}")


def described_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a pipeline's call by what decides their effect, as JSON can hold it, for keys and records.

    Raises:
        ValueError: An argument that cannot be told from another one, such as a function.
    """
    described: dict[str, Any] = {}
    for name, value in sorted(options.items()):
        if isinstance(value, (Tensor, np.ndarray)):
            array = np.asarray(value.float().cpu() if isinstance(value, Tensor) else value)
            described[name] = key_of(list(array.shape), array.tobytes()).hex()
        elif isinstance(value, Image.Image):
            described[name] = cell_key(value).hex()
        else:
            try:
                described[name] = json.loads(json.dumps(value))
            except TypeError as error:
                raise ValueError(
                    f"{name} is a {type(value).__name__}, which cannot be part of a sample's key. Leave out the "
                    "argument, or output."
                ) from error
    return described


def images_to_edit(pipeline: DiffusionPipeline, images: GivenImages, prompts: Sequence[str]) -> Conditions:
    """The images to edit, as `sample` takes them, by the argument of the pipeline; none where it generates from text.

    Raises:
        ValueError: The pipeline takes none, needs some, or takes fewer for a prompt; a mask of another size than its
            image; or see `condition_images`.
    """
    family, kind = family_for(pipeline), type(pipeline).__name__
    taken = family.condition_images
    # Where there are none, prompts of a data set have an empty mapping.
    images = None if isinstance(images, Mapping) and not images else images
    if images is None and (family.condition_is_optional or not taken):
        return {}
    if not taken:
        raise ValueError(
            f"images: a {kind} generates from text alone. Leave them out, or take a pipeline that edits images: "
            f"{editing_pipelines(family)}."
        )
    if images is None:
        given = "images=" if len(taken) == 1 else f"images={{{', '.join(f'{name!r}: ...' for name in taken)}}}"
        raise ValueError(
            f"A {kind} edits images, and got none. Pass {given}, one for each prompt, or prompts of a data set "
            f"that has {' and '.join(taken)} too."
        )
    found = condition_images(images, len(prompts))
    if set(found) != set(taken):
        raise ValueError(
            f"images: a {kind} takes {' and '.join(taken)} for each prompt, and got {' and '.join(found) or 'none'}."
        )
    found = {column: found[column] for column in taken}
    for number, prompt in enumerate(prompts):
        where, sizes = f"number {number}, for the prompt {prompt!r}", [cells.sizes[number] for cells in found.values()]
        most = [1] * (len(taken) - 1) + [family.max_condition_images]
        for column, of_column, limit in zip(found, sizes, most, strict=True):
            if len(of_column) > limit:
                raise ValueError(
                    f"images, {where}: found {len(of_column)} images, and a {kind} takes "
                    f"{'one' if limit == 1 else f'{limit} at most'} as {column}. Leave out some."
                )
        if family.mask_column is not None and len(set(sizes)) > 1:
            shown = " and ".join(f"{width}x{height}" for ((width, height),) in sizes)
            raise ValueError(f"images, {where}: image and mask have {shown} pixels. Make them equal in size.")
    return found


def _batches(numbers: Sequence[int], kinds: Sequence[Any], size: int) -> Iterator[list[int]]:
    """Batches of samples of one kind each."""
    groups: dict[Any, list[int]] = {}
    for number in numbers:
        groups.setdefault(kinds[number], []).append(number)
    for group in groups.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]


@contextmanager
def _ready(pipeline: DiffusionPipeline, family: Family, exact: bool) -> Iterator[None]:
    """Evaluation mode, a scheduler of its own, no bar per call; afterwards the pipeline is as it was."""
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    training = [part for module in modules for part in module.modules() if part.training]
    own = vars(pipeline)
    scheduler, shown = pipeline.scheduler, own.get("_progress_bar_config")
    device = getattr(pipeline, family.denoiser_name).device
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        try:
            for module in modules:
                module.eval()
            # Setting its timesteps would change the trainer's as well.
            pipeline.scheduler = copy.deepcopy(scheduler)
            pipeline.set_progress_bar_config(disable=True)
            if exact:
                tokens_first = [getattr(pipeline, name) for name in family.tokens_first]
                stack.enter_context(batch_invariant(device, tokens_first))
            yield
        finally:
            pipeline.scheduler = scheduler
            if shown is None:
                own.pop("_progress_bar_config", None)
            else:
                pipeline.set_progress_bar_config(**shown)
            for module in training:
                module.training = True


def _call(
    pipeline: DiffusionPipeline,
    family: Family,
    prompts: list[str],
    generators: list[torch.Generator],
    pipeline_kwargs: Mapping[str, Any],
) -> list[Sample]:
    """The samples of one call."""
    options = {
        # Some pipelines take a text for one prompt only.
        name: [value] * len(prompts) if isinstance(value, str) and name.startswith(_TEXTS) else value
        for name, value in pipeline_kwargs.items()
    }
    if not isinstance(family, AudioFamily):
        options["output_type"] = "pil"
    generated = pipeline(prompt=prompts, generator=generators, **options)[0]
    if len(generated) != len(prompts):
        raise RuntimeError(f"{type(pipeline).__name__} generated {len(generated)} samples for {len(prompts)} prompts.")
    if isinstance(family, AudioFamily):
        rate = family.sampling_rate(pipeline)
        return [as_waveform(audio, rate) for audio in generated]
    if family.modality == "video":
        return [[frame.convert("RGB") for frame in frames] for frames in generated]
    return [image.convert("RGB") for image in generated]


def _check_files(files: Sequence[Path]) -> None:
    missing = [file for file in files if not file.exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} samples of other processes are not there, first {missing[0]}. Set output to a folder on "
            "a disk that all processes see, and do not remove files while it is filled."
        )
