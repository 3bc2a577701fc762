"""Pairs and rankings of self-made samples: which they are, that they train, and that nothing is made twice."""

import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset, Image, Value, load_dataset
from helpers import make_pairs_run, tiny
from helpers.hub_server import HubServer, hub_server  # noqa: F401
from helpers.pipelines import build_tiny_pipeline
from huggingface_hub import DatasetCard
from PIL import Image as PILImage

from trl_diffusion_pref import MaPOTrainer, load_pairs, make_pairs, make_rankings
from trl_diffusion_pref.preference_data import dataset as dataset_module
from trl_diffusion_pref.preference_data import push_dataset
from trl_diffusion_pref.rewards import RewardError
from trl_diffusion_pref.shapes import load_pipeline, shapes_reward


PROMPTS = ["a red circle", "a blue square", "a green triangle"]
OPTIONS = {"num_inference_steps": 2, "samples_per_prompt": 3}


def redness(prompts, samples):
    return [float(np.asarray(image)[..., 0].mean()) for image in samples]


# Not enclosed by a reward, since what it encloses is part of what it computes.
SCORED: list[str] = []


def contrast(prompts, samples, **columns):
    return [float(np.asarray(image).std()) for image in samples]


def expected_scores(pipeline, prompt: str, seeds, reward=redness, **options) -> list[float]:
    """Of the pipeline's own images."""
    return [
        reward([prompt], pipeline(prompt, generator=torch.Generator().manual_seed(seed), **options).images)[0]
        for seed in seeds
    ]


# ---- What they are -----------------------------------------------------------------------------------------------


def test_a_pair_is_the_best_and_the_worst_sample_of_its_prompt(tmp_path):
    pipeline = build_tiny_pipeline()
    pairs = make_pairs(pipeline, PROMPTS, redness, tmp_path, **OPTIONS)
    rankings = make_rankings(pipeline, PROMPTS, redness, tmp_path, **OPTIONS)
    assert pairs["prompt"] == rankings["prompt"] == PROMPTS
    for pair, ranking in zip(pairs, rankings, strict=True):
        scores = expected_scores(pipeline, pair["prompt"], ranking["seeds"], num_inference_steps=2)
        # A byte may be rounded otherwise than in the pipeline's call.
        assert ranking["scores"] == ranking["scores/redness"] == pytest.approx(scores, abs=0.01)
        assert pair["chosen_score"] == pair["chosen_scores/redness"] == max(ranking["scores"])
        assert pair["rejected_score"] == min(ranking["scores"])
        best, worst = (ranking["scores"].index(pair[f"{side}_score"]) for side in ("chosen", "rejected"))
        assert pair["chosen"].tobytes() == ranking["images"][best].tobytes()
        assert [pair["chosen_seed"], pair["rejected_seed"]] == [ranking["seeds"][best], ranking["seeds"][worst]]
        assert redness([""], [pair["rejected"]]) == [pair["rejected_score"]]
        assert {pair["chosen_model"], *ranking["models"]} == {"StableDiffusionPipeline"}
    assert len(list((tmp_path / "samples").iterdir())) == 9
    assert len({seed for ranking in rankings for seed in ranking["seeds"]}) == 9


def test_several_models_compete_with_the_same_seeds(tmp_path):
    models = {"base": build_tiny_pipeline(), "other": build_tiny_pipeline(seed=1)}
    rankings = make_rankings(models, PROMPTS, redness, tmp_path, num_inference_steps=2, samples_per_prompt=2)
    for ranking in rankings:
        assert ranking["models"] == ["base", "base", "other", "other"]
        assert ranking["seeds"][:2] == ranking["seeds"][2:]
        for model, pipeline in models.items():
            own = [index for index, name in enumerate(ranking["models"]) if name == model]
            seeds = [ranking["seeds"][index] for index in own]
            scores = expected_scores(pipeline, ranking["prompt"], seeds, num_inference_steps=2)
            assert [ranking["scores"][index] for index in own] == pytest.approx(scores, abs=0.01)
    stored = DatasetCard.load(tmp_path / "rankings" / "README.md").text
    assert "| base | StableDiffusionPipeline |" in stored and "| other | StableDiffusionPipeline |" in stored


