"""What is written for others to load: denoiser folders, LoRA files, model cards."""

import inspect
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
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from .families import Family
from .version import __version__


_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PEFT_PREFIX = "base_model.model."


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


def load_denoiser_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder that `save_denoiser` wrote, in one file or several, on the CPU."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def save_pipeline(
    pipeline: DiffusionPipeline, family: Family, folder: Path, state_dict: dict[str, Tensor] | None = None
) -> None:
    """Writes a whole pipeline; `model_index.json`, without which it does not load, is removed first and comes last.

    Args:
        state_dict: The denoiser's gathered weights, see `save_denoiser`.
    """
    (folder / pipeline.config_name).unlink(missing_ok=True)
    save_denoiser(family.denoiser(pipeline), folder / family.denoiser_name, state_dict)
    save_all_but_denoiser(pipeline, family, folder)


def save_all_but_denoiser(pipeline: DiffusionPipeline, family: Family, folder: Path) -> None:
    """Writes the frozen components and `model_index.json`, for a denoiser that is written on its own."""
    for name, component in pipeline.components.items():
        if name != family.denoiser_name and component is not None:
            component.save_pretrained(folder / name)
    pipeline.save_config(folder)


def export_lora(
    pipeline: DiffusionPipeline,
    family: Family,
    model: PeftModel,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` from the model's active adapter, loadable by `load_lora_weights`.

    For pipelines without that method, what `PeftModel.from_pretrained` reads; see `Family.lora_format`.

    The adapter's configuration goes into the file's metadata. Without it diffusers guesses the rank from the weights,
    takes `lora_alpha` to equal it, and scales the LoRA wrongly whenever it does not.
    """
    adapter = model.active_adapter
    layers = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter)
    layers = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in layers.items()}
    # diffusers injects the layers in training mode with the dropout that it finds here, and would sample with it.
    metadata = {**model.peft_config[adapter].to_dict(), "lora_dropout": 0.0}
    family.save_lora(pipeline, folder, layers, metadata)


# Other initialisations rewrite the base's weights, which a LoRA file does not hold.
_LORA_INITIALISATIONS = (True, False, "gaussian")


def check_exportable(config: LoraConfig) -> None:
    """Refuses, before training, a LoRA that diffusers could not load or would load as something else.

    Raises:
        ValueError: The config asks for trained biases, other trained modules, or an initialisation that changes the
            base.
    """
    problem = None
    if config.bias != "none":
        problem = f"bias={config.bias!r} trains biases"
    elif config.modules_to_save:
        problem = f"modules_to_save={config.modules_to_save!r} trains other modules"
    elif config.init_lora_weights not in _LORA_INITIALISATIONS:
        problem = f"init_lora_weights={config.init_lora_weights!r} changes the base's weights"
    if problem:
        raise ValueError(
            f"peft_config: {problem}, which a LoRA file for load_lora_weights does not hold, so what you train could "
            "not be loaded. Use bias='none', no modules_to_save, and init_lora_weights True or 'gaussian'."
        )


_OUTPUTS = {"image": "images", "video": "frames", "audio": "audios"}


def _sampling_with_guidance(pipeline: DiffusionPipeline, family: Family) -> str:
    """The line of a negative model's card that samples, with guidance on."""
    # Where guidance_scale is an input of the denoiser, guidance itself has another name.
    true_guidance = "true_cfg_scale" in inspect.signature(type(pipeline).__call__).parameters
    options = 'true_cfg_scale=4.0, negative_prompt=" "' if true_guidance else "guidance_scale=5.0"
    return f'{family.modality} = pipeline("your prompt", {options}).{_OUTPUTS[family.modality]}[0]'


def write_model_card(
    folder: Path,
    *,
    method: str,
    negative: bool,
    paper: dict[str, str],
    pipeline: DiffusionPipeline,
    family: Family,
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
        negative: Whether the card is of a negative model, which is sampled with as such.
        base_model: Hub id, or None where the base came from a folder that others do not have.
        options: What was trained with, shown as a table.
    """
    task = f"text-to-{family.modality}"
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag=task,
        datasets=dataset_name,
        model_name=model_name,
        tags=sorted({task, *(["lora"] if lora else []), *tags}),
    )
    card = ModelCard.from_template(
        card_data=data,
        template_path=str(_TEMPLATE),
        title=model_name or folder.name,
        method=method,
        negative=negative,
        paper=paper,
        pipeline_class=type(pipeline).__name__,
        base=base_model,
        base_fingerprint=base_fingerprint,
        lora=lora,
        lora_format=family.lora_format,
        denoiser=family.denoiser_name,
        sample=family.modality,
        samples=_OUTPUTS[family.modality],
        guided_sample=_sampling_with_guidance(pipeline, family),
        # diffusers wants to be told again what a pipeline goes without.
        absent="".join(
            f", {name}=None"
            for name, component in pipeline.components.items()
            if component is None and name.startswith(("text_encoder", "tokenizer"))
        ),
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
