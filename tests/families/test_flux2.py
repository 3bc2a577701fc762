"""What Flux.2's families have beside the contract: sizes of images, columns, times, guidance, LoRA layers."""

import math

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from helpers import tiny
from helpers import tiny_flux2 as flux2
from helpers.pipelines import png
from helpers.recorder import Recorder
from helpers.tiny_instruct_pix2pix import images
from helpers.training_runs import train
from peft import LoraConfig

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.data import PAIRS, Layout, preparation_for
from trl_diffusion_pref.data.prompts import text_record
from trl_diffusion_pref.diffusion.noise import noise_process
from trl_diffusion_pref.export.model_card import _inputs
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.guidance import add_negative_guidance
from trl_diffusion_pref.training.model_setup import with_targets


SIZES = [(64, 64), (71, 130), (1024, 1024), (1500, 901), (700, 4001)]


def edits(cells: list, kind: object) -> Dataset:
    """Two pairs of 16x16 images with these cells beside them."""
    pictures = [png(image) for image in images((16, 16), 4)]
    rows = {"prompt": ["a", "b"], "chosen": pictures[:2], "rejected": pictures[2:], "image": cells}
    features = {"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "image": kind}
    return Dataset.from_dict(rows, features=Features(features))


@pytest.fixture
def options(image_run):
    return lambda **more: image_run(**{"aspect_ratio_buckets": False, **more})


# ---- Condition images --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_images_are_prepared_as_the_pipeline_prepares_them(size, monkeypatch):
    pipeline, (picture,) = tiny.build("flux2_klein"), images(size, 1)
    given = []

    def stop(images, **options):
        given.extend(images)
        raise InterruptedError

    monkeypatch.setattr(pipeline, "prepare_image_latents", stop)
    with pytest.raises(InterruptedError):
        pipeline(image=picture, prompt="a", height=16, width=16)
    preparation = preparation_for(pipeline, family_for(pipeline), 16)
    prepared = preparation.condition_tensor(picture, 1, (0.5, 0.5), False)
    torch.testing.assert_close(prepared[None], given[0])


def test_images_that_the_pipeline_refuses_are_named(monkeypatch, options):
    monkeypatch.setattr(Flux2ImageProcessor, "check_image_input", staticmethod(flux2.published_check))
    cells = [[png(image)] for size in ((64, 64), (40, 70)) for image in images(size, 1)]
    with pytest.raises(
        ValueError, match="row 1, column 'image'.*Flux2KleinPipeline refuses it: Image too small: 70×40"
    ):
        MaPOTrainer(tiny.build("flux2_klein"), MaPOConfig(**options()), edits(cells, List(Image())))


def test_several_images_of_a_row_train_after_the_noisy_tokens(options):
    cells = [[png(image) for image in own] for own in flux2.three_images(2)]
    trainer = MaPOTrainer(tiny.build("flux2_dev"), MaPOConfig(**options()), edits(cells, List(Image())))
    recorder = Recorder(trainer.model)
    train(trainer)
    # 16x16 pixels, and 24x16, 16x32 and 24x16 of which each 4x4 are a token.
    assert recorder.calls[0]["hidden_states"].shape[1] == 16 + 24 + 32 + 24
    times = recorder.calls[0]["img_ids"][0, :, 0].tolist()
    assert times == [0] * 16 + [10] * 24 + [20] * 32 + [30] * 24


def test_more_images_than_the_model_takes_are_refused(options):
    cells = [[png(image) for image in images((16, 16), count)] for count in (4, 5)]
    with pytest.raises(ValueError, match="row 1, column 'image': found 5 images, and the pipeline takes 1 to 4"):
        MaPOTrainer(tiny.build("flux2_klein"), MaPOConfig(**options()), edits(cells, List(Image())))


def test_the_columns_say_whether_a_run_edits_or_generates_from_text():
    family, one = family_for(tiny.build("flux2_klein")), Layout(samples=("edited_image",))
    assert PAIRS.conditioned_on(family, ["prompt", "chosen", "rejected"]) == PAIRS
    edited = PAIRS.conditioned_on(family, ["prompt", "chosen", "rejected", "image"])
    assert (edited.conditions, edited.images_per_cell) == (("image",), 4)
    assert one.conditioned_on(family, ["prompt", "image"]) == Layout(samples=("image",))
    edited = one.conditioned_on(family, ["prompt", "image", "edited_image"])
    assert (edited.samples, edited.conditions) == (("edited_image",), ("image",))


# ---- Times -------------------------------------------------------------------------------------------------------


def test_training_times_are_shifted_as_the_sampler_s_default_steps():
    pipeline = tiny.build("flux2_klein")
    pipeline(prompt="a", height=16, width=24, num_inference_steps=50, output_type="latent")
    process = noise_process(pipeline.scheduler, family_for(pipeline).image_tokens((4, 8, 12)))
    torch.testing.assert_close(process.solver_times(50).flip(0), pipeline.scheduler.sigmas)


def test_the_shift_of_many_tokens_does_not_depend_on_the_steps():
    pipeline = tiny.build("flux2_dev")
    process = noise_process(pipeline.scheduler, family_for(pipeline).image_tokens((4, 200, 200)))
    assert process.shift == pytest.approx(math.exp(0.00016927 * 10_000 + 0.45666666))


# ---- Prompts, guidance, LoRA -------------------------------------------------------------------------------------


def test_a_tokenizer_inside_a_processor_decides_which_prompts_are_cached():
    pipeline = tiny.build("flux2_dev")
    before = text_record(pipeline, family_for(pipeline))
    pipeline.tokenizer.tokenizer.add_tokens(["cat"])
    after = text_record(pipeline, family_for(pipeline))
    assert {name for name in before if before[name] != after[name]} == {"tokenizers"}


@pytest.mark.parametrize("pipeline", [flux2.build_flux2_dev, lambda: flux2.build_flux2_klein(is_distilled=True)])
def test_pipelines_without_guidance_take_no_negative_model(pipeline):
    with pytest.raises(ValueError, match="has no classifier-free guidance"):
        add_negative_guidance(pipeline(), tiny.build("flux2_klein").transformer)


def test_the_default_lora_has_the_layers_of_the_example():
    pipeline = tiny.build("flux2_klein")
    config = with_targets(LoraConfig(), family_for(pipeline), pipeline.transformer)
    assert set(config.target_modules) == {
        *("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj"),
        "single_transformer_blocks.0.attn.to_out",
    }


def test_a_card_s_code_names_the_prompt_which_is_not_the_first_argument():
    pipeline = tiny.build("flux2_klein")
    assert _inputs(pipeline, family_for(pipeline), []) == 'prompt="your prompt"'
