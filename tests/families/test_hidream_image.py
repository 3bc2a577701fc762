"""HiDream: patches in training mode, experts that get gradients, Llama's layers, and images with too many tokens."""

import logging

import pytest
import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.models.transformers.transformer_hidream_image import MoEGate
from helpers import tiny
from helpers.recorder import PROMPTS
from torch import Tensor

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.families import base, family_for
from trl_diffusion_pref.guidance.halves import take_half


@pytest.fixture
def pipeline():
    return tiny.build("hidream")


def prediction(pipeline, latents: Tensor) -> Tensor:
    family = family_for(pipeline)
    conditioning = family.encode_prompts(pipeline, PROMPTS)
    return family.predict(pipeline.transformer, latents, torch.tensor([500.0, 20.0]), conditioning)


def noise(*size: int) -> Tensor:
    return torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))


# Latents of 4 columns have as many tokens as rows, so that patches have the latents' shape.
@pytest.mark.parametrize("size", [(10, 10), (8, 12), (6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_modes_predict_the_same_to_the_bit(pipeline, size, dtype):
    pipeline.to(dtype)
    for part in pipeline.transformer.modules():
        if isinstance(part, MoEGate):
            # CUDA's autocast computes softmax in float32, the CPU's does not.
            part.register_forward_hook(lambda module, args, output: (output[0], output[1].float(), None))
    latents = noise(*size).to(dtype)
    with torch.no_grad():
        evaluated = prediction(pipeline, latents)
        pipeline.transformer.train()
        trained = prediction(pipeline, latents)
    assert trained.shape == latents.shape
    assert torch.equal(trained, evaluated)


def test_predict_leaves_the_modes_as_they_were(pipeline):
    prediction(pipeline, noise(8, 8))
    assert not any(part.training for part in pipeline.transformer.modules())


def test_every_weight_gets_a_gradient(pipeline):
    pipeline.transformer.train()
    prediction(pipeline, noise(8, 12)).square().mean().backward()
    assert {name for name, weight in pipeline.transformer.named_parameters() if weight.grad is None} == set()


def test_no_auxiliary_loss_is_in_the_gradient(pipeline):
    pipeline.transformer.train()
    gradients = []
    for weight in (0.0, 100.0):
        pipeline.transformer.zero_grad()
        for part in pipeline.transformer.modules():
            if hasattr(part, "alpha"):
                part.alpha = weight
        prediction(pipeline, noise(8, 8)).square().mean().backward()
        gradients.append(pipeline.transformer.single_stream_blocks[0].block.ff_i.gate.weight.grad.clone())
    assert gradients[0].any()
    assert torch.equal(*gradients)


def test_only_the_layers_that_the_denoiser_reads_are_stored(pipeline):
    family = family_for(pipeline)
    whole = family.encode_prompts(pipeline, PROMPTS)["prompt_embeds_llama3"]
    pipeline.transformer.register_to_config(llama_layers=[0, 1, 1])
    stored = family.encode_prompts(pipeline, PROMPTS)["prompt_embeds_llama3"]
    assert whole.shape == (2, 3, 128, 8)
    assert torch.equal(stored, whole[:, :2])
    assert family.conditioning_shapes(pipeline)["prompt_embeds_llama3"] == stored.shape[1:]


def test_too_many_tokens_of_an_oblong_image_are_refused(pipeline):
    family = family_for(pipeline)
    for size in ((32, 32), (16, 64), (64, 64)):
        shape = preparation_for(pipeline, family, size).shape
        assert prediction(pipeline, noise(*family.latent_shape(pipeline, shape)[1:])).isfinite().all()
    shape = preparation_for(pipeline, family, (20, 64)).shape
    with pytest.raises(
        ValueError, match="resolution=20x64 makes 80 tokens, .* has room for 64 of an image that is not"
    ):
        family.input_shapes(pipeline, shape)


def test_a_denoiser_that_keeps_gradients_from_its_experts_is_refused(pipeline):
    pipeline.transformer.register_to_config(force_inference_output=True)
    with pytest.raises(ValueError, match="force_inference_output=True.*Load it with force_inference_output=False"):
        family_for(pipeline).check_complete(pipeline)


def lcm(pipeline) -> str:
    pipeline.scheduler = FlowMatchLCMScheduler(shift=6.0)
    return "its scheduler is FlowMatchLCMScheduler"


def fast(pipeline) -> str:
    pipeline.register_to_config(_name_or_path="HiDream-ai/HiDream-I1-Fast")
    return "its name is HiDream-ai/HiDream-I1-Fast"


@pytest.mark.parametrize("distil", [lcm, fast])
def test_distilled_weights_are_warned_of(pipeline, distil, caplog):
    base._warn_of_distillation.cache_clear()
    reason = distil(pipeline)
    with caplog.at_level(logging.WARNING):
        family_for(pipeline).check_complete(pipeline)
    assert reason in caplog.text


def test_halves_of_llama_s_states_are_taken_of_their_second_dimension():
    states = torch.arange(4 * 4).view(4, 4, 1)
    given = {"hidden_states": torch.arange(4), "states": states}
    half = take_half(((), given), 1, 4, batch_second=("states",))[1]
    assert torch.equal(half["hidden_states"], torch.tensor([2, 3]))
    assert torch.equal(half["states"], states[:, 2:])
