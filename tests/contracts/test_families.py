"""What every family must hold, on tiny pipelines of the real classes: see `tiny.CASES`."""

import logging
import re
from functools import wraps
from itertools import takewhile
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from helpers import tiny
from helpers import tiny_flux2 as flux2
from helpers.recorder import PROMPTS, Recorder, noisy_latents, stacked
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import trl_diffusion_pref
from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.diffusion.noise import (
    ContinuousVariancePreserving,
    RectifiedFlow,
    VariancePreserving,
    noise_process,
)
from trl_diffusion_pref.export.weights import write_lora
from trl_diffusion_pref.families import Family, all_families, base, family_for, family_of_denoiser, supported_pipelines
from trl_diffusion_pref.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_pref.families.weightless import pipeline_around, pipeline_from_configs
from trl_diffusion_pref.guidance.halves import take_half


every_case = pytest.mark.parametrize("name", tiny.CASES)
every_family = pytest.mark.parametrize("name", tiny.marked(tiny.CASES))

PACKAGE = Path(trl_diffusion_pref.__file__).parent


def sample(pipeline: DiffusionPipeline, name: str, prompts: list[str], **options):
    """The pipeline's own `__call__`, two steps."""
    return pipeline(
        # Z-Image's pipeline puts its template into the list that it gets.
        prompt=list(tiny.CASES[name].takes(prompts)),
        **{
            "num_inference_steps": 2,
            "output_type": "latent",
            **tiny.CASES[name].arguments(len(prompts)),
            **options,
        },
        generator=torch.Generator().manual_seed(0),
    )[0]


def conditioning_for(family: Family, pipeline: DiffusionPipeline, name: str, prompts: list[str]) -> dict[str, Tensor]:
    """What a batch of these prompts carries, for images as the case's call makes them."""
    case = tiny.CASES[name]
    if family.prompts_see_images:
        cells = [cell if isinstance(cell, list) else [cell] for cell in case.images(len(prompts))]
        conditioning = family.encode_prompts_with_images(pipeline, prompts, cells)
    else:
        conditioning = family.encode_prompts(pipeline, prompts)
    if family.modality == "audio":
        seconds = family.audio_size(pipeline)[1] / family.sampling_rate(pipeline)
        of_sample = family.audio_conditioning(pipeline, case.call.get("audio_end_in_s", seconds))
    else:
        of_sample = family.image_conditioning(
            pipeline,
            case.call.get("original_size", case.size),
            case.call.get("crops_coords_top_left", (0, 0)),
            case.size,
        )
    conditioning |= {key: value.expand(len(prompts), *value.shape) for key, value in of_sample.items()}
    if case.edits:
        conditioning |= conditions_for(family, pipeline, case, len(prompts))
    conditioning |= {key: torch.full_like(conditioning[key], value) for key, value in case.conditioning.items()}
    assert all(value.dtype == torch.float32 for value in conditioning.values())
    return conditioning


def conditions_for(family: Family, pipeline: DiffusionPipeline, case: tiny.Case, rows: int) -> dict[str, Tensor]:
    """Conditioning on the images of the case's call, as data sets are encoded."""
    preparation, images = preparation_for(pipeline, family, case.size, case.frames), {}
    for column in family.condition_images:
        cells = [cell if isinstance(cell, list) else [cell] for cell in case.images(rows, column)]
        for number in range(len(cells[0])):
            # Of decoded cells.
            shown = [(cell[number].convert("RGB"), len(cell)) for cell in cells]
            pixels = [preparation.condition_tensor(image, count, (0.5, 0.5), False) for image, count in shown]
            name = f"{column}/{number}" if family.max_condition_images > 1 else column
            # In the pipelines' order in memory, by which convolutions round.
            images[name] = torch.stack(pixels).contiguous(memory_format=torch.channels_last)
    return family.encode_conditions(pipeline, images, preparation.shape)


def of_conditions(family: Family, conditioning: dict[str, Tensor]) -> list[str]:
    """The names of condition images in conditioning."""
    beginnings = tuple(column + end for column in family.condition_images for end in ("/", "_"))
    return [key for key in conditioning if key in family.condition_images or key.startswith(beginnings)]


