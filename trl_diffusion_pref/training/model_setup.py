"""Makes a pipeline's denoiser, or an adapter in it, trainable; raises first for what could not be trained well."""

import copy
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import recurse_remove_peft_layers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..export.weights import check_exportable, lora_config, lora_metadata
from ..families import Family
from ..families.denoisers import NoiseRouter, parts_of
from ..families.peft_format import PEFT_PREFIX
from ..fingerprint import weights_fingerprint
from .blocks import apply_compile, apply_gradient_checkpointing, check_compiled, check_gradient_checkpointing
from .config import DiffusionPreferenceConfig
from .quantised import check_quantised, prepare_layers
from .references import OLD_POLICY_ADAPTER, REFERENCE_ADAPTER


logger = get_logger(__name__)
# An option of torchao's optimizers, as transformers reads it.
_ROUNDED_BY_CHANCE = re.compile(r"bf16_stochastic_round\s*=\s*(y|yes|t|true|on|1)\b", re.IGNORECASE)


@contextmanager
def taken_out_of_peft_model(
    pipeline: DiffusionPipeline, family: Family
) -> Iterator[tuple[ModelMixin, PeftModel | None]]:
    """Puts the denoiser itself into the pipeline where a `PeftModel` was wrapped around it; on an error puts it back.

    Yields:
        The denoiser, and the wrapper that it came in, for `make_trainable`.
    """
    denoiser = family.denoiser(pipeline)
    wrapped = [name for name, part in parts_of(denoiser, "").items() if name and isinstance(part, PeftModel)]
    if wrapped:
        raise ValueError(
            f"The pipeline's {' and '.join(wrapped)} came in a PeftModel, which can be trained alone "
            f"(denoiser={wrapped[0]!r}). To train several denoisers at once, put their LoRAs in by load_lora_weights."
        )
    if not isinstance(denoiser, PeftModel):
        yield denoiser, None
        return
    base = denoiser.get_base_model()
    setattr(pipeline, family.denoiser_name, base)
    try:
        yield base, denoiser
    except BaseException:
        setattr(pipeline, family.denoiser_name, denoiser)
        raise


def carries_adapter(module: nn.Module) -> bool:
    """Whether there are PEFT layers in a module."""
    return any(isinstance(part, BaseTunerLayer) for part in module.modules())


def with_targets(peft_config: LoraConfig, family: Family, base: nn.Module) -> LoraConfig:
    """A copy, with the family's target modules where it names none.

    Args:
        base: The denoiser. Of several, regular expressions in the config are those of one denoiser's modules.
    """
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = family.lora_targets(base)
    if isinstance(base, NoiseRouter):
        for option in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(peft_config, option), str) and value != "all-linear":
                setattr(peft_config, option, rf"(?:(?:{'|'.join(base.names)})\.)?(?:{value})")
    return peft_config


