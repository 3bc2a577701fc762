"""Stable Audio's conditioning on durations, from the trainers to the denoiser, against its pipeline's own calls."""

import torch
from datasets import Dataset
from helpers import tiny
from helpers.recorder import Recorder

from trl_diffusion_pref import MaPOConfig, MaPOTrainer, SelfNPOConfig, SelfNPOTrainer


NAMES = ("encoder_hidden_states", "global_hidden_states")


def told_by_the_sampler(prompt: str, **options) -> dict[str, torch.Tensor]:
    """What the denoiser is told on both sides of guidance: [unconditional; conditional]."""
    pipeline = tiny.build("stable_audio")
    recorder = Recorder(pipeline.transformer)
    options = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": 3.0, **options}
    pipeline(prompt, **options, generator=torch.Generator().manual_seed(0))
    return {name: recorder.calls[0][name] for name in NAMES}


def calls_in_training(trainer) -> list[dict[str, torch.Tensor]]:
    recorder = Recorder(trainer.model)
    trainer.train()
    return recorder.calls


def options(tmp_path, **more) -> dict:
    common = {"output_dir": str(tmp_path / "output"), "dataset_cache_dir": str(tmp_path / "cache"), "use_cpu": True}
    common["cache_dtype"] = "float32"
    run = {"max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no", "disable_tqdm": True}
    return {**common, **run, "activation_checkpointing": False, **more}


def sounds(seconds: float) -> list[dict]:
    generator = torch.Generator().manual_seed(int(16 * seconds))
    return [
        {"array": torch.rand(2, int(16 * seconds), generator=generator).numpy(), "sampling_rate": 16} for _ in range(2)
    ]


def test_self_npo_draws_sounds_of_the_full_length_as_the_pipeline_does(tmp_path):
    config = SelfNPOConfig(**options(tmp_path, solver_steps=4, truncated_steps=2))
    trainer = SelfNPOTrainer(tiny.build("stable_audio"), config, Dataset.from_dict({"prompt": ["a bell"] * 2}))
    expected = told_by_the_sampler("a bell")
    for call in calls_in_training(trainer):
        for name in NAMES:
            for row in call[name]:
                torch.testing.assert_close(row, expected[name][1], rtol=0, atol=1e-6)


def test_training_tells_each_sound_s_length_and_drops_it_with_the_prompt_as_the_sampler_does(tmp_path):
    """Beside the text; alone, it stays."""
    rows = Dataset.from_dict({"prompt": ["a bell"] * 2, "chosen": sounds(2.5), "rejected": sounds(4.0)})
    config = MaPOConfig(**options(tmp_path, prompt_dropout=0.5, max_steps=6))
    calls = calls_in_training(MaPOTrainer(tiny.build("stable_audio"), config, rows))
    expected = [told_by_the_sampler("a bell", audio_end_in_s=seconds) for seconds in (2.5, 4.0)]
    sides = {False: 0, True: 0}
    for call in calls:
        # [chosen; rejected], two of each.
        for position in range(4):
            told = expected[position // 2]
            dropped = not bool(call["encoder_hidden_states"][position].any())
            sides[dropped] += 1
            for name in NAMES:
                torch.testing.assert_close(call[name][position], told[name][0 if dropped else 1], rtol=0, atol=1e-6)
    assert all(sides.values())


def test_a_second_trainer_says_again_what_the_cache_made_of_the_sounds(tmp_path, caplog):
    rows = Dataset.from_dict({"prompt": ["a bell"] * 2, "chosen": sounds(2.5), "rejected": sounds(4.0)})
    said = []
    for _ in range(2):
        caplog.clear()
        MaPOTrainer(tiny.build("stable_audio"), MaPOConfig(**options(tmp_path)), rows)
        # accelerate's logger, which speaks once for all processes, says which.
        messages = [record.getMessage().removeprefix("[RANK 0] ") for record in caplog.records]
        said.append([message for message in messages if "silence" in message])
    assert said[0] == said[1]
    assert said[0] == ["train_dataset: audio of 2.5 s is padded with silence to 8 s"]
