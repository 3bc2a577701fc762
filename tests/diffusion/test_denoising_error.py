import pytest
import torch

from trl_diffusion_pref.diffusion.elbo import denoising_error


def test_error_is_the_mean_over_all_but_the_first_dimension():
    prediction = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    target = torch.zeros(2, 2, 2)
    assert denoising_error(prediction, target).tolist() == [7.5, 1.0]


def test_half_precision_is_taken_to_float32_before_the_difference():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(4, 64, generator=generator).bfloat16()
    target = (prediction.float() + 0.01 * torch.randn(4, 64, generator=generator)).bfloat16()
    error = denoising_error(prediction, target)
    exact = (prediction.double() - target.double()).square().mean(dim=1)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), exact, rtol=1e-6, atol=0)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="shape"):
        denoising_error(torch.zeros(2, 3), torch.zeros(2, 1))
