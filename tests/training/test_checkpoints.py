import json

import pytest
import torch
from helpers.pipelines import build_tiny_pipeline

from trl_diffusion_pref.data import Encoders
from trl_diffusion_pref.export.weights import write_run_record
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.training.checkpoint import Checkpointer, checkpoint_problem, last_usable_checkpoint


def checkpoint(folder, step, *, state="{}", base="aaaa", **more):
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if base is not None:
        write_run_record(path, {"base_model": None, "base_fingerprint": base, **more})
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


@pytest.fixture(scope="module")
def pipeline():
    return build_tiny_pipeline()


def checkpointer(pipeline, folder, base="aaaa") -> Checkpointer:
    encoders = Encoders(pipeline, family_for(pipeline))
    return Checkpointer(encoders, folder, {"base_model": None, "base_fingerprint": base})


def test_newest_whole_checkpoint_is_taken_and_unfinished_ones_named(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 100, state=None)
    checkpoint(tmp_path, 11, state='{"global_step": ')
    (tmp_path / "checkpoint-x").mkdir()
    assert last_usable_checkpoint(tmp_path) == (tmp_path / "checkpoint-10", ["checkpoint-100", "checkpoint-11"])


def test_a_diverged_checkpoint_is_passed_over(tmp_path):
    checkpoint(tmp_path, 9)
    checkpoint(tmp_path, 10, diverged="its error rose")
    assert last_usable_checkpoint(tmp_path) == (tmp_path / "checkpoint-9", ["checkpoint-10"])


def test_no_checkpoint_at_all(tmp_path):
    assert last_usable_checkpoint(tmp_path / "nowhere") == (None, [])


def test_problems_say_what_is_wrong(tmp_path):
    assert "no such folder" in checkpoint_problem(tmp_path / "checkpoint-1")
    assert "missing" in checkpoint_problem(checkpoint(tmp_path, 1, state=None))
    assert "cut off" in checkpoint_problem(checkpoint(tmp_path, 2, state="{"))
    assert "not written by this package" in checkpoint_problem(checkpoint(tmp_path, 3, base=None))
    assert checkpoint_problem(checkpoint(tmp_path, 4)) is None


def test_a_record_that_was_cut_off_makes_the_checkpoint_unfinished(tmp_path, pipeline):
    path = checkpoint(tmp_path, 3)
    (path / "trl_diffusion_pref.json").write_text('{"base')
    checkpointer(pipeline, tmp_path).check_output_dir()
    assert last_usable_checkpoint(tmp_path) == (None, ["checkpoint-3"])


def test_checkpoints_of_another_base_are_refused(tmp_path, pipeline):
    path = checkpoint(tmp_path, 5, base="bbbb")
    checkpointer(pipeline, tmp_path, "bbbb").check_output_dir()
    with pytest.raises(ValueError, match=f"{path.name} was trained from another base.*bbbb.*aaaa.*output_dir"):
        checkpointer(pipeline, tmp_path).check_output_dir()
    assert json.loads((path / "trl_diffusion_pref.json").read_text())["base_fingerprint"] == "bbbb"


def test_an_unfinished_checkpoint_by_path_says_what_to_pass(tmp_path, pipeline):
    path = checkpoint(tmp_path, 2, state=None)
    with pytest.raises(ValueError, match="Cannot resume from .*unfinished.*resume_from_checkpoint=True.*newest"):
        checkpointer(pipeline, tmp_path).to_resume(str(path), pipeline.unet, sharded=False)


@pytest.mark.parametrize("name", ["optimizer.pt", "unet/diffusion_pytorch_model.safetensors"])
def test_a_file_that_is_cut_off_is_named(tmp_path, pipeline, name):
    path = checkpoint(tmp_path, 2)
    (path / "unet").mkdir()
    torch.save({}, path / "scheduler.pt")
    (path / name).write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match=f"{name} is cut off or damaged.*earlier checkpoint"):
        checkpointer(pipeline, tmp_path).to_resume(True, pipeline.unet, sharded=False)


class Part:
    """State of one number, of every process."""

    description, per_process = "number", True

    def __init__(self):
        self.value = torch.zeros(1)

    def reset(self):
        self.value = torch.zeros(1)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]

    def depends_on(self):
        return {}


def test_parts_whose_names_end_in_digits_are_told_apart(pipeline, tmp_path):
    writer = checkpointer(pipeline, tmp_path)
    writer.parts = {"pool1": Part(), "pool2": Part()}
    for process in range(2):
        for part in writer.parts.values():
            part.value = torch.tensor([5.0 + process])
        writer.write_parts(tmp_path, process, should_save=process == 0)
    writer.read_parts(tmp_path, process_index=1, processes=2)
    assert [part.value.item() for part in writer.parts.values()] == [6.0, 6.0]
