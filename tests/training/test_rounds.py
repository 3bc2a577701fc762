"""Rounds of self-made pairs: each goes on from the one before, and an interruption changes nothing."""

import json
import math

import pytest
import torch
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig
from PIL import ImageStat
from transformers import TrainerCallback

from trl_diffusion_pref import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    MaPOConfig,
    MaPOTrainer,
    SelfNPOConfig,
    SelfNPOTrainer,
    load_pairs,
    train_in_rounds,
)
from trl_diffusion_pref.preference_data import candidates
from trl_diffusion_pref.training import rounds


PROMPTS = ["a red circle", "a blue square", "a green triangle", "a black circle"]
CALL = {"num_inference_steps": 2, "guidance_scale": 2.0}
LORA = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"])


def brightness(prompts, samples, **columns):
    return [ImageStat.Stat(image.convert("L")).mean[0] for image in samples]


def redness(prompts, samples, **columns):
    return [ImageStat.Stat(image).mean[0] - ImageStat.Stat(image).mean[1] for image in samples]


class Interrupted(Exception):
    """Stands for a process that is killed."""


def config(folder, kind=MaPOConfig, **options):
    defaults = {
        "output_dir": str(folder),
        "dataset_cache_dir": str(folder.parent / "cache"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "divergence_guard": "off",
    }
    return kind(**{**defaults, **options})


def run(folder, *, lora: bool = False, number: int = 2, trainer_class=MaPOTrainer, **options):
    pipeline = build_tiny_pipeline()
    found = train_in_rounds(
        trainer_class,
        pipeline,
        config(folder),
        PROMPTS,
        brightness,
        rounds=number,
        samples_per_prompt=3,
        peft_config=LORA if lora else None,
        **{**CALL, **options},
    )
    return found, {name: value.clone() for name, value in pipeline.unet.state_dict().items()}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def whole(request, tmp_path_factory):
    """An uninterrupted call: its folder, what it returned, its last weights, and those that rounds sampled with."""
    folder, sampled, original = tmp_path_factory.mktemp("whole") / "run", [], candidates.sample

    def sample(pipeline, *arguments, **options):
        sampled.append({name: value.clone() for name, value in pipeline.unet.state_dict().items()})
        return original(pipeline, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "sample", sample)
        return request.param, folder, *run(folder, lora=request.param), sampled


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_each_round_samples_with_the_weights_of_the_one_before(whole):
    lora, folder, found, weights, sampled = whole
    base = build_tiny_pipeline()
    assert same(sampled[0], base.unet.state_dict())
    if lora:
        base.load_lora_weights(folder / "round-1")
        stored = base.unet.state_dict()
    else:
        stored = type(base.unet).from_pretrained(folder / "round-1" / "unet").state_dict()
    assert sorted(v.sum().item() for v in sampled[1].values()) == sorted(v.sum().item() for v in stored.values())
    assert not same(sampled[0], sampled[1]) and not same(sampled[1], weights)
    assert [one.number for one in found] == [1, 2] and found[0].scores != found[1].scores


def test_rounds_draw_other_samples_and_noise(whole):
    found = whole[2]
    seeds = [set(load_pairs(one.folder / "data" / "pairs")["chosen_seed"]) for one in found]
    assert not seeds[0] & seeds[1]


@pytest.mark.parametrize("phase", ["scoring", "training", "saving"])
def test_an_interrupted_call_ends_with_the_same_weights(phase, whole, monkeypatch, tmp_path):
    lora, weights = whole[0], whole[3]
    if lora and phase != "training":
        pytest.skip("the same as with all weights")
    calls = []

    def interrupt(function, number):
        def wrapped(*arguments, **options):
            calls.append(function)
            if len(calls) == number:
                raise Interrupted
            return function(*arguments, **options)

        return wrapped

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and args.output_dir.endswith("round-2"):
                raise Interrupted

    class Trainer(MaPOTrainer):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options, callbacks=[Stop()] if phase == "training" else None)

    Trainer.__name__ = "MaPOTrainer"
    with monkeypatch.context() as patch:
        if phase == "scoring":
            patch.setattr(candidates, "read_sample", interrupt(candidates.read_sample, 18))
        if phase == "saving":
            # After rounds.json and the first round's record.
            patch.setattr(rounds, "write_whole", interrupt(rounds.write_whole, 3))
        with pytest.raises(Interrupted):
            run(tmp_path / "run", lora=lora, trainer_class=Trainer)
    assert (tmp_path / "run" / "round-1" / "round.json").exists()
    assert not (tmp_path / "run" / "round-2" / "round.json").exists()
    found, resumed = run(tmp_path / "run", lora=lora)
    assert same(resumed, weights)
    assert len(found) == 2


