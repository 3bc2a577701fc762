import math

import pytest
import torch
from helpers.vectors import VECTORS, set_a, set_c

from trl_diffusion_pref.algorithms.diffusion_dpo.loss import (
    DiffusionDPOOptions,
    diffusion_dpo_logits,
    diffusion_dpo_loss,
)
from trl_diffusion_pref.algorithms.rank_dpo.loss import (
    RankDPOOptions,
    advantages,
    best_and_worst,
    implicit_rewards,
    pair_weights,
    rank_loss,
    ranking_accuracy,
    wanted_values,
    win_fractions,
)
from trl_diffusion_pref.diffusion.elbo import denoising_error


LOSS_TYPES = ["rankdpo", "dgpo", "crd"]
DPO = DiffusionDPOOptions("sigmoid", 20.0, label_smoothing=0.0, dmpo_alpha=0.01, margin_clip=None)


def options_of(loss_type: str = "rankdpo", beta: float = 20.0, given_fractions: bool = False) -> RankDPOOptions:
    return RankDPOOptions(loss_type, beta, given_fractions)


def losses(errors, ref_errors, scores, **options) -> torch.Tensor:
    """`(B,)`, from `(B, k)` of one reward, through the functions that the trainer composes."""
    constants = options_of(**options)
    rewards = implicit_rewards(errors, ref_errors, constants.beta)
    return rank_loss(rewards, wanted_values(scores[None], constants), constants)


def random_rankings(rows: int = 5, k: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors that have a gradient, the reference's, and scores."""
    torch.manual_seed(3)
    errors = 0.3 * torch.rand(rows, k)
    return errors.requires_grad_(), errors.detach() + 0.02 * torch.randn(rows, k), torch.randn(rows, k)


@pytest.mark.parametrize("letter", ["A", "C"])
def test_loss_and_gradients_are_the_reference_values(letter):
    expected = next(row for row in VECTORS[letter]["values"] if row["name"].startswith("RankDPO"))
    if letter == "A":
        prediction, target = set_a()
        # The references' noise follows the other two tensors in the generator.
        torch.manual_seed(1234)
        torch.randn(2, 4, 2, 2), torch.randn(4, 4, 2, 2)
        reference = target + 0.3 * torch.randn(4, 4, 2, 2)
    else:
        prediction, target = set_c()
        reference = prediction - 0.004 * torch.sin(1.1 * torch.arange(64) + 0.3).reshape(4, 4, 2, 2)
    prediction.requires_grad_()
    errors, ref_errors = (denoising_error(each, target)[None] for each in (prediction, reference))
    # Their beta of 10 is without the 1/2.
    loss = losses(errors, ref_errors, torch.tensor([[0.9, 0.6, 0.4, 0.1]]), beta=20.0, given_fractions=True).mean()
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    for part, name in zip((prediction.grad, *prediction.grad.chunk(2)), ("", "_chosen", "_rejected"), strict=True):
        assert part.norm().item() == pytest.approx(expected[f"grad_norm{name}"], rel=1e-4)
    assert prediction.grad.flatten()[0].item() == pytest.approx(expected["grad_first"], rel=1e-4)


def test_pair_weights_are_those_of_the_reference_values():
    found = pair_weights(torch.tensor([[0.9, 0.6, 0.4, 0.1]]))[0]
    wanted = [0.186546, 0.394258, 0.652400, 0.037062, 0.128257, 0.024777]
    assert found[torch.triu_indices(4, 4, 1).unbind()].tolist() == pytest.approx(wanted, abs=1e-6)
    assert found.tril().abs().sum() == 0


def test_the_loss_is_the_paper_s_sum_over_pairs():
    """Algorithm 2 in float64, pair by pair."""
    errors, ref_errors, scores = random_rankings()
    expected = []
    for row in range(5):
        s = (errors[row] - ref_errors[row]).double().tolist()
        order = sorted(range(4), key=lambda i: -scores[row, i])
        total = 0.0
        for better in range(4):
            for worse in range(better + 1, 4):
                # With one reward the best wins 3 of 3 comparisons, the next 2 of 3, ...
                gain = 2 ** ((3 - better) / 3) - 2 ** ((3 - worse) / 3)
                discount = 1 / math.log(2 + better) - 1 / math.log(2 + worse)
                margin = -10.0 * (s[order[better]] - s[order[worse]])
                total += gain * discount * math.log1p(math.exp(-margin))
        expected.append(total)
    assert losses(errors, ref_errors, scores).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradients_are_the_finite_differences(loss_type):
    errors, ref_errors, scores = random_rankings()
    (gradient,) = torch.autograd.grad(losses(errors, ref_errors, scores, loss_type=loss_type).sum(), errors)
    step = 1e-2
    for index in range(4):
        moved = torch.zeros(5, 4)
        moved[:, index] = step
        ends = [losses(errors.detach() + s * moved, ref_errors, scores, loss_type=loss_type) for s in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / (2 * step), gradient[:, index], rtol=2e-2, atol=2e-3)


def test_two_samples_give_dpo_with_a_gain_weight():
    errors, ref_errors, scores = random_rankings(k=2)
    ordered = scores.argsort(dim=1, descending=True)
    chosen, rejected = errors.gather(1, ordered).unbind(1)
    logits = diffusion_dpo_logits(
        chosen, rejected, *ref_errors.gather(1, ordered).unbind(1), beta=20.0, margin_clip=None
    )
    dpo = diffusion_dpo_loss(logits, DPO)
    torch.testing.assert_close(losses(errors, ref_errors, scores, loss_type="dgpo"), dpo)
    # The winner has phi 1, the other 0: gains 1 and 0.
    weight = 1 / math.log(2) - 1 / math.log(3)
    torch.testing.assert_close(losses(errors, ref_errors, scores), weight * dpo)
    # Given shares of won comparisons have smaller gains.
    fractions = torch.where(scores == scores.amax(dim=1, keepdim=True), 0.8, 0.2)
    found = losses(errors, ref_errors, fractions, given_fractions=True)
    torch.testing.assert_close(found, (2**0.8 - 2**0.2) * weight * dpo)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equal_scores_give_no_loss_and_no_gradient(loss_type):
    errors, ref_errors, _ = random_rankings()
    # A number whose mean over four is rounded.
    loss = losses(errors, ref_errors, torch.full((5, 4), 0.1), loss_type=loss_type)
    (gradient,) = torch.autograd.grad(loss.sum(), errors)
    assert loss.tolist() == [0.0] * 5 and gradient.abs().sum() == 0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_order_in_which_samples_are_stored_changes_nothing(loss_type):
    errors, ref_errors, scores = random_rankings()
    # With ties, at the best, in the middle and at the worst place.
    scores = scores.round().clamp(-1, 1)
    order = torch.tensor([2, 0, 3, 1])
    given = losses(errors, ref_errors, scores, loss_type=loss_type)
    moved = losses(errors[:, order], ref_errors[:, order], scores[:, order], loss_type=loss_type)
    torch.testing.assert_close(moved, given)


def test_win_fractions_are_shares_of_won_comparisons():
    first, second = torch.tensor([[3.0, 1.0, 1.0, -2.0]]), torch.tensor([[10.0, 30.0, 20.0, 40.0]])
    assert win_fractions(first[None]).tolist() == [pytest.approx([1, 0.5, 0.5, 0])]
    both = win_fractions(torch.stack([first, second]))
    assert both.tolist() == [pytest.approx([3 / 6, 3.5 / 6, 2.5 / 6, 3 / 6])]
    # Equal numbers of wins are equal fractions to the last digit, so that they are no pair.
    assert both[0, 0] == both[0, 3]


def test_advantages_are_standard_scores():
    scores = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])
    deviation = math.sqrt(14 / 3)
    assert advantages(scores[None])[0].tolist() == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation])
    assert advantages(scores[None])[1].tolist() == [0.0, 0.0, 0.0]


