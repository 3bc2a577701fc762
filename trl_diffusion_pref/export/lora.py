"""A trained LoRA in other formats: under kohya's names, or merged into the pipeline."""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from safetensors.torch import load_file
from torch import Tensor

from ..families import Family, family_named
from ..families.denoisers import parts_of
from ..families.peft_format import PEFT_PREFIX
from ..fingerprint import has_weights_of, is_quantised
from ..host_libraries import dtype_option, quiet_loading
from .kohya import KOHYA_FILE, save_kohya
from .weights import (
    RUN_RECORD,
    denoisers_in,
    lora_metadata,
    loras_of,
    read_run_record,
    save_pipeline,
    write_run_record,
)


def export_lora(
    source: str | os.PathLike[str], target: str | os.PathLike[str], format: Literal["kohya"] = "kohya"
) -> Path:
    """Writes a trained LoRA under the names of another format.

    Args:
        source: Output folder or checkpoint of a trainer, or its id on the Hub.
        target: File that ends with ".safetensors", or a folder, in which the file gets the format's usual name.
        format: "kohya": for ComfyUI and kohya's scripts, with each layer's alpha. Text encoders are never in it, since
            trainers do not train them. diffusers loads these files too, except for Stable Diffusion 3.

    Returns:
        The file. Of several denoisers the first one's; the others lie beside it, with their names at the end.

    Raises:
        ValueError: No folder of a trainer with a LoRA, a format or a LoRA that the format cannot hold.

    Example:

    ```python
    from trl_diffusion_pref.export import export_lora

    export_lora("mapo", "mapo-comfyui.safetensors")
    ```
    """
    if format != "kohya":
        raise ValueError(f"format={format!r} is none of kohya. The folder {source} holds diffusers' and PEFT's files.")
    folder, record, family = _trained(source)
    tensors, options = read_adapter(folder)
    file = Path(target)
    named = file.suffix == ".safetensors"
    file = file if named else file / KOHYA_FILE
    if "denoiser_config" not in record:
        raise ValueError(f"{folder / RUN_RECORD} is of an earlier version. Save the model again with this one.")
    names, files = denoisers_in(record, family), []
    for own, layers, each in loras_of(family, names, tensors, options):
        # A single one has the name that the caller chose, whichever denoiser's it is.
        files.append(file if named and len(names) == 1 else file.with_name(own.own_file(file.name)))
        save_kohya(files[-1], layers, each, family, record["denoiser_config"])
    return files[0]


def merge_lora(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    base: str | os.PathLike[str] | DiffusionPipeline | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Writes a whole pipeline whose denoiser has a trained LoRA merged into its weights.

    Args:
        source: Output folder or checkpoint of a trainer, or its id on the Hub.
        target: A folder that does not exist or is empty.
        base: What the LoRA was trained on: Hub id, folder or loaded pipeline, which is changed then. Default: the Hub
            id that the source names.
        dtype: To load a base in that is given by name. The merged weights are saved in it.

    Returns:
        The folder, for `from_pretrained`.

    Raises:
        ValueError: No folder of a trainer with a LoRA, no base, a base with other weights, or a target with files.
    """
    folder, record, family = _trained(source)
    target = Path(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"target={target} exists already. Name a new folder, so that no two models mix.")
    tensors, options = read_adapter(folder)
    base = base or record["base_model"]
    if base is None:
        name = f" called {record['base_folder']}" if record.get("base_folder") else ""
        raise ValueError(
            f"{folder} was trained on a local pipeline{name}, whose place is not recorded. Pass base=, the folder or "
            "the loaded pipeline."
        )
    if isinstance(base, DiffusionPipeline):
        pipeline = base
    else:
        with quiet_loading():
            pipeline = DiffusionPipeline.from_pretrained(base, **dtype_option(dtype))
    names = denoisers_in(record, family)
    family = family.with_denoiser(names[0]) if len(names) == 1 else family
    denoiser = family.denoiser(pipeline)
    if is_quantised(denoiser):
        raise ValueError(
            f"The base {base} is quantised, and merged weights would be rounded once more. Pass it as base= without "
            "quantization; a LoRA that was trained on a quantised base fits."
        )
    if not has_weights_of(denoiser, record):
        raise ValueError(f"The base {base} has other weights than the one that {folder} was trained on.")
    config = LoraConfig(**options)
    model = get_peft_model(denoiser, config)
    set_peft_model_state_dict(model, {PEFT_PREFIX + name: tensor for name, tensor in tensors.items()})
    for name, part in parts_of(model.merge_and_unload(safe_merge=True), family.denoiser_name).items():
        setattr(pipeline, name, part)
    target.mkdir(parents=True, exist_ok=True)
    save_pipeline(pipeline, family, target)
    write_run_record(target, record)
    return target


def _trained(source: str | os.PathLike[str]) -> tuple[Path, dict[str, Any], Family]:
    """Folder, run record and family of what a trainer saved."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            files = [PEFT_CONFIG, PEFT_FILE, RUN_RECORD]
            folder = Path(snapshot_download(str(source), allow_patterns=files))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"{source} is no folder here, and no repository on the Hub: {error}") from error
    record = read_run_record(folder)
    if record is None:
        raise ValueError(f"{folder} holds no {RUN_RECORD}, so no trainer of this package saved it.")
    return folder, record, family_named(record["pipeline_class"])


def read_adapter(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The LoRA of a folder that a trainer saved: tensors by the denoiser's names, and the configuration.

    Raises:
        ValueError: There is none.
    """
    if not ((folder / PEFT_CONFIG).is_file() and (folder / PEFT_FILE).is_file()):
        raise ValueError(f"{folder} holds no LoRA ({PEFT_CONFIG} and {PEFT_FILE}); all weights were trained there.")
    config = LoraConfig.from_peft_type(**json.loads((folder / PEFT_CONFIG).read_text()))
    tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in load_file(folder / PEFT_FILE).items()}
    return tensors, lora_metadata(config)
