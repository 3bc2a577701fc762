import random

import numpy as np
import pytest
import torch

from trl_diffusion_pref.training.process_state import denormals_are_flushed, flush_denormals, restored_generators


@pytest.fixture(autouse=True)
def restore():
    before = denormals_are_flushed()
    yield
    torch.set_flush_denormal(before)


@pytest.mark.parametrize("before", [False, True])
def test_flushed_inside_and_as_before_outside(before):
    torch.set_flush_denormal(before)
    with flush_denormals(torch.device("cpu")):
        assert (torch.full((4,), 1e-38) * 1e-3).tolist() == [0.0] * 4
    assert denormals_are_flushed() is before


def test_restored_after_an_error():
    torch.set_flush_denormal(False)
    with pytest.raises(RuntimeError), flush_denormals(torch.device("cpu")):
        raise RuntimeError
    assert not denormals_are_flushed()


def test_other_devices_leave_the_cpu_alone():
    torch.set_flush_denormal(False)
    with flush_denormals(torch.device("meta")):
        assert not denormals_are_flushed()


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


@pytest.mark.parametrize("raises", [False, True])
def test_what_is_drawn_within_does_not_change_what_is_drawn_after(raises):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = draw()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    try:
        with restored_generators(torch.device("cpu")):
            assert draw() == expected
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert draw() == expected
