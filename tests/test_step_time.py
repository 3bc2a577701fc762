"""What `make bench` says of given times, and that a trainer's step in turns is a step of its own loop."""

import pytest
from helpers.algorithms import trainer_for
from step_time import interval, missed, ratio, ratios, repaid, trainer_step


def measured(name: str, unit: str, rounds: list[list[float]], model: str = "sd15") -> dict:
    return {"model": model, "comparisons": [{"run": name, "unit": unit, "seconds": rounds}]}


def test_a_ratio_is_that_of_the_steps_in_turns_whatever_the_machine_s_speed():
    # Twice as slow in every other round, and in the second half of one.
    rounds = [[1.2, 1.0, 1.0, 1.2], [2.4, 2.0, 2.0, 2.4]] * 5 + [[1.2, 1.0, 2.0, 2.4]]
    assert ratio(rounds) == pytest.approx(1.2) and interval(rounds) == pytest.approx((1.2, 1.2))


@pytest.mark.parametrize(
    ("name", "unit", "spread", "found"),
    [
        ("MaPO", "bare step", (1.06, 1.07, 1.08), True),
        ("MaPO", "bare step", (1.0, 1.07, 1.2), False),  # within the noise
        ("MaPO", "bare step", (0.9, 0.92, 0.94), False),
        ("released MaPO", "MaPO", (1.2, 1.25, 1.3), True),
        ("released MaPO", "MaPO", (1.2, 1.35, 1.5), False),
        ("DPO, LoRA, adapter off, checkpointing", "MaPO, LoRA, checkpointing", (1.45, 1.5, 1.55), True),
        ("DPO, copy", "bare step with a copy", (3.0, 3.1, 3.2), False),  # without a bound
    ],
)
def test_a_bound_is_missed_by_more_than_the_noise(name, unit, spread, found):
    rounds = [[own, 1.0, 1.0, own] for own in spread for _ in range(5)]
    lines = missed(ratios(measured(name, unit, rounds)))
    assert bool(lines) == found and all(line.startswith(f"{name}: ") for line in lines)


def test_encoding_is_repaid_by_what_the_released_step_takes_longer():
    # Two pairs a step: 0.5 s longer, and encoding both takes 1 s, which a step takes too.
    result = measured("released MaPO", "MaPO", [[1.5, 1.0, 1.0, 1.5]] * 3)
    assert repaid({**result, "batch_size": 2, "encoding": 0.5}) == (
        "Encoding a pair, once, takes 1.00 of what training on it takes. Beside MaPO's released recipe this is repaid "
        "after 2.0 epochs."
    )


def test_a_step_in_turns_is_one_of_the_trainer_s_own(tmp_path):
    trainer = trainer_for("mapo", tmp_path, max_steps=100)
    step = trainer_step(trainer)
    assert trainer.state.global_step == 0
    for number in (1, 2, 3):
        assert step() > 0 and trainer.state.global_step == number


def test_an_error_of_the_trainer_is_raised_where_its_step_is_asked_for(tmp_path, monkeypatch):
    trainer = trainer_for("mapo", tmp_path, max_steps=100)
    step = trainer_step(trainer)

    def fail(*args, **kwargs):
        raise OSError("no such thing")

    monkeypatch.setattr(trainer, "compute_losses", fail)
    with pytest.raises(OSError, match="no such thing"):
        step()
