"""Encoding without training: saved, moved, pushed, loaded, and taken by trainers that it fits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import tiny
from helpers.hub_server import HubServer, hub_server  # noqa: F401
from helpers.pipelines import build_tiny_pipeline, image_pairs, png
from PIL import Image

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    encode_dataset,
    load_encoded_dataset,
)
from trl_diffusion_pref.data.encoded import EncodedDataset
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.shapes import preference_pairs


def options(folder: Path, **changed) -> dict:
    return {
        "output_dir": str(folder / "output"),
        "dataset_cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        **changed,
    }


def mapo(folder: Path, **changed) -> MaPOConfig:
    return MaPOConfig(**options(folder, **changed))


def losses(train_dataset, folder: Path, pipeline=None, **changed) -> list[float]:
    trainer = MaPOTrainer(pipeline or build_tiny_pipeline(), mapo(folder, **changed), train_dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def values(dataset: EncodedDataset) -> list[dict[str, torch.Tensor]]:
    """All that each row gives to a batch, with its prompt's embedding."""
    rows = [dataset[index] for index in range(len(dataset))]
    return [
        {name: torch.as_tensor(value) for name, value in row.items() if name != "prompt"}
        | {name: tensor[0] for name, tensor in dataset.prompts.conditioning([row["prompt"]]).items()}
        for row in rows
    ]


@pytest.fixture(scope="module")
def rows() -> Dataset:
    return preference_pairs(9, seed=1)


@pytest.fixture(scope="module")
def saved(rows, tmp_path_factory) -> Path:
    """A data set saved away from the cache that it came from, which is gone."""
    folder = tmp_path_factory.mktemp("saved")
    encoded = encode_dataset(build_tiny_pipeline(), rows, mapo(folder), output=folder / "first")
    expected = values(encoded)
    shutil.rmtree(folder / "cache")
    (folder / "first").rename(folder / "moved")
    torch.save(expected, folder / "expected.pt")
    return folder / "moved"


def test_a_loaded_data_set_gives_the_rows_that_were_encoded(saved):
    loaded, expected = load_encoded_dataset(saved), torch.load(saved.parent / "expected.pt")
    assert len(loaded) == len(expected) == 9
    for row, wanted in zip(values(loaded), expected, strict=True):
        assert row.keys() == wanted.keys()
        assert all(torch.equal(row[name], wanted[name]) for name in row)


def test_training_on_it_is_training_on_the_rows(saved, rows, tmp_path):
    assert losses(load_encoded_dataset(saved), tmp_path / "a") == losses(rows, tmp_path / "b")


def test_it_is_taken_for_evaluation_beside_rows_that_are_encoded_now(saved, rows, tmp_path):
    """Its prompts keep their own embeddings, though the trainer's table numbers them otherwise."""
    train, metrics = preference_pairs(4, seed=9).map(lambda row: {"prompt": f"other {row['prompt']}"}), []
    for evaluated in (load_encoded_dataset(saved), rows):
        trainer = MaPOTrainer(build_tiny_pipeline(), mapo(tmp_path, eval_draws=2), train, evaluated)
        metrics.append(trainer.evaluate())
    names = ("eval_loss", "eval_preference_accuracy", "eval_base_likelihood_accuracy")
    assert all(metrics[0][name] == metrics[1][name] for name in names)
    assert trainer.evaluate(load_encoded_dataset(saved))["eval_loss"] == metrics[0]["eval_loss"]