def to_vae(name: str, pipeline: DiffusionPipeline, samples: Tensor) -> Tensor:
    """Samples as the VAE takes them."""
    if name == "audioldm2":
        return family_for(pipeline).spectrograms(pipeline, samples)
    return tiny.CASES[name].to_vae(samples)


def reconstruction(name: str, pipeline: DiffusionPipeline, samples: Tensor) -> Tensor:
    """What the VAE makes of its own encoding, called by hand."""
    with torch.no_grad():
        of_vae = pipeline.vae.encode(to_vae(name, pipeline, samples))
        z = of_vae.latent_dist.mode() if hasattr(of_vae, "latent_dist") else of_vae.latent
        decoded = pipeline.vae.decode(z, return_dict=False)[0]
    # ACE-Step's pipeline scales to a peak of -1 dBFS.
    return decoded * (10**-0.05 / decoded.abs().amax(dim=(1, 2), keepdim=True)) if name == "ace_step" else decoded


def given_to_the_scheduler(pipeline: DiffusionPipeline) -> list[Tensor]:
    """The model outputs of all of the scheduler's steps from now on."""
    step, given = pipeline.scheduler.step, []

    # Pipelines read the signature of step.
    @wraps(step)
    def recorded(model_output: Tensor, *args, **kwargs):
        given.append(model_output)
        return step(model_output, *args, **kwargs)

    pipeline.scheduler.step = recorded
    return given


