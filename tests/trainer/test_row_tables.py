import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from trl_diffusion_pref.trainer.row_tables import compute_for_rows, load_or_compute


RECORD = {"weights": "aa", "seed": 3}


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_computed_once_and_loaded_after(tmp_path, accelerator):
    table, calls = torch.rand(4, 2), []

    def compute():
        calls.append(1)
        return table

    for _ in range(2):
        assert torch.equal(load_or_compute(tmp_path, RECORD, compute, accelerator), table)
    assert len(calls) == 1
    other = load_or_compute(tmp_path, {**RECORD, "seed": 4}, compute, accelerator)
    assert torch.equal(other, table) and len(calls) == 2
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_named_file_made_from_something_else_is_refused_with_the_differences(tmp_path, accelerator):
    load_or_compute(tmp_path, RECORD, lambda: torch.zeros(1), accelerator, name="errors")
    with pytest.raises(
        ValueError, match="seed: made with 3, this run has 4\n  weights: made with 'aa', this run has 'b'"
    ):
        load_or_compute(tmp_path, {"weights": "b", "seed": 4}, lambda: torch.zeros(1), accelerator, name="errors")


def test_a_table_is_in_order_of_rows_and_leaves_the_model_as_it_was(accelerator):
    model = torch.nn.Dropout(0.5).train()
    loader = accelerator.prepare(DataLoader([{"row": row} for row in (3, 0, 4, 1, 2)], batch_size=2))

    def compute(batch):
        assert not torch.is_grad_enabled()
        return model(torch.stack([batch["row"] * 10, batch["row"] + 1], dim=1).double())

    table = compute_for_rows(loader, compute, model, accelerator, 5)
    assert torch.equal(table, torch.tensor([[10.0 * row, row + 1.0] for row in range(5)]))
    assert table.dtype == torch.float32 and model.training
