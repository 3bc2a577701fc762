"""What is written for others to load: denoiser folders, whole pipelines, LoRA files, and the record of a run."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists as _is_target
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..families import Family
from ..families.denoisers import parts_of
from ..families.peft_format import PEFT_PREFIX
from ..fingerprint import fingerprints
from ..host_libraries import quiet_loading
from .files import unfinished_name
from .kohya import KOHYA_FILE, check_kohya, save_kohya


RUN_RECORD = "trl_diffusion_pref.json"
LORA_FILE = "pytorch_lora_weights.safetensors"
# Of the moving average of the weights: after a denoiser's name; a LoRA's folder, and the file in it that diffusers
# reads. It has another name than the trained LoRA's because load_lora_weights takes the first one of that name that a
# repository on the Hub lists, subfolders included.
EMA_SUFFIX = "_ema"
EMA_FOLDER, EMA_LORA_FILE = "ema", "ema_lora_weights.safetensors"


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


def save_denoisers(denoiser: ModelMixin, name: str, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Writes what is trained, each denoiser into the folder of its name; `name` is that of a single one."""
    for part, module in parts_of(denoiser, name).items():
        save_denoiser(module, folder / part, state_dict)


def load_denoisers(denoiser: ModelMixin, name: str, folder: Path) -> None:
    """Reads the weights that `save_denoisers` wrote."""
    for part, module in parts_of(denoiser, name).items():
        module.load_state_dict(load_denoiser_weights(folder / part), strict=True)


