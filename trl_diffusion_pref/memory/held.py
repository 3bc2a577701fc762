"""Bytes that are held throughout training beside the weights: the optimiser's state, and a reference or teacher."""

from collections.abc import Iterable

from torch import Tensor, nn

from ..trainer.base_config import DiffusionPreferenceConfig
from ..trainer.diffusion_dpo_config import DiffusionDPOConfig
from ..trainer.self_npo_config import SelfNPOConfig


# Below it bitsandbytes keeps states in float32 (its min_8bit_size), above in 8 bits with a float32 maximum per block.
_LEAST_8BIT_SIZE = 4096
_8BIT_BLOCK = 256
# States as large as the parameter: in its dtype, and in 8 bits.
_STATES = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_apex_fused": 2,
    "paged_adamw_32bit": 2,
    "lion_32bit": 1,
    "paged_lion_32bit": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "sgd": 0,
}
_STATES_8BIT = {
    "adamw_bnb_8bit": 2,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_8bit": 1,
    "paged_lion_8bit": 1,
    "rmsprop_bnb_8bit": 1,
}


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count_of(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def optimizer_bytes(cfg: DiffusionPreferenceConfig, trained: list[nn.Parameter]) -> int:
    """Bytes of the optimiser's state after its first step.

    Raises:
        ValueError: It is not known for this optimiser.
    """
    name = getattr(cfg.optim, "value", cfg.optim)
    if name in _STATES:
        return _STATES[name] * bytes_of(trained)
    if name not in _STATES_8BIT:
        raise ValueError(
            f"optim={name!r}: how large its state is, is not known here. Estimate with one of "
            f"{', '.join([*_STATES, *_STATES_8BIT])}."
        )
    total = 0
    for parameter in trained:
        count = parameter.numel()
        eight_bit = count + -(-count // _8BIT_BLOCK) * 4
        total += _STATES_8BIT[name] * (eight_bit if count >= _LEAST_8BIT_SIZE else 4 * count)
    return total


def reference_of(
    cfg: DiffusionPreferenceConfig, denoiser: nn.Module, trained: list[nn.Parameter], *, new_adapter: bool
) -> tuple[int, str]:
    """Bytes that a reference or teacher holds, and when it runs: "before" the trained model, "after" it or never."""
    lora = len(trained) < sum(1 for _ in denoiser.parameters())
    whole = bytes_of([*denoiser.parameters(), *denoiser.buffers()])
    if isinstance(cfg, DiffusionDPOConfig):
        if cfg.reference == "precomputed":
            return 0, ""
        kind = cfg.reference
        if kind == "auto":
            kind = "copy" if not lora else "adapter_off" if new_adapter else "frozen_adapter"
        return {"copy": whole, "frozen_adapter": bytes_of(trained), "adapter_off": 0}[kind], "after"
    if isinstance(cfg, SelfNPOConfig):
        moves = cfg.teacher == "ema"
        if lora:
            return (0 if new_adapter and not moves else bytes_of(trained)), "before"
        # A moving teacher is kept in float32.
        return (4 * count_of([*denoiser.parameters(), *denoiser.buffers()]) if moves else whole), "before"
    return 0, ""
