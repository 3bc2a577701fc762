"""Samples are those of the pipeline's own call, the same bytes however they are made, and made once.

tests/preference_data/test_make.py runs several processes and kills one.
"""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from helpers import tiny
from helpers.pipelines import build_tiny_pipeline
from peft import LoraConfig
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor

from trl_diffusion_pref.data.decode.audio import Waveform
from trl_diffusion_pref.evaluation.batch_invariance import RowByRow
from trl_diffusion_pref.evaluation.sample_files import png_bytes, read_sample, wav_bytes, write_sample
from trl_diffusion_pref.evaluation.sampling import is_blank, sample, seeds_for
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import negative_guidance
from trl_diffusion_pref.shapes import load_pipeline, prompts


TEXTS = ["a red circle", "x", "a big blue square on the left", "x"]
# By case, what switches guidance on.
TRUE_GUIDED = ("flux_kontext", "qwen_image", "qwen_image_edit", "qwen_image_edit_plus")
GUIDED = dict.fromkeys(["flux_dev", "flux_schnell", "hunyuan_video15"], {})
GUIDED |= dict.fromkeys(TRUE_GUIDED, {"true_cfg_scale": 4.0, "negative_prompt": "a"})


def bytes_of(item) -> list[bytes]:
    if isinstance(item, Waveform):
        return [item.samples.numpy().tobytes()]
    return [frame.tobytes() for frame in (item if isinstance(item, list) else [item])]


def tiny_samples(pipeline, **options):
    return sample(pipeline, TEXTS, [0, 1, 2, 3], **{"num_inference_steps": 2, "show_progress": False, **options})


# ---- The same bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.marked(tiny.CASES))
def test_a_sample_does_not_depend_on_its_batch(name):
    case, pipeline = tiny.CASES[name], tiny.build(name)
    options = case.arguments(len(TEXTS))
    taken = family_for(pipeline).condition_images if case.edits else ()
    if taken:
        options["images"] = {column: case.images(len(TEXTS), column) for column in taken}
        options = {name: value for name, value in options.items() if name not in taken}
    options |= GUIDED.get(name, {"guidance_scale": 4.0})
    decoded: list[torch.Tensor] = []
    pipeline.vae.decoder.register_forward_hook(
        # Beside a cache in some families.
        lambda module, args, output: decoded.append(output[0] if isinstance(output, tuple) else output)
    )
    results = []
    for size in (1, len(TEXTS)):
        decoded.clear()
        samples = [bytes_of(item) for item in tiny_samples(pipeline, batch_size=size, **options)]
        # Numbers as well, which become equal bytes more often than not. In some families the order differs.
        results.append((samples, sorted(row.numpy().tobytes() for output in decoded for row in output)))
    assert results[0] == results[1]
    assert samples[1] != samples[3], "another seed"


def test_the_embedded_flow_pipeline_does_not_depend_on_the_batch_either():
    texts = prompts()[:8]
    one, eight = (
        sample(load_pipeline("flow"), texts, seeds_for(texts), batch_size=size, num_inference_steps=6)
        for size in (1, 8)
    )
    assert [image.tobytes() for image in one] == [image.tobytes() for image in eight]


def test_rows_are_computed_as_if_alone():
    torch.manual_seed(0)
    rows, weight, images, kernel = (torch.randn(s) for s in ((9, 256), (192, 256), (9, 48, 8, 8), (48, 48, 3, 3)))
    with RowByRow():
        linear, product = nn.functional.linear(rows, weight), rows @ weight.T
        convolved = nn.functional.conv2d(images, kernel, padding=1)
    for row in range(9):
        assert torch.equal(linear[row], nn.functional.linear(rows[row : row + 1], weight)[0])
        assert torch.equal(convolved[row], nn.functional.conv2d(images[row : row + 1], kernel, padding=1)[0])
    assert torch.allclose(product.double(), rows.double() @ weight.double().T, atol=1e-4)


