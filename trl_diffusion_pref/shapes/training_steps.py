"""What the training of the embedded pipelines has in common: drawings as tensors, and the loop of steps."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .drawing import Scene, draw


# Share of the rows that train the unconditional side.
PROMPT_DROPOUT = 0.1


def as_pixels(scenes: Sequence[Scene]) -> Tensor:
    """The drawings of n scenes, `(n, 3, IMAGE_SIZE, IMAGE_SIZE)` float32 in [-1, 1]."""
    pixels = np.stack([np.asarray(draw(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def minimise(
    loss_of_a_batch: Callable[[], Tensor],
    parameters: list[nn.Parameter],
    steps: int,
    learning_rate: float,
    *,
    save_every: int = 0,
    save: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a one-cycle schedule; `save` sees the averaged weights, which also remain at the end."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1)
    average = EMAModel(parameters, decay=0.995, use_ema_warmup=True, power=0.75)
    started = time.time()
    for step in range(steps):
        loss = loss_of_a_batch()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        if step % 100 == 0 or step == steps - 1:
            print(f"denoiser {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
        if save and save_every and (step + 1) % save_every == 0:
            average.store(parameters)
            average.copy_to(parameters)
            save(step + 1)
            average.restore(parameters)
    average.copy_to(parameters)