def check_trainable(
    base: ModelMixin,
    family: Family,
    peft_config: LoraConfig | None,
    wrapper: PeftModel | None,
    args: DiffusionPreferenceConfig,
    device_type: str | None = None,
) -> None:
    """Raises for what `make_trainable` could not do well, before anything is changed.

    Args:
        device_type: That is trained on; None for the config's.

    Raises:
        ValueError: A distilled denoiser, a second adapter, several, float16 weights for full training, or a LoRA that
            could not be loaded.
    """
    if base.config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"This {type(base).__name__} is distilled: it takes the guidance scale as an input "
            "(time_cond_proj_dim), which training would leave out. Tune the model that it was distilled from."
        )
    if isinstance(base, NoiseRouter) and args.shards_weights:
        raise ValueError(
            f"FSDP and DeepSpeed cannot train {' and '.join(base.names)} at once: a process calls the one that its "
            "samples' noise asks for, and the others would wait for it. Use DDP, or train one at a time, with "
            f"denoiser={base.names[-1]!r}."
        )
    check_gradient_checkpointing(args, family, base)
    check_compiled(args, family, base)
    lora = peft_config is not None or carries_adapter(base)
    check_quantised(base, family, args, lora=lora, device_type=device_type)
    kohya = args.lora_format == "kohya"
    if kohya and not lora:
        raise ValueError("lora_format='kohya' is for a LoRA. Pass peft_config=LoraConfig(...), or leave it out.")
    if peft_config is not None:
        check_exportable(with_targets(peft_config, family, base), base, family, kohya=kohya)
    if carries_adapter(base):
        if peft_config is not None:
            raise ValueError(
                f"peft_config asks for a new adapter, but the pipeline's {family.denoiser_name} already "
                "carries an adapter, from an earlier trainer or load_lora_weights. Leave peft_config out to go on "
                "training that one, load the pipeline afresh, or merge the adapter first (pipeline.fuse_lora() "
                "and pipeline.unload_lora_weights())."
            )
        names = _injected(base)
        if wrapper is None and len(names) != 1:
            raise ValueError(
                f"The pipeline's {family.denoiser_name} carries {len(names)} adapters that can be found "
                f"({', '.join(names) or 'none'}); exactly one can be trained. Unload the others."
            )
        if kohya:
            check_exportable(lora_config(wrapper) if wrapper else base.peft_config[names[0]], base, family, kohya=True)
    elif peft_config is None and base.dtype == torch.float16:
        raise ValueError(
            f"The {family.denoiser_name}'s weights are float16, in which small updates vanish and the loss "
            "overflows. For full fine-tuning load them in float32 (dtype=torch.float32) and set bf16=True "
            "or fp16=True for mixed precision, or train a LoRA with peft_config=LoraConfig(...)."
        )


def make_trainable(
    base: ModelMixin,
    pipeline: DiffusionPipeline,
    family: Family,
    peft_config: LoraConfig | None,
    wrapper: PeftModel | None,
    args: DiffusionPreferenceConfig,
) -> nn.Module:
    """Freezes everything, then makes the denoiser or an adapter in it trainable.

    Args:
        base: The pipeline's denoiser.
        peft_config: Of a new adapter.
        wrapper: What the denoiser came in, see `taken_out_of_peft_model`.
        args: Their seed decides a new adapter's weights, whatever was drawn from the global generator before.

    Returns:
        The denoiser, or the PEFT model around it.
    """
    apply_gradient_checkpointing(base, args)
    apply_compile(base, args)
    prepare_layers(base)
    if isinstance(base, NoiseRouter):
        # DDP waits for the gradients of all parameters, and a step may need one denoiser alone.
        args.ddp_find_unused_parameters = True
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    if carries_adapter(base):
        return _carried_adapter(base, wrapper)
    if peft_config is not None:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(args.seed)
            return get_peft_model(base, with_targets(peft_config, family, base))
    if base.dtype == torch.bfloat16 and not _ROUNDED_BY_CHANCE.search(args.optim_args or ""):
        logger.warning(
            f"Full fine-tuning of a bfloat16 {family.denoiser_name}: updates below 1/256 of a weight are "
            "rounded away. Load it in float32 and set bf16=True, or, where memory forbids, round by chance: "
            "optim='adamw_torch_8bit', optim_args='bf16_stochastic_round=True' (pip install torchao)."
        )
    return base.requires_grad_(True)


def _injected(base: ModelMixin) -> list[str]:
    """Adapters without a PEFT model around them. An earlier trainer's frozen ones are none to go on with."""
    frozen = (REFERENCE_ADAPTER, OLD_POLICY_ADAPTER)
    return [name for name in getattr(base, "peft_config", {}) if name not in frozen]


