"""Parts of sampling trajectories: deterministic solver steps with guidance, from any point of the grid to another.

Latents are `(B, ...)` float32. A row's place is its position on `NoiseProcess.solver_times`: N is pure noise, 0 is the
end. Nothing here knows a model; `predict` is called as `predict(x_t, t, rows)` with the rows `(b,)` of the batch that
are still under way, and returns their predictions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .noise import NoiseProcess, per_sample


Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


def combine_guidance(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance `u + s (c - u)` (arXiv 2207.12598, equation 6, with s = w + 1), in float32.

    Predictions of noise, velocity and clean latents are affine in each other, so it does not matter which is combined.
    """
    conditional, unconditional = conditional.float(), unconditional.float()
    return unconditional + guidance_scale * (conditional - unconditional)


def solver_step(process: NoiseProcess, prediction: Tensor, x_t: Tensor, t: Tensor, earlier: Tensor) -> Tensor:
    """One DDIM step with eta = 0 (arXiv 2010.02502, equation 12); on a rectified flow it is an Euler step.

    Args:
        prediction: `(B, ...)` at `x_t` and t.
        t, earlier: Times `(B,)`.
    """
    alpha, sigma = (per_sample(value, x_t) for value in process.alpha_sigma(earlier))
    return alpha * process.predict_x0(prediction, x_t, t) + sigma * process.predict_noise(prediction, x_t, t)


@torch.no_grad()
def advance(
    predict: Predict,
    process: NoiseProcess,
    times: Tensor,
    x: Tensor,
    position: Tensor,
    steps: Tensor,
    *,
    rounds: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Takes each row so many solver steps; rows that reach the end stay there.

    Args:
        times: From `process.solver_times`, on the latents' device.
        x: `(B, ...)` at `times[position]`.
        position: `(B,)` int64.
        steps: `(B,)` int64, how far each row goes.
        rounds: Evaluates every row that many times, at least as often as any row has steps, so that all processes of
            a sharded model call it equally often. Default: only rows that still move, as often as is needed.

    Returns:
        Latents and positions.
    """
    goal = (position - steps).clamp(min=0)
    # One round trip to the device for the whole advance.
    left = (position - goal).tolist()
    everything = rounds is not None
    for taken in range(rounds if rounds is not None else max(left, default=0)):
        active = [row for row, count in enumerate(left) if everything or count > taken]
        rows = torch.tensor(active, device=x.device)
        t, earlier = times[position[rows]], times[(position[rows] - 1).clamp(min=0)]
        stepped = solver_step(process, predict(x[rows], t, rows), x[rows], t, earlier)
        moving = position[rows] > goal[rows]
        x = x.index_copy(0, rows, torch.where(per_sample(moving, stepped), stepped, x[rows]))
        position = position.index_copy(0, rows, position[rows] - moving.long())
    return x, position


@torch.no_grad()
def clean_estimate(predict: Predict, process: NoiseProcess, x_t: Tensor, t: Tensor) -> Tensor:
    """Tweedie's estimate `E[x0 | x_t]` from one more evaluation."""
    rows = torch.arange(len(x_t), device=x_t.device)
    return process.predict_x0(predict(x_t, t, rows), x_t, t)
