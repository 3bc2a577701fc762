"""Encoders leave memory for training where the trainer can read them again, and come back for whoever wants them."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from helpers import tiny
from helpers.pipelines import assert_equal_weights, build_tiny_pipeline, weights_of
from transformers import TrainerCallback

from trl_diffusion_pref import MaPOTrainer
from trl_diffusion_pref.data import Encoders
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.training.pipelines import encoders_of, load_pipeline


NAMES = ("vae", "text_encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("source")
    build_tiny_pipeline().save_pretrained(folder)
    return str(folder)


def tensors(pipeline) -> list[torch.Tensor]:
    return [tensor for name in NAMES for tensor in getattr(pipeline, name).state_dict().values()]


def tensors_of(trainer) -> list[torch.Tensor]:
    """Without bringing anything back."""
    return tensors(trainer.encoders.pipeline)


class Watch(TrainerCallback):
    """Notes at each step which of the encoders' tensors have memory, and which of the first ones are still alive."""

    def __init__(self) -> None:
        self.in_memory: list[bool] = []
        self.alive: list[int] = []

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        gc.collect()
        self.in_memory.append(any(not tensor.is_meta for tensor in tensors_of(self.trainer)))
        self.alive.append(sum(reference() is not None for reference in self.first))

    def of(self, trainer) -> "Watch":
        self.trainer = trainer
        self.first = [weakref.ref(p) for name in NAMES for p in getattr(trainer.encoders.pipeline, name).parameters()]
        trainer.add_callback(self)
        return self


def draw(pipeline) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a", num_inference_steps=2, generator=generator, output_type="np").images)


def test_encoders_of_a_pipeline_given_by_name_are_out_of_memory_in_every_step(folder, config, pairs):
    trainer = MaPOTrainer(folder, config(max_steps=1), pairs)
    watch = Watch().of(trainer)
    trainer.train()
    assert watch.in_memory == [False] and watch.alive == [0]


def test_a_pipeline_that_was_passed_keeps_its_encoders(config, pairs):
    pipeline = build_tiny_pipeline()
    before = {name: weights_of(getattr(pipeline, name)) for name in NAMES}
    trainer = MaPOTrainer(pipeline, config(max_steps=1), pairs)
    watch = Watch().of(trainer)
    trainer.train()
    assert watch.in_memory == [True]
    for name, weights in before.items():
        assert_equal_weights(weights_of(getattr(pipeline, name)), weights)


def test_the_pipeline_samples_before_and_after_training(folder, config, pairs):
    trainer = MaPOTrainer(folder, config(max_steps=1), pairs)
    assert torch.equal(draw(trainer.pipeline), draw(StableDiffusionPipeline.from_pretrained(folder)))
    trainer.train()
    assert trainer.encoders.released
    expected = StableDiffusionPipeline.from_pretrained(folder)
    expected.unet = trainer.model
    assert torch.equal(draw(trainer.pipeline), draw(expected))


def test_they_come_back_for_a_callback_that_samples(folder, config, pairs):
    class Samples(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            drawn.append(draw(trainer.pipeline).isfinite().all())

    drawn: list[torch.Tensor] = []
    trainer = MaPOTrainer(folder, config(max_steps=1), pairs, callbacks=[Samples()])
    trainer.train()
    assert len(drawn) == 1 and all(drawn)


def test_save_model_writes_the_whole_pipeline_and_releases_them_again(folder, config, pairs, tmp_path):
    trainer = MaPOTrainer(folder, config(max_steps=1), pairs)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert all(tensor.is_meta for tensor in tensors_of(trainer))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    source = StableDiffusionPipeline.from_pretrained(folder)
    for name in NAMES:
        assert_equal_weights(weights_of(getattr(loaded, name)), weights_of(getattr(source, name)))
    assert_equal_weights(weights_of(loaded.unet), weights_of(trainer.model))


def test_a_model_may_be_saved_over_the_one_it_came_from(config, pairs, tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "source")
    trainer = MaPOTrainer(str(tmp_path / "source"), config(max_steps=1), pairs)
    trainer.train()
    trainer.save_model(str(tmp_path / "source"))
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "source")
    assert_equal_weights(weights_of(loaded.unet), weights_of(trainer.model))
    assert_equal_weights(weights_of(loaded.vae), weights_of(build_tiny_pipeline().vae))