def test_a_round_can_be_added_later(whole, tmp_path):
    lora, weights = whole[0], whole[3]
    run(tmp_path / "run", lora=lora, number=1)
    assert same(run(tmp_path / "run", lora=lora, number=2)[1], weights)


def test_other_options_in_the_same_folder_are_refused(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    record = {"trainer": "MaPOTrainer", "seed": 42, "prompts": {"number": 1, "digest": "x"}}
    (folder / "rounds.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="rounds of another call: prompts .*Choose another output_dir"):
        run(folder)


def test_rounds_need_an_algorithm_on_pairs_and_one_round(tmp_path):
    with pytest.raises(ValueError, match="SelfNPOTrainer does not train on pairs"):
        arguments = (SelfNPOTrainer, build_tiny_pipeline(), SelfNPOConfig(output_dir=str(tmp_path)), PROMPTS)
        train_in_rounds(*arguments, brightness)
    with pytest.raises(ValueError, match="rounds=0"):
        run(tmp_path / "run", number=0)


def test_rounds_of_irepo_regress_on_the_answers_of_several_rewards(tmp_path):
    temperatures = {"brightness": 5.0, "redness": 2.0}

    def irepo(folder, stop=None):
        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if args.output_dir.endswith("round-2") and state.global_step == stop:
                    raise Interrupted

        class Trainer(DiffusionDPOTrainer):
            def __init__(self, *arguments, **options):
                super().__init__(*arguments, **options, callbacks=[Stop()])

        Trainer.__name__ = "DiffusionDPOTrainer"
        own = {"loss_type": "irepo", "beta": 100.0, "weight_decay": 0.0, "logging_steps": 1}
        args = config(folder, DiffusionDPOConfig, **own, per_device_train_batch_size=4)
        pipeline, rewards = build_tiny_pipeline(), [brightness, redness]
        options = {"samples_per_prompt": 3, "pair_options": {"temperature": temperatures}, **CALL}
        train_in_rounds(Trainer, pipeline, args, PROMPTS, rewards, **options)
        return pipeline.unet.state_dict()

    weights = irepo(tmp_path / "whole")
    for number in (1, 2):
        folder = tmp_path / "whole" / f"round-{number}"
        logits = []
        for row in load_pairs(folder / "data" / "pairs"):
            gains = {name: row[f"chosen_scores/{name}"] - row[f"rejected_scores/{name}"] for name in temperatures}
            answers = [1 / (1 + math.exp(-gain / temperatures[name])) for name, gain in gains.items()]
            assert row["soft_label"] == pytest.approx(sum(answers) / 2, rel=1e-9)
            logits.append(math.log(row["soft_label"] / (1 - row["soft_label"])))
        assert 2 <= len(logits) <= 4
        # All pairs are in the first batch. The reference is the round's start, so that their margins are 0 there.
        log = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
        expected = sum(logit**2 for logit in logits) / len(logits)
        assert log[0]["loss"] == pytest.approx(expected, rel=1e-3) and log[1]["loss"] != log[0]["loss"]
    with pytest.raises(Interrupted):
        irepo(tmp_path / "stopped", stop=3)
    assert same(irepo(tmp_path / "stopped"), weights)
