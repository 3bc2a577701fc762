"""What the model card says of a run, taken from its options, its log and the files beside it."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import metadata_load, try_to_load_from_cache
from peft import LoraConfig

from .weights import EMA_FOLDER, EMA_SUFFIX


logger = logging.getLogger(__name__)

# Shown whatever their values are.
_ALWAYS = ("learning_rate", "lr_scheduler_type", "optim", "max_grad_norm", "seed", "weight_decay", "prompt_dropout")
# Of the machine, of files and accounts, or filled in without being asked for: they say nothing about the model.
_OF_THE_MACHINE = re.compile(
    "(accelerator|activation_checkpointing|batch_eval|checkpointing|data_seed|dataloader|dataset_cache|ddp|debug|"
    "deepspeed|disable_tqdm|do|encode|eval|fsdp|gradient_checkpointing|greater|hub|ignore|include|local_rank|log|logging|"
    "lora_format|max_steps|metric|model_init|output_dir|parallelism|per_device|prediction|project|push|remove_unused|"
    "report|restore|resume|run_name|save|skip|torch_compile|trackio|use_cpu)(_.*)?|.*_dir"
)
_CURVE_ROWS, _CURVE_COLUMNS = 10, 5
# In the log beside metrics.
_NO_METRICS = ("epoch", "step", "loss", "grad_norm", "learning_rate", "total_flos")
_SPEED = re.compile(r".*_(runtime|samples_per_second|steps_per_second|model_preparation_time)")


def shown_options(args: Any, batch: str, steps: int) -> dict[str, Any]:
    """Values of a run's options: the algorithm's own, a few of training, and others that are not the defaults.

    Args:
        args: The config.
        batch: What a batch is made of, such as "pairs".
        steps: That were trained.
    """
    own = args.own_options()
    others = [option.name for option in fields(args) if option.name not in (*_ALWAYS, *own) and _told(args, option)]
    options = {name: getattr(args, name) for name in (*_ALWAYS, *own, *others)}
    options = {name: getattr(value, "value", value) for name, value in options.items() if value is not None}
    options[f"{batch} per step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    return options | {"steps": steps}


def _told(args: Any, option: Field) -> bool:
    """Whether an option has another value than its default, and one that says something about the model."""
    default = option.default_factory() if option.default_factory is not MISSING else option.default
    value = getattr(args, option.name)
    if value == default or (default is None and value in (False, None)) or _OF_THE_MACHINE.fullmatch(option.name):
        return False
    # Values with a slash are names of files.
    return isinstance(value, (bool, int, float, str)) and not (isinstance(value, str) and re.search(r"[/\\]", value))


def lora_options(config: LoraConfig | None) -> dict[str, Any]:
    """What decides the size and the scale of a LoRA, by the names of `LoraConfig`; empty without one."""
    if config is None:
        return {}
    targets = config.target_modules
    options = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets if isinstance(targets, str) else ", ".join(sorted(targets or ())),
    }
    for name in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout"):
        if value := getattr(config, name):
            options[name] = value
    return options


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def training_curve(history: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of logged steps, evenly spaced, the first and the last among them.

    Args:
        history: transformers' `log_history`.
    """
    logged = [entry for entry in history if "loss" in entry]
    if not logged:
        return [], []
    count = min(_CURVE_ROWS, len(logged))
    chosen = [logged[round(number * (len(logged) - 1) / max(count - 1, 1))] for number in range(count)]
    metrics = [name for name in logged[-1] if name not in _NO_METRICS][:_CURVE_COLUMNS]
    header = ["step", "loss", *metrics]
    return header, [[_number(entry.get(name, "")) for name in header] for entry in chosen]


def final_metrics(history: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The newest value of every metric of evaluation, and of the whole training's mean loss, by logged name."""
    metrics: dict[str, str] = {}
    for entry in history:
        for name, value in entry.items():
            if (name.startswith("eval_") or name == "train_loss") and not _SPEED.fullmatch(name):
                metrics[name] = _number(value)
    return metrics


def data_facts(data: Mapping[str, Any], dataset_id: str | None) -> dict[str, str]:
    """Rows of the card's table on the training data.

    Args:
        data: Of the run's record: `id` or `name`, `columns`, `rows` (None for streams), `left_out` by kind.
        dataset_id: On the Hub, where the caller named it.
    """
    known = dataset_id or data.get("id")
    name = f"[{known}](https://huggingface.co/datasets/{known})" if known else data.get("name")
    facts = {"name": name or "not named: a data set that was made in memory, or read from a folder"}
    if "columns" in data:
        facts["columns"] = ", ".join(f"`{column}`" for column in data["columns"])
    if "rows" in data:
        facts["rows"] = "streamed" if data["rows"] is None else f"{data['rows']:,}"
        if left_out := {kind: count for kind, count in data.get("left_out", {}).items() if count}:
            facts["rows left out"] = ", ".join(f"{count:,} ({kind})" for kind, count in left_out.items())
        elif data["rows"] is not None:
            facts["rows left out"] = "none"
    return facts


def base_licence(pipeline: DiffusionPipeline, base_model: str | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` of the base's own card, where that is on this machine.

    Args:
        pipeline: The base; it knows the folder that it was loaded from.
        base_model: Its Hub id.
    """
    folder = getattr(pipeline, "name_or_path", None)
    card: Any = Path(folder) / "README.md" if folder else None
    if base_model and not (card and card.is_file()):
        # Not downloaded for this: a run must not need the network at its end.
        card = try_to_load_from_cache(base_model, "README.md")
    if not isinstance(card, (str, Path)) or not Path(card).is_file():
        return {}
    try:
        data = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning(f"The base's card {card} cannot be read, so the model card names no licence: {error}")
        return {}
    fields = ("license", "license_name", "license_link")
    licence = {name: data[name] for name in fields if isinstance(data.get(name), str)}
    link = licence.get("license_link", "")
    if link and "://" not in link:
        # A file of the base's repository, which the new model's does not have.
        licence.pop("license_link")
        if base_model:
            licence["license_link"] = f"https://huggingface.co/{base_model}/blob/main/{link}"
    return licence


def averages(folder: Path, denoisers: Sequence[str]) -> list[str]:
    """The folders in which the moving average of the weights stands beside the weights."""
    names = [EMA_FOLDER, *(f"{name}{EMA_SUFFIX}" for name in denoisers)]
    return [name for name in names if (folder / name).is_dir()]


def pictures(folder: Path) -> list[tuple[str, str]]:
    """Title and link of each picture in `samples/`, in the order of their names."""
    return [(file.stem, f"samples/{quote(file.name)}") for file in sorted(folder.glob("samples/*.png"))]


def comparison(folder: Path) -> str:
    """What `compare` wrote into the folder or into `comparison/` there, without a heading of its own."""
    places = (folder / "comparison.md", folder / "comparison" / "comparison.md")
    file = next(filter(Path.is_file, places), None)
    return re.sub(r"\A#+ .*\n+", "", file.read_text(encoding="utf-8")).strip() if file else ""


def bibtex(paper: Mapping[str, str]) -> str:
    """The paper's entry: its `citation` as TRL's trainers have it, or one of its title and arXiv id."""
    if not paper:
        return ""
    if "citation" in paper:
        return paper["citation"].strip()
    identifier = paper["id"]
    return (
        f"@misc{{arxiv{identifier},\n    title         = {{{{{paper['title']}}}}},\n    eprint        = "
        f"{{{identifier}}},\n    archivePrefix = {{arXiv}},\n    url           = {{https://arxiv.org/abs/{identifier}}}\n}}"
    )
