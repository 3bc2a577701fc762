"""Rewards of noisy latents: which pairs they prefer, what is saved of them, and sampling towards them."""

import json
import math

import pytest
import torch
from datasets import Dataset
from helpers import tiny
from helpers.tiny_wan_2_2 import build_wan_2_2
from helpers.training_runs import pairs  # noqa: F401
from peft import LoraConfig

from trl_diffusion_pref import evaluation
from trl_diffusion_pref.families.features import blocks_of, first_features
from trl_diffusion_pref.guidance import reward_guidance
from trl_diffusion_pref.rewards import LatentReward, latent_reward_accuracy, train_latent_reward
from trl_diffusion_pref.rewards.latent import RewardHead
from trl_diffusion_pref.shapes import load_pipeline, preference_pairs, prompts, sample, sample_base, summarize


KINDS = ("stable_diffusion", "flux_dev", "qwen_image_edit", "z_image", "cogvideox")
ALL = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in tiny.CASES]


def generate(pipeline, name, size=None):
    case = tiny.CASES[name]
    options = {"num_inference_steps": 2, "output_type": "latent", **case.arguments(2)}
    if size is not None:
        options |= {"height": size[0], "width": size[1]}
    prompt = list(case.takes(["a cat", "a dog"]))
    return pipeline(prompt=prompt, **options, generator=torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("name", ALL)
def test_every_family_s_blocks_give_a_reward_that_guides(name, pairs, tmp_path):  # noqa: F811
    pipeline, case = tiny.build(name), tiny.CASES[name]
    options = {"resolution": case.size or None, "num_frames": case.frames, "cache_folder": tmp_path}
    reward = train_latent_reward(pipeline, pairs, epochs=1, batch_size=2, **options)
    plain = generate(pipeline, name)
    with reward_guidance(pipeline, reward, scale=100.0):
        guided = generate(pipeline, name)
    assert guided.isfinite().all() and guided.ne(plain).any()
    assert torch.equal(generate(pipeline, name), plain)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def reward(pipeline):
    return train_latent_reward(pipeline, preference_pairs(256), blocks=2, epochs=5)


class TestOnShapes:
    def test_it_prefers_the_chosen_of_held_out_pairs_up_to_half_noise(self, pipeline, reward):
        found = latent_reward_accuracy(reward, pipeline, preference_pairs(128, seed=7), levels=(0.1, 0.3, 0.5))
        assert list(found) == ["preference"] and min(found["preference"].values()) >= 0.9

    def test_sampling_towards_it_raises_the_preferred_share_by_30_points(self, pipeline, reward):
        asked = prompts()
        plain = summarize(sample_base("mixed", asked, steps=10), asked)
        with reward_guidance(pipeline, reward, scale=2.0):
            guided = summarize(sample(pipeline, asked, steps=10), asked)
        assert guided.preferred >= plain.preferred + 0.3
        assert guided.colour >= 0.9 and guided.shape >= 0.9

    def test_the_same_seed_gives_the_same_reward_and_another_seed_another(self, pipeline):
        made = [train_latent_reward(pipeline, preference_pairs(8), epochs=1, seed=seed).record() for seed in (0, 0, 1)]
        assert made[0] == made[1] != made[2]

    def test_it_loads_as_it_was_saved(self, pipeline, reward, tmp_path):
        reward.save(tmp_path)
        assert sorted(file.name for file in tmp_path.iterdir()) == ["latent_reward.json", "latent_reward.safetensors"]
        loaded = LatentReward.load(tmp_path)
        assert loaded.record() == reward.record() and loaded.objectives == ("preference",)
        options = {"output": tmp_path / "samples", "num_inference_steps": 3, "show_progress": False}
        with reward_guidance(pipeline, reward, scale=2.0):
            guided = evaluation.sample(pipeline, prompts()[:3], [0, 1, 2], batch_size=3, **options)
        # Its files are those of the same reward.
        files = sorted((tmp_path / "samples").iterdir())
        with reward_guidance(pipeline, loaded, scale=2.0):
            evaluation.sample(pipeline, prompts()[:3], [0, 1, 2], batch_size=1, **options)
            alone = evaluation.sample(pipeline, prompts()[:3], [0, 1, 2], batch_size=1, **options | {"output": None})
        assert sorted((tmp_path / "samples").iterdir()) == files
        assert [image.tobytes() for image in guided] == [image.tobytes() for image in alone]
        evaluation.sample(pipeline, prompts()[:3], [0, 1, 2], **options)
        assert len(list((tmp_path / "samples").iterdir())) == 2 * len(files)

    def test_a_pipeline_tuned_since_needs_the_denoiser_of_the_training(self, pipeline, reward, tmp_path):
        tuned = load_pipeline("filled_only")
        with pytest.raises(ValueError, match="pass the denoiser"), reward_guidance(tuned, reward):
            pass
        reward.save(tmp_path)
        own = LatentReward.load(tmp_path, denoiser=pipeline.unet)
        plain = sample(tuned, prompts()[:2], steps=3)
        with reward_guidance(tuned, own, scale=2.0):
            assert sample(tuned, prompts()[:2], steps=3)[0].tobytes() != plain[0].tobytes()
        with pytest.raises(ValueError, match="weights differ"):
            LatentReward.load(tmp_path, denoiser=tuned.unet)

    def test_a_lora_of_the_pipeline_does_not_change_its_features(self, reward):
        tuned = load_pipeline()
        inputs = (torch.randn(2, 4, 8, 8), torch.tensor(300), torch.randn(2, 8, tuned.unet.config.cross_attention_dim))
        expected = reward.streams(tuned.unet, lambda unet: unet(*inputs))
        tuned.unet.add_adapter(LoraConfig(target_modules=["to_q", "conv1"], init_lora_weights=False))
        trainable = [parameter.requires_grad for parameter in tuned.unet.parameters()]
        changed = first_features(tuned.unet, 2, lambda: tuned.unet(*inputs))
        found = reward.streams(tuned.unet, lambda unet: unet(*inputs))
        assert changed[0].ne(expected[0]).any()
        torch.testing.assert_close(found, expected)
        assert [parameter.requires_grad for parameter in tuned.unet.parameters()] == trainable


def test_objectives_are_learnt_each_from_its_pairs_and_soft_labels_count(pipeline):
    """One objective prefers outlines and the other fillings, said by soft labels of 0."""
    both = preference_pairs(96)
    labelled = both.add_column("soft_label", [0.0] * len(both))
    reward = train_latent_reward(pipeline, {"outlined": both, "filled": labelled}, blocks=2, epochs=5)
    held_out = preference_pairs(64, seed=7)
    found = latent_reward_accuracy(reward, pipeline, dict.fromkeys(reward.objectives, held_out), levels=[0.2])
    assert found["outlined"][0.2] >= 0.85 and found["filled"][0.2] <= 0.15
    ties = held_out.add_column("soft_label", [0.5] * len(held_out))
    assert math.isnan(latent_reward_accuracy(reward, pipeline, {"filled": ties}, levels=[0.2])["filled"][0.2])


def test_the_blocks_after_the_last_that_is_needed_are_not_computed():
    transformer = tiny.build("stable_diffusion_3").transformer
    computed = []
    for number, block in enumerate(blocks_of(transformer)):
        block.register_forward_hook(lambda module, args, output, number=number: computed.append((number, output)))
    inputs = {"encoder_hidden_states": torch.randn(2, 5, 64), "pooled_projections": torch.randn(2, 48)}
    inputs |= {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.ones(2)}
    features = first_features(transformer, 1, lambda: transformer(**inputs))
    ((number, output),) = computed
    assert number == 0 and len(features) == len(output) == 2
    assert all(torch.equal(*both) for both in zip(features, output, strict=True))


def test_the_head_rates_tokens_in_any_order_and_knows_the_time():
    torch.manual_seed(0)
    head, stream, time = RewardHead([8], 3, 16), torch.randn(2, 5, 8), torch.tensor([0.1, 0.9])
    scores = head([stream], time)
    assert scores.shape == (2, 3)
    torch.testing.assert_close(head([stream.flip(1)], time), scores)
    assert (head([stream], time.flip(0)) - scores).abs().min() > 1e-4


class TestBadInput:
    def test_a_reward_of_another_family_raises(self, reward):
        flow = load_pipeline("flow")
        message = "trained for a StableDiffusionPipeline, and this is a StableDiffusion3Pipeline"
        with pytest.raises(ValueError, match=message), reward_guidance(flow, reward):
            pass

    def test_weights_of_objectives_that_it_lacks_raise_before_sampling(self, pipeline, reward):
        guidance = reward_guidance(pipeline, reward, weights={"motion": 1.0})
        with pytest.raises(ValueError, match="'motion', and the reward has 'preference'"), guidance:
            pass
        with pytest.raises(ValueError, match="does not rate motion, only preference"):
            latent_reward_accuracy(reward, pipeline, {"motion": preference_pairs(2)})

    def test_latents_of_another_size_raise(self, pipeline, reward):
        message = "trained on latents of the shape .*, or train a reward on pairs of this one"
        with pytest.raises(ValueError, match=message), reward_guidance(pipeline, reward):
            pipeline(prompts()[0], num_inference_steps=2, height=48, width=48)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"blocks": 0}, "blocks=0: the UNet2DConditionModel has 1 to"),
            ({"blocks": 9}, "blocks=9"),
            ({"epochs": 0}, "epochs=0"),
            ({"learning_rate": math.nan}, "learning_rate=nan"),
            ({"weight_decay": -1.0}, "weight_decay=-1"),
        ],
        ids=str,
    )
    def test_options_out_of_range_raise(self, pipeline, options, message):
        with pytest.raises(ValueError, match=message):
            train_latent_reward(pipeline, preference_pairs(2), **options)

    def test_pairs_that_cannot_be_used_raise(self, pipeline):
        with pytest.raises(ValueError, match=r"pairs\['quality'\] lacks the columns chosen, rejected"):
            train_latent_reward(pipeline, {"quality": Dataset.from_dict({"prompt": ["a"]})})
        wrong = preference_pairs(2).add_column("soft_label", [0.5, 1.5])
        with pytest.raises(ValueError, match=r"is 1.5, not in \[0, 1\]"):
            train_latent_reward(pipeline, wrong)
        with pytest.raises(ValueError, match="no objective"):
            train_latent_reward(pipeline, {})

    def test_levels_out_of_range_raise(self, pipeline, reward):
        with pytest.raises(ValueError, match="levels has 1"):
            latent_reward_accuracy(reward, pipeline, preference_pairs(2), levels=[0.5, 1.0])

    def test_a_folder_without_a_reward_or_of_another_version_raises(self, reward, tmp_path):
        with pytest.raises(ValueError, match="no latent reward"):
            LatentReward.load(tmp_path)
        reward.save(tmp_path)
        settings = json.loads((tmp_path / "latent_reward.json").read_text()) | {"format": 99}
        (tmp_path / "latent_reward.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="format 99"):
            LatentReward.load(tmp_path)

    def test_two_denoisers_raise(self):
        with pytest.raises(ValueError, match="each for a range of times"):
            train_latent_reward(build_wan_2_2(), preference_pairs(2))
