import torch
from accelerate import Accelerator
from torch import nn

from trl_diffusion_pref.trainer.non_finite import non_finite_losses, non_finite_weights


def test_the_first_bad_loss_and_all_its_rows_are_named():
    losses, rows = torch.tensor([1.0, float("inf"), 2.0, float("nan")]), torch.tensor([4, 9, 2, 7])
    accelerator = Accelerator(cpu=True)
    assert non_finite_losses(losses, rows, accelerator) == "the loss is inf for the rows [7, 9] of train_dataset"
    assert non_finite_losses(losses[::2], rows[::2], accelerator) is None


def test_weights_that_are_not_finite_are_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert non_finite_weights(model) == []
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    assert non_finite_weights(model) == ["1.bias"]
