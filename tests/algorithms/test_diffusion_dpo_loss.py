import math

import numpy as np
import pytest
import torch
from helpers.vectors import VECTORS, set_a, set_c
from torch.nn import functional

from trl_diffusion_pref.algorithms.diffusion_dpo import loss as module
from trl_diffusion_pref.algorithms.diffusion_dpo.loss import DiffusionDPOOptions, flow_dpo_beta, preserve_winner
from trl_diffusion_pref.diffusion.elbo import denoising_error


def options_of(loss_type="sigmoid", beta=5000.0, label_smoothing=0.0, dmpo_alpha=0.01, margin_clip=None):
    """The released code's constants, unless others are given. Betas of each pair stand outside."""
    beta = 1.0 if isinstance(beta, torch.Tensor) else beta
    return DiffusionDPOOptions(loss_type, beta, label_smoothing, dmpo_alpha, margin_clip)


def diffusion_dpo_logits(*errors, beta=5000.0, margin_clip=None):
    return module.diffusion_dpo_logits(*errors, beta=beta, margin_clip=margin_clip)


def diffusion_dpo_loss(*errors, soft_labels=None, **options):
    """From errors to the loss, as the trainer composes it."""
    constants = options_of(**options)
    beta, margin_clip = options.get("beta", 5000.0), options.get("margin_clip")
    logits = diffusion_dpo_logits(*errors, beta=beta, margin_clip=margin_clip)
    return module.diffusion_dpo_loss(logits, constants, soft_labels)


def dspo_loss(prediction, target, reference, logits, *, loss_type="dspo", beta=0.001):
    return module.dspo_loss(prediction, target, reference, logits, options_of(loss_type, beta))


def tensors(letter: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prediction, target and reference prediction of a set of the authors' vectors."""
    prediction, target = set_a() if letter == "A" else set_c()
    if letter == "A":
        torch.manual_seed(1234)
        torch.randn(2, 4, 2, 2), torch.randn(4, 4, 2, 2)
        return prediction, target, target + 0.3 * torch.randn(4, 4, 2, 2)
    k = torch.arange(64)
    return prediction, target, prediction - 0.004 * torch.sin(1.1 * k + 0.3).reshape(4, 4, 2, 2)


def losses(prediction, target, reference, *, loss_type="sigmoid", mu=None, swapped=False, sft_weight=0.0, **options):
    """Mean loss through the same functions that the trainer composes."""
    (p_w, p_l), (y_w, y_l), (r_w, r_l) = (tensor.chunk(2) for tensor in (prediction, target, reference))
    if swapped:
        (p_w, p_l), (r_w, r_l) = (p_l, p_w), (r_l, r_w)
    chosen, rejected = denoising_error(p_w, y_w), denoising_error(p_l, y_l)
    if mu is not None:
        rejected = preserve_winner(rejected, p_w - y_w, p_l - y_l, mu=mu)
    errors = (chosen, rejected, denoising_error(r_w, y_w), denoising_error(r_l, y_l))
    if loss_type.startswith("dspo"):
        logits = diffusion_dpo_logits(*errors, beta=options["beta"])
        return dspo_loss(p_w, y_w, r_w, logits, loss_type=loss_type, **options).mean()
    return (diffusion_dpo_loss(*errors, loss_type=loss_type, **options) + sft_weight * chosen).mean()


ROWS = [
    ("Diffusion-DPO official beta=2000", {"beta": 2000.0}),
    ("Diffusion-DPO official beta=5000", {"beta": 5000.0}),
    ("Diffusion-DPO official beta=10", {"beta": 10.0}),
    # no 1/2 in that script, so its beta of 10 is 20 here
    ("diffusers SD1.5 DPO sigmoid beta=10 (no 1/2)", {"beta": 20.0}),
    ("diffusers SD1.5 DPO hinge beta=10", {"beta": 20.0, "loss_type": "hinge"}),
    ("Diffusion-NPO official SD1.5 beta=10 (swapped)", {"beta": 20.0, "swapped": True}),
    ("SDPO(Diffusion-DPO) official beta=10 mu=0.0", {"beta": 10.0, "mu": 0.0}),
    ("SDPO(Diffusion-DPO) official beta=10 mu=0.6", {"beta": 10.0, "mu": 0.6}),
    ("SDPO(Diffusion-DPO) official beta=10 mu=0.9", {"beta": 10.0, "mu": 0.9}),
    ("DSPO official SD1.5 beta=0.001 sdpo=False", {"beta": 0.001, "loss_type": "dspo"}),
    ("DSPO official SD1.5 beta=0.05 sdpo=False", {"beta": 0.05, "loss_type": "dspo"}),
    ("DSPO official SD1.5 beta=0.001 sdpo=True mu=0.2", {"beta": 0.001, "loss_type": "dspo", "mu": 0.2}),
    ("DSPO official SD1.5 beta=0.05 sdpo=True mu=0.2", {"beta": 0.05, "loss_type": "dspo", "mu": 0.2}),
    ("DSPO official repo SD1.5 beta=0.05", {"beta": 0.05, "loss_type": "dspo"}),
    ("DMPO official beta=10 alpha=0.01", {"beta": 10.0, "loss_type": "dmpo"}),
    ("DMPO official beta=10 alpha=0.1", {"beta": 10.0, "loss_type": "dmpo", "dmpo_alpha": 0.1}),
    ("DMPO official beta=2000 alpha=0.01", {"beta": 2000.0, "loss_type": "dmpo"}),
    ("Flow-DPO flow_grpo mean-reduced beta=100", {"beta": 100.0}),
    ("TangoFlux CRPO official beta=2000", {"beta": 2000.0, "sft_weight": 1.0}),
    (
        "iREPO-diffusion (spec) beta=10 P=.8,.65",
        {"beta": 10.0, "loss_type": "irepo", "soft_labels": torch.tensor([0.8, 0.65])},
    ),
]


def row(name: str, letter: str, index: int = 0) -> dict:
    return [entry for entry in VECTORS[letter]["values"] if entry["name"].startswith(name)][index]


def assert_row(expected: dict, prediction: torch.Tensor, loss: torch.Tensor) -> None:
    loss.backward()
    chosen, rejected = prediction.grad.chunk(2)
    # the file prints six decimals of losses
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=6e-7)
    # gradients below 1e-9 of the chosen side's are rounding in the authors' float32 as in ours
    floor = 1e-9 * expected["grad_norm"]
    for name, gradient in (
        ("grad_norm", prediction.grad),
        ("grad_norm_chosen", chosen),
        ("grad_norm_rejected", rejected),
    ):
        assert gradient.norm().item() == pytest.approx(expected[name], rel=1e-4, abs=floor), name
    assert prediction.grad.reshape(-1)[0].item() == pytest.approx(expected["grad_first"], rel=1e-4, abs=floor)