def assert_same_arguments(ours: dict, theirs: dict, rounding: float = 0.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        value = ours[name]
        if not isinstance(expected, Tensor):
            assert value == expected, name
            continue
        if name == "timestep":
            # UNets take one time for the whole batch, and repeat it themselves.
            expected = expected.expand(value.shape)
        assert value.dtype == expected.dtype, f"{name}: {value.dtype} instead of {expected.dtype}"
        assert value.shape == expected.shape, f"{name}: {tuple(value.shape)} instead of {tuple(expected.shape)}"
        assert value.is_floating_point() or torch.equal(value, expected), name
        assert (value.float() - expected.float()).abs().max() <= rounding, name


def test_every_supported_pipeline_has_a_case():
    assert {type(tiny.build(name)).__name__ for name in tiny.CASES} == {*supported_pipelines()} - {*tiny.ABSENT}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one_prompt", "two_prompts"])
@every_case
def test_predict_calls_the_denoiser_as_the_pipeline_does(name, prompts, dtype):
    if name in ("audioldm2", "ace_step", "cogview4"):
        # Their pipelines condition a prompt otherwise where a longer one stands beside it.
        prompts = prompts[:1] * len(prompts)
    pipeline = tiny.build(name, dtype=dtype)
    check_predictions(family_for(pipeline), pipeline, name, prompts)


def check_predictions(family: Family, pipeline: DiffusionPipeline, name: str, prompts: list[str]) -> None:
    """Holds what `predict` passes to the denoiser, and what it returns, to what the sampler passes and uses."""
    case = tiny.CASES[name]
    prompts = case.takes(prompts)
    denoiser = family.denoiser(pipeline)
    recorder, used = Recorder(denoiser), given_to_the_scheduler(pipeline)
    sample(pipeline, name, prompts, num_inference_steps=5)
    conditioning = conditioning_for(family, pipeline, name, prompts)
    calls, outputs, times = recorder.calls[:], used[:], pipeline.scheduler.timesteps
    assert len(calls) == len(times)
    if name == "cogview4":
        # Its scheduler has times from before the shift, as the denoiser is given them; training's stand after it.
        times = pipeline.scheduler.sigmas[:-1] * 1000
    for theirs, their_output, time in zip(calls, outputs, times, strict=True):
        if name == "hunyuan_video":
            # Its sampler gives the first time, 1000, in float32, and the others in the latents' precision.
            theirs["timestep"] = theirs["timestep"].to(theirs["hidden_states"].dtype)
        x_t = case.unpack(pipeline, noisy_latents(theirs))
        with torch.no_grad():
            prediction = family.predict(denoiser, x_t, time.expand(len(prompts)), conditioning)
        # Of sound, durations and prompts are encoded one by one, which rounds otherwise than together.
        # Of an image that a video begins with, rows are encoded one by one in some pipelines.
        one_by_one = (family.modality == "audio" and len(prompts) > 1) or (case.edits and case.frames is not None)
        rounding = 5e-6 * one_by_one
        if name == "cogview4":
            # Of times, which are shifted and back; bfloat16 rounds their embeddings otherwise then.
            rounding = 1e-4 if denoiser.dtype == torch.float32 else 1e-3
        if (family.own_condition_sizes or family.mask_column) and denoiser.dtype == torch.bfloat16:
            # These pipelines shift and scale the encoded image in bfloat16, of which one step is 1/128 at most here.
            rounding = 2**-7
        assert_same_arguments(recorder.calls[-1], theirs, rounding)
        assert prediction.shape == x_t.shape
        # Some pipelines let the scheduler compute in float32 whatever the denoiser's precision.
        expected = case.unpack(pipeline, their_output).to(prediction.dtype)
        torch.testing.assert_close(prediction, expected, **({"rtol": 0.05, "atol": 0.05} if rounding >= 0.001 else {}))


class NegatingPipeline(StableDiffusionPipeline):
    """Gives its scheduler the negative of what its denoiser returns, as Lumina 2's pipeline does."""

    def __call__(self, *args, **kwargs):
        hook = self.unet.register_forward_hook(lambda module, inputs, output: (-output[0],))
        try:
            return super().__call__(*args, **kwargs)
        finally:
            hook.remove()


class NegatingFamily(StableDiffusionFamily):
    def predict(self, *args) -> Tensor:
        return -super().predict(*args)


def test_a_prediction_with_the_wrong_sign_does_not_pass():
    name = "stable_diffusion"
    parts = tiny.build(name).components
    check_predictions(NegatingFamily(), NegatingPipeline(**parts, requires_safety_checker=False), name, PROMPTS)
    pipeline = NegatingPipeline(**tiny.build(name).components, requires_safety_checker=False)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_predictions(StableDiffusionFamily(), pipeline, name, PROMPTS)


@pytest.mark.parametrize("name", ["lumina2", "z_image", "hidream"])
def test_a_family_of_a_negating_pipeline_has_to_negate(name, monkeypatch):
    pipeline = tiny.build(name)
    predict = type(family_for(pipeline)).predict
    monkeypatch.setattr(type(family_for(pipeline)), "predict", lambda *args: -predict(*args))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        check_predictions(family_for(pipeline), pipeline, name, PROMPTS)


@pytest.mark.parametrize("name", [name for name in tiny.CASES if name not in tiny.WITHOUT_GUIDANCE])
def test_the_unconditional_prompt_is_the_sampler_s(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    recorder = Recorder(family.denoiser(pipeline))
    # AudioLDM 2's pads it to the length of the prompt beside it, and its language model counts padding.
    # ACE-Step repeats its learned embedding to the prompt's length.
    prompts = [""] if name in ("audioldm2", "ace_step") else PROMPTS[:1]
    guided = tiny.guidance(name, pipeline, 3.0)
    if name in tiny.TRUE_GUIDANCE:
        # Without any negative prompt these draw without guidance.
        guided["negative_prompt"] = ""
    sample(pipeline, name, prompts, **guided)
    first, second = recorder.calls[:2]
    batch = len(noisy_latents(first))
    # In one call on both sides, or in a second one.
    theirs = second
    if family.condition_images and batch == 3:
        # On [both; image; neither].
        theirs = {key: value.chunk(3)[1] if value.ndim else value for key, value in first.items()}
    if batch == 2:
        half, lists = int(family.guidance_layout == "positive_first"), "x.0" in first
        how = {"lists": lists, "batch_second": family.batch_second}
        theirs = recorder.named(*take_half(recorder.raw[0], half, batch, family.shared_arguments, **how))

    conditioning = conditioning_for(family, pipeline, name, [""])
    if not family.prompts_see_images:
        conditioning |= family.encode_unconditional(pipeline)
    conditioning |= {key: torch.full_like(conditioning[key], value) for key, value in case.conditioning.items()}
    time = theirs["timestep"].reshape(-1)[:1] if family.denoiser_name == "unet" else pipeline.scheduler.timesteps[:1]
    with torch.no_grad():
        family.predict(family.denoiser(pipeline), case.unpack(pipeline, noisy_latents(theirs)), time, conditioning)
    assert_same_arguments(recorder.calls[-1], theirs, 5e-6 * (case.edits and case.frames is not None))


@every_family
def test_conditioning_of_a_prompt_has_one_shape_whatever_the_prompt(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    together = family.encode_prompts(pipeline, ["", *PROMPTS])
    for row, prompt in enumerate(["", *PROMPTS]):
        alone = family.encode_prompts(pipeline, [prompt])
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            torch.testing.assert_close(value[0], together[key][row], rtol=1e-4, atol=1e-5)


@every_family
def test_encoded_latents_decode_to_the_vae_s_own_reconstruction(name, monkeypatch):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    pixels = case.pixels()
    mean, _ = family.encode_samples(pipeline, pixels)
    # The pipeline's own decoding, whatever it shifts and scales by: the sampler's last step returns these latents.
    monkeypatch.setattr(pipeline.scheduler, "step", lambda *args, **kwargs: SchedulerOutput(case.pack(pipeline, mean)))
    if name == "audioldm2":
        # What the VAE decodes is a spectrogram; the vocoder after it is no part of training.
        monkeypatch.setattr(pipeline, "mel_spectrogram_to_waveform", lambda spectrogram: spectrogram)
    decoded = sample(pipeline, name, PROMPTS[:1], output_type="pt")
    expected = reconstruction(name, pipeline, pixels)
    if case.frames is not None:
        # The pipelines' videos have frames before channels.
        expected = expected.transpose(1, 2)
    expected = expected.reshape(decoded.shape)
    if family.modality != "audio":
        expected = (expected / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_decoded_samples_are_the_vae_s_own_reconstruction(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    samples = tiny.CASES[name].pixels(batch=2)
    decoded = family.decode_samples(pipeline, family.encode_samples(pipeline, samples)[0])
    assert decoded.dtype == torch.float32
    # Of the even number of latent frames that CogVideoX 1.5 takes, its VAE and its pipeline make four frames each.
    assert decoded.shape == samples.shape or name.startswith("cogvideox_1_5")
    expected = reconstruction(name, pipeline, samples)
    if name == "audioldm2":
        with torch.no_grad():
            expected = pipeline.vocoder(expected.squeeze(1))
    if family.modality != "audio":
        assert decoded.abs().max() <= 1
        expected = expected.clamp(-1, 1)
    torch.testing.assert_close(decoded, expected.reshape(decoded.shape), rtol=1e-4, atol=1e-5)


@every_family
def test_shapes_from_configs_are_those_of_encoded_samples(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    samples = tiny.CASES[name].pixels()
    shapes = family.input_shapes(pipeline, tuple(samples.shape[1:]))
    assert shapes.latents == tuple(family.encode_samples(pipeline, samples)[0].shape[1:])
    conditioning = conditioning_for(family, pipeline, name, PROMPTS)
    if family.prompts_see_images:
        # Padded to a length that is assumed.
        conditioning |= family.encode_prompts(pipeline, PROMPTS)
    conditioning = {
        key: value for key, value in conditioning.items() if key not in of_conditions(family, conditioning)
    }
    assert shapes.conditioning == {key: tuple(value.shape[1:]) for key, value in conditioning.items()}
    # A family from outside that does not say them finds them by encoding.
    assert Family.conditioning_shapes(family, pipeline) == shapes.conditioning


@every_family
def test_a_folder_s_configs_give_the_same_shapes(name, tmp_path):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    pipeline.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    weightless = pipeline_from_configs(tmp_path, dtype=torch.bfloat16)
    assert family_for(weightless) is family
    of_sample = preparation_for(pipeline, family).shape
    assert preparation_for(weightless, family).shape == of_sample
    assert family.input_shapes(weightless, of_sample) == family.input_shapes(pipeline, of_sample)
    shapes, expected = (
        {key: tensor.shape for key, tensor in family.denoiser(part).state_dict().items()}
        for part in (weightless, pipeline)
    )
    assert shapes == expected
    assert {(p.device.type, p.dtype) for p in family.denoiser(weightless).parameters()} == {("meta", torch.bfloat16)}


@every_family
def test_a_denoiser_alone_has_the_shapes_of_the_published_pipeline(name):
    pipeline = tiny.build(name)
    family, denoiser = family_for(pipeline), family_for(pipeline).denoiser(pipeline)
    wrapped = get_peft_model(denoiser, LoraConfig(target_modules=list(family.lora_target_modules)))
    found = family_of_denoiser(denoiser)
    assert found is family_of_denoiser(wrapped)
    # A denoiser that also reads condition images where it gets them is taken for the one that generates from text.
    assert found is family or (family.own_condition_sizes and isinstance(family, type(found)))
    alone = pipeline_around(family, wrapped)
    assert family.denoiser(alone) is wrapped
    shapes = family.input_shapes(alone, preparation_for(alone, family).shape)
    of_pipeline = family.input_shapes(pipeline, preparation_for(pipeline, family).shape)
    # The published VAE makes more pixels of a latent than the tiny one. A spectrogram's mels are not the denoiser's,
    # and AuraFlow's and Kontext's default sizes are numbers of pixels.
    known = {"audioldm2": slice(2), "auraflow": slice(1), "ace_step": slice(1), "flux_kontext": slice(1)}.get(
        name, slice(None)
    )
    if family.modality != "video":
        assert shapes.latents[known] == of_pipeline.latents[known]
    assert shapes.latents[0] == of_pipeline.latents[0]
    widths, expected = (
        {key: shape[-1:] if "embeds" in key and "mask" not in key else len(shape) for key, shape in of.items()}
        for of in (shapes.conditioning, of_pipeline.conditioning)
    )
    assert widths == expected


@pytest.mark.parametrize(
    ("name", "sample_shape", "latents", "lengths"),
    [
        ("stable_diffusion", (3, 512, 512), (4, 64, 64), {"prompt_embeds": 77}),
        ("instruct_pix2pix", (3, 512, 512), (4, 64, 64), {"prompt_embeds": 77}),
        ("stable_diffusion_inpaint", (3, 512, 512), (4, 64, 64), {"prompt_embeds": 77}),
        ("stable_diffusion_xl", (3, 1024, 768), (4, 128, 96), {"prompt_embeds": 77}),
        ("stable_diffusion_xl_inpaint", (3, 1024, 768), (4, 128, 96), {"prompt_embeds": 77}),
        ("stable_diffusion_3", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 333}),
        ("flux_dev", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512}),
        ("flux_fill", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512}),
        ("flux2_klein", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512}),
        ("flux2_dev", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512}),
        ("pixart_sigma", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 300}),
        ("sana", (3, 1024, 1024), (4, 32, 32), {"prompt_embeds": 300}),
        ("qwen_image", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512}),
        ("chroma", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512, "prompt_attention_mask": 512}),
        ("auraflow", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 256}),
        ("lumina2", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 256}),
        ("z_image", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 512}),
        ("cogview4", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds": 1024}),
        ("hidream", (3, 1024, 1024), (4, 128, 128), {"prompt_embeds_t5": 128}),
        ("wan", (3, 81, 480, 832), (16, 21, 60, 104), {"prompt_embeds": 512}),
        ("wan_5b", (3, 121, 704, 1280), (48, 31, 44, 80), {"prompt_embeds": 512}),
        ("ltx", (3, 161, 512, 704), (4, 21, 16, 22), {"prompt_embeds": 128}),
        ("hunyuan_video", (3, 129, 720, 1280), (4, 33, 90, 160), {"prompt_embeds": 256}),
        ("hunyuan_video15", (3, 121, 480, 848), (4, 31, 30, 53), {"prompt_embeds": 1000, "prompt_embeds_2": 256}),
        ("cogvideox", (3, 49, 480, 720), (4, 13, 60, 90), {"prompt_embeds": 226}),
        ("stable_audio", (2, 2097152), (4, 1024), {"prompt_embeds": 128}),
        ("audioldm2", (1, 163840), (4, 256, 16), {"prompt_embeds": 512, "generated_prompt_embeds": 8}),
    ],
)
def test_published_sizes_are_assumed_of_a_denoiser_alone(name, sample_shape, latents, lengths):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    shapes = family.input_shapes(pipeline_around(family, family.denoiser(pipeline)), sample_shape)
    assert shapes.latents == latents
    assert {key: shapes.conditioning[key][0] for key in lengths} == lengths


