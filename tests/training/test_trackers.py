"""What TensorBoard, Weights & Biases and Trackio get of a run, read back from what they wrote."""

import json
import re
import sys
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trl_diffusion_pref
from trl_diffusion_pref import MaPOTrainer, SampleCallback


PAGE = Path(trl_diffusion_pref.__file__).parent.parent / "docs" / "mapo.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    build_tiny_pipeline().save_pretrained(path)
    return path


def documented_names() -> set[str]:
    """Metrics of the page's table, as trackers show them; evaluation has its own names."""
    section = PAGE.read_text().split("## What is logged")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    names = {name for cell in first_cells for name in re.findall(r"`([\w/]+)`", cell)}
    assert {"loss", "rewards/margins"} <= names
    return {f"train/{name}" for name in names if not name.startswith("eval_")}


def trained(config, folder: Path, pairs, tracker: str) -> MaPOTrainer:
    args = config(
        max_steps=2,
        report_to=[tracker],
        eval_strategy="steps",
        eval_steps=1,
        hub_token="hf_SECRET",
        model_init_kwargs={"token": "hf_SECRET", "dtype": torch.float32},
    )
    lora = LoraConfig(r=2, lora_alpha=8, init_lora_weights="gaussian")
    trainer = MaPOTrainer(str(folder), args, pairs, pairs.select(range(4)), peft_config=lora)
    trainer.add_callback(SampleCallback(trainer, ["a red circle"], every=2, num_inference_steps=2))
    trainer.train()
    return trainer


def logged_losses(trainer: MaPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def evaluation_names() -> set[str]:
    """Those of training and the accuracies that docs/diffusion_dpo.md lists."""
    accuracies = [f"preference_accuracy{end}" for end in ("", "_low", "_high")]
    accuracies += ["likelihood_accuracy", "base_likelihood_accuracy"]
    return {name.replace("train/", "eval/") for name in documented_names()} | {f"eval/{name}" for name in accuracies}


def test_tensorboard_has_the_metrics_pictures_and_options(config, folder, pairs, tmp_path):
    trainer = trained(config, folder, pairs, "tensorboard")
    (log,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    found = EventAccumulator(str(log)).Reload()
    tags = found.Tags()
    assert documented_names() | evaluation_names() <= set(tags["scalars"])
    assert [point.value for point in found.Scalars("train/loss")] == pytest.approx(logged_losses(trainer))
    assert [picture.step for picture in found.Images("samples")] == [0, 2]
    (options,) = found.Tensors("args/text_summary")
    (text,) = options.tensor_proto.string_val
    assert json.loads(text)["learning_rate"] == 1e-3
    (model,) = found.Tensors("model_config/text_summary")
    assert json.loads(model.tensor_proto.string_val[0])["cross_attention_dim"] == 32
    assert not [file for file in log.iterdir() if b"SECRET" in file.read_bytes()]


# ---- Weights & Biases ----------------------------------------------------------------------------------------------


def records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file.

    It is a log as LevelDB writes it, after a header of seven bytes: blocks of 32 KiB with parts of records, each with
    a checksum (4 bytes), a length (2) and a kind (1: whole, 2: first, 3: middle, 4: last part). wandb has no public
    reader.
    """
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        checksum = int.from_bytes(data[position : position + 4], "little")
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind, part = data[position + 6], data[position + 7 : position + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + part)
        parts = part if kind in (1, 2) else parts + part
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def values(items) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


@pytest.mark.newest
def test_weights_and_biases_has_the_metrics_pictures_and_options(config, folder, pairs, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true", "DISABLE_GIT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        trainer = trained(config, folder, pairs, "wandb")
        wandb.finish()
    finally:
        wandb.teardown()
    (file,) = tmp_path.rglob("*.wandb")
    found = list(records(file))
    history = [values(record.history.item) for record in found if record.WhichOneof("record_type") == "history"]
    assert documented_names() | evaluation_names() <= {name for row in history for name in row}
    losses = {row["train/global_step"]: row["train/loss"] for row in history if "train/loss" in row}
    assert list(losses) == [1, 2] and [*losses.values()] == pytest.approx(logged_losses(trainer))
    pictures = {row["samples/caption"]: row["samples/path"] for row in history if "samples/path" in row}
    assert list(pictures) == ["step 0", "step 2"]
    assert all((file.parent / "files" / path).read_bytes().startswith(b"\x89PNG") for path in pictures.values())
    options: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "run":
            options |= values(record.run.config.update)
        if record.WhichOneof("record_type") == "config":
            options |= values(record.config.update)
    assert options["learning_rate"] == 1e-3 and options["cross_attention_dim"] == 32
    assert not [path for path in file.parent.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]


# ---- Trackio -------------------------------------------------------------------------------------------------------


class Options(dict):
    """A tracker's configuration."""

    def update(self, new, allow_val_change: bool) -> None:
        super().update(new)


@pytest.fixture
def trackio(monkeypatch) -> Iterator[SimpleNamespace]:
    """Stands in for the package, which pins other versions than these tests run with; keeps what it is called with."""
    kept = SimpleNamespace(rows=[], config=Options(), init={})
    module = ModuleType("trackio")
    module.__version__, module.config = "1.0.0", kept.config
    module.context_vars = SimpleNamespace(
        current_space_id=ContextVar("space", default=None), current_project=ContextVar("project", default=None)
    )
    module.init = lambda **options: kept.init.update(options)
    module.log = kept.rows.append
    module.Image = lambda picture, caption: (picture.size, caption)
    module.finish = lambda: None
    monkeypatch.setitem(sys.modules, "trackio", module)
    integrations = "transformers.integrations.integration_utils"
    monkeypatch.setattr(f"{integrations}.is_trackio_available", lambda: True)
    monkeypatch.setattr(
        "trl_diffusion_pref.training.option_checks.get_available_reporting_integrations", lambda: ["trackio"]
    )
    yield kept


@pytest.mark.newest
def test_trackio_s_callback_passes_metrics_pictures_and_options(config, folder, pairs, trackio):
    trainer = trained(config, folder, pairs, "trackio")
    assert documented_names() | evaluation_names() <= {name for row in trackio.rows for name in row}
    losses = [row["train/loss"] for row in trackio.rows if "train/loss" in row]
    assert losses == pytest.approx(logged_losses(trainer))
    assert [row["samples"][1] for row in trackio.rows if "samples" in row] == ["step 0", "step 2"]
    assert trackio.config["learning_rate"] == 1e-3 and trackio.config["cross_attention_dim"] == 32
    assert "SECRET" not in str(trackio.config) + str(trackio.init)
