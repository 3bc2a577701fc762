"""How a denoiser runs its blocks: with activations kept or computed again, and as written or compiled."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import ModelMixin
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..families import Family
from ..families.base import model_inside
from ..families.denoisers import parts_of
from .config import DiffusionPreferenceConfig


logger = get_logger(__name__)
# Each width of a block, with and without gradients and adapter, is compiled once; torch gives up after 8 versions.
_VERSIONS = 64


class SomeBlocks:
    """Computes the activations of a share of the blocks again in the backward pass, evenly spread over the depth.

    diffusers' models call it in place of each block, `(block, *inputs)`, while gradients are computed.

    Args:
        share: In (0, 1].
        options: Further ones of `torch.utils.checkpoint.checkpoint`.
    """

    def __init__(self, share: float, **options: Any) -> None:
        self.share, self.options = share, {"use_reentrant": False, **options}
        self._places: dict[Callable[..., Any], int] = {}  # of the blocks, in the order of the first step

    def __call__(self, block: Callable[..., Any], *inputs: Any) -> Any:
        place = self._places.setdefault(block, len(self._places))
        # Whether the blocks so far make one more: with 0.5 every second one. Decimal shares are not exact in binary.
        before, after = (int(self.share * count + 1e-6) for count in (place, place + 1))
        return checkpoint(block, *inputs, **self.options) if after > before else block(*inputs)


def has_gradient_checkpointing(base: ModelMixin) -> bool:
    """Whether a diffusers model has it at all, which it says under no public name."""
    return getattr(base, "_supports_gradient_checkpointing", True)


def check_gradient_checkpointing(args: DiffusionPreferenceConfig, family: Family, base: ModelMixin) -> None:
    """Switches the default off where the family or its denoiser cannot do it, and raises where it was asked for.

    Raises:
        ValueError: Checkpointing was asked for.
    """
    has_it = has_gradient_checkpointing(base)
    if not (args.activation_checkpointing or args.gradient_checkpointing) or (
        family.gradient_checkpointing and has_it
    ):
        return
    denoiser = f"The {family.denoiser_name} of {family.pipeline_class}"
    if not args.checkpointing_is_default:
        problem = "gives wrong results with" if has_it else "does not support"
        raise ValueError(f"{denoiser} {problem} activation checkpointing. Set activation_checkpointing=False.")
    logger.warning(f"{denoiser} cannot be trained with activation checkpointing, so it is off.")
    args.activation_checkpointing = args.gradient_checkpointing = False


def apply_gradient_checkpointing(base: ModelMixin, args: DiffusionPreferenceConfig) -> None:
    """diffusers names the method differently, so it is called here, and the loop's options are switched off."""
    if args.activation_checkpointing or args.gradient_checkpointing:
        base.enable_gradient_checkpointing(SomeBlocks(args.checkpointing_share))
    elif base.is_gradient_checkpointing:
        # From an earlier trainer on the same pipeline, or switched on by its owner: the config decides.
        base.disable_gradient_checkpointing()
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        setattr(args, name, False)


def check_compiled(args: DiffusionPreferenceConfig, family: Family, base: ModelMixin) -> None:
    """Raises where `torch_compile` cannot be served.

    Raises:
        ValueError: A mode with CUDA graphs, or a model that does not say which blocks it repeats.
    """
    if not args.torch_compile:
        return
    if args.torch_compile_mode in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"torch_compile_mode={args.torch_compile_mode!r} records CUDA graphs, in which a block's second call "
            "overwrites what its first gave, and a step calls blocks of one kind many times before its backward pass. "
            "Leave it out, or set torch_compile_mode='max-autotune-no-cudagraphs'."
        )
    for part in parts_of(base, family.denoiser_name).values():
        if not _repeated_blocks(part):
            raise ValueError(
                f"torch_compile: {type(part).__name__} does not say which blocks it repeats (diffusers' "
                "_repeated_blocks), and compiling it as a whole takes many minutes for every shape. Set "
                "torch_compile=False."
            )


def apply_compile(base: ModelMixin, args: DiffusionPreferenceConfig) -> None:
    """Compiles each kind of block once, in place: names of weights, checkpoints and adapters stay as they are.

    accelerate would compile the whole model, which takes minutes for each shape, and leave references as written.
    """
    if not args.torch_compile:
        return
    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    compile_blocks(base, {name: value for name, value in options.items() if value is not None})
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None


def compile_blocks(base: nn.Module, options: dict[str, Any]) -> None:
    """Compiles the blocks of one or several denoisers with these options of `torch.compile`."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VERSIONS)
    for part in parts_of(base, "").values():
        part._repeated_blocks = _repeated_blocks(part)
        part.compile_repeated_blocks(**options)
        part.compiled_with = options


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, compiled as the model is: copies lose that, and a reference would not compute quite the same."""
    copied = copy.deepcopy(model)
    for part in parts_of(model_inside(copied), "").values():
        if hasattr(part, "compiled_with"):
            compile_blocks(part, part.compiled_with)
    return copied


def _repeated_blocks(model: ModelMixin) -> list[str]:
    """Their classes' names; older models say only which classes must stay on one device, blocks among them."""
    return list(getattr(model, "_repeated_blocks", None) or getattr(model, "_no_split_modules", None) or ())
