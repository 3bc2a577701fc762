"""What every family must hold, on tiny pipelines of the real classes: see `tiny.CASES`."""

import inspect
from itertools import takewhile

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from trl_diffusion_pref.data import preparation_for
from trl_diffusion_pref.families import Family, family_for, supported_pipelines
from trl_diffusion_pref.guidance.halves import take_half
from trl_diffusion_pref.hub import export_lora
from trl_diffusion_pref.noise import ContinuousVariancePreserving, RectifiedFlow, VariancePreserving, noise_process


PROMPTS = ["a red circle", "a blue ring on a green ground, far away"]
every_family = pytest.mark.parametrize("name", tiny.CASES)


class Recorder:
    """Keeps each call of a module: its arguments, as they were and by name, and its output."""

    def __init__(self, module: nn.Module) -> None:
        self.calls: list[dict] = []
        self.raw: list[tuple[tuple, dict]] = []
        self.outputs: list[Tensor] = []
        self._signature = inspect.signature(module.forward)
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(lambda module, args, output: self.outputs.append(output[0]))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.raw.append((args, kwargs))
        arguments = self._signature.bind(*args, **kwargs).arguments
        # Dictionaries and tuples are compared entry by entry; an empty one says as much as None.
        for name, value in list(arguments.items()):
            if isinstance(value, dict):
                arguments |= {f"{name}.{key}": entry for key, entry in arguments.pop(name).items()}
            elif isinstance(value, tuple):
                arguments |= {f"{name}.{key}": entry for key, entry in enumerate(arguments.pop(name))}
        arguments.pop("return_dict", None)
        self.calls.append({name: value for name, value in arguments.items() if value is not None})


def sample(pipeline: DiffusionPipeline, name: str, prompts: list[str], **options):
    """The pipeline's own `__call__`, two steps."""
    case = tiny.CASES[name]
    size = dict(zip(("height", "width"), case.size, strict=False))
    return pipeline(
        prompts,
        **{
            "num_inference_steps": 2,
            "output_type": "latent",
            **size,
            **case.call,
            **options,
        },
        generator=torch.Generator().manual_seed(0),
    )[0]


def conditioning_for(family: Family, pipeline: DiffusionPipeline, name: str, prompts: list[str]) -> dict[str, Tensor]:
    """What a batch of these prompts carries, for images as the case's call makes them."""
    case = tiny.CASES[name]
    conditioning = family.encode_prompts(pipeline, prompts)
    if family.modality == "audio":
        seconds = family.audio_size(pipeline)[1] / family.sampling_rate(pipeline)
        of_sample = family.sound_conditioning(pipeline, case.call.get("audio_end_in_s", seconds))
    else:
        of_sample = family.image_conditioning(
            pipeline,
            case.call.get("original_size", case.size),
            case.call.get("crops_coords_top_left", (0, 0)),
            case.size,
        )
    conditioning |= {key: value.expand(len(prompts), *value.shape) for key, value in of_sample.items()}
    conditioning |= {key: torch.full_like(conditioning[key], value) for key, value in case.conditioning.items()}
    assert all(value.dtype == torch.float32 for value in conditioning.values())
    return conditioning


def to_vae(name: str, pipeline: DiffusionPipeline, samples: Tensor) -> Tensor:
    """Samples as the VAE takes them."""
    if name == "audioldm2":
        return family_for(pipeline).spectrograms(pipeline, samples)
    return tiny.CASES[name].to_vae(samples)


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
    assert {type(tiny.build(name)).__name__ for name in tiny.CASES} == set(supported_pipelines())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one_prompt", "two_prompts"])
@every_family
def test_predict_calls_the_denoiser_as_the_pipeline_does(name, prompts, dtype):
    if name == "audioldm2":
        # Its pipeline conditions a prompt otherwise where a longer one stands beside it.
        prompts = prompts[:1] * len(prompts)
    case, pipeline = tiny.CASES[name], tiny.build(name, dtype=dtype)
    family = family_for(pipeline)
    recorder = Recorder(family.denoiser(pipeline))
    sample(pipeline, name, prompts, num_inference_steps=5)
    conditioning = conditioning_for(family, pipeline, name, prompts)
    calls, outputs, times = recorder.calls[:], recorder.outputs[:], pipeline.scheduler.timesteps
    assert len(calls) == len(times)
    for theirs, their_output, time in zip(calls, outputs, times, strict=True):
        latents = theirs["sample" if family.denoiser_name == "unet" else "hidden_states"]
        x_t = case.unpack(pipeline, latents)
        with torch.no_grad():
            prediction = family.predict(family.denoiser(pipeline), x_t, time.expand(len(prompts)), conditioning)
        # Of sound, durations and prompts are encoded one by one, which rounds otherwise than together.
        assert_same_arguments(recorder.calls[-1], theirs, 1e-6 * (family.modality == "audio" and len(prompts) > 1))
        assert prediction.shape == x_t.shape
        expected = case.unpack(pipeline, their_output)
        torch.testing.assert_close(prediction, expected[:, : x_t.shape[1]])


