"""What a user may pass as a negative model, read into one of two forms: a LoRA, or a whole denoiser."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from safetensors.torch import load_file
from torch import Tensor, nn

from ..export.weights import LORA_FILE, RUN_RECORD, read_run_record
from ..families import Family, family_named, supported_pipelines
from ..families.denoisers import parts_of
from ..fingerprint import different_parameters, fingerprints
from ..host_libraries import dtype_option


Model: TypeAlias = str | os.PathLike[str] | DiffusionPipeline | nn.Module


@dataclass(frozen=True)
class Negative:
    """A negative model: a whole denoiser, or a LoRA on the pipeline's own.

    Args:
        name: For messages.
        attribute: The pipeline's that predicts, for which it is.
        record: What the training wrote about its base, where there is such a file.
        denoiser: Of the pipeline's architecture; None for a LoRA.
        state_dict: The LoRA with the denoiser's name as prefix, as pipelines' `lora_state_dict` gives it.
        options: Further arguments of the denoiser's `load_lora_adapter`: metadata, or network alphas.
    """

    name: str
    attribute: str
    record: dict[str, Any] | None = None
    denoiser: nn.Module | None = None
    state_dict: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def families() -> Iterator[Family]:
    """All families, those registered from outside included."""
    return map(family_named, supported_pipelines())


def guided_family(pipeline: DiffusionPipeline) -> Family | None:
    """The family that says how a pipeline of this class is guided; None for an unknown class."""
    name = type(pipeline).__name__
    return next((each for each in families() if name in (each.pipeline_class, *each.guided_pipelines)), None)


def denoiser_name(pipeline: DiffusionPipeline) -> str:
    """The pipeline's attribute that predicts, as its family says; for unknown pipelines the first one of any family.

    Raises:
        TypeError: Not a pipeline, or one without such an attribute.
    """
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"pipeline is a {type(pipeline).__name__}; pass a loaded diffusers pipeline.")
    family = guided_family(pipeline)
    names = sorted({each.denoiser_name for each in ([family] if family else families())})
    for name in names:
        if isinstance(getattr(pipeline, name, None), nn.Module):
            return name
    raise TypeError(f"{type(pipeline).__name__} has no denoiser called {' or '.join(names)}.")


def denoiser_names(pipeline: DiffusionPipeline) -> list[str]:
    """The pipeline's attributes that predict: `denoiser_name`, or one for each range of noise.

    Raises:
        TypeError: See `denoiser_name`.
    """
    first, family = denoiser_name(pipeline), guided_family(pipeline)
    names = list(family.time_ranges(pipeline)) if family is not None and family.denoiser_names else []
    present = [name for name in names if isinstance(getattr(pipeline, name, None), nn.Module)]
    return present or [first]


def read_negatives(negative: Model, pipeline: DiffusionPipeline) -> list[Negative]:
    """Reads what was passed as the negative model, for each of the pipeline's denoisers of which it has weights.

    Raises:
        ValueError, TypeError: See `read_negative`; or a denoiser or file that does not say for which one it is.
    """
    names = denoiser_names(pipeline)
    if len(names) > 1 and not isinstance(negative, DiffusionPipeline):
        names = _named_in(negative, names, pipeline)
    return [read_negative(negative, pipeline, name) for name in names]


def _named_in(negative: Model, names: list[str], pipeline: DiffusionPipeline) -> list[str]:
    """Those of a pipeline's denoisers of which a model that is no pipeline has weights."""
    found: list[str] = []
    if isinstance(negative, nn.Module):
        found = [name for name in parts_of(_unwrapped(negative), "") if name in names]
    elif isinstance(negative, (str, os.PathLike)):
        files = {name: (lora_file(pipeline, name), f"{name}/config.json") for name in names}
        path = Path(negative)
        if path.is_file():
            found = [name for name, (lora, _) in files.items() if path.name == lora]
        else:
            folder = _folder(str(negative), [file for pair in files.values() for file in pair])
            found = [name for name, pair in files.items() if any((folder / file).is_file() for file in pair)]
    if not found:
        raise ValueError(
            f"It is not known for which of the {type(pipeline).__name__}'s {' and '.join(names)} the model "
            f"{negative if isinstance(negative, (str, os.PathLike)) else type(negative).__name__} is. Pass a folder "
            "that a trainer saved, or a pipeline."
        )
    return found


def lora_file(pipeline: DiffusionPipeline, name: str) -> str:
    """What `save_lora` calls the file of a denoiser's LoRA."""
    family = guided_family(pipeline)
    return LORA_FILE if family is None else family.with_denoiser(name).own_file(LORA_FILE)


