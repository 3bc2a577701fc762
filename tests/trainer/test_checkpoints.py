import json

import pytest

from trl_diffusion_pref.run_record import write_run_record
from trl_diffusion_pref.trainer.checkpoints import check_same_base, checkpoint_problem, last_complete_checkpoint


def checkpoint(folder, step, *, state="{}", base="aaaa"):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if base is not None:
        write_run_record(path, {"base_model": None, "base_fingerprint": base})
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_newest_whole_checkpoint_is_taken_and_unfinished_ones_named(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, state=None)
    checkpoint(tmp_path, 11, state='{"global_step": ')
    (tmp_path / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(tmp_path) == (
        str(tmp_path / "checkpoint-10"),
        ["checkpoint-100", "checkpoint-11"],
    )


def test_no_checkpoint_at_all(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") == (None, [])


def test_problems_say_what_is_wrong(tmp_path):
    assert "no such folder" in checkpoint_problem(tmp_path / "checkpoint-1")
    assert "missing" in checkpoint_problem(checkpoint(tmp_path, 1, state=None))
    assert "cut off" in checkpoint_problem(checkpoint(tmp_path, 2, state="{"))
    assert "not written by this package" in checkpoint_problem(checkpoint(tmp_path, 3, base=None))
    assert checkpoint_problem(checkpoint(tmp_path, 4)) is None


def test_a_record_that_was_cut_off_makes_the_checkpoint_unfinished(tmp_path):
    path = checkpoint(tmp_path, 3)
    (path / "trl_diffusion_pref.json").write_text('{"base')
    check_same_base(tmp_path, "aaaa")
    assert last_complete_checkpoint(tmp_path) == (None, ["checkpoint-3"])


def test_checkpoints_of_another_base_are_refused(tmp_path):
    path = checkpoint(tmp_path, 5, base="bbbb")
    check_same_base(tmp_path, "bbbb")
    with pytest.raises(ValueError, match=f"{path.name} was trained from another base.*bbbb.*aaaa.*output_dir"):
        check_same_base(tmp_path, "aaaa")
    assert json.loads((path / "trl_diffusion_pref.json").read_text())["base_fingerprint"] == "bbbb"