def test_several_rewards_count_alike_whatever_their_scales(tmp_path):
    def millionth(prompts, samples):
        return [value / 1e6 for value in contrast(prompts, samples)]

    pipeline, folders = build_tiny_pipeline(), (tmp_path / "a", tmp_path / "b")
    one, other = (
        make_rankings(pipeline, PROMPTS, [redness, reward], folder, **OPTIONS)
        for reward, folder in zip((contrast, millionth), folders, strict=True)
    )
    for row, scaled in zip(one, other, strict=True):
        assert row["scores"] == pytest.approx(scaled["scores"], abs=1e-6)
        assert row["scores/contrast"] == pytest.approx([value * 1e6 for value in scaled["scores/millionth"]])
    pairs = make_pairs(pipeline, PROMPTS, [redness, contrast], folders[0], soft_labels=True, **OPTIONS)
    assert all(0.5 < label < 1 for label in pairs["soft_label"])
    # With huge temperatures everything is undecided.
    (folders[0] / "pairs").rename(folders[0] / "first")
    options = {**OPTIONS, "temperature": 1e9, "soft_labels": True}
    undecided = make_pairs(pipeline, PROMPTS, redness, folders[0], **options)
    assert undecided["soft_label"] == pytest.approx([0.5] * 3, abs=1e-6)


def test_all_pairs_with_the_largest_differences_are_made(tmp_path, caplog):
    pipeline, caplog.handler.level = build_tiny_pipeline(), logging.INFO
    rankings = make_rankings(pipeline, PROMPTS, redness, tmp_path, **OPTIONS)
    options = {"strategy": "all", "max_pairs_per_prompt": 2, "min_score_difference": 0.5}
    pairs = make_pairs(pipeline, PROMPTS, redness, tmp_path, **options, **OPTIONS)
    wanted, counted = [], {"close": 0, "further": 0}
    for row in rankings:
        scores = row["scores"]
        gaps = sorted((abs(scores[i] - scores[j]) for i in range(3) for j in range(i)), reverse=True)
        wide = [gap for gap in gaps if gap >= 0.5]
        wanted += wide[:2]
        counted["close"] += len(gaps) - len(wide)
        counted["further"] += len(wide[2:])
    found = [pair["chosen_score"] - pair["rejected_score"] for pair in pairs]
    assert found == pytest.approx(wanted) and len(wanted) >= 3
    for kind, count in counted.items():
        assert not count or f"{kind} pairs: {count}" in caplog.text


@pytest.mark.parametrize("scored", [False, True])
def test_contrast_prompts_are_stored_under_the_prompt_itself(scored, tmp_path):
    pipeline = build_tiny_pipeline()
    pairs = make_pairs(
        pipeline,
        PROMPTS,
        redness if scored else None,
        tmp_path,
        chosen_prompt="{prompt}, outlined",
        rejected_prompt="{prompt}",
        num_inference_steps=2,
        samples_per_prompt=4,
    )
    assert set(pairs["prompt"]) <= set(PROMPTS) and 0 < len(pairs) <= 12 - 2 * scored
    for pair in pairs:
        assert pair["chosen_seed"] == pair["rejected_seed"]
        for side, text in (("chosen", f"{pair['prompt']}, outlined"), ("rejected", pair["prompt"])):
            generator = torch.Generator().manual_seed(pair["chosen_seed"])
            [image] = pipeline(text, generator=generator, num_inference_steps=2).images
            assert np.abs(np.asarray(image).astype(int) - np.asarray(pair[side])).max() <= 1
        if scored:
            assert pair["chosen_score"] > pair["rejected_score"] == redness([""], [pair["rejected"]])[0]
    if not scored:
        assert pairs["prompt"] == [prompt for prompt in PROMPTS for _ in range(4)]
        assert "chosen_score" not in pairs.column_names


def test_pairs_and_rankings_are_trained_on_as_they_are(tmp_path, config):
    pipeline = build_tiny_pipeline()
    pairs = make_pairs(pipeline, PROMPTS, redness, tmp_path / "data", **OPTIONS)
    rankings = make_rankings(pipeline, PROMPTS, redness, tmp_path / "data", **OPTIONS)
    for number, data in enumerate((pairs, load_pairs(tmp_path / "data" / "pairs"), load_pairs(rankings))):
        trainer = MaPOTrainer(build_tiny_pipeline(), config(max_steps=2, output_dir=str(tmp_path / f"{number}")), data)
        assert trainer.train().global_step == 2
    assert load_pairs(tmp_path / "data" / "rankings")["prompt"] == PROMPTS