# ---- The pipeline's own call -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_samples_are_those_of_the_pipelines_own_call(guided):
    pipeline, options = build_tiny_pipeline(), {"num_inference_steps": 3, "negative_prompt": "blue"}
    with negative_guidance(pipeline, build_tiny_pipeline(seed=1)) if guided else torch.no_grad():
        samples = sample(pipeline, TEXTS, [5, 6, 7, 8], show_progress=False, **options)
        expected = [
            pipeline(text, generator=torch.Generator().manual_seed(seed), **options).images[0]
            for text, seed in zip(TEXTS, [5, 6, 7, 8], strict=True)
        ]
    for image, other in zip(samples, expected, strict=True):
        assert np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1


def test_audio_has_the_models_rate_and_the_pipelines_values():
    pipeline = tiny.build("stable_audio")
    [audio] = sample(pipeline, ["rain"], [3], num_inference_steps=2, show_progress=False)
    expected = pipeline(["rain"], generator=torch.Generator().manual_seed(3), num_inference_steps=2).audios[0]
    assert audio.rate == pipeline.vae.config.sampling_rate
    assert (audio.samples - expected).abs().max() < 1e-5


def state_of(pipeline) -> tuple:
    scheduler = pipeline.scheduler
    modes = [part.training for module in (pipeline.unet, pipeline.vae) for part in module.modules()]
    adapters = [part.disable_adapters for part in pipeline.unet.modules() if hasattr(part, "disable_adapters")]
    timesteps, bar = scheduler.timesteps.tolist(), vars(pipeline).get("_progress_bar_config")
    return scheduler, timesteps, modes, adapters, bar, torch.get_rng_state().tolist(), torch.get_num_threads()


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_left_as_it_was(fails):
    pipeline = build_tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    pipeline.unet.train()
    pipeline.set_progress_bar_config(desc="mine")
    seen, threads = [], torch.get_num_threads()
    pipeline.unet.register_forward_pre_hook(lambda module, args: seen.append((module.training, torch.rand(1))))
    if fails:
        pipeline.vae.register_forward_pre_hook(lambda *args: 1 / 0)
        pipeline.vae.decode = lambda *args, **kwargs: 1 / 0
    torch.set_num_threads(2)
    try:
        before = state_of(pipeline)
        if fails:
            with pytest.raises(ZeroDivisionError):
                tiny_samples(pipeline)
        else:
            tiny_samples(pipeline)
        assert state_of(pipeline) == before
    finally:
        torch.set_num_threads(threads)
    assert seen and not any(training for training, _ in seen)


# ---- Files -------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_generated(tmp_path):
    pipeline, calls = build_tiny_pipeline(), []
    pipeline.text_encoder.register_forward_pre_hook(lambda *args: calls.append(1))
    options = {"num_inference_steps": 2, "output": tmp_path, "guidance_scale": 1.0, "show_progress": False}
    first = sample(pipeline, ["a", "b"], [0, 1], **options)
    more = sample(pipeline, ["b", "c", "a", "c"], [1, 2, 0, 2], **options)
    assert (first.made, more.made, len(calls)) == (2, 1, 2)
    assert [more.files[2], more.files[0]] == first.files and more.files[1] == more.files[3]
    assert more[2].tobytes() == first[0].tobytes()
    assert [len(files) for files in (first.files, more[1:3], list(more))] == [2, 2, 4]


def changed(pipeline, what: str, folder: Path):
    """Names of the samples after one change, from the same folder."""
    options: dict = {"num_inference_steps": 2}
    if what == "weights":
        nn.init.zeros_(pipeline.unet.conv_out.weight)
    elif what == "adapter":
        pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    elif what == "adapter's scale":
        changed(pipeline, "adapter", folder)
        pipeline.unet.set_adapters("default", 0.5)
    elif what == "adapter switched off":
        changed(pipeline, "adapter", folder)
        pipeline.unet.disable_adapters()
    elif what == "scheduler":
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.02)
    elif what == "argument":
        options["guidance_scale"] = 3.0
    elif what == "exact":
        options["exact"] = False
    if what.startswith("guidance"):
        with negative_guidance(pipeline, build_tiny_pipeline(seed=1), beta=0.5 if "beta" in what else 1.0):
            return tiny_samples(pipeline, output=folder, **options)
    return tiny_samples(pipeline, output=folder, **options)


