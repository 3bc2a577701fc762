"""A trained model's files: written into a folder, read back from a checkpoint, copied from there for the Hub."""

import shutil
from pathlib import Path

from diffusers import DiffusionPipeline
from peft import PeftModel
from torch import Tensor, nn

from ..families import Family
from ..hub import export_lora, load_denoiser_weights, save_denoiser, save_pipeline
from ..run_record import RUN_RECORD


def write_weights(
    model: nn.Module,
    pipeline: DiffusionPipeline,
    family: Family,
    folder: Path,
    state_dict: dict[str, Tensor] | None,
    *,
    whole_pipeline: bool,
) -> None:
    """Full training: a diffusers folder. LoRA: PEFT's files and diffusers'.

    Args:
        model: The trained denoiser, or the PEFT model around it, unwrapped.
        state_dict: Gathered weights, where the module itself holds shards only.
        whole_pipeline: Of full training, whether the frozen parts are written too.
    """
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, state_dict=state_dict, selected_adapters=[model.active_adapter])
        export_lora(pipeline, family, model, folder, state_dict)
    elif whole_pipeline:
        save_pipeline(pipeline, family, folder, state_dict)
    else:
        save_denoiser(model, folder / family.denoiser_name, state_dict)


def read_denoiser(denoiser: nn.Module, family: Family, checkpoint: Path) -> None:
    """Loads the weights of full training.

    Raises:
        ValueError: The checkpoint has none.
    """
    folder = checkpoint / family.denoiser_name
    if not folder.is_dir():
        raise ValueError(f"{checkpoint} holds no folder {family.denoiser_name}, so it is no full checkpoint.")
    denoiser.load_state_dict(load_denoiser_weights(folder), strict=True)


def copy_weights(family: Family, checkpoint: Path, folder: Path, *, lora: bool) -> None:
    """Copies the trained weights and their record, not the optimizer's state, to where they are pushed from."""
    if lora:
        # Of the second pattern there is none where the pipeline cannot load it (`Family.lora_format`).
        for file in [*checkpoint.glob("adapter_*"), *checkpoint.glob("pytorch_lora_weights.safetensors")]:
            shutil.copy(file, folder / file.name)
    else:
        name = family.denoiser_name
        shutil.copytree(checkpoint / name, folder / name, dirs_exist_ok=True)
    shutil.copy(checkpoint / RUN_RECORD, folder / RUN_RECORD)
