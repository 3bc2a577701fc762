"""A LoRA under the names that kohya's scripts and ComfyUI give its layers."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mode
from typing import Any, NamedTuple

import torch
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..families import Family, all_families
from ..families.kohya import KohyaLayer
from .files import save_tensors


# Unlike the name of diffusers' file, at whose end `load_lora_weights(folder)` recognises it.
KOHYA_FILE = "kohya_lora_weights.safetensors"
# What such a file can express, by LoraConfig's names. The rest of a configuration changes what is computed.
_EXPRESSED = (
    *("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
)


class _Factors(NamedTuple):
    """One layer's LoRA: `scale * up @ down` is added to the weight."""

    down: Tensor
    up: Tensor
    scale: float


def check_kohya(layers: Iterable[str], options: Mapping[str, Any], family: Family, config: Mapping[str, Any]) -> None:
    """Raises where a LoRA has no place in a file of kohya's.

    Args:
        layers: Names of the diffusers modules that have a LoRA.
        options: The adapter's configuration, see `lora_metadata`.
        config: The denoiser's.

    Raises:
        ValueError: The family's layers have no names there, a layer has none, or an option cannot be expressed.
    """
    if family.kohya is None:
        known = ", ".join(sorted(each.pipeline_class for each in all_families() if each.kohya is not None))
        raise ValueError(
            f"lora_format='kohya': kohya's scripts and ComfyUI have no names for the layers of a "
            f"{family.pipeline_class}; they have for {known}. Use the file in diffusers' or PEFT's format."
        )
    if others := sorted(name for name, value in options.items() if name not in _EXPRESSED and value):
        raise ValueError(
            f"lora_format='kohya': files of this format cannot express {', '.join(others)} of the LoRA's "
            "configuration. Train without, or merge the LoRA into the pipeline (trl_diffusion_pref.export.merge_lora)."
        )
    if homeless := [name for name in layers if family.kohya.layer(name, config) is None]:
        raise ValueError(
            f"lora_format='kohya': {len(homeless)} of the LoRA's layers have no name in this format, first "
            f"{homeless[0]}. Leave them out of target_modules, or merge the LoRA into the pipeline "
            "(trl_diffusion_pref.export.merge_lora)."
        )


def kohya_state_dict(
    tensors: Mapping[str, Tensor], options: Mapping[str, Any], family: Family, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of a kohya file: `<layer>.lora_down.weight`, `<layer>.lora_up.weight` and `<layer>.alpha`.

    diffusers has `convert_state_dict_to_kohya`, which knows UNets alone and writes alpha = rank whatever was trained.

    Args:
        tensors: The LoRA by PEFT's names without prefix: `<module>.lora_A.weight`, `(rank, in)` or of a convolution
            `(rank, in, height, width)`, and `<module>.lora_B.weight`, `(out, rank)`.
        options: The adapter's configuration, see `lora_metadata`.
        config: The denoiser's.

    Returns:
        alpha is float32 and alpha / rank the trained scale, in `lora_up` where `alpha_pattern` or `use_rslora` give
        layers other alphas than most have: diffusers' loader of UNets ignores those of attention. Layers that are one
        layer in the authors' code become one LoRA of as many times the rank, in blocks.

    Raises:
        ValueError: See `check_kohya`; or tensors that are no LoRA's factors.
    """
    ends = (".lora_A.weight", ".lora_B.weight")
    if others := sorted(name for name in tensors if not name.endswith(ends)):
        raise ValueError(f"lora_format='kohya': {others[0]} is none of {' and '.join(ends)}, which such a file holds.")
    modules = sorted({name.removesuffix(ends[0]).removesuffix(ends[1]) for name in tensors})
    check_kohya(modules, options, family, config)
    assert family.kohya is not None
    alphas = {module: _alpha(module, len(tensors[module + ends[0]]), options) for module in modules}
    common = mode(alphas.values()) or 1.0
    places: dict[str, dict[int, _Factors]] = {}
    widths: dict[str, tuple[int, ...]] = {}
    for module in modules:
        down, up = (tensors[module + end] for end in ends)
        up = up if alphas[module] == common else up * (alphas[module] / common)
        place: KohyaLayer | None = family.kohya.layer(module, config)
        assert place is not None
        places.setdefault(place.name, {})[place.part] = _Factors(down, up, common / len(down))
        widths[place.name] = place.widths
    result = {}
    for name, parts in places.items():
        factors = parts[0] if len(widths[name]) == 1 else _joined(parts, widths[name])
        result[f"{name}.lora_down.weight"] = factors.down.contiguous()
        result[f"{name}.lora_up.weight"] = factors.up.contiguous()
        result[f"{name}.alpha"] = torch.tensor(factors.scale * len(factors.down), dtype=torch.float32)
    return result


def _alpha(module: str, rank: int, options: Mapping[str, Any]) -> float:
    """With which alpha / rank is PEFT's scale of a module's LoRA."""
    patterns = options.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), options["lora_alpha"])
    return float(alpha * rank**0.5 if options.get("use_rslora") else alpha)


def _joined(parts: Mapping[int, _Factors], widths: tuple[int, ...]) -> _Factors:
    """One LoRA of several side by side: each has rows of `down` and columns of `up` of its own, zeros elsewhere.

    All get the largest rank, since diffusers takes a LoRA apart again only where the blocks are alike.
    """
    rank = max(len(factors.down) for factors in parts.values())
    scale = max((factors.scale for factors in parts.values()), key=abs)
    number, any_part = next(iter(parts.items()))
    unit = len(any_part.up) // widths[number]
    down = any_part.down.new_zeros(len(widths) * rank, any_part.down.shape[1])
    up = any_part.up.new_zeros(sum(widths) * unit, len(widths) * rank)
    for part, factors in parts.items():
        row, start, size = part * rank, sum(widths[:part]) * unit, len(factors.down)
        down[row : row + size] = factors.down
        own = factors.up if factors.scale == scale else factors.up * (factors.scale / scale)
        up[start : start + len(own), row : row + size] = own
    return _Factors(down, up, scale)


def save_kohya(
    file: Path,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
    family: Family,
    config: Mapping[str, Any],
) -> None:
    """Writes a file of `kohya_state_dict`."""
    save_tensors(kohya_state_dict(tensors, options, family, config), file, {"format": "pt"})