def test_the_data_set_holds_its_samples_and_can_be_moved(tmp_path):
    make_pairs(build_tiny_pipeline(), PROMPTS, redness, tmp_path / "data", **OPTIONS)
    (tmp_path / "data" / "pairs").rename(tmp_path / "moved")
    stored = {file.name: file.read_bytes() for file in (tmp_path / "data" / "samples").iterdir()}
    for file in (tmp_path / "data" / "samples").iterdir():
        file.unlink()
    pairs = load_pairs(tmp_path / "moved").cast_column("chosen", Image(decode=False))
    assert [pair["chosen"]["bytes"] for pair in pairs] == [stored[pair["chosen"]["path"]] for pair in pairs]


@pytest.mark.parametrize("name", ["wan", "stable_audio"])
def test_videos_and_audio_are_paired_and_trained_on(name, tmp_path, config):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    options = {**dict(zip(("height", "width"), case.size, strict=False)), **case.call, **OPTIONS}

    def loudness(prompts, samples):
        frames = [sample.samples.abs().mean() if case.waveform else np.asarray(sample).mean() for sample in samples]
        return [float(value) for value in frames]

    pairs = make_pairs(pipeline, PROMPTS, loudness, tmp_path, **options)
    rankings = make_rankings(pipeline, PROMPTS, loudness, tmp_path, **options)
    assert len(rankings[0]["audio" if case.waveform else "videos"]) == 3
    for pair in pairs:
        if case.waveform:
            values, rate = soundfile.read(io.BytesIO(pair["chosen"]["bytes"]), dtype="float32")
            assert rate == pipeline.vae.config.sampling_rate and values.T.shape == case.waveform
            assert np.abs(values).mean() == pytest.approx(pair["chosen_score"], rel=1e-5)
        else:
            assert [frame.size for frame in pair["chosen"]] == [(case.size[1], case.size[0])] * case.frames
            assert np.asarray(pair["chosen"]).mean() == pytest.approx(pair["chosen_score"])
    size = {} if case.waveform else {"num_frames": case.frames, "resolution": f"{case.size[0]}x{case.size[1]}"}
    trainer = MaPOTrainer(pipeline, config(max_steps=1, per_device_train_batch_size=2, **size), pairs)
    assert trainer.train().global_step == 1


# ---- Made once ---------------------------------------------------------------------------------------------------


def test_a_run_that_another_one_overtakes_takes_its_pairs(tmp_path, monkeypatch):
    """Two runs of the same options may share a folder; one of other options may not."""
    folder, stored = tmp_path / "pairs", {}
    record, card = {"seed": 1}, {"counts": {}, "modality": "image", "kind": "pairs"}
    monkeypatch.setattr(dataset_module, "dataset_card", lambda values: "card")

    def overtaken(unfinished, target):
        if not target.exists():
            shutil.copytree(unfinished, target)
            if stored:
                (target / dataset_module.RECORD).write_text(json.dumps(stored))
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(dataset_module.os, "rename", overtaken)
    write = partial(dataset_module.write_dataset, folder, [{"prompt": "a"}], {"prompt": Value("string")}, record, card)
    assert write()["prompt"] == ["a"]
    shutil.rmtree(folder)
    stored.update({"options": {"seed": 2}, "counts": {}})
    with pytest.raises(OSError, match="not empty"):
        write()