def test_a_pipeline_given_by_name_is_encoded_without_its_denoiser_s_weights(saved, rows, tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    for file in (tmp_path / "pipeline" / "unet").glob("*.safetensors"):
        file.unlink()
    encoded = encode_dataset(str(tmp_path / "pipeline"), rows, mapo(tmp_path))
    assert encoded.record == load_encoded_dataset(saved).record
    assert encoded.fingerprint == load_encoded_dataset(saved).fingerprint


def test_it_shares_the_cache_with_the_trainer(rows, tmp_path, monkeypatch):
    pipeline = build_tiny_pipeline()
    encode_dataset(pipeline, rows, mapo(tmp_path))
    seen, original = [], pipeline.vae.encode
    monkeypatch.setattr(pipeline.vae, "encode", lambda pixels: (seen.append(len(pixels)), original(pixels))[1])
    MaPOTrainer(pipeline, mapo(tmp_path), rows)
    assert seen == [1], "only the latents' shape is asked for"


def test_pairs_are_the_default(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    assert encode_dataset(build_tiny_pipeline(), rows).record["samples"] == ["chosen", "rejected", 1]


def test_the_config_says_which_columns_are_read(tmp_path):
    cfg = SelfNPOConfig(**options(tmp_path, per_device_train_batch_size=2))
    prompts = Dataset.from_dict({"prompt": [["a red circle"], ["a blue ring", "a ring"]]})
    encode_dataset(build_tiny_pipeline(), prompts, cfg, output=tmp_path / "saved")
    loaded = load_encoded_dataset(tmp_path / "saved")
    assert loaded.samples is None and not (tmp_path / "saved" / "samples").exists()
    assert sorted(loaded.prompts.texts) == ["", "a blue ring", "a red circle", "a ring"]
    SelfNPOTrainer(build_tiny_pipeline(), cfg, loaded).train()


def half_precision(pipeline):
    pipeline.vae.to(torch.bfloat16)


def other_vae(pipeline):
    with torch.no_grad():
        pipeline.vae.encoder.conv_in.weight.mul_(2)


def other_text_encoder(pipeline):
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.mul_(2)


def other_tokenizer(pipeline):
    pipeline.tokenizer.model_max_length = 8


def as_it_is(pipeline):
    pass


@pytest.mark.parametrize(
    ("change", "changed", "message"),
    [
        (as_it_is, {"resolution": 8}, r"resolution: made with \[16, 16\], this run has \[8, 8\]"),
        (as_it_is, {"aspect_ratio_buckets": True}, r"resolution: made with \[16, 16\], this run has \[\[\d+, \d+\], "),
        (as_it_is, {"label_noise": 0.25}, "pairs, label_noise: made with 0.0, this run has 0.25"),
        (as_it_is, {"crop": "random"}, "crop: made with 'center', this run has 'random'"),
        (as_it_is, {"random_flip": True}, "random_flip: made with False, this run has True"),
        (as_it_is, {"cache_dtype": "float32"}, "cache_dtype: made with 'float16', this run has 'float32'"),
        (half_precision, {}, "vae's dtype: made with 'float32', this run has 'bfloat16'"),
        (other_vae, {}, "vae: made with '[0-9a-f]{16}', this run has '[0-9a-f]{16}'"),
        (other_text_encoder, {}, "prompts, text encoders, text_encoder: made with "),
        (other_tokenizer, {}, "prompts, tokenizers, tokenizer: made with "),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_what_differs_is_named(change, changed, message, saved, tmp_path):
    pipeline = build_tiny_pipeline()
    change(pipeline)
    expected = f"(?s)train_dataset was encoded for something else:\n.*{message}.*encode_dataset"
    with pytest.raises(ValueError, match=expected):
        MaPOTrainer(pipeline, mapo(tmp_path, **changed), load_encoded_dataset(saved))


def test_another_pipeline_and_other_columns_are_named(saved, tmp_path):
    pipeline = tiny.build("stable_diffusion_xl")
    cfg = SelfNPOConfig(**options(tmp_path, start="data"))
    with pytest.raises(ValueError) as raised:
        SelfNPOTrainer(pipeline, cfg, load_encoded_dataset(saved))
    message = str(raised.value)
    assert "pipeline: made with 'StableDiffusionPipeline', this run has 'StableDiffusionXLPipeline'" in message
    assert "samples: made with ['chosen', 'rejected', 1], this run has ['image', 1]" in message


def test_the_mean_alone_does_not_do_for_drawing_samples_and_the_reverse_does(saved, rows, tmp_path):
    encoded = encode_dataset(build_tiny_pipeline(), rows, mapo(tmp_path, latent_sampling="mean"))
    with pytest.raises(ValueError, match="latent_sampling: made with 'mean', this run has 'sample'"):
        MaPOTrainer(build_tiny_pipeline(), mapo(tmp_path), encoded)
    mean = losses(load_encoded_dataset(saved), tmp_path, latent_sampling="mean")
    assert mean == losses(encoded, tmp_path, latent_sampling="mean")


def test_a_column_that_the_method_needs_and_the_data_set_lacks_is_named(saved):
    loaded = load_encoded_dataset(saved)
    with pytest.raises(ValueError, match="column reward: it has none, and this run needs it"):
        loaded.check_fits(loaded.record, "data", required=("reward",))


def test_columns_of_numbers_come_back(rows, tmp_path):
    labelled = rows.add_column("soft_label", np.linspace(0.1, 0.9, 9).tolist())
    cfg = DiffusionDPOConfig(**options(tmp_path, loss_type="irepo"))
    encode_dataset(build_tiny_pipeline(), labelled, cfg, output=tmp_path / "saved")
    loaded = load_encoded_dataset(tmp_path / "saved")
    assert loaded.scalars["soft_label"].tolist() == pytest.approx(np.linspace(0.1, 0.9, 9).tolist())
    assert DiffusionDPOTrainer(build_tiny_pipeline(), cfg, loaded).train().global_step == 2


def test_other_versions_of_the_libraries_are_no_matter_where_they_compute_the_same(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.__version__", "99.0")
    assert losses(load_encoded_dataset(saved), tmp_path)


def test_other_versions_of_the_libraries_that_compute_otherwise_are_named(saved, tmp_path, monkeypatch):
    pipeline, made = build_tiny_pipeline(), load_encoded_dataset(saved).record["prompts"]["transformers"]
    monkeypatch.setattr("transformers.__version__", "99.0")
    original = pipeline.encode_prompt

    def otherwise(*args, **kwargs):
        embeds, *rest = original(*args, **kwargs)
        return (embeds * 1.1, *rest)

    monkeypatch.setattr(pipeline, "encode_prompt", otherwise)
    with pytest.raises(ValueError, match=f"encoded with transformers {made}, and the installed .* give other prompt_"):
        MaPOTrainer(pipeline, mapo(tmp_path), load_encoded_dataset(saved))


@pytest.mark.parametrize("name", ["pixart_sigma", "flux_dev", "stable_diffusion_3"])
def test_embeddings_without_their_padding_are_compared_as_they_are_kept(name, tmp_path):
    pipeline = tiny.build(name)
    prompts = ["a ring", "b"]
    encoded = encode_dataset(pipeline, Dataset.from_dict({"prompt": prompts}), SelfNPOConfig(**options(tmp_path)))
    assert encoded.prompts.differs_from(prompts, pipeline, family_for(pipeline)) == []


def test_rows_of_several_sizes_come_back_in_their_buckets(tmp_path):
    noise = np.random.default_rng(0)

    def image(width, height):
        return png(Image.fromarray(noise.integers(0, 255, (height, width, 3), dtype=np.uint8)))

    shapes = [(32, 32), (64, 32), (32, 64), (64, 32)]
    rows = image_pairs([("a", image(*shape), image(*shape)) for shape in shapes])
    cfg = mapo(tmp_path, aspect_ratio_buckets=True, per_device_train_batch_size=1)
    encoded = encode_dataset(build_tiny_pipeline(), rows, cfg, output=tmp_path / "saved")
    loaded = load_encoded_dataset(tmp_path / "saved")
    assert loaded.buckets.tolist() == encoded.buckets.tolist() and len(set(loaded.buckets.tolist())) == 3
    assert loaded.sizes == encoded.sizes and loaded.latent_shapes() == encoded.latent_shapes()
    assert losses(loaded, tmp_path / "a", aspect_ratio_buckets=True) == losses(
        encoded, tmp_path / "b", aspect_ratio_buckets=True
    )


def test_rows_that_were_left_out_stay_counted(tmp_path):
    good = [(row["prompt"], png(row["chosen"]), png(row["rejected"])) for row in preference_pairs(4)]
    cut_off = {"bytes": good[0][1]["bytes"][:80], "path": None}
    rows = image_pairs([*good, ("a", cut_off, good[0][1]), ("b", cut_off, good[0][1])])
    cfg = mapo(tmp_path, on_bad_row="skip", max_bad_share=0.5)
    encode_dataset(build_tiny_pipeline(), rows, cfg, output=tmp_path / "saved")
    loaded = load_encoded_dataset(tmp_path / "saved")
    # Two equal bad rows, of which one is read.
    assert loaded.rows.tolist() == [0, 1, 2, 3] and sum(loaded.left_out.values()) == 2


def test_rows_of_other_data_sets_in_the_cache_are_not_saved(rows, tmp_path):
    pipeline = build_tiny_pipeline()
    encode_dataset(pipeline, rows, mapo(tmp_path))
    encode_dataset(pipeline, rows.select([4, 1]), mapo(tmp_path), output=tmp_path / "saved")
    loaded = load_encoded_dataset(tmp_path / "saved")
    wanted = {"", rows[4]["prompt"], rows[1]["prompt"]}
    assert len(loaded.samples) == 2 and set(loaded.prompts.texts) == wanted
    assert len(loaded.prompts.shards) == len(wanted)


def test_only_safetensors_and_json_are_written_and_no_path_of_this_machine(saved):
    assert {file.suffix for file in saved.rglob("*") if file.is_file()} == {".safetensors", ".json", ".md"}
    for file in saved.rglob("*"):
        assert not file.is_file() or str(saved.parent).encode() not in file.read_bytes()


def test_a_save_that_was_interrupted_goes_on(saved, tmp_path):
    loaded = load_encoded_dataset(saved)
    loaded.save_to_disk(tmp_path / "copy")
    (tmp_path / "copy" / "encoded_dataset.json").unlink()
    lost = next((tmp_path / "copy" / "samples").iterdir())
    lost.unlink()
    with pytest.raises(ValueError, match="has no encoded_dataset.json, which is written last"):
        load_encoded_dataset(tmp_path / "copy")
    loaded.save_to_disk(tmp_path / "copy")
    assert len(load_encoded_dataset(tmp_path / "copy")) == len(loaded)


def test_a_folder_of_another_data_set_is_refused(saved, rows, tmp_path):
    shutil.copytree(saved, tmp_path / "saved")
    encoded = encode_dataset(build_tiny_pipeline(), rows.select([0]), mapo(tmp_path))
    with pytest.raises(ValueError, match="has another encoded data set"):
        encoded.save_to_disk(tmp_path / "saved")


def remove_a_shard(folder: Path) -> None:
    next((folder / "samples").iterdir()).unlink()


def cut_a_shard(folder: Path) -> None:
    file = next((folder / "prompts").iterdir())
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[:-10])


def damage_a_shard(folder: Path) -> None:
    file = next((folder / "samples").iterdir())
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(b"\xff" * 8 + data[8:])


def exchange_shards(folder: Path) -> None:
    """Of equal sizes, so that only the keys in them show it."""
    file = next((folder / "samples").iterdir())
    data = file.read_bytes()
    start = data.index(b'keys\\": \\"') + len(b'keys\\": \\"')
    file.unlink()
    file.write_bytes(data[:start] + b"00" + data[start + 2 :])


def damage_the_rows(folder: Path) -> None:
    file = folder / "rows.safetensors"
    file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:])


def cut_the_document(folder: Path) -> None:
    file = folder / "encoded_dataset.json"
    file.write_text(file.read_text()[:-5])


def newer(folder: Path) -> None:
    file = folder / "encoded_dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_a_shard, "lacks samples/.*safetensors. Save or download the encoded data set again"),
        (cut_a_shard, "prompts/.*safetensors has [0-9]+ bytes instead of [0-9]+"),
        (damage_a_shard, "samples/.*safetensors is damaged .*Save or download"),
        (exchange_shards, "samples lacks [0-9]+ rows"),
        (damage_the_rows, "rows.safetensors is damaged"),
        (cut_the_document, "encoded_dataset.json is damaged"),
        (newer, "written by a newer version of trl-diffusion-pref"),
    ],
)
def test_damaged_files_are_named(damage, message, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(ValueError, match=message):
        load_encoded_dataset(tmp_path / "copy")


def test_a_folder_without_a_data_set_and_a_missing_one_are_named(tmp_path):
    with pytest.raises(ValueError, match="it is no encoded data set"):
        load_encoded_dataset(tmp_path)
    with pytest.raises(ValueError, match="is no folder"):
        load_encoded_dataset(tmp_path / "nowhere")


def test_a_stream_is_refused(rows, tmp_path):
    with pytest.raises(TypeError, match="dataset is streamed"):
        encode_dataset(build_tiny_pipeline(), rows.to_iterable_dataset(), mapo(tmp_path))


def test_a_pushed_data_set_is_loaded_by_its_name(saved, tmp_path, hub_server: HubServer):  # noqa: F811
    loaded = load_encoded_dataset(saved)
    loaded.push_to_hub("me/encoded-pairs")
    files = hub_server.repositories["me/encoded-pairs"]
    assert {"README.md", "encoded_dataset.json", "rows.safetensors"} < files.keys()
    assert b"load_encoded_dataset" in files["README.md"] and files["README.md"].startswith(b"---\ntags:")
    again = load_encoded_dataset("me/encoded-pairs")
    assert again.fingerprint == loaded.fingerprint
    for one, other in zip(values(again), values(loaded), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_pushing_another_data_set_removes_the_shards_of_the_one_before(saved, rows, tmp_path, hub_server: HubServer):  # noqa: F811
    load_encoded_dataset(saved).push_to_hub("me/two")
    encoded = encode_dataset(build_tiny_pipeline(), rows.select([0, 1]), mapo(tmp_path))
    encoded.push_to_hub("me/two")
    files = hub_server.repositories["me/two"]
    listed = set(json.loads(files["encoded_dataset.json"])["files"])
    assert set(files) == listed | {"README.md", "encoded_dataset.json"}
    assert len(load_encoded_dataset("me/two")) == 2