@pytest.mark.parametrize("letter", ["A", "C"])
@pytest.mark.parametrize(("name", "options"), ROWS, ids=[name for name, _ in ROWS])
def test_value_and_gradients_are_the_authors(letter, name, options):
    prediction, target, reference = tensors(letter)
    prediction.requires_grad_()
    expected = row(name, letter)
    assert_row(expected, prediction, losses(prediction, target, reference, **options))


@pytest.mark.parametrize("letter", ["A", "C"])
@pytest.mark.parametrize("index", [0, 1])
def test_dspo_for_sdxl_far_from_and_near_to_the_reference(letter, index):
    """The file's two rows: the set as it stands, and with the reference a tenth as far from the prediction."""
    prediction, target, reference = tensors(letter)
    expected = [entry for entry in VECTORS[letter]["values"] if entry["name"].startswith("DSPO official SDXL")][index]
    if index == 1:
        reference = prediction + 0.1 * (reference - prediction)
    prediction = prediction.clone().requires_grad_()
    distance = (prediction - reference).chunk(2)[0].square().mean().item()
    assert distance == pytest.approx(float(expected["name"].rsplit("=", 1)[1]), abs=6e-5)
    assert_row(expected, prediction, losses(prediction, target, reference, loss_type="dspo_sdxl", beta=10.0))


def test_at_the_reference_every_loss_has_its_known_value():
    error = torch.rand(3)
    at = (error, error.flip(0), error, error.flip(0))
    assert torch.equal(diffusion_dpo_logits(*at), torch.zeros(3))
    expected = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 0.25, "dmpo": 1.614463}
    for loss_type, value in expected.items():
        torch.testing.assert_close(
            diffusion_dpo_loss(*at, loss_type=loss_type), torch.full((3,), value), rtol=1e-6, atol=0
        )
    labels = torch.tensor([0.2, 0.5, 0.9])
    torch.testing.assert_close(
        diffusion_dpo_loss(*at, loss_type="irepo", soft_labels=labels), torch.logit(labels).square()
    )
    p = torch.randn(2, 3)
    torch.testing.assert_close(dspo_loss(p, p + 1, p, torch.zeros(2), loss_type="dspo_sdxl"), torch.full((2,), 0.25))