@pytest.mark.slow
def test_two_processes_complete_what_a_killed_one_began_with_the_same_bytes(tmp_path):
    """One process with batches of 8 and two threads, and one that is killed and two with batches of 1."""
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    script = str(Path(__file__).parents[1] / "helpers" / "make_pairs_run.py")
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment = kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, script, str(begun), "1"], env=environment, **quiet)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = make_pairs_run.main(str(whole), 8)
    finally:
        torch.set_num_threads(threads)
    deadline = time.monotonic() + 120
    while len(list(begun.glob("samples/*.png"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in begun.glob("samples/*.png")}
    assert 3 <= len(before) < 10 and not (begun / "pairs").exists()
    (begun / "samples" / ".left.unfinished").write_bytes(b"of a killed process")
    for left in begun.glob("samples/.*.unfinished"):
        os.utime(left, (time.time() - 7200,) * 2)
    young = begun / "samples" / ".young.unfinished"
    young.write_bytes(b"of another run that shares the folder")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, script, str(begun), "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # In every process.
    assert re.findall(r"rows (\d+)", done.stdout) == [str(len(rows))] * 2
    assert young.read_bytes()
    young.unlink()
    samples = [{path.name: path.read_bytes() for path in (folder / "samples").iterdir()} for folder in (whole, begun)]
    assert samples[0] == samples[1] and len(samples[0]) == 10
    assert {path: path.stat().st_mtime_ns for path in before} == before, "nothing was made twice"
    assert make_pairs_run.main(str(begun), 8) == rows


def test_only_missing_samples_and_scores_are_made(tmp_path):
    pipeline = build_tiny_pipeline()
    SCORED.clear()

    def counted(prompts, samples):
        SCORED.extend(prompts)
        return redness(prompts, samples)

    calls = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda *args: calls.append(1))
    first = make_pairs(pipeline, PROMPTS[:2], {"r": counted}, tmp_path, **OPTIONS, batch_size=3)
    assert (len(SCORED), len(calls)) == (6, 2)
    again = make_pairs(pipeline, PROMPTS[:2], {"r": counted}, tmp_path, **OPTIONS, batch_size=1)
    assert (len(SCORED), len(calls)) == (6, 2) and again["chosen_seed"] == first["chosen_seed"]
    (tmp_path / "pairs").rename(tmp_path / "before")
    more = make_pairs(pipeline, PROMPTS, {"r": counted, "contrast": contrast}, tmp_path, **OPTIONS)
    assert (len(SCORED), len(more)) == (9, 3)

    def counted(prompts, samples):  # noqa: F811
        SCORED.extend(prompts)
        return [2 * value for value in redness(prompts, samples)]

    # Another function of the same name.
    (tmp_path / "pairs").rename(tmp_path / "before that")
    make_pairs(pipeline, PROMPTS, {"r": counted}, tmp_path, **OPTIONS)
    assert len(SCORED) == 18


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "all"}, 'strategy was "best_worst" and is "all"'),
        ({"num_inference_steps": 3}, "arguments of the call num_inference_steps was 2 and is 3"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"prompts": PROMPTS[:2]}, "prompts number was 3 and is 2"),
        ({"rewards": contrast}, "rewards contrast was null"),
        ({"pipelines": "other weights"}, "models model weights unet was"),
        ({"pipelines": "other scheduler"}, "models model scheduler options beta_end was 0.012 and is 0.02"),
    ],
)
def test_a_folder_with_results_of_other_options_is_refused(change, message, tmp_path):
    arguments = {"pipelines": {"model": build_tiny_pipeline()}, "prompts": PROMPTS, "rewards": redness} | OPTIONS
    make_pairs(**arguments, output=tmp_path)
    before = (tmp_path / "pairs" / "options.json").read_bytes()
    if "pipelines" in change:
        other = build_tiny_pipeline(seed=1 if "weights" in change["pipelines"] else 0)
        if "scheduler" in change["pipelines"]:
            other.scheduler = type(other.scheduler).from_config(other.scheduler.config, beta_end=0.02)
        change = {"pipelines": {"model": other}}
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        make_pairs(**{**arguments, **change}, output=tmp_path)
    assert str(tmp_path / "pairs") in str(raised.value)
    assert (tmp_path / "pairs" / "options.json").read_bytes() == before


# ---- What is left out, and what is refused -----------------------------------------------------------------------


def blanking(pipeline):
    """Makes some of the images black as a safety checker does, counted from 1."""
    calls = []

    def check(image, device, dtype):
        calls.append(1)
        return (-torch.ones_like(image) if len(calls) in (2, 4, 5, 6) else image), None

    pipeline.run_safety_checker = check


