"""The model card: what was trained, with which options, and how to sample from it."""

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import transformers
import trl
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, ModelCardData
from peft import LoraConfig

from ..families import Family
from ..version import __version__


_TEMPLATE = Path(__file__).parent / "model_card.md"
# The method of a pairwise algorithm whose pairs are reversed.
_DIFFUSION_NPO = {
    "title": "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion "
    "Models",
    "id": "2505.11245",
}
_OUTPUTS = {"image": "images", "video": "frames", "audio": "audios"}


def _sampling_with_guidance(pipeline: DiffusionPipeline, family: Family) -> str:
    """The line of a negative model's card that samples, with guidance on."""
    # Where guidance_scale is an input of the denoiser, guidance itself has another name.
    true_guidance = "true_cfg_scale" in inspect.signature(type(pipeline).__call__).parameters
    options = 'true_cfg_scale=4.0, negative_prompt=" "' if true_guidance else "guidance_scale=5.0"
    return f'{family.modality} = pipeline("your prompt", {options}).{_OUTPUTS[family.modality]}[0]'


_SHOWN = ("learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "seed", "weight_decay", "prompt_dropout")


def card_options(args: Any, shared: type, sample_name: str, steps: int) -> dict[str, Any]:
    """Values of a run's options by the names under which the card shows them.

    Args:
        args: The config.
        shared: The config class that all algorithms share; every option beyond it is shown.
        sample_name: What a batch is made of.
        steps: That were trained.
    """
    own = {field.name for field in fields(args)} - {field.name for field in fields(shared)}
    options = {name: getattr(args, name) for name in (*_SHOWN, *sorted(own))}
    options = {name: getattr(value, "value", value) for name, value in options.items()}
    options[f"{sample_name} per step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    options["steps"] = steps
    return options


def write_model_card(
    folder: Path,
    *,
    method: str,
    paper: dict[str, str],
    pipeline: DiffusionPipeline,
    family: Family,
    record: dict[str, Any],
    lora: LoraConfig | None,
    args: Any,
    options: dict[str, Any],
    model_name: str | None,
    repo_id: str | None,
    dataset_name: str | None,
    tags: list[str],
) -> None:
    """Writes `README.md`, after everything else, since PEFT rewrites the front matter of a card that it finds.

    Args:
        method, paper: The algorithm's name; title and arXiv id of its paper, or nothing.
        record: The run's, see `run_record`.
        lora: The adapter's configuration, or None for full weights.
        args: The run's config.
        options: What was trained with, shown as a table.
        model_name, repo_id: For the title and the code; default the folder's name.
    """
    negative, base_model = record["negative"], record["base_model"]
    if getattr(args, "negative", False):
        method, paper, tags = f"Diffusion-NPO ({method})", _DIFFUSION_NPO, [*tags, "diffusion-npo"]
    task = f"text-to-{family.modality}"
    data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag=task,
        datasets=dataset_name,
        model_name=model_name,
        tags=sorted({task, *(["lora"] if lora else []), *(["negative-model"] if negative else []), *tags}),
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
        base_fingerprint=record["base_fingerprint"],
        lora=lora is not None,
        lora_format=family.lora_format,
        denoiser=family.denoiser_name,
        sample=family.modality,
        samples=_OUTPUTS[family.modality],
        guided_sample=_sampling_with_guidance(pipeline, family),
        # from_pretrained has to be given again what a pipeline goes without.
        absent="".join(
            f", {name}=None"
            for name, component in pipeline.components.items()
            if component is None and name.startswith(("text_encoder", "tokenizer"))
        ),
        repo_id=repo_id or model_name or folder.name,
        dataset=dataset_name,
        options=options | ({"r": lora.r, "lora_alpha": lora.lora_alpha} if lora else {}),
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
