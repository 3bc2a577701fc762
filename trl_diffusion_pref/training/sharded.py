"""FSDP: what may be asked for, and checkpoints that go from sharded weights to whole ones and back.

FSDP writes an optimizer's state by the parameters' names, and torch's optimizers write it by their numbers.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from .config import DiffusionPreferenceConfig


# As transformers and accelerate name them.
_WEIGHTS, _OPTIMIZER, _OPTIMIZER_BY_NUMBER = "pytorch_model_fsdp.bin", "optimizer.bin", "optimizer.pt"


def check_sharding(args: DiffusionPreferenceConfig, accelerator: Accelerator) -> None:
    """Raises where accelerate does not do what the options ask for, or would write what no pipeline can load.

    Raises:
        ValueError: FSDP is asked for and not on, or has its weights written in shards.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if args.fsdp and plugin is None:
        raise ValueError(
            f"fsdp={args.fsdp!r} has no effect here: accelerate shards weights over several processes with an "
            f"accelerator each, and this run has {accelerator.num_processes} on {accelerator.device.type}. Leave it "
            "out, and the processes train with DDP."
        )
    if plugin is not None and "FULL" not in str(plugin.state_dict_type):
        raise ValueError(
            f"fsdp_state_dict_type={plugin.state_dict_type.name} writes weights in shards, which no pipeline loads. "
            "Set FULL_STATE_DICT, in fsdp_config or in accelerate's config."
        )


def is_sharded_checkpoint(folder: Path) -> bool:
    """Whether FSDP wrote a checkpoint."""
    return (folder / _WEIGHTS).is_file()


def read_weights(model: nn.Module, whole: dict[str, Any]) -> None:
    """Puts whole weights, all or an adapter's, into a model, which may be sharded.

    Raises:
        ValueError: The model has no weights of some name.
    """
    found = set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=False))
    if found.unexpected_keys:
        raise ValueError(f"The checkpoint holds weights that the model lacks: {', '.join(found.unexpected_keys[:3])}.")


def read_adapter(model: PeftModel, folder: Path) -> dict[str, Tensor]:
    """A saved adapter's weights by the names that the model has for them."""
    name = model.active_adapter
    stored = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    # PEFT leaves the adapter's name out, which comes before the last part.
    return {
        f"{layer}.{name}.{kind}": value for key, value in stored.items() for layer, _, kind in [key.rpartition(".")]
    }


def read_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, sharded: bool) -> None:
    """Takes the state of a run whose weights were whole where they are sharded now, or the reverse."""
    file = folder / (_OPTIMIZER_BY_NUMBER if sharded else _OPTIMIZER)
    stored = torch.load(file, map_location="cpu", weights_only=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    if sharded:
        by_name = _with_keys(stored, dict(enumerate(in_order)))
        set_optimizer_state_dict(model, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(_with_keys(stored, {name: number for number, name in enumerate(in_order)}))


def _with_keys(stored: dict[str, Any], keys: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other keys for its parameters, in order, as torch's optimizers read numbers."""
    return {
        "state": {keys[key]: state for key, state in stored["state"].items()},
        "param_groups": [
            {**group, "params": sorted(keys[key] for key in group["params"])} for group in stored["param_groups"]
        ],
    }
