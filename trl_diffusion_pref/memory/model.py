"""What is trained, without values, with an adapter as the trainers make it."""

import copy
import os
from types import SimpleNamespace

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.utils._device import set_device

from ..families import Family, family_for, family_of_denoiser
from ..families.weightless import pipeline_around, pipeline_from_configs
from ..training.config import DiffusionPreferenceConfig
from ..training.model_setup import carries_adapter, check_trainable, make_trainable
from ..training.pipelines import family_of
from ..training.quantised import check_quantize
from .quantised import keep_without_values, memo_without_values


_WHERE = ("revision", "cache_dir", "token", "local_files_only")


def pipeline_of(
    model: str | os.PathLike | DiffusionPipeline | nn.Module, args: DiffusionPreferenceConfig
) -> tuple[Family, DiffusionPipeline]:
    """The family, and a pipeline that at least says all sizes, of what `estimate_memory` takes."""
    if isinstance(model, (str, os.PathLike)):
        options = args.loading
        family = family_of(model, options)
        dtype = options.get("dtype") or options.get("torch_dtype") or torch.float32
        where = {name: options[name] for name in _WHERE if name in options}
        return family, pipeline_from_configs(model, dtype=dtype, **where)
    if isinstance(model, nn.Module):
        family = family_of_denoiser(model)
        return family, pipeline_around(family, model)
    check_quantize(model, args, lora=True)
    return family_for(model), model


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy with weights on the meta device, adapters and dtypes as they are."""
    memo = memo_without_values(module)
    for parameter in module.parameters():
        if id(parameter) not in memo:
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    copied = copy.deepcopy(module, memo)
    keep_without_values(copied, module)
    return copied


def make_fake(module: nn.Module) -> None:
    """Gives a module fake tensors in place of its own; called within a `FakeTensorMode`."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_like(tensor, device="cpu")
            if isinstance(tensor, nn.Parameter):
                made[id(tensor)] = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
        return made[id(tensor)]

    for part in module.modules():
        own = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False), *vars(part).items())
        for name, value in own:
            if isinstance(value, Tensor):
                setattr(part, name, fake(value))


def trainable(
    denoiser: nn.Module,
    family: Family,
    peft_config: LoraConfig | None,
    args: DiffusionPreferenceConfig,
    device_type: str,
) -> tuple[nn.Module, bool]:
    """A denoiser on the meta device as the trainers make it trainable, and whether it came with an adapter."""
    carried = carries_adapter(denoiser)
    wrapper = denoiser if isinstance(denoiser, PeftModel) else None
    base = denoiser.get_base_model() if isinstance(denoiser, PeftModel) else denoiser
    if peft_config is not None:
        # How an adapter starts does not change its size, and some ways decompose the weights.
        peft_config = copy.copy(peft_config)
        peft_config.init_lora_weights = True
    check_trainable(base, family, peft_config, wrapper, args, device_type)
    pipeline = SimpleNamespace(components={family.denoiser_name: base})
    with torch.device("meta"):
        model = make_trainable(base, pipeline, family, peft_config, wrapper, args)
    if isinstance(model, PeftModel):
        # Where the trainers put a frozen copy of the adapter.
        vars(model)["add_adapter"] = set_device("meta")(model.add_adapter)
    return model, carried