def _carried_adapter(base: ModelMixin, model: PeftModel | None) -> PeftModel:
    """The adapter that the denoiser carries, as a PEFT model that goes on training it."""
    if model is None:
        # load_lora_weights injects the layers without the PEFT model around them, which saving and resuming need.
        (name,) = _injected(base)
        config = copy.deepcopy(base.peft_config[name])
        state_dict = get_peft_model_state_dict(base, adapter_name=name)
        _remove_adapters(base)
        model = get_peft_model(base, config)
        set_peft_model_state_dict(model, {PEFT_PREFIX + name: tensor for name, tensor in state_dict.items()})
    # Everything is frozen by now; this makes the active adapter's own parameters trainable.
    model.set_adapter(model.active_adapter)
    return model


def _remove_adapters(denoiser: nn.Module) -> None:
    for part in parts_of(denoiser, "").values():
        if isinstance(part, PeftAdapterMixin):
            part.unload_lora()
        else:
            # Of pipelines without load_lora_weights: PEFT put them in.
            recurse_remove_peft_layers(part)
            del part.peft_config


def starting_fingerprint(model: nn.Module, record: Mapping[str, Any]) -> str:
    """Of the weights that a run starts from: the base's, unless an adapter makes them another function.

    A new LoRA of which one factor is zero computes what the base computes, so that runs with and without one share
    what is stored of the base.
    """
    last_factors = [p for name, p in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    if not isinstance(model, PeftModel) or (last_factors and not any(bool(p.any()) for p in last_factors)):
        return record["base_fingerprint"]
    # The scale of a layer is among the options, not among the weights.
    options = lora_metadata(lora_config(model))
    return f"{weights_fingerprint(model)} {json.dumps(options, sort_keys=True, default=str)}"


# What TRL's trainers take and these have no use for, with what to do here.
_NOT_TAKEN = {
    "processing_class": "the pipeline brings its own tokenizers",
    "tokenizer": "the pipeline brings its own tokenizers",
    "compute_metrics": "evaluation computes its own metrics; for others sample from trainer.pipeline",
    "preprocess_logits_for_metrics": "a denoiser has no logits",
    "quantization_config": "set quantize in the config, or load the pipeline quantised and pass it as model",
    "reward_funcs": "score samples before training, and pass pairs",
    "ref_model": "this method has no reference model",
}


def check_arguments(trainer: str, config_class: type, args: Any, not_taken: Mapping[str, Any]) -> None:
    """Raises where a trainer was called as another library's is.

    Raises:
        TypeError: Says what to do here.
    """
    for name in not_taken:
        advice = _NOT_TAKEN.get(name, "it is no argument of this trainer")
        raise TypeError(f"{trainer} does not take {name!r}: {advice}. Leave it out.")
    if args is not None and not isinstance(args, config_class):
        raise TypeError(
            f"args is a {type(args).__name__}; {trainer} takes a {config_class.__name__} as its second "
            "argument. (TRL's DPOTrainer has ref_model there; here it is a keyword of trainers with a reference.)"
        )


def check_can_evaluate(accelerator: Accelerator, *, trained: bool) -> None:
    """Raises where accelerate could not prepare a model for an evaluation before training.

    Raises:
        RuntimeError: FSDP2, which shards a model only together with its optimizer.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if not trained and getattr(plugin, "fsdp_version", 1) == 2:
        raise RuntimeError(
            "With FSDP2 evaluate() needs train() before it: accelerate shards a model only together with its "
            "optimizer. For a model that is not trained, use evaluation.preference_accuracy in one process."
        )


def undo_preparation(model: nn.Module, wrapped: nn.Module, accelerator: Accelerator) -> bool:
    """Lets training prepare the model again after an evaluation; returns whether there was one.

    An evaluation before training prepares the model without DDP, and accelerate prepares a model only once: the
    processes would then train apart without exchanging gradients, and nothing would be raised.
    """
    prepared = getattr(model, "_is_accelerate_prepared", False)
    if not prepared or accelerator.unwrap_model(wrapped, keep_torch_compile=False) is not model:
        return False
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    model._is_accelerate_prepared = False
    return True
