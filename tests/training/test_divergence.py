import pytest
import torch
from diffusers import DDPMScheduler

from trl_diffusion_pref.diffusion.noise import RectifiedFlow, noise_process
from trl_diffusion_pref.training.divergence import DivergenceGuard


def make_guard(margin=0.25, window=3, start_margin=1.5) -> DivergenceGuard:
    process = noise_process(DDPMScheduler())
    return DivergenceGuard(window, process, reference_margin=margin, start_margin=start_margin)


def record(guard, chosen, reference, time=500.0):
    as_tensor = torch.atleast_1d(torch.tensor(chosen))
    reference = None if reference is None else torch.full_like(as_tensor, reference)
    guard.record(as_tensor, reference, torch.full_like(as_tensor, time))


def run(steps, *, margin=0.25, window=3) -> list[int]:
    """Steps at which a guard found something, for (chosen, reference) errors or lists of micro-batches of them."""
    guard, found = make_guard(margin, window), []
    for number, errors in enumerate(steps, start=1):
        for batch in errors if isinstance(errors, list) else [errors]:
            record(guard, *batch)
        if guard.check():
            found.append(number)
    return found


def test_silent_while_the_error_stays_within_the_margin():
    assert run([(0.124, 0.1)] * 20) == []
    assert run([(0.05, 0.1)] * 20) == []


def test_reports_once_a_whole_window_is_above():
    assert run([(0.1, 0.1)] * 4 + [(0.2, 0.1)] * 2) == [5]  # mean of 0.1, 0.1, 0.2 is 0.133
    assert run([(0.2, 0.1)] * 2) == []


def test_single_spikes_pass():
    assert run([(0.1, 0.1)] * 3 + [(0.15, 0.1)] + [(0.1, 0.1)] * 5) == []


def test_it_is_the_ratio_to_the_reference_that_counts():
    """Late timesteps have large errors for every model."""
    assert run([(5.0, 5.0), (0.1, 0.1), (3.0, 3.0)] * 4) == []


def test_micro_batches_count_as_one_step():
    assert run([[(0.1, 0.1), (0.2, 0.1)]] * 3) == [3]
    assert run([[(0.1, 0.1), (0.14, 0.1)]] * 6) == []


def test_findings_come_once_per_window():
    assert run([(0.2, 0.1)] * 9) == [3, 6, 9]


def test_the_finding_says_how_much_and_what_is_allowed():
    guard = make_guard(window=1)
    record(guard, 0.2, 0.1)
    finding = guard.check()
    assert "100% above the reference's" in finding and "allowed: 25%" in finding


def test_a_rise_over_the_start_is_found_without_a_reference():
    """The base's error differs a hundredfold over times; each time is compared with its own start."""
    guard, generator = make_guard(window=5), torch.Generator().manual_seed(0)
    found = []
    for step in range(200):
        times = torch.rand(4, generator=generator) * 1000
        error = torch.exp(-times / 200) * (1 + 0.3 * torch.randn(4, generator=generator)).clamp(min=0.2)
        guard.record(error * (1.0 if step < 100 else 2.0), None, times)
        if guard.check():
            found.append(step)
    assert found and 100 < found[0] < 120


@pytest.mark.parametrize("batch", [1, 16])
def test_healthy_noise_is_no_alarm_in_twenty_runs(batch):
    for seed in range(20):
        guard, generator = make_guard(window=5), torch.Generator().manual_seed(seed)
        for _ in range(150):
            times = torch.rand(batch, generator=generator)
            guard.process = RectifiedFlow()
            error = (0.2 + times) * torch.exp(0.4 * torch.randn(batch, generator=generator))
            guard.record(error, None, times * 1000)
            assert guard.check() is None, seed


def test_a_reference_that_moves_along_does_not_hide_a_rise():
    guard = make_guard(window=5)
    found = []
    for step in range(100):
        record(guard, [0.1 * (1 + 0.05 * step)] * 4, 0.1 * (1 + 0.05 * step))
        found += [step] if guard.check() else []
    assert found and found[0] < 40


def test_a_resumed_guard_finds_what_an_uninterrupted_one_finds():
    steps = [0.1] * 30 + [0.3] * 30
    whole, first, found = make_guard(), make_guard(), {"whole": [], "resumed": []}
    for number, error in enumerate(steps):
        record(whole, [error] * 4, None)
        found["whole"] += [number] if whole.check() else []
    for number, error in enumerate(steps):
        if number == 32:
            second = make_guard()
            second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
            first = second
        record(first, [error] * 4, None)
        found["resumed"] += [number] if first.check() else []
    assert found["whole"] == found["resumed"] != []