def read_negative(negative: Model, pipeline: DiffusionPipeline, name: str) -> Negative:
    """Reads what was passed as the negative model.

    Args:
        negative: LoRA file; folder or Hub id with a LoRA, a denoiser or a pipeline; a trained pipeline; a denoiser.
        pipeline: The one to guide.
        name: Its attribute that predicts.

    Raises:
        ValueError: A folder or repository without weights that can be used, or the pipeline's own denoiser.
        TypeError: Something else was passed.
    """
    if isinstance(negative, (str, os.PathLike)):
        return _read_place(str(negative), pipeline, name)
    if isinstance(negative, DiffusionPipeline):
        negative = getattr(negative, name, negative)
    if not isinstance(negative, nn.Module):
        raise TypeError(
            f"The model is a {type(negative).__name__}; pass a LoRA file, a folder, a Hub id, a pipeline or a "
            "denoiser."
        )
    negative, own = parts_of(_unwrapped(negative), name)[name], _unwrapped(getattr(pipeline, name))
    if negative is own:
        raise ValueError(
            "The model is the pipeline's own denoiser, and it cannot be set against itself. Load the base "
            "pipeline again, and pass that one."
        )
    layers = [part for part in negative.modules() if isinstance(part, BaseTunerLayer)]
    adapters = sorted({name for layer in layers for name in layer.active_adapters})
    if not adapters:
        kind = type(negative).__name__
        return Negative(kind, name, denoiser=_same_architecture(negative, own, kind))
    if len(adapters) > 1:
        raise ValueError(
            f"The model carries the adapters {', '.join(adapters)}; exactly one can be used. Save the one "
            "you mean with save_lora_weights and pass that folder."
        )
    return _read_adapter(negative, adapters[0], name)


def _unwrapped(denoiser: nn.Module) -> nn.Module:
    """The diffusers model inside PEFT's wrapper or a compiled module."""
    denoiser = getattr(denoiser, "_orig_mod", denoiser)
    return denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser


def _read_adapter(denoiser: ModelMixin, adapter: str, prefix: str) -> Negative:
    layers = [part for part in denoiser.modules() if isinstance(part, LoraLayer) and adapter in part.scaling]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            f"The model's adapter {adapter!r} is switched off. Call enable_lora() on its pipeline, or "
            "pass the folder that it was saved to."
        )
    config = denoiser.peft_config[adapter].to_dict()
    power = 0.5 if config["use_rslora"] else 1.0
    scales = [layer.scaling[adapter] * layer.r[adapter] ** power / layer.lora_alpha[adapter] for layer in layers]
    if max(scales) - min(scales) > 1e-6 * max(scales):
        raise ValueError(
            f"The model's adapter {adapter!r} has scales from {min(scales):g} to {max(scales):g} in its "
            "blocks, and one for all is needed. Set it with set_adapters."
        )
    # set_adapters(..., weights) changes the layers' scaling and leaves the configuration.
    config["lora_alpha"] *= scales[0]
    config["alpha_pattern"] = {key: alpha * scales[0] for key, alpha in config["alpha_pattern"].items()}
    tensors = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    record = {
        "base_model": getattr(denoiser, "name_or_path", None) or type(denoiser).__name__,
        **fingerprints(denoiser),
    }
    tensors = {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in tensors.items()}
    return Negative(f"adapter {adapter!r}", prefix, record, state_dict=tensors, options=_metadata(config, prefix))


