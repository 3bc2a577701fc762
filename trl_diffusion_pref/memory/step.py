"""Forward and backward of one batch on the meta device, as the trainers run them."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..families import Family
from ..families.base import model_inside
from ..likelihood import denoising_error
from ..trainer.base_config import DiffusionPreferenceConfig
from ..trainer.published import published
from ..trainer.self_npo_config import SelfNPOConfig
from .live_bytes import LiveBytes
from .meta_modes import MetaModes
from .sizes import Sizes


def images_of(cfg: DiffusionPreferenceConfig) -> int:
    """In one call of the trained denoiser; a pair is two."""
    return (1 if isinstance(cfg, SelfNPOConfig) else 2) * cfg.per_device_train_batch_size


class Step:
    """Forward and backward of one batch on the meta device.

    Args:
        extra: When a reference or teacher is called, see `held.reference_of`.
        device_type: Whose autocast is counted, see `meta_modes.DEVICE_TYPES`.
    """

    def __init__(
        self,
        family: Family,
        denoiser: nn.Module,
        cfg: DiffusionPreferenceConfig,
        sizes: Sizes,
        extra: str,
        device_type: str,
    ) -> None:
        self.family, self.denoiser, self.cfg, self.sizes, self.extra = family, denoiser, cfg, sizes, extra
        self.base = model_inside(denoiser)
        self.layouts: dict[tuple, list[tuple | None] | None] = {}
        self.dtype = torch.bfloat16 if cfg.bf16 else torch.float16 if cfg.fp16 else None
        self.device_type = device_type

    def run(self, checkpointing: bool) -> tuple[int, int]:
        """The most that lives at once beside weights, gradients included, and without them."""
        if checkpointing:
            self.base.enable_gradient_checkpointing(self._checkpoint)
        else:
            self.base.disable_gradient_checkpointing()
        self.denoiser.train()
        for parameter in self.denoiser.parameters():
            parameter.grad = None
        live = LiveBytes(self.denoiser, self.layouts)
        with torch.device("meta"), live:
            self._forward_and_backward()
            activations = live.peak_beside_gradients
            if self.cfg.gradient_accumulation_steps > 1:
                # From the second micro-batch on, gradients are there from the start.
                self._forward_and_backward()
        live.detach()
        for parameter in self.denoiser.parameters():
            parameter.grad = None
        return live.peak, activations

    def _checkpoint(self, module: nn.Module, *args: Any) -> Any:
        return checkpoint(module, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), self._again()))

    @contextmanager
    def _again(self) -> Iterator[None]:
        # The backward pass runs outside the modes that surround it.
        with torch.device("meta"), MetaModes(self.dtype, self.device_type):
            yield

    def _forward_and_backward(self) -> None:
        size, images = self.sizes.latents, images_of(self.cfg)
        # What a trainer holds of a batch: mean and deviation of each image's posterior, latents, noise, target.
        batch_tensors = [torch.empty(images, *size) for _ in range(5)]
        x_t, target = torch.empty(images, *size), batch_tensors[-1]
        conditioning = self._conditioning(images)
        # A batch has one prompt per pair, beside the call's two.
        prompts = self._conditioning(images // 2) if images > self.cfg.per_device_train_batch_size else {}  # noqa: F841
        with MetaModes(self.dtype, self.device_type):
            if self.extra == "before":
                scale = self.cfg.guidance_scale
                if scale is None:
                    scale = published("Self-NPO", self.family.pipeline_class).values["guidance_scale"]
                self._without_gradients(x_t, conditioning, guided=scale not in (0.0, 1.0))
            prediction = self._predict(x_t, conditioning)
            if self.extra == "after":
                kept = self._without_gradients(x_t, conditioning)  # noqa: F841 - alive until the backward pass
            loss = denoising_error(prediction, target).mean()
            del prediction
        loss.backward()

    def _conditioning(self, images: int) -> dict[str, Tensor]:
        # Some families read the length of the longest prompt off its mask, which needs values.
        return {
            name: torch.ones(images, *shape, device="cpu" if name.endswith("_embeds_mask") else "meta")
            for name, shape in self.sizes.conditioning.items()
        }

    def _predict(self, x_t: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        times = torch.empty(len(x_t))
        return self.family.predict(self.denoiser, x_t.to(self.base.dtype), times, conditioning).float()

    def _without_gradients(self, x_t: Tensor, conditioning: dict[str, Tensor], guided: bool = False) -> Tensor:
        if guided:
            x_t = torch.cat([x_t] * 2)
            conditioning = {name: torch.cat([tensor] * 2) for name, tensor in conditioning.items()}
        with torch.no_grad():
            return self._predict(x_t, conditioning)