def test_what_changes_a_sample_changes_its_name(tmp_path):
    names: dict[tuple, str] = {}
    cases = ["nothing", "weights", "adapter", "adapter's scale", "adapter switched off", "scheduler", "argument"]
    for what in [*cases, "exact", "guidance", "guidance with another beta"]:
        files = tuple(changed(build_tiny_pipeline(), what, tmp_path).files)
        assert files not in names, f"{what} has the name of {names.get(files)}"
        names[files] = what
    assert changed(build_tiny_pipeline(), "nothing", tmp_path).made == 0


def test_a_video_is_a_folder_of_frames(tmp_path):
    case = tiny.CASES["wan"]
    options = {**dict(zip(("height", "width"), case.size, strict=True)), **case.call}
    pipeline = tiny.build("wan")
    stored, kept = (tiny_samples(pipeline, output=output, **options) for output in (tmp_path, None))
    assert [file.name for file in sorted(stored.files[0].iterdir())] == [f"{i:05}.png" for i in range(case.frames)]
    assert [bytes_of(item) for item in stored] == [bytes_of(item) for item in kept]
    # Frames that are equal are kept, too.
    write_sample(tmp_path / "still", [Image.new("RGB", (8, 8), "red")] * 3)
    assert len(read_sample(tmp_path / "still")) == 3


def test_audio_files_hold_the_values_that_libsndfile_reads(tmp_path):
    audio = Waveform(torch.randn(2, 1000) * 1.5, 44100)
    values, rate = soundfile.read(io.BytesIO(wav_bytes(audio)), dtype="float32", always_2d=True)
    assert rate == 44100 and np.array_equal(values.T, audio.samples.numpy())
    write_sample(tmp_path / "a.wav", audio)
    assert torch.equal(read_sample(tmp_path / "a.wav").samples, audio.samples)


# ---- Blank samples and bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flagged", [False, True])
def test_images_that_a_safety_checker_blanks_are_found(flagged):
    pipeline = build_tiny_pipeline()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8))
    # How similar an image may be to a concept: any cosine is above -1, none above 1.
    for thresholds in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        nn.init.constant_(thresholds, -1.0 if flagged else 1.0)
    pipeline.register_modules(safety_checker=checker)
    pipeline.feature_extractor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    assert [is_blank(image) for image in tiny_samples(pipeline)] == [flagged] * 4


def test_black_is_blank_and_nearly_black_is_not():
    black, dark = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4))
    dark.putpixel((3, 3), (0, 0, 1))
    cases = [black, dark, [black, black], [black, dark], Waveform(torch.zeros(1, 9), 8), Waveform(torch.ones(1, 9), 8)]
    assert [is_blank(case) for case in cases] == [True, False, True, False, True, False]
    assert is_blank(Image.open(io.BytesIO(png_bytes(black))))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((["a"], [0, 1]), {}, "1 prompts for 2 seeds"),
        ((["a", " "], [0, 1]), {}, "prompt 1 is ' '"),
        ((["a"], [-1]), {}, "seed 0 is -1"),
        ((["a"], [0]), {"batch_size": 0}, "batch_size=0"),
        ((["a"], [0]), {"guidence_scale": 3.0}, "no argument guidence_scale. Did you mean guidance_scale?"),
        ((["a"], [0]), {"generator": None}, "generator cannot be passed on"),
        ((["a"], [0]), {"callback_on_step_end": print, "output": "x"}, "callback_on_step_end is a builtin"),
    ],
)
def test_bad_input_is_named(arguments, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        sample(build_tiny_pipeline(), *arguments, **options)


def test_weights_that_are_not_in_memory_are_refused_with_a_folder(tmp_path):
    pipeline = build_tiny_pipeline()
    pipeline.vae.to("meta")
    with pytest.raises(ValueError, match="weights of the pipeline's vae are not in memory"):
        sample(pipeline, ["a"], [0], output=tmp_path)


def test_seeds_depend_on_the_prompt_and_not_on_the_others():
    seeds = seeds_for(["a", "b", "a"], seed=1)
    assert seeds[0] == seeds[2] != seeds[1]
    assert seeds_for(["b"], seed=1) == seeds[1:2]
    assert len({*seeds, *seeds_for(["a", "b"], seed=2), *seeds_for(["a", "b"], seed=1, number=1)}) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