def test_an_evaluation_of_new_data_brings_them_back_for_its_duration(folder, config, pairs):
    trainer = MaPOTrainer(folder, config(max_steps=1, eval_draws=2), pairs)
    trainer.train()
    assert trainer.evaluate(pairs.select(range(4)))["eval_loss"] > 0
    assert trainer.encoders.released


def test_a_second_training_releases_them_again(folder, config, pairs):
    trainer = MaPOTrainer(folder, config(max_steps=1), pairs)
    trainer.train()
    draw(trainer.pipeline)
    watch = Watch().of(trainer)
    trainer.train()
    assert watch.in_memory == [False]


def test_a_source_that_changed_meanwhile_is_refused_and_what_was_trained_is_kept(config, pairs, tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "source")
    trainer = MaPOTrainer(str(tmp_path / "source"), config(max_steps=1), pairs)
    trainer.train()
    build_tiny_pipeline(seed=1).vae.save_pretrained(tmp_path / "source" / "vae")
    with pytest.raises(ValueError, match="The vae was read again .* changed there since the run began"):
        trainer.save_model(str(tmp_path / "saved"))
    saved = type(trainer.model).from_pretrained(tmp_path / "saved" / "unet")
    assert_equal_weights(weights_of(saved), weights_of(trainer.model))


def test_an_encoder_that_the_user_brings_stays(folder, config, pairs):
    vae: AutoencoderKL = build_tiny_pipeline().vae
    trainer = MaPOTrainer(folder, config(max_steps=1, model_init_kwargs={"vae": vae}), pairs)
    trainer.train()
    assert not any(parameter.is_meta for parameter in vae.parameters())
    assert all(parameter.is_meta for parameter in trainer.encoders.pipeline.text_encoder.parameters())
    assert draw(trainer.pipeline).isfinite().all()


def test_a_stream_keeps_them(folder, config, pairs):
    trainer = MaPOTrainer(folder, config(max_steps=1), pairs.to_iterable_dataset())
    watch = Watch().of(trainer)
    trainer.train()
    assert watch.in_memory == [True]


@pytest.mark.parametrize("name", tiny.marked(tiny.CASES))
def test_every_family_s_encoders_come_back_as_they_were(name, tmp_path):
    """Tied weights and buffers that are not saved included: what they compute is the same."""
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    pipeline.save_pretrained(tmp_path)
    absent = {part: None for part, module in pipeline.components.items() if module is None}
    held = load_pipeline(str(tmp_path), absent)
    encoders = encoders_of(str(tmp_path), held, family, {})
    modules = family.encoders(held)
    for module in modules:
        # As they come back: PyTorch computes products with weights that ask for gradients in another order.
        module.requires_grad_(False)
    expected = family.encode_prompts(held, ["a b"])
    encoders.release()
    assert all(tensor.is_meta for module in modules for tensor in (*module.parameters(), *module.buffers()))
    encoders.bring_back()
    assert family.encoders(held) == modules, "whoever holds a module keeps it"
    for key, values in family.encode_prompts(held, ["a b"]).items():
        assert torch.equal(values, expected[key])


def test_the_memory_is_given_back(tmp_path):
    """Of a VAE of 64 MB, measured by the tensors that are alive."""
    pipeline = tiny.build("stable_diffusion")
    pipeline.vae.register_buffer("ballast", torch.zeros(2**24))
    pipeline.save_pretrained(Path(tmp_path))
    gc.collect()

    def alive() -> int:
        return sum(t.nbytes for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta)

    before = alive()
    Encoders(pipeline, family_for(pipeline), dict).release()
    gc.collect()
    assert before - alive() >= 2**26
