import numpy as np
import pytest
import torch
from accelerate import Accelerator

from trl_diffusion_pref.data import Batch
from trl_diffusion_pref.training.row_cache import RowCache


RECORD = {"what": "numbers", "weights": "aa", "seed": 3}


class Options:
    """The config's part that the cache reads."""

    per_device_eval_batch_size = 2

    def __init__(self, folder):
        self.cache_folder = lambda: folder


class Encoded:
    """What the cache asks of an encoded data set."""

    fingerprint = "data"

    def __init__(self, rows):
        self.rows = np.asarray(rows)

    def __len__(self):
        return len(self.rows)

    def subset(self, indices):
        return Encoded(self.rows[indices])


@pytest.fixture
def dataset() -> Encoded:
    return Encoded(range(5))


def batches(dataset, batch_size):
    """Not in order, and one row twice, as the processes of a run hand them in."""
    for rows in ([3, 0], [4, 1], [2, 2]):
        wanted = [row for row in rows if row in dataset.rows]
        if wanted:
            yield Batch(torch.tensor(wanted), None, {}, {}, {}, {})


@pytest.fixture
def cache(tmp_path) -> RowCache:
    model = torch.nn.Dropout(0.5).train()
    return RowCache(Accelerator(cpu=True), model, batches, Options(tmp_path), {"prompts": "p"})


def test_computed_once_and_loaded_after(tmp_path, cache, dataset, capsys):
    calls = []

    def compute(batch):
        calls.append(batch.rows)
        return batch.rows.double()[:, None]

    for _ in range(2):
        assert torch.equal(cache.load_or_compute(dataset, compute, RECORD), torch.arange(5.0)[:, None])
    assert len(calls) == 3
    assert "numbers: 100%" in capsys.readouterr().err
    cache.load_or_compute(dataset, compute, {**RECORD, "seed": 4})
    assert len(calls) == 6
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_named_file_made_from_something_else_is_refused_with_the_differences(tmp_path, cache, dataset):
    file = tmp_path / "errors.safetensors"
    cache.load_or_compute(dataset, lambda batch: batch.rows, RECORD, file)
    other = {**RECORD, "weights": "b", "seed": 4}
    with pytest.raises(
        ValueError, match="seed: made with 3, this run has 4\n  weights: made with 'aa', this run has 'b'"
    ):
        cache.load_or_compute(dataset, lambda batch: batch.rows, other, file)


def test_a_table_is_in_order_of_rows_and_leaves_the_model_as_it_was(cache, dataset):
    def compute(batch):
        assert not torch.is_grad_enabled()
        return cache.model(torch.stack([batch.rows * 10, batch.rows + 1], dim=1).double())

    table = cache.load_or_compute(dataset, compute, RECORD)
    assert torch.equal(table, torch.tensor([[10.0 * row, row + 1.0] for row in range(5)]))
    assert table.dtype == torch.float32 and cache.model.training


def test_rows_that_were_left_out_are_not_computed(cache):
    table = cache.load_or_compute(Encoded([0, 2, 3]), lambda batch: batch.rows[:, None], RECORD)
    assert table.isnan().squeeze(1).tolist() == [False, True, False, False]


def test_an_interrupted_computation_goes_on_where_it_was(cache, dataset, monkeypatch):
    monkeypatch.setattr("trl_diffusion_pref.training.row_cache._SAVE_EVERY", -1.0)
    seen = []

    def compute(batch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(batch.rows.tolist())
        return batch.rows[:, None]

    with pytest.raises(KeyboardInterrupt):
        cache.load_or_compute(dataset, compute, RECORD)
    seen.append("again")
    table = cache.load_or_compute(dataset, compute, RECORD)
    assert table.squeeze(1).tolist() == [0, 1, 2, 3, 4]
    assert seen == [[3, 0], [4, 1], "again", [2, 2]]
