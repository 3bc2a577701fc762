import random

import numpy as np
import pytest
import torch

from trl_diffusion_pref.trainer.global_generators import restored_generators


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