def load_denoiser_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder that `save_denoiser` wrote, in one file or several, on the CPU."""
    shards = sorted(folder.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def save_pipeline(
    pipeline: DiffusionPipeline,
    family: Family,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    encoders: AbstractContextManager[None] | None = None,
) -> None:
    """Writes a whole pipeline; `model_index.json`, without which it does not load, is removed first and comes last.

    Args:
        state_dict: The denoiser's gathered weights, see `save_denoiser`.
        encoders: Within it the other parts are in memory.
    """
    denoiser = family.denoiser(pipeline)
    with ExitStack() as stack:
        try:
            # Before anything is written, since the folder may be the one that they are read from.
            stack.enter_context(encoders or nullcontext())
        except Exception:
            # What was trained is kept all the same.
            save_denoisers(denoiser, family.denoiser_name, folder, state_dict)
            raise
        (folder / pipeline.config_name).unlink(missing_ok=True)
        save_denoisers(denoiser, family.denoiser_name, folder, state_dict)
        save_all_but_denoiser(pipeline, family, folder)


def save_all_but_denoiser(pipeline: DiffusionPipeline, family: Family, folder: Path) -> None:
    """Writes the frozen components and `model_index.json`, for a denoiser that is written on its own."""
    trained = family.trained_ranges(pipeline)
    with quiet_loading():
        for name, component in pipeline.components.items():
            if name not in trained and component is not None:
                component.save_pretrained(folder / name)
                # transformers 5 saves tokenizer.json alone; 4 reads CLIP's and Qwen's vocabulary from these.
                if isinstance(component, PreTrainedTokenizerBase) and "merges_file" in component.vocab_files_names:
                    component.backend_tokenizer.model.save(str(folder / name))
        pipeline.save_config(folder)


def adapter_tensors(model: PeftModel, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The active adapter's, by the names of the modules in the denoiser.

    Args:
        state_dict: Gathered weights, where the module itself holds shards only.
    """
    tensors = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=model.active_adapter)
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def write_lora(
    pipeline: DiffusionPipeline,
    family: Family,
    model: PeftModel,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes `pytorch_lora_weights.safetensors` from the model's active adapter, loadable by `load_lora_weights`.

    Of several denoisers each gets a file of its own, see `Family.own_file`. For pipelines without that method, what
    `PeftModel.from_pretrained` reads; see `Family.lora_format`.

    The adapter's configuration goes into the file's metadata. Without it diffusers guesses the rank from the weights,
    takes `lora_alpha` to equal it, and scales the LoRA wrongly whenever it does not.
    """
    tensors, options = adapter_tensors(model, state_dict), lora_metadata(lora_config(model))
    for own, layers, metadata in loras_of(family, list(family.trained_ranges(pipeline)), tensors, options):
        own.save_lora(pipeline, folder, layers, metadata)


def loras_of(
    family: Family, names: Sequence[str], tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> Iterator[tuple[Family, dict[str, Tensor], dict[str, Any]]]:
    """A LoRA as one of each denoiser: the family for it, the tensors by its modules' names, and the options.

    Args:
        names: Of the denoisers that the LoRA was trained in. With several, each is a prefix of its tensors' names.
        options: See `lora_metadata`.
    """
    if len(names) == 1:
        yield family.with_denoiser(names[0]), dict(tensors), options
        return
    for name in names:
        prefix, others = f"{name}.", tuple(f"{other}." for other in names if other != name)
        layers = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        own: dict[str, Any] = dict(options)
        for option in ("target_modules", "rank_pattern", "alpha_pattern"):
            # Keys without the name of a denoiser are meant for all.
            if isinstance(value := own.get(option), dict):
                own[option] = {key.removeprefix(prefix): n for key, n in value.items() if not key.startswith(others)}
            elif isinstance(value, list):
                own[option] = sorted({key.removeprefix(prefix) for key in value if not key.startswith(others)})
        if layers:
            yield family.with_denoiser(name), layers, own


def lora_config(model: PeftModel) -> LoraConfig:
    """The active adapter's; adapters of other kinds are never trained."""
    return cast(LoraConfig, model.peft_config[model.active_adapter])


# Written always: diffusers reads them without asking whether they are there.
_ALWAYS_WRITTEN = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
# What a loaded adapter computes does not depend on these. The dropout must not be written: diffusers injects the
# layers in training mode and would sample with it.
_NEVER_WRITTEN = (
    "lora_dropout",
    "init_lora_weights",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "peft_type",
    "peft_version",
)


def lora_metadata(config: LoraConfig) -> dict[str, Any]:
    """The fields of an adapter's configuration that change what it computes.

    An older PEFT raises on a field that it does not know, so fields that hold their default are left out.
    """
    defaults = LoraConfig().to_dict()
    metadata = {
        name: value
        for name, value in config.to_dict().items()
        if name in _ALWAYS_WRITTEN or (name not in _NEVER_WRITTEN and value != defaults.get(name))
    }
    if not isinstance(config.target_modules, str):
        metadata["target_modules"] = sorted(config.target_modules or ())
    return metadata


# Other initialisations rewrite the base's weights, which a LoRA file does not hold.
_LORA_INITIALISATIONS = (True, False, "gaussian")


def check_exportable(config: LoraConfig, base: ModelMixin, family: Family, *, kohya: bool = False) -> None:
    """Raises, before training, for a LoRA that diffusers could not load or would load as something else.

    Args:
        config: With target modules.
        base: The denoiser that will get it.
        kohya: Whether it is to be written under kohya's names too.

    Raises:
        ValueError: The config asks for trained biases, other trained modules, or an initialisation that changes the
            base; or, with `kohya`, for what such a file cannot hold.
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
    for denoiser in parts_of(base, family.denoiser_name).values() if kohya else ():
        layers = [
            name
            for name, part in denoiser.named_modules()
            # PEFT's name for all of these, which it replaces while it puts the adapter in.
            if (isinstance(part, nn.Linear) if config.target_modules == "all-linear" else _is_target(config, name))
        ]
        check_kohya(layers, lora_metadata(config), family, denoiser.config)


def save_lora(
    pipeline: DiffusionPipeline,
    family: Family,
    model: PeftModel,
    folder: Path,
    state_dict: dict[str, Tensor] | None = None,
    *,
    kohya: bool = False,
) -> None:
    """Writes the active adapter in PEFT's files, from which training resumes, and for `load_lora_weights`.

    Args:
        kohya: Whether to write it under kohya's names too, into `KOHYA_FILE`.
    """
    model.save_pretrained(str(folder), state_dict=state_dict, selected_adapters=[model.active_adapter])
    write_lora(pipeline, family, model, folder, state_dict)
    if kohya:
        options, tensors = lora_metadata(lora_config(model)), adapter_tensors(model, state_dict)
        config = family.denoiser_config(pipeline)
        for own, layers, each in loras_of(family, list(family.trained_ranges(pipeline)), tensors, options):
            save_kohya(folder / own.own_file(KOHYA_FILE), layers, each, family, config)


def save_averaged(
    pipeline: DiffusionPipeline,
    family: Family,
    model: nn.Module,
    folder: Path,
    record: dict[str, Any],
    *,
    kohya: bool = False,
) -> None:
    """Writes the model, which has its averaged weights, beside its own: `<denoiser>_ema/`, or for a LoRA `ema/`.

    A denoiser's loads with `from_pretrained(folder, subfolder=...)`. A LoRA's folder has PEFT's files, for diffusers
    `EMA_LORA_FILE`, and the run's record, so that it can be exported and merged. Both are there whole or not at all.

    Args:
        kohya: See `save_lora`.
    """
    if not isinstance(model, PeftModel):
        for name, part in parts_of(model, family.denoiser_name).items():
            with _written_whole(folder / f"{name}{EMA_SUFFIX}") as place:
                save_denoiser(part, place)
        return
    with _written_whole(folder / EMA_FOLDER) as place:
        save_lora(pipeline, family, model, place, kohya=kohya)
        for name in family.trained_ranges(pipeline):
            own = family.with_denoiser(name)
            if (file := place / own.own_file(LORA_FILE)).is_file():
                file.rename(place / own.own_file(EMA_LORA_FILE))
        # PEFT's card, which says nothing of this folder.
        (place / "README.md").unlink(missing_ok=True)
        write_run_record(place, record)


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of the other one at the end."""
    unfinished = unfinished_name(folder)
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def run_record(
    trainer: str,
    base_model: str | None,
    base_folder: str | None,
    denoiser: ModelMixin,
    family: Family,
    negative: bool,
) -> dict[str, Any]:
    """What a run's weights are trained from.

    Args:
        trainer: Name of the class.
        base_model: Hub id, or None where the base came from a folder that others do not have.
        base_folder: Name of that folder, without the path to it; None where there is none.
        denoiser: Before it is trained, unwrapped.
        negative: Whether the result is a negative model, which is sampled with as such.
    """
    names = list(parts_of(denoiser, family.denoiser_name))
    return {
        "trainer": trainer,
        "base_model": base_model,
        "base_folder": base_folder,
        **fingerprints(denoiser),
        "pipeline_class": family.pipeline_class,
        "denoisers": [name for name in family.denoiser_names or names if name in names],
        # Without what diffusers notes of where and how the model was loaded.
        "denoiser_config": {
            name: value
            for name, value in denoiser.config.items()
            if not name.startswith("_") and name != "quantization_config"
        },
        "negative": negative,
    }


def write_run_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes what a folder's weights were trained from."""
    unfinished = folder / f"{RUN_RECORD}.unfinished"
    unfinished.write_text(json.dumps(record, indent=2) + "\n")
    unfinished.replace(folder / RUN_RECORD)


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """The record, or None where there is none that can be read."""
    try:
        return json.loads((folder / RUN_RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def denoisers_in(record: Mapping[str, Any], family: Family) -> list[str]:
    """The pipeline's attributes that a run trained; records of earlier versions name none."""
    return record.get("denoisers", [family.denoiser_name])