def test_swapping_chosen_and_rejected_negates_the_margin():
    errors = [torch.rand(4) for _ in range(4)]
    swapped = [errors[1], errors[0], errors[3], errors[2]]
    torch.testing.assert_close(diffusion_dpo_logits(*errors), -diffusion_dpo_logits(*swapped))
    labels = torch.tensor([0.1, 0.4, 0.6, 0.8])
    torch.testing.assert_close(
        diffusion_dpo_loss(*errors, beta=5.0, loss_type="irepo", soft_labels=labels),
        diffusion_dpo_loss(*swapped, beta=5.0, loss_type="irepo", soft_labels=1 - labels),
    )


def test_ipo_is_beta_squared_times_the_published_loss():
    errors = [torch.rand(4) for _ in range(4)]
    beta = 40.0
    log_ratio = -((errors[0] - errors[1]) - (errors[2] - errors[3])) / 2
    published = (log_ratio - 1 / (2 * beta)).square()
    torch.testing.assert_close(diffusion_dpo_loss(*errors, beta=beta, loss_type="ipo"), beta**2 * published)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """Its mean over labels that are flipped with probability epsilon is the loss on clean labels."""
    errors = [torch.rand(5) for _ in range(4)]
    swapped = [errors[1], errors[0], errors[3], errors[2]]
    epsilon, options = 0.2, {"beta": 8.0}
    kept, flipped = (diffusion_dpo_loss(*e, label_smoothing=epsilon, **options) for e in (errors, swapped))
    torch.testing.assert_close((1 - epsilon) * kept + epsilon * flipped, diffusion_dpo_loss(*errors, **options))


def test_clipped_margins_have_no_gradient_and_others_are_untouched():
    chosen = torch.tensor([0.0, 0.5], requires_grad=True)
    rest = (torch.tensor([1.0, 0.5]), torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    diffusion_dpo_loss(chosen, *rest, beta=40.0, margin_clip=10.0).sum().backward()
    assert chosen.grad[0].item() == 0.0
    assert chosen.grad[1].item() == pytest.approx(40.0 / 4)
    logits = diffusion_dpo_logits(chosen.detach(), *rest, beta=40.0, margin_clip=10.0)
    assert logits.tolist() == [10.0, 0.0]


def test_flow_dpo_s_loss_and_gradients_are_equation_6_with_a_beta_of_each_pair():
    """Arrays of numpy in float64, from velocities on; gradients are written out too."""
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 3, 5)), rng.normal(size=(3, 5))
    velocity = noise - x0
    predicted, reference = (velocity + 0.3 * rng.normal(size=(2, 3, 5)) for _ in range(2))
    beta, t = 40.0, np.array([0.1, 0.5, 0.9])
    errors, ref_errors = (((p - velocity) ** 2).mean(axis=-1) for p in (predicted, reference))
    beta_t = beta * (1 - t) ** 2
    u = -(beta_t / 2) * ((errors[0] - ref_errors[0]) - (errors[1] - ref_errors[1]))
    expected = np.log1p(np.exp(-u))
    # d loss / d prediction = (1 - sigmoid(u)) beta_t / 2 d(l_w - l_l) / d prediction
    slope = (beta_t / 2 / (1 + np.exp(u)))[:, None] * 2 * (predicted - velocity) / 5
    slope[1] *= -1

    prediction = torch.tensor(predicted, dtype=torch.float32).requires_grad_()
    target = torch.tensor(velocity, dtype=torch.float32)
    of_model = denoising_error(prediction.flatten(0, 1), target.flatten(0, 1)).chunk(2)
    of_reference = torch.tensor(ref_errors, dtype=torch.float32)
    betas = flow_dpo_beta(torch.tensor(t), beta)
    assert betas.dtype == torch.float32
    np.testing.assert_allclose(betas.numpy(), [32.4, 10.0, 0.4], rtol=1e-6)
    loss = diffusion_dpo_loss(*of_model, *of_reference, beta=betas)
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-5)
    loss.sum().backward()
    np.testing.assert_allclose(prediction.grad.numpy(), slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "dmpo", "irepo"])