def test_dgpo_and_crd_are_their_formulas():
    errors, ref_errors, scores = random_rankings()
    rewards = (-10.0 * (errors - ref_errors)).double()
    centred = (scores - scores.mean(1, keepdim=True)).double()
    standard = centred / centred.square().mean(1, keepdim=True).sqrt()
    dgpo = torch.log1p(torch.exp(-(standard * rewards).sum(1) * 2 / 4))
    torch.testing.assert_close(losses(errors, ref_errors, scores, loss_type="dgpo").double(), dgpo)
    crd = (rewards - rewards.mean(1, keepdim=True) - centred).square().mean(1)
    torch.testing.assert_close(losses(errors, ref_errors, scores, loss_type="crd").double(), crd)


def test_accuracy_counts_the_pairs_of_unequal_samples():
    wanted = torch.tensor([[3.0, 2.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    rewards = torch.tensor([[0.5, 0.7, 0.2, 0.1], [1.0, 2.0, 3.0, 4.0]])
    # Of five pairs, that of the first two is in the wrong order.
    found = ranking_accuracy(rewards, wanted)
    assert found[0].item() == pytest.approx(4 / 5) and found[1].isnan()


def test_several_best_samples_count_alike():
    best, worst = best_and_worst(torch.tensor([[1.0, 3.0, 5.0]]), torch.tensor([[2.0, 2.0, 0.0]]))
    assert (best.item(), worst.item()) == (2.0, 5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "listwise"}, "none of rankdpo, dgpo, crd"),
        ({"beta": 0.0}, "beta=0.0: it must be positive"),
        ({"loss_type": "crd", "given_fractions": True}, "has no use for win fractions"),
    ],
)
def test_constants_that_cannot_be_used_raise(options, message):
    with pytest.raises(ValueError, match=message):
        options_of(**options)