def test_blank_samples_and_ties_are_left_out_and_counted(tmp_path, caplog):
    pipeline = build_tiny_pipeline()
    blanking(pipeline)

    def tied(prompts, samples):
        assert all(np.asarray(image).any() for image in samples), "a blank sample is not scored"
        scores = redness(prompts, samples)
        return [1.0 if prompt == "a green triangle" else value for prompt, value in zip(prompts, scores, strict=True)]

    pairs = make_pairs(pipeline, PROMPTS, {"tied": tied}, tmp_path, batch_size=1, **OPTIONS)
    # One of three is blank for the first prompt, all are for the second, all are equally good for the third.
    assert pairs["prompt"] == PROMPTS[:1]
    assert "9 samples for 3 prompts gave 1 rows; left out: blank samples: 4, short prompts: 1, tied prompts: 1" in (
        caplog.text
    )
    counts = json.loads((tmp_path / "pairs" / "options.json").read_text())["counts"]
    assert counts["blank_samples"] == 4 and counts["tied_prompts"] == counts["short_prompts"] == counts["rows"] == 1
    with pytest.raises(ValueError, match="There are no rankings: 9 samples .* short prompts: 2, tied prompts: 1"):
        make_rankings(pipeline, PROMPTS, {"tied": tied}, tmp_path, batch_size=1, **OPTIONS)
    assert not (tmp_path / "rankings").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda n: 1 / 0, "raised ZeroDivisionError"),
        (lambda n: [float("nan")] * n, "returned nan; a score must be finite"),
        (lambda n: ["good"] * n, "returned 'good' (str), not a number"),
        (lambda n: [1.0] * (n + 1), "returned 10 values for 9 samples"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_sample(values, message, tmp_path):
    def broken(prompts, samples):
        return values(len(samples))

    with pytest.raises(RewardError, match=re.escape(message)) as raised:
        make_pairs({"base": build_tiny_pipeline()}, PROMPTS, broken, tmp_path, **OPTIONS)
    assert "reward 'broken'" in str(raised.value)
    if "values for" not in message:
        assert "the sample of base for prompt 'a red circle' with seed" in str(raised.value)
    assert len(list((tmp_path / "samples").iterdir())) == 9, "samples are kept"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewards": None}, "rewards is None: pass at least one, or contrast prompts"),
        ({"prompts": []}, "prompts has no prompts"),
        ({"samples_per_prompt": 1}, "samples_per_prompt=1 of one pipeline makes no pairs"),
        ({"samples_per_prompt": 0}, "samples_per_prompt=0"),
        ({"chosen_prompt": "painting"}, "The prompt template 'painting' has no {prompt}"),
        ({"chosen_prompt": "{prompt}!", "rejected_prompt": "{prompt}!"}, "are equal; put their text into the prompts"),
        ({"rewards": None, "chosen_prompt": "{prompt}!", "soft_labels": True}, "soft_labels need rewards"),
        ({"pipelines": {}}, "No pipelines to sample from"),
        ({"pipelines": {"a": "image", "b": "audio"}}, "The pipeline 'b' generates audio, others image"),
        ({"min_score_difference": 1e9}, "There are no pairs: 9 samples for 3 prompts gave 0 rows"),
        ({"temperature": {"other": 1.0}, "soft_labels": True}, "temperature is given for other"),
    ],
)
def test_bad_input_is_named(arguments, message, tmp_path):
    given = {"pipelines": build_tiny_pipeline(), "prompts": PROMPTS, "rewards": redness} | OPTIONS | arguments
    if given["pipelines"] and isinstance(given["pipelines"], dict):
        given["pipelines"] = {"a": build_tiny_pipeline(), "b": tiny.build("stable_audio")}
    with pytest.raises(ValueError, match=re.escape(message)):
        make_pairs(**given, output=tmp_path)


# ---- The Hub -----------------------------------------------------------------------------------------------------


def test_a_pushed_data_set_has_its_card_and_is_loaded_by_its_name(
    tmp_path,
    hub_server: HubServer,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub_server.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    pairs = make_pairs({"base": build_tiny_pipeline()}, PROMPTS, redness, tmp_path, **OPTIONS)
    push_dataset(tmp_path / "pairs", "me/self-made")
    files = hub_server.repositories["me/self-made"]
    card = DatasetCard(files["README.md"].decode())
    assert "3 pairs of generated image samples for 3 prompts" in card.text and "scored by redness" in card.text
    assert "preference" in card.data.tags and card.data.to_dict()["dataset_info"]["splits"][0]["num_examples"] == 3
    assert not [name for name in files if "options" in name or name.startswith("/")]
    loaded = load_dataset("me/self-made", split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["chosen_seed"] == pairs["chosen_seed"]
    assert [image.tobytes() for image in loaded["chosen"]] == [image.tobytes() for image in pairs["chosen"]]
    with pytest.raises(ValueError, match="holds no data set with a card"):
        push_dataset(tmp_path, "me/self-made")


def test_the_embedded_pipelines_samples_are_paired_by_its_judge(tmp_path):
    prompts = [f"a {colour} circle" for colour in ("red", "green", "blue", "black")]
    options = {"samples_per_prompt": 4, "num_inference_steps": 8, "batch_size": 16, "guidance_scale": 3.0}
    pairs = make_pairs(load_pipeline(), Dataset.from_dict({"prompt": prompts}), shapes_reward, tmp_path, **options)
    assert pairs["prompt"] == prompts and isinstance(pairs[0]["chosen"], PILImage.Image)
    for prompt, chosen, rejected in zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True):
        better, worse = shapes_reward([prompt] * 2, [chosen, rejected])
        assert better > worse
