"""What a user may pass as a negative model, read into one of two forms: a LoRA, or a whole denoiser."""

import inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import WEIGHTS_NAME
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from safetensors.torch import load_file
from torch import Tensor, nn

from ..fingerprint import rounded_fingerprints, weights_fingerprint
from ..run_record import RUN_RECORD, read_run_record


LORA_FILE = "pytorch_lora_weights.safetensors"
# PEFT's files have names as seen from PeftModel.
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class NegativeLoRA:
    """A LoRA on the denoiser.

    Args:
        state_dict: With the denoiser's name as prefix, as pipelines' `lora_state_dict` gives it.
        options: Further arguments of the denoiser's `load_lora_adapter`: metadata (the adapter's configuration, with
            the same prefix), or network alphas.
        record: What the training wrote about its base, where there is such a file.
        name: For messages.
        scale: At which it was set where it comes from.
    """

    state_dict: dict[str, Tensor]
    options: dict[str, Any]
    record: dict[str, Any] | None
    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class NegativeWeights:
    """A whole denoiser.

    Args:
        denoiser: Of the pipeline's architecture.
        record, name: As in [`NegativeLoRA`].
    """

    denoiser: nn.Module
    record: dict[str, Any] | None
    name: str


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The pipeline's attribute that predicts, "unet" or "transformer".

    Raises:
        TypeError: Not a pipeline, or one without either.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"pipeline is a {type(pipeline).__name__}; pass a loaded diffusers pipeline.")
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise TypeError(f"{type(pipeline).__name__} has neither a unet nor a transformer.")


def read_negative(negative: Any, pipeline: DiffusionPipeline) -> NegativeLoRA | NegativeWeights:
    """Reads what was passed as the negative model.

    Args:
        negative: LoRA file; folder or Hub id with a LoRA, a denoiser or a pipeline; a trained pipeline; a denoiser.
        pipeline: The one to guide.

    Raises:
        ValueError: A folder or repository without weights that can be used, or the pipeline's own denoiser.
        TypeError: Something else was passed.
    """
    if isinstance(negative, (str, os.PathLike)):
        return _read_place(str(negative), pipeline)
    if isinstance(negative, DiffusionPipeline):
        negative = getattr(negative, denoiser_name(negative))
    if not isinstance(negative, nn.Module):
        raise TypeError(
            f"negative is a {type(negative).__name__}; pass a LoRA file, a folder, a Hub id, a pipeline or a denoiser."
        )
    negative, own = _unwrapped(negative), _unwrapped(getattr(pipeline, denoiser_name(pipeline)))
    if negative is own:
        raise ValueError(
            "negative is the pipeline's own denoiser, so both sides of the guidance would be the same. Load the base "
            "pipeline afresh and guide that one."
        )
    adapters = sorted(
        {name for part in negative.modules() if isinstance(part, BaseTunerLayer) for name in part.active_adapters}
    )
    if not adapters:
        return NegativeWeights(negative, None, type(negative).__name__)
    if len(adapters) > 1:
        raise ValueError(
            f"The negative model carries the adapters {', '.join(adapters)}; exactly one can be taken. Save the one "
            "you mean with save_lora_weights and pass that folder."
        )
    (adapter,), prefix = adapters, denoiser_name(pipeline)
    layers = [part for part in negative.modules() if isinstance(part, BaseTunerLayer) and adapter in part.scaling]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"The negative model's adapter {adapter!r} is switched off. Call enable_lora() on its pipeline, or "
            "pass the folder that it was saved to."
        )
    config = _without_dropout(negative.peft_config[adapter])
    state_dict = get_peft_model_state_dict(negative, adapter_name=adapter)
    root = layers[0].r[adapter] ** 0.5 if config.get("use_rslora") else layers[0].r[adapter]
    return NegativeLoRA(
        {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in state_dict.items()},
        {"metadata": {f"{prefix}.{key}": value for key, value in config.items()}},
        {
            "base_model": getattr(negative, "name_or_path", None) or type(negative).__name__,
            "base_fingerprint": weights_fingerprint(negative),
            "base_fingerprint_rounded": rounded_fingerprints(negative),
        },
        f"adapter {adapter!r}",
        # set_adapters(..., weights) changes this and nothing else
        layers[0].scaling[adapter] * root / layers[0].lora_alpha[adapter],
    )


