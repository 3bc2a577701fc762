"""Two gloo processes on the CPU, started as a user would start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline


@pytest.fixture(scope="module")
def run(tmp_path_factory, pairs):
    """What each process saw, in a run with two processes and one with a single one."""
    folder = tmp_path_factory.mktemp("distributed")
    pairs.save_to_disk(folder / "pairs")
    script = str(Path(__file__).parents[1] / "helpers" / "distributed_run.py")
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    results = {}
    for processes in (2, 1):
        output = folder / str(processes)
        output.mkdir()
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        )
        command = [sys.executable, *launch, script, str(output), str(folder / "pairs")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = [json.loads((output / f"rank-{rank}.json").read_text()) for rank in range(processes)]
    results["folder"] = folder
    return results


def test_every_sample_is_seen_once(run):
    first, second = (rank["rows"] for rank in run[2])
    assert sorted(first + second) == list(range(16))


def test_processes_draw_different_noise_and_timesteps(run):
    (one,), (first, second) = run[1], run[2]
    assert len(first["noise"]) == len(second["noise"]) == 8
    assert not set(first["noise"]) & set(second["noise"])
    assert first["timesteps"] != second["timesteps"]
    # Those of one process with the double batch.
    assert sorted(first["noise"] + second["noise"]) == sorted(one["noise"])
    assert sorted(first["timesteps"] + second["timesteps"]) == sorted(one["timesteps"])


def test_processes_end_with_equal_weights_and_log_the_same(run):
    first, second = run[2]
    assert first["weights"] == second["weights"]
    assert first["losses"] and first["losses"] == second["losses"]


def test_two_processes_train_as_one_with_the_double_batch(run):
    (one,), (two, _) = run[1], run[2]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-3)
    pools = [[latents for rank in run[count] for latents in rank["self_npo"]["whole"]["pool"]] for count in (1, 2)]
    assert pools[1] == [pytest.approx(latents, rel=1e-3, abs=1e-3) for latents in pools[0]]


def test_weights_that_are_damaged_in_one_process_are_known_to_all(run):
    """Each may hold shards of its own, and all must stop or none."""
    assert [rank["non_finite"] for rank in run[2]] == [["weight"], ["weight"]]
    assert run[1][0]["non_finite"] == []


def test_evaluation_equals_that_of_one_process(run):
    assert run[2][0]["eval_loss"] == run[2][1]["eval_loss"]
    assert run[2][0]["eval_loss"] == pytest.approx(run[1][0]["eval_loss"], rel=1e-6)


def test_held_out_accuracies_and_their_interval_are_equal_for_one_and_two_processes(run):
    for name in ("accuracies", "interval"):
        assert run[2][0][name] == run[2][1][name] == run[1][0][name]


def test_reference_errors_are_equal_however_many_processes_computed_them(run):
    assert len(run[1][0]["dpo"]["errors"]) == 16 * 2 * 2
    assert run[2][0]["dpo"]["errors"] == run[2][1]["dpo"]["errors"]
    assert run[2][0]["dpo"]["errors"] == pytest.approx(run[1][0]["dpo"]["errors"], rel=1e-6)


def test_dpo_s_processes_end_with_equal_weights(run):
    assert run[2][0]["dpo"]["weights"] == run[2][1]["dpo"]["weights"]
    assert run[2][0]["dpo"]["accuracy"] == run[2][1]["dpo"]["accuracy"]


def test_self_npo_s_processes_hold_different_trajectories_and_equal_weights(run):
    first, second = (rank["self_npo"]["whole"] for rank in run[2])
    assert all(left != right for left in first["pool"] for right in second["pool"])
    assert first["weights"] == second["weights"] and first["teacher"] == second["teacher"]


def test_self_npo_resumes_each_process_s_own_trajectories(run):
    for rank in run[2]:
        assert rank["self_npo"]["resumed"] == rank["self_npo"]["whole"]


def test_images_are_encoded_once_by_all_processes_together(run):
    """The seven pairs for evaluation are among the sixteen for training."""
    probes = 1  # one call asks for the latents' shape
    assert sum(rank["encoded"] - probes for rank in run[2]) == 2 * 16
    assert run[1][0]["encoded"] - probes == 2 * 16


def test_two_processes_write_the_encoded_files_of_one(run):
    written = []
    for processes in (1, 2):
        cache = run["folder"] / str(processes) / "cache"
        shards = [*cache.glob("samples-*/*"), *cache.glob("prompts-*/*"), *cache.glob("contents-*")]
        written.append({str(file.relative_to(cache)): file.read_bytes() for file in shards})
    assert written[0] == written[1]
    assert sum(name.startswith("samples-") for name in written[0]) == 2, "each process wrote one"


def test_the_saved_pipeline_loads(run):
    StableDiffusionPipeline.from_pretrained(run["folder"] / "2" / "output")
