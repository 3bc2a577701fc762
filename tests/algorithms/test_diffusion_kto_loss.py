import math

import pytest
import torch
from helpers.vectors import VECTORS, set_a, set_c

from trl_diffusion_pref.algorithms.diffusion_kto.loss import (
    DiffusionKTOOptions,
    diffusion_kto_loss,
    likelihood_gain,
)
from trl_diffusion_pref.diffusion.elbo import denoising_error


LABELS = torch.tensor([1.0, 1.0, 0.0, 0.0])
ROWS = [
    ("Diffusion-KTO official sigmoid beta=10 labels=1100", "sigmoid", 10.0),
    ("Diffusion-KTO official sigmoid beta=1000 labels=1100", "sigmoid", 1000.0),
    ("Diffusion-KTO official sigmoid beta=5000 labels=1100", "sigmoid", 5000.0),
    ("Diffusion-KTO official loss_averse beta=10", "loss_averse", 10.0),
    ("Diffusion-KTO official risk_seeking_3 beta=10", "risk_seeking", 10.0),
]


def tensors(letter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction, target and reference prediction of a set of the authors' vectors."""
    prediction, target = set_a() if letter == "A" else set_c()
    if letter == "A":
        torch.manual_seed(1234)
        torch.randn(2, 4, 2, 2), torch.randn(4, 4, 2, 2)
        return prediction, target, target + 0.3 * torch.randn(4, 4, 2, 2)
    k = torch.arange(64)
    return prediction, target, prediction - 0.004 * torch.sin(1.1 * k + 0.3).reshape(4, 4, 2, 2)


@pytest.mark.parametrize("letter", ["A", "C"])
@pytest.mark.parametrize(("name", "utility", "beta"), ROWS, ids=[name for name, _, _ in ROWS])
def test_value_and_gradients_are_the_authors(letter, name, utility, beta):
    prediction, target, reference = tensors(letter)
    prediction.requires_grad_()
    expected = next(entry for entry in VECTORS[letter]["values"] if entry["name"] == name)
    gain = likelihood_gain(denoising_error(prediction, target), denoising_error(reference, target))
    kl = gain.detach().mean().clamp(min=0)
    if "extra" in expected:
        of_authors, gains = expected["extra"]["kl ; per-sample g-kl"].split("  ")
        assert kl.item() == pytest.approx(float(of_authors), abs=6e-7)
        differences = [float(value) for value in gains.strip("[]").split(", ")]
        assert (gain - kl).tolist() == pytest.approx(differences, abs=6e-7)
    loss = diffusion_kto_loss(gain, LABELS, kl, DiffusionKTOOptions(utility, beta)).mean()
    loss.backward()
    # The file prints six decimals of losses. Gradients below 1e-8 of a saturated sigmoid are rounding on both sides.
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=6e-7)
    chosen, rejected = prediction.grad.chunk(2)
    of_part = {"grad_norm": prediction.grad, "grad_norm_chosen": chosen, "grad_norm_rejected": rejected}
    for key, gradient in of_part.items():
        assert gradient.norm().item() == pytest.approx(expected[key], rel=1e-4, abs=1e-14), key
    assert prediction.grad.reshape(-1)[0].item() == pytest.approx(expected["grad_first"], rel=1e-4, abs=1e-14)


def test_at_the_reference_every_utility_has_its_known_value():
    errors = torch.rand(4)
    gain = likelihood_gain(errors, errors)
    assert torch.equal(gain, torch.zeros(4))
    known = {"sigmoid": 0.5, "loss_averse": 1 + math.log(2), "risk_seeking": 1 - math.log(2)}
    for utility, value in known.items():
        loss = diffusion_kto_loss(gain, LABELS, 0.0, DiffusionKTOOptions(utility, 5000.0))
        torch.testing.assert_close(loss, torch.full((4,), value), rtol=1e-6, atol=0)


def test_losses_and_gradients_are_the_formulas_in_float64():
    generator = torch.Generator().manual_seed(0)
    gain = 0.3 * torch.randn(4, generator=generator)
    weights, beta, baseline = torch.tensor([2.0, 2.0, 0.5, 0.5]), 8.0, 0.1
    z = torch.tensor([1.0, 1.0, -1.0, -1.0]).double() * beta * (gain.double() - baseline)
    s = 1 / (1 + torch.exp(-z))
    sign = torch.tensor([1.0, 1.0, -1.0, -1.0]).double()
    expected = {
        "sigmoid": (1 - s, -s * (1 - s)),
        "loss_averse": (1 - torch.log(s), -(1 - s)),
        "risk_seeking": (1 + torch.log(1 - s), -s),
    }
    for utility, (value, slope) in expected.items():
        x = gain.clone().requires_grad_()
        loss = diffusion_kto_loss(x, LABELS, baseline, DiffusionKTOOptions(utility, beta, 2.0, 0.5))
        assert loss.dtype == torch.float32
        loss.sum().backward()
        torch.testing.assert_close(loss.detach(), (weights * value).float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x.grad, (weights * slope * sign * beta).float(), rtol=1e-5, atol=1e-6)


def test_the_baseline_gets_no_gradient():
    gain = torch.tensor([0.1, -0.2], requires_grad=True)
    options = DiffusionKTOOptions("sigmoid", 5.0)
    with_gradient = diffusion_kto_loss(gain, torch.tensor([1.0, 0.0]), gain.mean().clamp(min=0.05), options).sum()
    (of_tensor,) = torch.autograd.grad(with_gradient, gain)
    (of_number,) = torch.autograd.grad(diffusion_kto_loss(gain, torch.tensor([1.0, 0.0]), 0.05, options).sum(), gain)
    assert torch.equal(of_tensor, of_number)


def test_losses_stay_finite_where_the_sigmoid_saturates():
    gain = torch.tensor([10.0, -10.0, 10.0, -10.0], requires_grad=True)
    for utility in ("sigmoid", "loss_averse", "risk_seeking"):
        loss = diffusion_kto_loss(gain, LABELS, 0.0, DiffusionKTOOptions(utility, 1e5))
        (gradient,) = torch.autograd.grad(loss.sum(), gain)
        assert bool(torch.isfinite(loss).all()) and bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"utility": "kto"}, "utility='kto' is none of sigmoid, loss_averse, risk_seeking"),
        ({"beta": 0.0}, "beta=0.0: it must be positive"),
        ({"beta": math.inf}, "beta=inf: it must be positive and finite"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0: it must be finite and at least 0"),
        ({"undesirable_weight": math.inf}, "undesirable_weight=inf: it must be finite and at least 0"),
        ({"desirable_weight": math.nan}, "desirable_weight=nan: it must be finite and at least 0"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "are both 0"),
    ],
)
def test_constants_outside_their_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionKTOOptions(**{"utility": "sigmoid", "beta": 10.0, **options})
