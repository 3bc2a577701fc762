"""What is written for others to load: denoiser folders, LoRA files, model cards."""

import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
import trl
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import ModelCard, ModelCardData, save_torch_state_dict
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from .families import Family
from .version import __version__


_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
_PEFT_PREFIX = "base_model.model."


def save_denoiser(denoiser: ModelMixin, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes a denoiser the way diffusers does, config and safetensors.

    Args:
        denoiser: Gives config and class name, and the weights unless they are passed.
        state_dict: Gathered weights, where the module itself holds shards only (FSDP, ZeRO-3).
    """
    if state_dict is None:
        denoiser.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    denoiser.save_config(folder)
    # FSDP2 renames the class of the modules it wraps, and from_pretrained reads the name in the config.
    config_file = folder / denoiser.config_name
    config = json.loads(config_file.read_text())
    config["_class_name"] = config["_class_name"].removeprefix("FSDP")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.rsplit(".", 1)
    save_torch_state_dict(state_dict, folder, filename_pattern=f"{stem}{{suffix}}.{suffix}", force_contiguous=True)


def export_lora(
    pipeline: DiffusionPipeline,
    family: Family,
    model: PeftModel,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` from the model's active adapter, loadable by `load_lora_weights`.

    The adapter's configuration goes into the file's metadata. Without it diffusers guesses the rank from the weights,
    takes `lora_alpha` to equal it, and scales the LoRA wrongly whenever it does not.
    """
    adapter = model.active_adapter
    layers = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter)
    layers = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in layers.items()}
    family.save_lora(pipeline, folder, layers, model.peft_config[adapter].to_dict())


def write_model_card(
    folder: Path,
    *,
    method: str,
    paper: dict[str, str],
    pipeline: DiffusionPipeline,
    base_model: str | None,
    base_fingerprint: str,
    lora: bool,
    options: dict[str, Any],
    model_name: str | None,
    repo_id: str | None,
    dataset_name: str | None,
    tags: list[str],
) -> None:
    """Writes `README.md`, after everything else, since PEFT rewrites the front matter of a card that it finds.

    Args:
        base_model: Hub id, or None where the base came from a folder that others do not have.
        options: What was trained with, shown as a table.
    """
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        datasets=dataset_name,
        model_name=model_name,
        tags=sorted({"text-to-image", *(["lora"] if lora else []), *tags}),
    )
    card = ModelCard.from_template(
        card_data=data,
        template_path=str(_TEMPLATE),
        title=model_name or folder.name,
        method=method,
        paper=paper,
        pipeline_class=type(pipeline).__name__,
        base=base_model,
        base_fingerprint=base_fingerprint,
        lora=lora,
        repo_id=repo_id or model_name or folder.name,
        dataset=dataset_name,
        options=options,
        versions={
            "trl_diffusion_pref": __version__,
            "trl": trl.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
        },
    )
    card.save(folder / "README.md")
