import pytest
from transformers import TrainerControl, TrainerState

from trl_diffusion_pref.trainer.divergence import DivergenceGuard


class Reports:
    def __init__(self):
        self.calls = []

    def report_divergence(self, what, advice, *, stop):
        self.calls.append((what, advice, stop))


def run(steps, *, action="stop", margin=0.25, window=3) -> list[int]:
    """Steps at which a guard reported, for (chosen, reference) errors or lists of micro-batches of them."""
    reports, state = Reports(), TrainerState()
    guard = DivergenceGuard(reports, action, margin, window)
    reported = []
    for number, errors in enumerate(steps, start=1):
        for batch in errors if isinstance(errors, list) else [errors]:
            guard.record(*batch)
        state.global_step = number
        before = len(reports.calls)
        guard.on_step_end(None, state, TrainerControl())
        if len(reports.calls) > before:
            reported.append(number)
    return reported


def test_silent_while_the_error_stays_within_the_margin():
    assert run([(0.124, 0.1)] * 20) == []
    assert run([(0.05, 0.1)] * 20) == []


def test_reports_once_a_whole_window_is_above():
    assert run([(0.1, 0.1)] * 4 + [(0.2, 0.1)] * 2) == [5]  # mean of 0.1, 0.1, 0.2 is 0.133
    assert run([(0.2, 0.1)] * 2) == []


def test_single_spikes_pass():
    assert run([(0.1, 0.1)] * 3 + [(0.15, 0.1)] + [(0.1, 0.1)] * 5) == []


def test_it_is_the_ratio_to_the_reference_that_counts():
    """Late timesteps have large errors for everyone."""
    assert run([(5.0, 5.0), (0.1, 0.1), (3.0, 3.0)] * 4) == []


def test_micro_batches_count_as_one_step():
    assert run([[(0.1, 0.1), (0.2, 0.1)]] * 3) == [3]
    assert run([[(0.1, 0.1), (0.14, 0.1)]] * 6) == []


def test_warnings_come_once_per_window():
    assert run([(0.2, 0.1)] * 9, action="warn") == [3, 6, 9]


def test_the_report_says_what_and_what_to_do():
    reports, state = Reports(), TrainerState(global_step=7)
    guard = DivergenceGuard(reports, "stop", 0.25, 1)
    guard.record(0.2, 0.1)
    guard.on_step_end(None, state, TrainerControl())
    ((what, advice, stop),) = reports.calls
    assert stop is True
    assert "At step 7" in what and "100% above" in what and "allowed: 25%" in what
    for option in ("learning_rate", "beta", "margin_clip", "winner_preserving_mu", "sft_weight"):
        assert option in advice


@pytest.mark.parametrize(("action", "stop"), [("stop", True), ("warn", False)])
def test_the_action_is_passed_on(action, stop):
    reports = Reports()
    guard = DivergenceGuard(reports, action, 0.25, 1)
    guard.record(0.2, 0.1)
    guard.on_step_end(None, TrainerState(), TrainerControl())
    assert reports.calls[0][2] is stop
