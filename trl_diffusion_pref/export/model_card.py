"""The model card: what was trained, with which options, and how to sample from it."""

import inspect
from collections.abc import Sequence
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
from transformers import TrainerState

from ..families import Family
from ..version import __version__
from . import card_contents as contents
from .kohya import KOHYA_FILE
from .weights import EMA_LORA_FILE, denoisers_in


_TEMPLATE = Path(__file__).parent / "model_card.md"
# The method of a pairwise algorithm whose pairs are reversed.
_DIFFUSION_NPO = {
    "title": "Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of Diffusion "
    "Models",
    "id": "2505.11245",
    "citation": """\
@inproceedings{wang2025diffusionnpo,
    title         = {{Diffusion-NPO: Negative Preference Optimization for Better Preference Aligned Generation of
                     Diffusion Models}},
    author        = {Fu-Yun Wang and Yunhao Shui and Jingtan Piao and Keqiang Sun and Hongsheng Li},
    booktitle     = {International Conference on Learning Representations},
    year          = 2025,
    eprint        = {2505.11245},
    archivePrefix = {arXiv}
}""",
}
_OUTPUTS = {"image": "images", "video": "frames", "audio": "audios"}


def _sampling_with_guidance(pipeline: DiffusionPipeline, family: Family, inputs: str) -> str:
    """The line of a negative model's card that samples, with guidance on."""
    # Where guidance_scale is an input of the denoiser, guidance itself has another name.
    true_guidance = "true_cfg_scale" in inspect.signature(type(pipeline).__call__).parameters
    options = 'true_cfg_scale=4.0, negative_prompt=" "' if true_guidance else "guidance_scale=5.0"
    return f"{family.modality} = pipeline({inputs}, {options}).{_OUTPUTS[family.modality]}[0]"


def _inputs(pipeline: DiffusionPipeline, family: Family, conditions: Sequence[str]) -> str:
    """What a card's code gives the pipeline: a prompt, and the condition images that it was trained with."""
    files = {name: "mask.png" if name == family.mask_column else "to_edit.png" for name in conditions}
    several = family.max_condition_images > 1
    given = [f'{name}={"[" * several}load_image("{file}"){"]" * several}' for name, file in files.items()]
    first = list(inspect.signature(type(pipeline).__call__).parameters)[1]
    prompt = '"your prompt"' if first == "prompt" else 'prompt="your prompt"'
    return ", ".join([prompt, *given])


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
    batch: str,
    state: TrainerState,
    model_name: str | None,
    repo_id: str | None,
    dataset_name: str | None,
    tags: list[str],
) -> None:
    """Writes `README.md`, after everything else, since PEFT rewrites the front matter of a card that it finds.

    Pictures in `samples/*.png` and the text of `comparison.md` are shown where the folder has them. The licence is
    that of the base's card, where that is on this machine, and is left out otherwise.

    Args:
        method, paper: The algorithm's name; `title`, arXiv `id` and BibTeX `citation` of its paper, or nothing.
        record: The run's, see `run_record`, with what is known of the data under `data`.
        lora: The adapter's configuration, or None for full weights.
        args: The run's config.
        batch: What a batch is made of, such as "pairs".
        state: The loop's, with the steps and the log.
        model_name, repo_id: For the title and the code; default the folder's name.
        dataset_name: The training data's id on the Hub. Default: what the data set says of itself.
    """
    negative, base_model, data = record["negative"], record["base_model"], record.get("data", {})
    if getattr(args, "negative", False):
        method, paper, tags = f"Diffusion-NPO ({method})", _DIFFUSION_NPO, [*tags, "diffusion-npo"]
    conditions: Sequence[str] = family.condition_images
    if family.condition_is_optional:
        columns = set(data.get("columns", ()))
        # A column alone beside the prompt has the samples.
        conditions = [name for name in conditions if name in columns and columns - {"prompt", name}]
    task, inputs = f"{'image' if conditions else 'text'}-to-{family.modality}", _inputs(pipeline, family, conditions)
    licence: dict[str, Any] = {**contents.base_licence(pipeline, base_model)}
    relation: dict[str, Any] = {"base_model_relation": "adapter" if lora else "finetune"} if base_model else {}
    card_data = ModelCardData(
        base_model=base_model,
        library_name="diffusers",
        pipeline_tag=task,
        datasets=dataset_name or data.get("id"),
        model_name=model_name,
        tags=sorted({task, *(["lora"] if lora else []), *(["negative-model"] if negative else []), *tags}),
        **relation,
        **licence,
    )
    trained = [family.with_denoiser(name) for name in denoisers_in(record, family)]
    curve_header, curve = contents.training_curve(state.log_history)
    card = ModelCard.from_template(
        card_data=card_data,
        template_path=str(_TEMPLATE),
        title=model_name or folder.name,
        method=method,
        negative=negative,
        paper=paper,
        citation=contents.bibtex(paper),
        pipeline_class=type(pipeline).__name__,
        more_imports="\nfrom diffusers.utils import load_image" if conditions else "",
        inputs=inputs,
        base=base_model,
        base_folder=record.get("base_folder"),
        base_fingerprint=record["base_fingerprint"],
        lora=lora is not None,
        lora_format=family.lora_format,
        lora_arguments=[
            "".join(f", {key}={value!r}" for key, value in own.lora_arguments().items()).replace("'", '"')
            for own in trained
        ],
        kohya_files=[
            (file, own.denoiser_name) for own in trained if (folder / (file := own.own_file(KOHYA_FILE))).is_file()
        ],
        averages=contents.averages(folder, denoisers_in(record, family)) if args.use_ema else [],
        averaged_files=[own.own_file(EMA_LORA_FILE) for own in trained],
        denoiser_class=family.denoiser_class,
        denoiser=family.denoiser_name,
        sample=family.modality,
        samples=_OUTPUTS[family.modality],
        guided_sample=_sampling_with_guidance(pipeline, family, inputs),
        # from_pretrained has to be given again what a pipeline goes without.
        absent="".join(
            f", {name}=None"
            for name, component in pipeline.components.items()
            if component is None and name.startswith(("text_encoder", "tokenizer"))
        ),
        repo_id=repo_id or model_name or folder.name,
        pictures=contents.pictures(folder),
        comparison=contents.comparison(folder),
        data=contents.data_facts(data, dataset_name),
        options=contents.shown_options(args, batch, state.global_step) | contents.lora_options(lora),
        curve_header=curve_header,
        curve=curve,
        metrics=contents.final_metrics(state.log_history),
        licence=licence.get("license_name") or licence.get("license"),
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
