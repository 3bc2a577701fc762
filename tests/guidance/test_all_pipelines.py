"""Guidance with a negative model in every kind of pipeline: those that batch both sides, and those that call twice."""

import copy
import inspect

import pytest
import torch
from helpers import tiny
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import add_negative_guidance, negative_guidance
from trl_diffusion_pref.guidance.sources import denoiser_name


SCALE = 3.0
PROMPTS = ["a red circle", "a blue ring on a green ground, far away"]
GUIDED = [name for name in tiny.CASES if name not in tiny.WITHOUT_GUIDANCE]


def sample(pipeline, name: str, scale: float) -> torch.Tensor:
    arguments = tiny.CASES[name].arguments(len(PROMPTS))
    # Z-Image's guidance is `pos + s (pos - neg)`, off at 0.
    value = scale - 1 if name == "z_image" else scale
    options = {"num_inference_steps": 2, "output_type": "latent", **arguments, **tiny.guidance(name, pipeline, value)}
    # ACE-Step guides against a learned embedding, and Flux.2 [klein] always against the empty prompt.
    if scale != 1.0 and "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters:
        options["negative_prompt"] = tiny.CASES[name].takes(["a black square"] * 2)
    return pipeline(
        prompt=list(tiny.CASES[name].takes(PROMPTS)), **options, generator=torch.Generator().manual_seed(0)
    )[0]


def scaled(output: torch.Tensor | list[torch.Tensor], factor: float) -> tuple:
    """A denoiser's output, times a number."""
    return ([factor * sample for sample in output] if isinstance(output, list) else factor * output,)


# ACE-Step's guidance is not linear: see its own tests.
@pytest.mark.parametrize("name", [name for name in GUIDED if name != "ace_step"])
def test_the_negative_side_alone_is_the_other_model_s(name):
    """With a negative model that predicts zero, guidance `neg + s (pos - neg)` is s times the plain prediction."""
    plain = tiny.build(name)
    denoiser = getattr(plain, denoiser_name(plain))
    # These bring the result back to the positive prediction's norm.
    factor = 1.0 if name in ("qwen_image", "qwen_image_edit", "qwen_image_edit_plus", "lumina2") else SCALE
    denoiser.register_forward_hook(lambda module, args, output: scaled(output[0], factor))
    expected = sample(plain, name, 1.0)

    pipeline = tiny.build(name)
    own = getattr(pipeline, denoiser_name(pipeline))
    guidance = add_negative_guidance(pipeline, copy.deepcopy(own))
    rows, case, layout = [], tiny.CASES[name], family_for(plain).guidance_layout

    def zero(module, args, kwargs, output):
        rows.append(len(output[0]))
        return scaled(output[0], 0.0)

    guidance.second.register_forward_hook(zero, with_kwargs=True)
    guided = sample(pipeline, name, SCALE)
    # Solvers of higher order evaluate more often.
    assert len(rows) >= 2 and set(rows) == {1 if case.one_prompt else 4 if layout == "positive_of_three" else 2}
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", GUIDED)
def test_the_model_s_own_weights_as_negative_change_nothing(name):
    pipeline = tiny.build(name)
    expected, off = sample(pipeline, name, SCALE), sample(pipeline, name, 1.0)
    with negative_guidance(pipeline, copy.deepcopy(getattr(pipeline, denoiser_name(pipeline)))):
        torch.testing.assert_close(sample(pipeline, name, SCALE), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sample(pipeline, name, 1.0), off, rtol=0, atol=0)
    torch.testing.assert_close(sample(pipeline, name, SCALE), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", GUIDED)
def test_a_lora_file_equals_its_offset_in_whole_weights(name, tmp_path):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    own = family.denoiser(pipeline)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=list(family.lora_target_modules), init_lora_weights=False)
    trained = get_peft_model(copy.deepcopy(own), config)
    tensors = {
        key.removeprefix("base_model.model."): value for key, value in get_peft_model_state_dict(trained).items()
    }
    family.save_lora(pipeline, tmp_path, tensors, trained.peft_config["default"].to_dict())
    plain = sample(pipeline, name, SCALE)
    with negative_guidance(pipeline, trained.merge_and_unload()):
        expected = sample(pipeline, name, SCALE)
    with negative_guidance(pipeline, tmp_path):
        guided = sample(pipeline, name, SCALE)
    assert (guided - plain).abs().max() > 1e-3
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sample(pipeline, name, SCALE), plain, rtol=0, atol=0)