def test_pairs_with_betas_of_their_own_lose_what_each_would_alone(loss_type):
    generator = torch.Generator().manual_seed(0)
    errors = [torch.rand(3, generator=generator) for _ in range(4)]
    betas, options = torch.tensor([0.5, 20.0, 300.0]), {"loss_type": loss_type, "soft_labels": 0.7, "margin_clip": 9.0}
    together = diffusion_dpo_loss(*errors, beta=betas, **options)
    for row, beta in enumerate(betas.tolist()):
        alone = diffusion_dpo_loss(*(error[row : row + 1] for error in errors), beta=beta, **options)
        torch.testing.assert_close(together[row], alone[0])


def test_a_pair_of_pure_noise_has_no_gradient_under_the_flow_schedule():
    chosen = torch.tensor([0.1, 0.1], requires_grad=True)
    rest = (torch.tensor([0.2, 0.2]), torch.tensor([0.3, 0.3]), torch.tensor([0.1, 0.1]))
    diffusion_dpo_loss(chosen, *rest, beta=flow_dpo_beta(torch.tensor([1.0, 0.5]), 100.0)).sum().backward()
    assert chosen.grad[0].item() == 0.0 and chosen.grad[1].item() > 0.0


def test_betas_of_another_shape_than_the_errors_are_refused():
    errors = [torch.rand(3) for _ in range(4)]
    with pytest.raises(ValueError, match=r"beta has shape \(3, 1\), the errors \(3,\)"):
        diffusion_dpo_loss(*errors, beta=torch.ones(3, 1))


@pytest.mark.parametrize("mu", [0.0, 0.5, 1.0])
def test_the_safeguard_changes_the_rejected_gradient_alone_by_its_factor(mu):
    generator = torch.Generator().manual_seed(1)
    e_w = torch.randn(2, 5, generator=generator)
    e_l = e_w + 0.5 * torch.randn(2, 5, generator=generator)
    rejected = torch.rand(2, generator=generator).requires_grad_()
    preserved = preserve_winner(rejected, e_w, e_l, mu=mu)
    assert torch.equal(preserved, rejected) or torch.allclose(preserved, rejected, rtol=1e-7)
    preserved.sum().backward()
    expected = min(1.0, (1 - mu) * float(e_w.square().sum() / (e_w * e_l).sum()))
    torch.testing.assert_close(rejected.grad, torch.full((2,), expected))
    opposed = torch.rand(2).requires_grad_()
    preserve_winner(opposed, e_w, -e_l, mu=mu).sum().backward()
    assert opposed.grad.tolist() == [1.0, 1.0]


def test_the_derivatives_have_the_right_signs():
    for loss_type in ("sigmoid", "hinge", "dmpo"):
        chosen, rejected = (torch.full((1,), 0.1, requires_grad=True) for _ in range(2))
        reference = torch.full((1,), 0.1)
        diffusion_dpo_loss(chosen, rejected, reference, reference, loss_type=loss_type).sum().backward()
        assert chosen.grad.item() > 0 > rejected.grad.item(), loss_type


def test_differences_are_taken_per_image_before_they_are_multiplied():
    """At beta 5000 a rounding of 1e-8 in an error of 0.1 is 2.5e-5 of a logit; errors of float16 would be 0.15."""
    errors = [torch.tensor([value], dtype=torch.float64) for value in (0.1000001, 0.3, 0.1, 0.3000002)]
    exact = -2500 * ((errors[0] - errors[2]) - (errors[1] - errors[3]))
    ours = diffusion_dpo_logits(*(error.float() for error in errors))
    assert ours.item() == pytest.approx(exact.item(), abs=2e-4)
    assert functional.logsigmoid(ours).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "orpo"}, "sigmoid, hinge, ipo, dmpo, irepo, dspo"),
        ({"beta": 0.0}, "must be positive"),
        ({"beta": float("nan")}, "must be positive"),
        ({"label_smoothing": 0.5}, r"outside \[0, 0.5\)"),
        ({"label_smoothing": 0.1, "loss_type": "hinge"}, "does nothing for 'hinge'"),
        ({"dmpo_alpha": 1.0}, "dmpo_alpha"),
        ({"margin_clip": 0.0}, "margin_clip"),
        ({"loss_type": "irepo"}, "needs soft_labels"),
        ({"loss_type": "irepo", "soft_labels": 1.0}, r"outside \(0, 1\)"),
        ({"loss_type": "dspo"}, "call dspo_loss"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        diffusion_dpo_loss(*[torch.rand(2) for _ in range(4)], **options)