@every_family
def test_latents_means_and_deviations_have_one_scale(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    pixels, others = case.pixels(seed=1), case.pixels(seed=2)
    mean, std = family.encode_samples(pipeline, pixels)
    assert mean.dtype == std.dtype == torch.float32
    if name == "sana":
        assert not std.any()
        return
    with torch.no_grad():
        posterior, other = (
            pipeline.vae.encode(to_vae(name, pipeline, images)).latent_dist for images in (pixels, others)
        )
    scale = (mean - family.encode_samples(pipeline, others)[0]) / (posterior.mean - other.mean).reshape(mean.shape)
    torch.testing.assert_close(std / posterior.std.reshape(std.shape), scale, rtol=1e-2, atol=1e-2)


@every_family
def test_target_and_predicted_latents_invert_each_other(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    process = noise_process(pipeline.scheduler, image_tokens=16)
    if case.prediction_type is None:
        assert isinstance(process, RectifiedFlow)
    else:
        assert isinstance(process, VariancePreserving | ContinuousVariancePreserving)
        assert process.prediction_type == case.prediction_type
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(8, 4, 8, 8, generator=generator) for _ in range(2))
    t = process.sample_timesteps(8, generator)
    x_t = process.corrupt(x0, noise, t)
    torch.testing.assert_close(process.predict_x0(process.target(x0, noise, t), x_t, t), x0, rtol=1e-3, atol=1e-3)


@every_family
def test_the_sampler_goes_to_the_image_that_the_process_s_target_stands_for(name):
    scheduler = tiny.build(name).scheduler
    process = noise_process(scheduler)
    # A scheduler that shifts by the image's size is told by how much; ACE-Step's pipeline makes the times itself.
    own = {"sigmas": [1.0, 0.75, 0.5, 0.25]} if name == "ace_step" else {}
    scheduler.set_timesteps(4, **own, **({"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}))
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(1, 4, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    sample = None
    for time in scheduler.timesteps:
        t = time[None] / process.num_train_timesteps if isinstance(process, RectifiedFlow) else time[None]
        torch.testing.assert_close(process.model_time(t), time[None], check_dtype=False)
        if sample is None:
            # Some samplers count in other units than the denoiser's input.
            sample = process.corrupt(x0, noise, t) * getattr(scheduler, "init_noise_sigma", 1.0)
        alpha, sigma = process.alpha_sigma(t)
        x_t = scheduler.scale_model_input(sample, time) if hasattr(scheduler, "scale_model_input") else sample
        prediction = process.target(x0, (x_t - alpha * x0) / sigma, t)
        sample = scheduler.step(prediction, time, sample, return_dict=False)[0]
    # Solvers with integer times miss a flow's by up to 1/1000.
    torch.testing.assert_close(sample, x0, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell", "qwen_image", "chroma", "ltx"])
def test_the_solver_s_grid_is_that_of_a_sampler_which_shifts_by_the_image_s_size(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    sample(pipeline, name, PROMPTS[:1], num_inference_steps=5)
    mean, _ = family.encode_samples(pipeline, case.pixels())
    process = noise_process(pipeline.scheduler, family.image_tokens(tuple(mean.shape[1:])))
    torch.testing.assert_close(process.solver_times(5).flip(0), pipeline.scheduler.sigmas)


@every_family
def test_a_saved_lora_gives_the_same_output_in_a_fresh_pipeline(name, tmp_path):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    recorder = Recorder(family.denoiser(pipeline))
    sample(pipeline, name, PROMPTS)
    args, kwargs = recorder.raw[-1]

    # alpha is not r: a file that does not say so loads at a fourth of the scale.
    config = LoraConfig(r=2, lora_alpha=8, target_modules=list(family.lora_target_modules), init_lora_weights=False)
    denoiser = get_peft_model(family.denoiser(pipeline), config).eval()
    with torch.no_grad():
        expected = stacked(denoiser(*args, **kwargs)[0])
    write_lora(pipeline, family, denoiser, tmp_path)

    fresh = tiny.build(name)
    with torch.no_grad():
        base = stacked(family.denoiser(fresh)(*args, **kwargs)[0])
        if family.lora_format == "peft":
            loaded = PeftModel.from_pretrained(family.denoiser(fresh), tmp_path).eval()
        else:
            fresh.load_lora_weights(tmp_path)
            loaded = family.denoiser(fresh)
        output = stacked(loaded(*args, **kwargs)[0])
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@every_family
def test_predict_takes_a_wrapped_denoiser(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    mean, _ = family.encode_samples(pipeline, tiny.CASES[name].pixels(batch=2))
    conditioning = conditioning_for(family, pipeline, name, PROMPTS)
    time = torch.tensor([500.0, 20.0])
    with torch.no_grad():
        expected = family.predict(family.denoiser(pipeline), mean, time, conditioning)
        config = LoraConfig(target_modules=list(family.lora_target_modules))
        wrapped = get_peft_model(family.denoiser(pipeline), config).eval()
        torch.testing.assert_close(family.predict(wrapped, mean, time, conditioning), expected)


@every_family
def test_gradients_are_the_same_with_gradient_checkpointing(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    denoiser = family.denoiser(pipeline)
    if name == "hidream":
        # Checkpointing calls its blocks again, whose experts have no gradient in evaluation mode.
        denoiser.train()
    mean, _ = family.encode_samples(pipeline, tiny.CASES[name].pixels(batch=2))
    conditioning = conditioning_for(family, pipeline, name, PROMPTS)

    def gradients() -> dict[str, Tensor]:
        denoiser.zero_grad()
        family.predict(denoiser, mean, torch.tensor([500.0, 20.0]), conditioning).square().mean().backward()
        return {key: value.grad.clone() for key, value in denoiser.named_parameters() if value.grad is not None}

    without = gradients()
    denoiser.enable_gradient_checkpointing()
    if not family.gradient_checkpointing:
        with pytest.raises(ValueError, match="activation_checkpointing=False"):
            gradients()
        return
    torch.testing.assert_close(gradients(), without)
    # everything is trained but what no output depends on, such as a last block's update of the text
    assert len(without) > 0.9 * len(list(denoiser.parameters()))


@pytest.mark.parametrize(
    "name", tiny.marked(name for name in tiny.IMAGE_CASES if name != "sana" and not tiny.CASES[name].edits)
)
def test_resolution_is_what_the_pipeline_generates(name, monkeypatch):
    pipeline = tiny.build(name)
    options = {"clean_caption": False, "use_resolution_binning": False} if name == "pixart_sigma" else {}
    assert generated_size(pipeline, monkeypatch, **options) == (family_for(pipeline).resolution(pipeline),) * 2


@pytest.mark.parametrize(("sample_size", "resolution"), [(16, 512), (32, 1024), (64, 2048)])
def test_resolution_of_sana_is_the_centre_of_its_bins(sample_size, resolution, monkeypatch):
    pipeline = tiny.build("sana")
    pipeline.transformer.register_to_config(sample_size=sample_size)
    # As published; the default size of __call__ is fixed, and goes into the bins of the transformer's size.
    pipeline.vae_scale_factor = 32
    assert generated_size(pipeline, monkeypatch) == (resolution, resolution)
    assert family_for(pipeline).resolution(pipeline) == resolution


@pytest.mark.parametrize("name", tiny.marked(tiny.IMAGE_CASES))
def test_resolutions_that_the_denoiser_cannot_take_are_refused_before_anything_is_encoded(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    conditioning = conditioning_for(family, pipeline, name, PROMPTS[:1])

    def predicted_shape(height: int, width: int) -> tuple[torch.Size, torch.Size]:
        mean, _ = family.encode_samples(pipeline, torch.zeros(1, 3, height, width))
        conditioning.update(dict.fromkeys(of_conditions(family, conditioning), mean))
        if family.mask_column:
            conditioning[family.mask_column] = mean[:, :1].expand(-1, family.mask_channels(pipeline), -1, -1)
        with torch.no_grad():
            prediction = family.predict(family.denoiser(pipeline), mean, torch.tensor([500.0]), conditioning)
        return prediction.shape, mean.shape

    # An odd number of the smallest pieces works, a part of one does not.
    step = family.size_step(pipeline)
    assert preparation_for(pipeline, family, 3 * step).shape == (3, 3 * step, 3 * step)
    assert preparation_for(pipeline, family, (3 * step, 5 * step)).shape == (3, 3 * step, 5 * step)
    given, wanted = predicted_shape(3 * step, 5 * step)
    assert given == wanted
    side = 3 * step - pipeline.vae_scale_factor if step > pipeline.vae_scale_factor else 3 * step - 1
    with pytest.raises(
        ValueError, match=f"resolution={side}: .* multiples of {step} pixels. Take {2 * step} or {3 * step}"
    ):
        preparation_for(pipeline, family, side)
    if step > pipeline.vae_scale_factor:
        try:
            given, wanted = predicted_shape(side, side)
        except RuntimeError:
            return
        assert given != wanted


@pytest.mark.parametrize("name", tiny.VIDEO_CASES)
def test_size_and_frames_of_a_video_are_what_the_pipeline_generates(name, monkeypatch):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    frames, height, width = family.video_size(pipeline)
    edited = {"image": tiny.CASES[name].images(1)[0]} if tiny.CASES[name].edits else {}
    theirs = generated_size(pipeline, monkeypatch, **edited)
    assert theirs == ((frames, height, width) if name.startswith("cogvideox") else (height, width, frames))
    assert family.resolution(pipeline) == min(height, width)


def generated_size(pipeline: DiffusionPipeline, monkeypatch, **options) -> tuple[int, ...]:
    """Sizes in pixels and frames of what the pipeline generates by default, as its `prepare_latents` gets them."""
    sizes = []

    def stop(*args, **named):
        given = list(takewhile(lambda value: isinstance(value, (int, Tensor)), (*args, *named.values())))
        # After the condition image, where there is one, and the numbers of rows and of channels.
        sizes.append(tuple(value for value in given if isinstance(value, int))[2:])
        raise InterruptedError

    monkeypatch.setattr(pipeline, "prepare_latents", stop)
    with pytest.raises(InterruptedError):
        pipeline(prompt="", **options)
    return sizes[0]


@every_family
def test_a_denoiser_that_takes_more_than_noisy_latents_is_refused(name):
    """As checkpoints for inpainting, Flux fill or control, and image to video."""
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    family.check_complete(pipeline)
    denoiser = family.denoiser(pipeline)
    channels = denoiser.config.in_channels
    denoiser.register_to_config(in_channels=2 * channels + 1)
    message = f"{family.denoiser_name} of this .* takes {2 * channels + 1} channels, but .* have {channels}"
    with pytest.raises(ValueError, match=f"{message}.*generates from text alone"):
        family.check_complete(pipeline)


def turbo(name: str) -> DiffusionPipeline:
    pipeline = tiny.build(name)
    pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    return pipeline


def z_image_turbo() -> DiffusionPipeline:
    pipeline = tiny.build("z_image")
    pipeline.register_to_config(_name_or_path="Tongyi-MAI/Z-Image-Turbo")
    return pipeline


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: tiny.build("flux_schnell"), "guidance_embeds=False"),
        (lambda: flux2.build_flux2_klein(is_distilled=True), "is_distilled=True"),
        (z_image_turbo, "its name is Tongyi-MAI/Z-Image-Turbo"),
        (lambda: turbo("stable_diffusion"), "EulerAncestralDiscreteScheduler has timestep_spacing='trailing'"),
        (lambda: turbo("stable_diffusion_xl"), "EulerAncestralDiscreteScheduler has timestep_spacing='trailing'"),
    ],
    ids=["schnell", "klein", "z_image_turbo", "sd_turbo", "sdxl_turbo"],
)
def test_step_distilled_checkpoints_are_warned_of_once(build, reason, caplog):
    base._warn_of_distillation.cache_clear()
    pipeline = build()
    for _ in range(2):
        family_for(pipeline).check_complete(pipeline)
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(f"This {type(pipeline).__name__} looks distilled to a few sampling steps")
    assert reason in message


@pytest.mark.parametrize("name", [name for name in tiny.CASES if name != "flux_schnell"])
def test_nothing_else_is_taken_to_be_distilled(name):
    """Zero terminal SNR, which also asks for trailing times, is among the cases."""
    pipeline = tiny.build(name)
    assert family_for(pipeline).distilled(pipeline) is None


def test_nothing_outside_families_names_a_family():
    names = {name for family in all_families() for name in (family.pipeline_class, family.denoiser_class)}
    # FluxPipeline, FluxTransformer2DModel, FluxFamily; of names of two words also without what follows.
    stems = {name.removesuffix("Pipeline") for name in names}
    names |= {stem + (r"\w*" if len(re.findall("[A-Z]", stem)) > 1 else r"[A-Z0-9]\w*") for stem in stems}
    pattern = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in ("families", "shapes")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)
