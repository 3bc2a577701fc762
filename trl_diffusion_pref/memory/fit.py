"""Which options make a config fit a card, and what they cost."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from ..fingerprint import is_quantised
from ..training.config import DiffusionPreferenceConfig
from ..training.reference_config import ReferenceConfig
from .cards import GIB, SHARE, card_bytes, smallest_card
from .estimate import CountedStep
from .model import meta_copy


Model: TypeAlias = str | os.PathLike | DiffusionPipeline | nn.Module

# Larger batches are not looked for.
LARGEST = 512
_LORA_RANK = 16
_EIGHT_BIT, _ROUNDED = "adamw_bnb_8bit", "adamw_torch_8bit"


@dataclass(frozen=True)
class FitOption:
    """One way to train, and what it takes; see `fit_memory`.

    Args:
        changes: Of the config and the model, as the options to set; empty for the config as asked.
        memory: Bytes at the batch that was asked for.
        fits: Whether that is within the card's limit.
        largest_batch: The largest `per_device_train_batch_size` that fits, 0 where not even 1 does; at most 512.
        slow_down: Time of a step over that of the config as asked, by the operations counted: an expectation.
        least: Bytes at a batch of 1.
    """

    changes: tuple[str, ...]
    memory: int
    fits: bool
    largest_batch: int
    slow_down: float
    least: int

    def __str__(self) -> str:
        return " + ".join(self.changes) or "as asked"


@dataclass(frozen=True)
class MemoryFit:
    """What fits a card; see `fit_memory`. Printed, a table.

    Args:
        card: Its bytes.
        options: The config as asked, then each change by itself, then changes together.
        batch_size, gradient_accumulation_steps: That were asked for.
        conditions: What was counted as asked, in words.
    """

    card: int
    options: tuple[FitOption, ...]
    batch_size: int
    gradient_accumulation_steps: int
    conditions: str

    @property
    def limit(self) -> int:
        """Bytes that training may take of the card."""
        return int(SHARE * self.card)

    @property
    def fits(self) -> bool:
        """Whether the config fits as it was asked for."""
        return self.options[0].fits

    @property
    def nearest(self) -> FitOption | None:
        """Where no option fits with any batch, the one that takes least; else None."""
        if any(option.largest_batch for option in self.options):
            return None
        return min(self.options, key=lambda option: option.least)

    def __str__(self) -> str:
        width = max(len(str(option)) for option in self.options)
        size = f"{self.batch_size} row{'s' * (self.batch_size > 1)}"
        lines = [
            self.conditions,
            f"A card of {self.card / GIB:g} GiB, of which {SHARE:.0%} may be taken: {self.limit / GIB:.2f} GiB. "
            f"{'It fits as asked.' if self.fits else 'It does not fit as asked.'}",
            "",
            f"{'':{width}}{f'GiB at {size}':>16}{'fits':>6}{'largest batch':>15}{'time of a step':>16}",
        ]
        for option in self.options:
            largest = f"{'>= ' if option.largest_batch == LARGEST else ''}{option.largest_batch or '-'}"
            lines.append(
                f"{option!s:{width}}{option.memory / GIB:16.2f}{'yes' if option.fits else 'no':>6}{largest:>15}"
                f"{option.slow_down:>14.2f} x"
            )
        lines += ["", *self._advice(), "Times are expected from the operations counted, not measured."]
        return "\n".join(lines)

    def _advice(self) -> list[str]:
        nearest = self.nearest
        if nearest is not None:
            size = smallest_card(nearest.least)
            card = f"a card of {size} GB" if size else "a larger card than 141 GB"
            return [
                f"Nothing fits. Least takes {nearest}: {nearest.least / GIB:.2f} GiB at one row, for which {card} is "
                "needed."
            ]
        if any(option.fits for option in self.options):
            return []
        most = max(option.largest_batch for option in self.options)
        batch = max(size for size in range(1, most + 1) if self.batch_size % size == 0)
        accumulation = self.gradient_accumulation_steps * self.batch_size // batch
        return [
            f"The same step in smaller batches: per_device_train_batch_size={batch}, "
            f"gradient_accumulation_steps={accumulation}."
        ]


def fit_memory(
    card: str | int,
    model: Model,
    cfg: DiffusionPreferenceConfig,
    peft_config: LoraConfig | None = None,
    device_type: str | None = None,
) -> MemoryFit:
    """Says whether a config fits a card, the largest batch that does, and which changes make it fit.

    Memory is that of `estimate_memory`, of which an option may take 90 % of the card; the rest is for what the
    estimate does not count. If the config does not fit, these changes are tried one by one, and then together in
    this order until the batch fits:

    * 8-bit Adam, in place of another Adam;
    * under a LoRA the base in bfloat16 (float16 with `fp16=True`), if `model` is a name or a denoiser alone;
    * a precomputed reference, in place of one that takes memory; it also needs a pass over all data before training;
    * activation checkpointing;
    * under a LoRA the base in 4 bit (`quantize="nf4"`), if `model` is a name or a denoiser alone.

    If all of that is not enough, so does a LoRA of rank 16 instead of all weights, which trains something else. A
    config that fits is compared with what makes its steps faster: no checkpointing, and a precomputed reference.

    The time of a step is expected from the floating-point operations of its matrix products, convolutions and
    attention, counted and not measured. It leaves out that small batches use a GPU less well, that 4-bit weights are
    unpacked at each use, and the sampling of online trainers.

    Args:
        card: Its size as cards are sold, such as "24GB", which is taken for GiB; or the device's bytes.
        model, cfg, peft_config, device_type: See `estimate_memory`. Each row takes several estimates.

    Returns:
        Bytes and batches; printed, a table.

    Raises:
        TypeError: See `estimate_memory`.
        ValueError: `card` is no size; or see `estimate_memory`.

    Example:

    ```python
    from trl_diffusion_pref import MaPOConfig, fit_memory

    cfg = MaPOConfig(output_dir="mapo", per_device_train_batch_size=4)
    print(fit_memory("24GB", "stabilityai/stable-diffusion-xl-base-1.0", cfg))
    ```
    """
    size = card_bytes(card)
    wish = _Wish(model, cfg, peft_config, device_type, int(SHARE * size))
    return MemoryFit(
        card=size,
        options=tuple(wish.options()),
        batch_size=cfg.per_device_train_batch_size,
        gradient_accumulation_steps=cfg.gradient_accumulation_steps,
        conditions=wish.asked.conditions,
    )


def largest_batch(memory: Callable[[int], int], limit: int) -> int:
    """The largest batch size within a limit, at most `LARGEST`; 0 where there is none.

    Memory is the largest of several sums that are linear in the batch, one for each moment of a step, so that a line
    through two sizes never says too much of larger ones.

    Args:
        memory: Bytes of a batch size; an estimate for each call.
    """
    if memory(1) > limit:
        return 0
    if memory(2) > limit:
        return 1
    fits, over = [1, 2], LARGEST + 1
    while True:
        before, last = fits[-2:]
        rise, left = memory(last) - memory(before), limit - memory(last)
        most = min(over - 1, last + left * (last - before) // rise if rise > 0 else LARGEST)
        if most <= last:
            return last
        if memory(most) <= limit:
            fits.append(most)
            continue
        # Between a size that fits and one that does not, a line says too much, so that what it gives fits.
        over = most
        between = last + left * (over - last) // (memory(over) - memory(last))
        if between == last and (over == last + 1 or memory(last + 1) > limit):
            return last
        fits.append(max(between, last + 1))


class _Wish:
    """A config on a card, with the steps that were counted, since most options share some."""

    def __init__(
        self,
        model: Model,
        cfg: DiffusionPreferenceConfig,
        peft_config: LoraConfig | None,
        device_type: str | None,
        limit: int,
    ) -> None:
        self._model, self._cfg, self._peft_config, self._device_type = model, cfg, peft_config, device_type
        self._limit, self._half = limit, "float16" if cfg.fp16 else "bfloat16"
        self._batch = cfg.per_device_train_batch_size
        self._steps: dict[frozenset[str], CountedStep] = {}
        # As the options to set.
        self.checkpointing, self.no_checkpointing = "activation_checkpointing=True", "activation_checkpointing=False"
        self.eight_bit, self.precomputed, self.nf4 = (
            f'optim="{_EIGHT_BIT}"',
            'reference="precomputed"',
            'quantize="nf4"',
        )
        self.half = f'model_init_kwargs={{"dtype": "{self._half}"}}'
        # All weights in half precision lose small updates, unless the optimizer rounds by chance.
        self.rounded = (
            f'model_init_kwargs={{"dtype": "bfloat16"}}, optim="{_ROUNDED}", optim_args="bf16_stochastic_round=True"'
        )
        self.lora = f"LoRA of rank {_LORA_RANK} (not all weights)"
        self.asked = self._counted(frozenset())

    def _counted(self, changes: frozenset[str]) -> CountedStep:
        """The step of some changes; whether activations are checkpointed, and Adam's bits, are asked of it."""
        changes &= {self.precomputed, self.half, self.rounded, self.nf4, self.lora}
        if changes not in self._steps:
            model, args, peft_config = self._model, self._cfg.own_copy(), self._peft_config
            options: dict[str, Any] = {}
            if self.precomputed in changes:
                options["reference"] = "precomputed"
            if self.nf4 in changes:
                options["quantize"] = "nf4"
            dtype = "bfloat16" if self.rounded in changes else self._half if self.half in changes else None
            if dtype is not None and isinstance(model, nn.Module):
                model = nn.Module.to(meta_copy(model), getattr(torch, dtype))
            elif dtype is not None:
                options["model_init_kwargs"] = {**args.loading, "dtype": dtype}
            if self.lora in changes:
                peft_config = LoraConfig(r=_LORA_RANK, lora_alpha=_LORA_RANK)
            vars(args).update(options)
            self._steps[changes] = CountedStep(model, args, peft_config, self._device_type)
        return self._steps[changes]

    def _option(self, changes: Iterable[str]) -> FitOption:
        names = frozenset(changes)
        checkpointing = self.checkpointing in names or (
            self.asked.checkpointing and self.no_checkpointing not in names
        )
        optim = _ROUNDED if self.rounded in names else _EIGHT_BIT if self.eight_bit in names else self.asked.optim
        counted = self._counted(names)

        def memory(size: int) -> int:
            return counted.total(checkpointing, optim, size)

        flops = counted.counts(checkpointing, self._batch).flops
        return FitOption(
            changes=tuple(changes),
            memory=memory(self._batch),
            fits=memory(self._batch) <= self._limit,
            largest_batch=largest_batch(memory, self._limit),
            slow_down=flops / self.asked.counts(self.asked.checkpointing, self._batch).flops,
            least=memory(1),
        )

    def options(self) -> list[FitOption]:
        """The config as asked and what there is beside it, in the order of the table."""
        asked = self._option(())
        if asked.fits:
            faster = {
                self.no_checkpointing: self.asked.checkpointing,
                self.precomputed: _can_precompute(self._cfg),
            }
            return [asked, *(self._option([change]) for change, possible in faster.items() if possible)]
        lora = self._peft_config is not None or self.asked.step.trainer.carried_adapter
        found = [asked, *self._saving([], asked, lora=lora)]
        if not lora and not any(option.fits for option in found):
            first = self._option([self.lora])
            found += [first, *self._saving([self.lora], first, lora=True)]
        return found

    def _saving(self, base: list[str], before: FitOption, *, lora: bool) -> list[FitOption]:
        """What saves memory, first each change by itself, without a `base` of others, then as many as are needed."""
        if before.fits:
            return []
        step, by_name_or_alone = self.asked.step, not isinstance(self._model, DiffusionPipeline)
        adam = self.asked.optim.startswith("adamw_")
        frozen = lora and by_name_or_alone and self._cfg.quantize is None and not is_quantised(step.base)
        own = [each for name, each in step.base.named_parameters() if ".lora_" not in name]
        in_float32 = any(each.dtype == torch.float32 for each in own)
        possible = {
            self.eight_bit: self.asked.optim.startswith("adamw_torch"),
            self.half: frozen and in_float32,
            # The reference of a new LoRA is the base itself.
            self.precomputed: not base and step.held > 0 and _can_precompute(self._cfg),
            self.checkpointing: not self.asked.checkpointing and self.asked.can_checkpoint,
            self.nf4: frozen,
            self.rounded: not lora and by_name_or_alone and in_float32 and adam and not self._cfg.fp16,
        }
        single = {change: self._option([*base, change]) for change, can in possible.items() if can}
        options, chosen = list(single.values()), list(base)
        if any(option.fits for option in options):
            return options
        for change, alone in single.items():
            if alone.memory < before.memory:
                # It has an 8-bit Adam of its own.
                chosen = [other for other in chosen if (change, other) != (self.rounded, self.eight_bit)] + [change]
                if len(chosen) > len(base) + 1:
                    options.append(self._option(chosen))
                    if options[-1].fits:
                        break
        return options


def _can_precompute(cfg: DiffusionPreferenceConfig) -> bool:
    """Whether a config calls a reference of which errors could be stored."""
    if not isinstance(cfg, ReferenceConfig) or cfg.reference == "precomputed" or cfg.sync_ref_model:
        return False
    try:
        # Some methods need more of a reference than its errors, which their configs say.
        type(cfg)(output_dir=cfg.output_dir, reference="precomputed", use_cpu=True, bf16=False)
    except ValueError:
        return False
    return True