def _unwrapped(denoiser: nn.Module) -> nn.Module:
    """The diffusers model inside PEFT's wrapper or a compiled module."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    return denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser


def _read_place(place: str, pipeline: DiffusionPipeline) -> NegativeLoRA | NegativeWeights:
    """A file, a folder or a Hub id."""
    path, name = Path(place), denoiser_name(pipeline)
    if path.is_file() and path.name == PEFT_FILE and (path.parent / PEFT_CONFIG).is_file():
        return _read_peft(place, path.parent, pipeline)
    if path.is_file():
        return _read_lora(place, path.parent, pipeline)
    files = _files(place)

    def folder(*patterns: str) -> Path:
        return path if path.is_dir() else Path(snapshot_download(place, allow_patterns=[*patterns, RUN_RECORD]))

    if LORA_FILE in files and f"{name}/config.json" in files:
        raise ValueError(
            f"{place} holds a LoRA ({LORA_FILE}) and a whole denoiser ({name}), probably of two runs. Pass the one "
            f"you mean: {place}/{LORA_FILE} or {place}/{name}."
        )

    denoiser_class: type[ModelMixin] = type(getattr(pipeline, name))
    dtype = getattr(pipeline, name).dtype
    if LORA_FILE in files:
        return _read_lora(place, folder(LORA_FILE), pipeline)
    if {PEFT_CONFIG, PEFT_FILE} <= set(files):
        return _read_peft(place, folder(PEFT_CONFIG, PEFT_FILE), pipeline)
    if f"{name}/config.json" in files:
        local = folder(f"{name}/*.json", f"{name}/*.safetensors")
        _check_class(local / name, denoiser_class, place)
        denoiser = denoiser_class.from_pretrained(local / name, dtype=dtype, use_safetensors=True)
        return NegativeWeights(denoiser, read_run_record(local), place)
    if "config.json" in files:
        local = folder("*.json", "*.safetensors")
        _check_class(local, denoiser_class, place)
        denoiser = denoiser_class.from_pretrained(local, dtype=dtype, use_safetensors=True)
        return NegativeWeights(denoiser, read_run_record(local), place)
    loras = [file for file in files if "/" not in file and file.endswith(".safetensors")]
    if len(loras) == 1:
        return _read_lora(place, folder(loras[0]), pipeline, loras[0])
    pickled = WEIGHTS_NAME in files or any(file.endswith((".bin", ".ckpt", ".pt")) for file in files)
    raise ValueError(
        f"{place} holds neither {LORA_FILE}, nor {PEFT_CONFIG} with {PEFT_FILE}, nor {name}/config.json, nor "
        "config.json, nor a single .safetensors file, so there is no negative model to load."
        + (" Pickled weights are not read: convert them to safetensors." if pickled else "")
    )


def _files(place: str) -> list[str]:
    """Files of a folder or a Hub repository, by their paths in it; without a network, those of a stored snapshot."""
    path = Path(place)
    if not path.is_dir():
        if path.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1:
            raise ValueError(f"There is no file or folder {place}.")
        try:
            return list_repo_files(place)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            try:
                path = Path(snapshot_download(place, local_files_only=True))
            except (LocalEntryNotFoundError, HFValidationError, OSError):
                raise ValueError(
                    f"{place} is no file or folder here, and no repository that the Hub gives: {error}"
                ) from error
    return [str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()]


def _check_class(folder: Path, expected: type[ModelMixin], place: str) -> None:
    found = json.loads((folder / "config.json").read_text()).get("_class_name")
    if found != expected.__name__:
        raise ValueError(
            f"The negative model in {place} is a {found}, and the pipeline's denoiser a {expected.__name__}. Train "
            "the negative model from the same base."
        )


def _without_dropout(config: LoraConfig) -> dict[str, Any]:
    # Layers are put in in training mode, and would draw masks while sampling.
    return {**config.to_dict(), "lora_dropout": 0.0}


def _read_peft(place: str, folder: Path, pipeline: DiffusionPipeline) -> NegativeLoRA:
    """What `PeftModel.save_pretrained` writes, and a trainer for pipelines without `load_lora_weights`."""
    name, config = denoiser_name(pipeline), LoraConfig.from_pretrained(folder)
    return NegativeLoRA(
        {f"{name}.{key.removeprefix(_PEFT_PREFIX)}": tensor for key, tensor in load_file(folder / PEFT_FILE).items()},
        {"metadata": {f"{name}.{key}": value for key, value in _without_dropout(config).items()}},
        read_run_record(folder),
        place,
    )


def _read_lora(place: str, folder: Path, pipeline: DiffusionPipeline, file: str | None = None) -> NegativeLoRA:
    if not hasattr(pipeline, "lora_state_dict"):
        raise TypeError(
            f"{type(pipeline).__name__} has no load_lora_weights, so {place} cannot be read. Pass a folder with "
            f"PEFT's {PEFT_CONFIG} and {PEFT_FILE}, or full negative weights."
        )
    name = denoiser_name(pipeline)
    options: dict[str, Any] = {"unet_config": pipeline.unet.config} if name == "unet" else {}
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        options["return_alphas"] = True
    path = place if Path(place).is_file() else folder / (file or LORA_FILE)
    read = pipeline.lora_state_dict(str(path), return_lora_metadata=True, use_safetensors=True, **options)
    state_dict, metadata = read[0], read[-1]
    alphas = read[1] if len(read) == 3 else None
    others = sorted({key.split(".")[0] for key in state_dict if not key.startswith(f"{name}.")})
    if others:
        raise ValueError(
            f"The LoRA {place} also changes {', '.join(others)}, which both sides of the guidance share. Use a LoRA "
            f"of the {name} alone."
        )
    extra = {"metadata": metadata} if metadata else {"network_alphas": alphas} if alphas else {}
    return NegativeLoRA(state_dict, extra, read_run_record(folder), place)
