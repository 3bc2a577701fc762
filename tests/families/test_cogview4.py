"""CogView4: times from before the sampler's shift, prompts that are not masked, and the one scheduler that fits."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from helpers import tiny
from helpers.recorder import PROMPTS, Recorder
from torch import Tensor, nn

from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.families import family_for


@pytest.fixture
def pipeline():
    return tiny.build("cogview4")


def arguments(pipeline, prompts: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Noisy latents and conditioning of some prompts."""
    family = family_for(pipeline)
    sizes = family.image_conditioning(pipeline, (40, 30), (3, 5), (32, 48))
    conditioning = family.encode_prompts(pipeline, prompts)
    conditioning |= {name: value.expand(len(prompts), 2) for name, value in sizes.items()}
    return torch.randn(len(prompts), 4, 4, 6, generator=torch.Generator().manual_seed(0)), conditioning


@pytest.mark.parametrize(("height", "width"), [(32, 32), (128, 64), (512, 512)])
def test_training_s_noise_shifts_by_the_square_root_of_the_image_s_tokens(pipeline, height, width):
    shape = (4, height // 8, width // 8)
    process = noise_process(pipeline.scheduler, family_for(pipeline).image_tokens(shape))
    assert process.shift == pytest.approx(calculate_shift(height * width / 16**2), rel=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (128, 64)])
def test_the_denoiser_is_given_the_times_before_the_shift(pipeline, size):
    """Those of the sampler's own list, whole numbers of which its scheduler makes shifted noise."""
    recorder = Recorder(pipeline.transformer)
    pipeline("a", height=size[0], width=size[1], num_inference_steps=4, output_type="latent", guidance_scale=1.0)
    assert [call["timestep"].item() for call in recorder.calls] == [1000, 667, 334, 1]
    noise = pipeline.scheduler.sigmas[:-1]
    _, conditioning = arguments(pipeline, ["a"])
    with torch.no_grad():
        for sigma in noise:
            latents = torch.zeros(1, 4, size[0] // 8, size[1] // 8)
            family_for(pipeline).predict(pipeline.transformer, latents, 1000 * sigma[None], conditioning)
    times = [call["timestep"].item() for call in recorder.calls[4:]]
    assert times == pytest.approx([1000, 667, 334, 1], abs=1e-3)


def test_prompts_of_several_lengths_are_predicted_as_each_alone(pipeline):
    family = family_for(pipeline)
    x_t, conditioning = arguments(pipeline, [PROMPTS[1], PROMPTS[0], "", PROMPTS[1]])
    assert conditioning["prompt_embeds_mask"].sum(dim=1).tolist() == [48, 16, 16, 48]
    times = torch.tensor([900.0, 500.0, 20.0, 300.0])
    recorder = Recorder(pipeline.transformer)
    with torch.no_grad():
        together = family.predict(pipeline.transformer, x_t, times, conditioning)
        assert [call["encoder_hidden_states"].shape[:2] for call in recorder.calls] == [(2, 16), (2, 48)]
        for row in range(4):
            own = {name: value[row : row + 1] for name, value in conditioning.items()}
            alone = family.predict(pipeline.transformer, x_t[row : row + 1], times[row : row + 1], own)
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


class FSDPStandIn(nn.Module):
    """Named as what wraps a denoiser whose weights are spread over processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_sharded_denoiser_takes_prompts_of_one_length_only(pipeline):
    family, sharded = family_for(pipeline), FSDPStandIn(pipeline.transformer)
    time = torch.tensor([500.0, 500.0])
    with torch.no_grad():
        family.predict(sharded, *arguments(pipeline, [PROMPTS[1]] * 2)[:1], time, arguments(pipeline, ["a", "b"])[1])
        x_t, conditioning = arguments(pipeline, PROMPTS)
        with pytest.raises(ValueError, match="several lengths.*per_device_train_batch_size=1 and prompt_dropout=0"):
            family.predict(sharded, x_t, time, conditioning)


@pytest.mark.parametrize(
    "options", [{"time_shift_type": "exponential"}, {"use_dynamic_shifting": False}, {"max_shift": 1.15}]
)
def test_a_scheduler_that_shifts_otherwise_is_refused(pipeline, options):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, **options)
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"The scheduler of this CogView4Pipeline has {name}={value!r} instead of"):
        family_for(pipeline).check_complete(pipeline)
