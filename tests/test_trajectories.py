import json
from pathlib import Path

import pytest
import torch

from trl_diffusion_pref.losses import self_npo_loss
from trl_diffusion_pref.noise import VariancePreserving
from trl_diffusion_pref.trajectories import advance, clean_estimate, combine_guidance


VECTORS = json.loads((Path(__file__).parent / "reference" / "self_npo_vectors.json").read_text())
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
SHAPE = (3, 2, 2, 2)
COUNT = torch.arange(24, dtype=torch.float64)


def process() -> VariancePreserving:
    return VariancePreserving(torch.cumprod(1 - BETAS, dim=0))


def authors_teacher(guidance_scale: float):
    """The closed-form network of the vectors, with guidance."""

    def predict(x_t, t, rows):
        common = 0.6 * x_t + 0.1 * t.reshape(-1, 1, 1, 1) / 1000
        return combine_guidance(common + 0.10, common - 0.05, guidance_scale)

    return predict


@pytest.mark.parametrize("name", VECTORS["cases"])
def test_one_training_step_equals_the_released_code_s(name):
    case = VECTORS["cases"][name]
    vp = process()
    latents = (0.8 * torch.sin(0.5 * COUNT)).float().reshape(SHAPE)
    start_noise = torch.cos(0.9 * COUNT).float().reshape(SHAPE)
    forward_noise = torch.sin(1.3 * COUNT + 0.2).float().reshape(SHAPE)
    times = vp.solver_times(25)
    assert times[1:].tolist() == list(range(39, 1000, 40))
    start = torch.tensor([2, 7, 24]) + 1
    x = vp.corrupt(latents, start_noise, times[start])
    teacher = authors_teacher(case["w"] + 1)
    x_t, position = advance(teacher, vp, times, x, start, torch.full((3,), 5))
    t_end = times[position]
    assert t_end.tolist() == [0, 119, 799]
    target = clean_estimate(teacher, vp, x_t, t_end)
    s = torch.tensor([100, 419, 949])
    x_s = vp.renoise(x_t, forward_noise, t_end, s)
    theta = torch.zeros(3, 2, 2, 2, requires_grad=True)
    student = 0.5 * x_s + 0.2 * s.reshape(-1, 1, 1, 1) / 1000 + 0.10 + theta
    loss = self_npo_loss(vp.predict_x0(student, x_s, s), target, loss_type=case["loss_type"], huber_c=1e-3).mean()
    loss.backward()

    def row_sums(tensor):
        return tensor.flatten(1).sum(dim=1)

    def check(ours, theirs):
        # The vectors are printed to six decimals.
        torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-5, atol=1e-6)

    check(row_sums(x), VECTORS["intermediate"]["x at t0 row sums"])
    check(row_sums(x_t), case["x_t row sums"])
    check(row_sums(target), case["x0 target row sums"])
    check(row_sums(x_s), case["x_s row sums"])
    check(loss.detach(), case["loss"])
    check(theta.grad.norm(), case["grad_norm_theta"])