@every_family
def test_the_unconditional_prompt_is_the_sampler_s(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    recorder = Recorder(family.denoiser(pipeline))
    # AudioLDM 2's pads it to the length of the prompt beside it, and its language model counts padding.
    prompts = [""] if name == "audioldm2" else PROMPTS[:1]
    guided = {"guidance_scale": 3.0}
    if name in tiny.TRUE_GUIDANCE:
        # Without any negative prompt these draw without guidance.
        guided = {"true_cfg_scale": 3.0, "negative_prompt": ""}
    sample(pipeline, name, prompts, **guided)
    first, second = recorder.calls[:2]
    latents = "sample" if family.denoiser_name == "unet" else "hidden_states"
    batch = len(first[latents])
    # In one call on [negative; positive], or in a second one.
    theirs = second
    if batch == 2:
        # Rotations belong to positions, however many there are.
        theirs = {key: value if "rotary" in key else take_half(value, 0, batch) for key, value in first.items()}

    conditioning = conditioning_for(family, pipeline, name, [""]) | family.encode_unconditional(pipeline)
    conditioning |= {key: torch.full_like(conditioning[key], value) for key, value in case.conditioning.items()}
    time = theirs["timestep"].reshape(-1)[:1] if family.denoiser_name == "unet" else pipeline.scheduler.timesteps[:1]
    with torch.no_grad():
        family.predict(family.denoiser(pipeline), case.unpack(pipeline, theirs[latents]), time, conditioning)
    assert_same_arguments(recorder.calls[-1], theirs)


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
    mean, _ = family.encode_images(pipeline, pixels)
    # The pipeline's own decoding, whatever it shifts and scales by: the sampler's last step returns these latents.
    monkeypatch.setattr(pipeline.scheduler, "step", lambda *args, **kwargs: SchedulerOutput(case.pack(pipeline, mean)))
    if name == "audioldm2":
        # What the VAE decodes is a spectrogram; the vocoder after it is no part of training.
        monkeypatch.setattr(pipeline, "mel_spectrogram_to_waveform", lambda spectrogram: spectrogram)
    decoded = sample(pipeline, name, PROMPTS[:1], output_type="pt")
    with torch.no_grad():
        of_vae = pipeline.vae.encode(to_vae(name, pipeline, pixels))
        z = of_vae.latent_dist.mode() if hasattr(of_vae, "latent_dist") else of_vae.latent
        expected = pipeline.vae.decode(z, return_dict=False)[0]
    if case.frames is not None:
        # The pipelines' clips have frames before channels.
        expected = expected.transpose(1, 2)
    expected = expected.reshape(decoded.shape)
    if family.modality != "audio":
        expected = (expected / 2 + 0.5).clamp(0, 1)
    assert expected.std() > 0.01
    torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)


@every_family
def test_latents_means_and_deviations_have_one_scale(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    pixels, others = case.pixels(seed=1), case.pixels(seed=2)
    mean, std = family.encode_images(pipeline, pixels)
    assert mean.dtype == std.dtype == torch.float32
    if name == "sana":
        assert not std.any()
        return
    with torch.no_grad():
        posterior, other = (
            pipeline.vae.encode(to_vae(name, pipeline, images)).latent_dist for images in (pixels, others)
        )
    scale = (mean - family.encode_images(pipeline, others)[0]) / (posterior.mean - other.mean).reshape(mean.shape)
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
    # A scheduler that shifts by the image's size is told by how much.
    scheduler.set_timesteps(4, **({"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}))
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


@pytest.mark.parametrize("name", ["flux_dev", "flux_schnell", "qwen_image"])
def test_the_solver_s_grid_is_that_of_a_sampler_which_shifts_by_the_image_s_size(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    family = family_for(pipeline)
    sample(pipeline, name, PROMPTS[:1], num_inference_steps=5)
    mean, _ = family.encode_images(pipeline, case.pixels())
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
        expected = denoiser(*args, **kwargs)[0]
    export_lora(pipeline, family, denoiser, tmp_path)

    fresh = tiny.build(name)
    with torch.no_grad():
        base = family.denoiser(fresh)(*args, **kwargs)[0]
        if family.lora_format == "peft":
            loaded = PeftModel.from_pretrained(family.denoiser(fresh), tmp_path).eval()
        else:
            fresh.load_lora_weights(tmp_path)
            loaded = family.denoiser(fresh)
        output = loaded(*args, **kwargs)[0]
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


@every_family
def test_predict_takes_a_wrapped_denoiser(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    mean, _ = family.encode_images(pipeline, tiny.CASES[name].pixels(batch=2))
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
    mean, _ = family.encode_images(pipeline, tiny.CASES[name].pixels(batch=2))
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


@pytest.mark.parametrize("name", [name for name in tiny.IMAGE_CASES if name != "sana"])
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


@pytest.mark.parametrize("name", tiny.IMAGE_CASES)
def test_resolutions_that_the_denoiser_cannot_take_are_refused_before_anything_is_encoded(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    conditioning = conditioning_for(family, pipeline, name, PROMPTS[:1])

    def predicted_shape(height: int, width: int) -> tuple[torch.Size, torch.Size]:
        mean, _ = family.encode_images(pipeline, torch.zeros(1, 3, height, width))
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
def test_size_and_frames_of_a_clip_are_what_the_pipeline_generates(name, monkeypatch):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    frames, height, width = family.video_size(pipeline)
    theirs = generated_size(pipeline, monkeypatch)
    assert theirs == ((height, width, frames) if name == "wan" else (frames, height, width))
    assert family.resolution(pipeline) == min(height, width)


def generated_size(pipeline: DiffusionPipeline, monkeypatch, **options) -> tuple[int, ...]:
    """Sizes in pixels and frames of what the pipeline draws by default, as its `prepare_latents` gets them."""
    sizes = []

    def stop(batch_size, channels, *args):
        sizes.append(tuple(takewhile(lambda value: isinstance(value, int), args)))
        raise InterruptedError

    monkeypatch.setattr(pipeline, "prepare_latents", stop)
    with pytest.raises(InterruptedError):
        pipeline("", **options)
    return sizes[0]
