import pytest
import torch

from trl_diffusion_pref.trainer.denormals import denormals_are_flushed, flush_denormals


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