def _metadata(config: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A LoRA's configuration as `load_lora_adapter` takes it; PEFT warns of fields that only a newer version knows."""
    known = LoraConfig.from_peft_type(**{"peft_type": "LORA", **config}).to_dict()
    # Adapters are loaded in training mode, in which dropout would act while sampling.
    return {"metadata": {f"{prefix}.{key}": value for key, value in {**known, "lora_dropout": 0.0}.items()}}


def _folder(place: str, files: list[str]) -> Path:
    """A folder, or what a Hub id has of the files."""
    try:
        # Without a network, the Hub's client gives what it downloaded before.
        return Path(place) if Path(place).is_dir() else Path(snapshot_download(place, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{place} is no file or folder here, and no repository on the Hub: {error}") from error


def _read_place(place: str, pipeline: DiffusionPipeline, name: str) -> Negative:
    """A file, a folder or a Hub id."""
    path, own_file = Path(place), lora_file(pipeline, name)
    configs = [f"{name}/config.json", "config.json"]
    wanted = [own_file, PEFT_CONFIG, PEFT_FILE, *configs]
    if path.is_file():
        folder, wanted = path.parent, [path.name, *([PEFT_CONFIG] if path.name == PEFT_FILE else [])]
    else:
        folder = _folder(place, [*wanted, RUN_RECORD])
    files, record = [file for file in wanted if (folder / file).is_file()], read_run_record(folder)
    if own_file in files and configs[0] in files:
        raise ValueError(
            f"{place} holds a LoRA ({own_file}) and a whole denoiser ({name}), probably of two runs. Pass the one "
            f"you mean: {place}/{own_file} or {place}/{name}."
        )
    if PEFT_CONFIG in files and PEFT_FILE in files and own_file not in files:
        config = json.loads((folder / PEFT_CONFIG).read_text())
        # PEFT's files have names as seen from PeftModel.
        tensors = {
            key.removeprefix("base_model.model."): value for key, value in load_file(folder / PEFT_FILE).items()
        }
        tensors = {f"{name}.{key}": value for key, value in tensors.items()}
        return Negative(place, name, record, state_dict=tensors, options=_metadata(config, name))
    if own_file not in files and (config := next((file for file in files if file in configs), None)):
        return Negative(place, name, record, _read_denoiser(place, folder, config, getattr(pipeline, name)))
    others = files or (os.listdir(folder) if path.is_dir() else list_repo_files(place))
    loras = [file for file in others if file.endswith(".safetensors") and "/" not in file]
    if own_file in files or len(loras) == 1:
        file = own_file if own_file in files else loras[0]
        read = _read_lora(str(folder) if path.is_file() else place, file, pipeline, name)
        return Negative(place, name, record, None, *read)
    raise ValueError(
        f"{place} holds neither {own_file}, nor {PEFT_CONFIG} with {PEFT_FILE}, nor {' or '.join(configs)}, nor a "
        "single .safetensors file, so there is no model to load. Pickled weights (.bin, .ckpt, .pt) are not "
        "read: convert them to safetensors."
    )


def _read_denoiser(place: str, folder: Path, config: str, own: ModelMixin) -> nn.Module:
    found, kind = json.loads((folder / config).read_text()).get("_class_name"), type(own)
    if found != kind.__name__:
        raise ValueError(
            f"The model in {place} is a {found}, and the pipeline's denoiser a {kind.__name__}. Train the "
            "model from the same base."
        )
    options = {"subfolder": str(Path(config).parent), "use_safetensors": True, **dtype_option(own.dtype)}
    return _same_architecture(kind.from_pretrained(place, **options), own, place)


def _same_architecture(denoiser: nn.Module, own: nn.Module, name: str) -> nn.Module:
    different = different_parameters(own, denoiser)
    if different:
        raise ValueError(
            f"{name} has another architecture ({type(denoiser).__name__}) than the pipeline's {type(own).__name__}: "
            f"{len(different)} parameters differ, first {different[0]}. Train the model from the same base."
        )
    return denoiser


def _read_lora(
    place: str, file: str, pipeline: DiffusionPipeline, name: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_lora_weights` writes, and the other formats that diffusers converts."""
    # Files of all of a pipeline's denoisers have the first one's name in them.
    prefix = denoiser_name(pipeline)
    if not hasattr(pipeline, "lora_state_dict"):
        raise TypeError(
            f"{type(pipeline).__name__} has no load_lora_weights, so {file} cannot be read. Pass a folder with "
            f"PEFT's {PEFT_CONFIG} and {PEFT_FILE}, or full weights."
        )
    # Each pipeline's loader reads those of the options that it needs.
    options = {"return_lora_metadata": True, "return_alphas": True, "unet_config": getattr(pipeline, prefix).config}
    read = pipeline.lora_state_dict(place, weight_name=file, use_safetensors=True, **options)
    state_dict, *alphas, metadata = read
    others = sorted({key.split(".")[0] for key in state_dict if not key.startswith(f"{prefix}.")})
    if others:
        raise ValueError(
            f"The LoRA {file} also changes {', '.join(others)}, which both sides of the guidance share. Use a LoRA "
            f"of the {prefix} alone."
        )
    state_dict = {f"{name}{key.removeprefix(prefix)}": tensor for key, tensor in state_dict.items()}
    if metadata:
        return state_dict, _metadata({key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}, name)
    if not alphas or not alphas[0]:
        return state_dict, {}
    return state_dict, {
        "network_alphas": {f"{name}{key.removeprefix(prefix)}": alpha for key, alpha in alphas[0].items()}
    }
