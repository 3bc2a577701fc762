import copy
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from threading import Barrier

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from helpers.pipelines import build_tiny_pipeline
from helpers.tensor_memory import PeakMemory
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file

from trl_diffusion_pref import families
from trl_diffusion_pref.families.stable_diffusion import StableDiffusionFamily
from trl_diffusion_pref.guidance import add_negative_guidance, negative_guidance
from trl_diffusion_pref.guidance.halves import join_halves, take_half


PROMPTS = ["a red circle", "a blue square", "a green star"]


def generate(pipeline, scale: float = 4.0, **options) -> np.ndarray:
    options = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "np", **options}
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    return pipeline(PROMPTS, generator=generators, **options).images


def moved_unet(amount: float = 0.02, seed: int = 0):
    """The tiny pipeline's UNet with other weights."""
    unet = build_tiny_pipeline().unet
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator)
    return unet


def write_lora(folder, seed: int = 1, rank: int = 2, alpha: int = 8, targets=("to_q", "to_v"), size: float = 0.3):
    """A random LoRA of the tiny UNet in diffusers' format, alpha unlike r."""
    pipeline = build_tiny_pipeline()
    pipeline.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in pipeline.unet.named_parameters():
            if ".lora_" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    metadata = pipeline.unet.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(pipeline.unet, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("negative"))


@pytest.fixture(scope="module")
def positive_lora(tmp_path_factory):
    return write_lora(tmp_path_factory.mktemp("positive"), seed=2, targets=("to_k", "to_v", "to_out.0"))


def generate_with(lora) -> np.ndarray:
    pipeline = build_tiny_pipeline()
    pipeline.load_lora_weights(lora)
    return generate(pipeline)


def weights_with_lora(pipeline, *parts: tuple) -> dict[str, torch.Tensor]:
    """The UNet's weights with LoRAs added by hand: (folder, scale) each, `W + scale alpha / r B A`."""
    from safetensors import safe_open

    weights = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    for folder, scale in parts:
        with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as opened:
            config = json.loads(opened.metadata()["lora_adapter_metadata"])
            factor = scale * config["unet.lora_alpha"] / config["unet.r"]
            for key in opened.keys():  # noqa: SIM118
                if ".lora_A." in key:
                    down, up = opened.get_tensor(key), opened.get_tensor(key.replace("lora_A", "lora_B"))
                    weights[key.removeprefix("unet.").replace(".lora_A", "")] += factor * up @ down
    return weights


def reference_images(positive: dict, negative: dict, scale: float = 4.0, **options) -> np.ndarray:
    """A sampler of two UNets, written out: the pipeline's own code with the guidance computed by hand."""
    pipeline = build_tiny_pipeline()
    pipeline.unet.load_state_dict(positive)
    other = copy.deepcopy(pipeline.unet)
    other.load_state_dict(negative)
    forward = pipeline.unet.forward

    def both(sample, timestep, encoder_hidden_states, **kwargs):
        n = len(sample) // 2
        neg = other(sample[:n], timestep, encoder_hidden_states[:n], return_dict=False)[0]
        pos = forward(sample[n:], timestep, encoder_hidden_states[n:], return_dict=False)[0]
        return (torch.cat([neg, pos]),)

    pipeline.unet.forward = both
    return generate(pipeline, scale, **options)


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return generate(build_tiny_pipeline())


class TestIdentity:
    @pytest.mark.parametrize("scale", [1.0, 1.5, 7.5])
    def test_the_base_s_own_weights_as_negative_change_nothing(self, scale):
        pipeline = build_tiny_pipeline()
        expected = generate(pipeline, scale)
        with negative_guidance(pipeline, build_tiny_pipeline()):
            np.testing.assert_allclose(generate(pipeline, scale), expected, rtol=0, atol=1e-5)

    def test_a_lora_that_does_nothing_changes_nothing(self, tmp_path, plain):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, write_lora(tmp_path, size=0.0)):
            np.testing.assert_allclose(generate(pipeline), plain, rtol=0, atol=1e-5)

    def test_the_positive_s_lora_as_negative_with_alpha_0_changes_nothing(self, lora):
        pipeline = build_tiny_pipeline()
        pipeline.load_lora_weights(lora)
        expected = generate(pipeline)
        assert np.abs(expected - generate(build_tiny_pipeline())).max() > 1e-2
        with negative_guidance(pipeline, lora, alpha=0.0):
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_with_guidance_off_it_is_the_plain_pipeline(self, kind, lora):
        pipeline = build_tiny_pipeline()
        expected = generate(pipeline, 1.0)
        with negative_guidance(pipeline, lora if kind == "lora" else moved_unet()):
            np.testing.assert_array_equal(generate(pipeline, 1.0), expected)
            assert np.abs(generate(pipeline, 4.0) - expected).max() > 1e-3


GRID = [(alpha, beta) for alpha in (0.0, 0.6, 1.0) for beta in (0.0, 0.6, 1.0)]


class TestMergedByHand:
    """theta_neg = theta + alpha (theta_pos - theta) + beta delta, against weights merged by hand."""

    @pytest.mark.parametrize(("alpha", "beta"), GRID)
    def test_lora_positive_and_lora_negative(self, alpha, beta, lora, positive_lora):
        base = build_tiny_pipeline()
        expected = reference_images(
            weights_with_lora(base, (positive_lora, 1.0)),
            weights_with_lora(base, (positive_lora, alpha), (lora, beta)),
        )
        base.load_lora_weights(positive_lora)
        with negative_guidance(base, lora, alpha, beta):
            np.testing.assert_allclose(generate(base), expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize(("alpha", "beta"), GRID)
    def test_fully_tuned_positive_and_full_negative(self, alpha, beta):
        theta, positive, negative = build_tiny_pipeline().unet, moved_unet(seed=3), moved_unet(seed=4)
        merged = {
            name: value + alpha * (positive.state_dict()[name] - value) + beta * (negative.state_dict()[name] - value)
            for name, value in theta.state_dict().items()
        }
        expected = reference_images(positive.state_dict(), merged)
        pipeline = build_tiny_pipeline()
        pipeline.unet.load_state_dict(positive.state_dict())
        with negative_guidance(pipeline, negative, alpha, beta, base=build_tiny_pipeline()):
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=2e-5)

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.6), (0.6, 1.0)])
    def test_fully_tuned_positive_and_lora_negative(self, alpha, beta, lora):
        pipeline, positive = build_tiny_pipeline(), moved_unet(seed=3).state_dict()
        delta = weights_with_lora(pipeline, (lora, beta))
        merged = {
            name: value + alpha * (positive[name] - value) + delta[name] - value
            for name, value in pipeline.unet.state_dict().items()
        }
        expected = reference_images(positive, merged)
        pipeline.unet.load_state_dict(positive)
        with negative_guidance(pipeline, lora, alpha, beta, base=build_tiny_pipeline()) as guided:
            assert (vars(guided.unet)["_negative_guidance"].second is None) == (alpha == 1.0)
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=2e-5)

    def test_lora_positive_and_full_negative(self, positive_lora):
        pipeline, negative = build_tiny_pipeline(), moved_unet(seed=4).state_dict()
        scaled = weights_with_lora(pipeline, (positive_lora, 0.6))
        merged = {
            name: scaled[name] + 0.5 * (negative[name] - value) for name, value in pipeline.unet.state_dict().items()
        }
        expected = reference_images(weights_with_lora(pipeline, (positive_lora, 1.0)), merged)
        pipeline.load_lora_weights(positive_lora)
        with negative_guidance(pipeline, moved_unet(seed=4), 0.6, 0.5):
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=2e-5)

    def test_the_user_s_adapter_scale_holds_on_both_sides(self, lora, positive_lora):
        base = build_tiny_pipeline()
        expected = reference_images(
            weights_with_lora(base, (positive_lora, 0.7)),
            weights_with_lora(base, (positive_lora, 0.7 * 0.5), (lora, 1.0)),
        )
        base.load_lora_weights(positive_lora, adapter_name="mine")
        base.set_adapters(["mine"], [0.7])
        with negative_guidance(base, lora, alpha=0.5):
            np.testing.assert_allclose(generate(base), expected, rtol=0, atol=2e-5)

    def test_a_disabled_adapter_stays_off_on_both_sides(self, lora, positive_lora):
        base = build_tiny_pipeline()
        expected = reference_images(base.unet.state_dict(), weights_with_lora(base, (lora, 1.0)))
        base.load_lora_weights(positive_lora)
        base.disable_lora()
        with negative_guidance(base, lora):
            np.testing.assert_allclose(generate(base), expected, rtol=0, atol=2e-5)


def snapshot(pipeline) -> dict:
    """All that a user could notice of a denoiser."""
    unet = pipeline.unet
    return {
        "modules": {name: type(part) for name, part in unet.named_modules()},
        "attributes": {name for name in vars(unet) if name not in ("_modules", "_parameters")},
        "requires_grad": {name: parameter.requires_grad for name, parameter in unet.named_parameters()},
        "adapters": {
            name: (list(part.active_adapters), part.disable_adapters, dict(part.scaling))
            for name, part in unet.named_modules()
            if isinstance(part, BaseTunerLayer)
        },
        "configs": sorted(getattr(unet, "peft_config", {}) or {}),
    }


class TestLeaving:
    @pytest.mark.parametrize("positive", ["none", "lora", "two loras", "disabled"])
    @pytest.mark.parametrize("negative", ["lora", "full"])
    def test_the_pipeline_is_exactly_as_before(self, positive, negative, lora, positive_lora):
        pipeline = build_tiny_pipeline()
        if positive != "none":
            pipeline.load_lora_weights(positive_lora, adapter_name="one")
        if positive == "two loras":
            pipeline.load_lora_weights(lora, adapter_name="two")
            pipeline.set_adapters(["one", "two"], [0.3, 0.8])
        if positive == "disabled":
            pipeline.disable_lora()
        before, images = snapshot(pipeline), generate(pipeline)
        weights = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
        with negative_guidance(pipeline, lora if negative == "lora" else moved_unet(), 0.5, 0.5):
            generate(pipeline)
        assert snapshot(pipeline) == before
        assert all(torch.equal(weights[name], tensor) for name, tensor in pipeline.unet.state_dict().items())
        np.testing.assert_array_equal(generate(pipeline), images)

    def test_also_after_an_error_inside(self, lora):
        pipeline = build_tiny_pipeline()
        before = snapshot(pipeline)
        with pytest.raises(KeyError), negative_guidance(pipeline, lora):
            raise KeyError
        assert snapshot(pipeline) == before

    def test_the_permanent_form_stays_until_it_is_removed(self, lora, plain):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, lora):
            expected = generate(pipeline)
        guidance = add_negative_guidance(pipeline, lora)
        np.testing.assert_array_equal(generate(pipeline), expected)
        np.testing.assert_array_equal(generate(pipeline), expected)
        guidance.remove()
        guidance.remove()
        np.testing.assert_array_equal(generate(pipeline), plain)

    def test_offloading_switched_on_inside_survives(self, lora, plain):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, lora):
            expected = generate(pipeline)
            cpu_offload_with_hook(pipeline.unet, execution_device="cpu")
            np.testing.assert_array_equal(generate(pipeline), expected)
        np.testing.assert_array_equal(generate(pipeline), plain)
        assert hasattr(pipeline.unet, "_hf_hook")


class TestThePipelineKeepsWorking:
    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_negative_prompt_rescaling_and_scheduler(self, kind, lora):
        options = {"negative_prompt": ["a black star"] * 3, "guidance_rescale": 0.7}
        pipeline = build_tiny_pipeline()
        negative = weights_with_lora(pipeline, (lora, 1.0)) if kind == "lora" else moved_unet().state_dict()
        expected = reference_images(pipeline.unet.state_dict(), negative, **options)
        with negative_guidance(pipeline, lora if kind == "lora" else moved_unet()):
            np.testing.assert_allclose(generate(pipeline, **options), expected, rtol=0, atol=2e-5)
            for scheduler in (DDIMScheduler, EulerDiscreteScheduler):
                pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
                assert np.isfinite(generate(pipeline)).all()

    def test_callbacks_see_each_step(self, lora):
        pipeline, steps = build_tiny_pipeline(), []

        def callback(pipe, step, timestep, values):
            steps.append((step, tuple(values["latents"].shape)))
            return values

        with negative_guidance(pipeline, lora):
            generate(pipeline, callback_on_step_end=callback)
        assert steps == [(step, (3, 4, 8, 8)) for step in range(3)]

    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_a_denoiser_that_is_kept_off_the_device(self, kind, lora):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, lora if kind == "lora" else moved_unet()):
            expected = generate(pipeline)
        cpu_offload_with_hook(pipeline.unet, execution_device="cpu")
        with negative_guidance(pipeline, lora if kind == "lora" else moved_unet()):
            np.testing.assert_array_equal(generate(pipeline), expected)

    def test_added_conditioning_is_split_too(self):
        sample = torch.arange(8.0).reshape(4, 2)
        kwargs = {
            "added": {"text": sample, "ids": [sample, sample + 1]},
            "timestep": torch.tensor(3),
            "lengths": [1, 2, 3, 4],
            "image_rotary_emb": (torch.zeros(4, 2),) * 2,
            "return_dict": False,
        }
        negative, positive = (take_half(kwargs, half, 4, ("image_rotary_emb",)) for half in (0, 1))
        assert torch.equal(negative["added"]["ids"][1], sample[:2] + 1)
        assert torch.equal(positive["added"]["text"], sample[2:])
        assert positive["timestep"] == 3 and positive["lengths"] == [3, 4]
        assert len(positive["image_rotary_emb"][0]) == 4
        assert torch.equal(join_halves((sample[:2],), (sample[2:],))[0], sample)

    def test_a_lora_needs_no_second_denoiser_and_hardly_more_memory(self, lora):
        pipeline = build_tiny_pipeline()
        with PeakMemory(pipeline.unet) as plain:
            generate(pipeline)
        guidance = add_negative_guidance(pipeline, lora)
        with PeakMemory(pipeline.unet) as guided:
            generate(pipeline)
        assert guidance.second is None
        assert guided.peak <= 1.1 * plain.peak
        guidance.remove()
        guidance = add_negative_guidance(pipeline, moved_unet())
        with PeakMemory(pipeline.unet, guidance.second) as second:
            generate(pipeline)
        assert second.peak > 1.1 * plain.peak  # the measure sees a second model


class TestSources:
    def test_folder_file_pipeline_and_denoiser_are_the_same_negative(self, lora, tmp_path):
        unet = moved_unet()
        unet.save_pretrained(tmp_path / "denoiser")
        other = build_tiny_pipeline()
        other.unet.load_state_dict(unet.state_dict())
        other.save_pretrained(tmp_path / "pipeline")
        unet.save_pretrained(tmp_path / "checkpoint-3" / "unet")
        trained = build_tiny_pipeline()
        trained.load_lora_weights(lora)
        groups = [
            [unet, other, tmp_path / "denoiser", str(tmp_path / "pipeline"), tmp_path / "checkpoint-3"],
            [lora, str(lora / "pytorch_lora_weights.safetensors"), trained, trained.unet],
        ]
        for group in groups:
            images = []
            for negative in group:
                pipeline = build_tiny_pipeline()
                with negative_guidance(pipeline, negative):
                    images.append(generate(pipeline))
            for image in images[1:]:
                np.testing.assert_allclose(image, images[0], rtol=0, atol=1e-6)

    def test_another_base_is_named_in_a_warning(self, lora, tmp_path, caplog):
        from trl_diffusion_pref.fingerprint import rounded_fingerprints

        record = {
            "base_model": "someone/base",
            "base_fingerprint": "abc",
            "base_fingerprint_rounded": rounded_fingerprints(build_tiny_pipeline(seed=1).unet),
        }
        weights = (lora / "pytorch_lora_weights.safetensors").read_bytes()
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(weights)
        (tmp_path / "trl_diffusion_pref.json").write_text(json.dumps(record))
        caplog.set_level(logging.WARNING)
        for pipeline, warned in (
            (build_tiny_pipeline(), True),
            (build_tiny_pipeline(seed=1), False),
            (build_tiny_pipeline(seed=1).to(torch.float16), False),
            (build_tiny_pipeline(seed=1).to(torch.bfloat16), False),
        ):
            caplog.clear()
            pipeline.register_to_config(_name_or_path="mine/model")
            with negative_guidance(pipeline, tmp_path):
                pass
            text = "\n".join(record.getMessage() for record in caplog.records if "guidance" in record.name)
            assert ("someone/base" in text and "mine/model" in text) == warned


class TestMetadata:
    @pytest.fixture
    def changed(self, lora, tmp_path):
        """The LoRA with other fields in its metadata."""
        from safetensors import safe_open

        def write(**fields):
            with safe_open(lora / "pytorch_lora_weights.safetensors", "pt") as opened:
                metadata = {**opened.metadata()}
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            config = json.loads(metadata["lora_adapter_metadata"])
            config |= {f"unet.{key}": value for key, value in fields.items()}
            metadata["lora_adapter_metadata"] = json.dumps(config)
            save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata=metadata)
            return tmp_path

        return write

    def test_fields_of_a_newer_peft_are_named_in_a_warning(self, lora, changed):
        with negative_guidance(build_tiny_pipeline(), lora) as pipeline:
            expected = generate(pipeline)
        pipeline = build_tiny_pipeline()
        with pytest.warns(UserWarning, match="invented_next_year"):
            guidance = add_negative_guidance(pipeline, changed(invented_next_year=None))
        np.testing.assert_array_equal(generate(pipeline), expected)
        guidance.remove()

    def test_dropout_of_the_training_does_not_act_while_sampling(self, lora, changed):
        with negative_guidance(build_tiny_pipeline(), lora) as pipeline:
            expected = generate(pipeline)
        with negative_guidance(build_tiny_pipeline(), changed(lora_dropout=0.5)) as pipeline:
            np.testing.assert_array_equal(generate(pipeline), expected)


class TestErrors:
    def test_what_is_no_model(self):
        with pytest.raises(TypeError, match="The model is a int"):
            add_negative_guidance(build_tiny_pipeline(), 3)
        with pytest.raises(TypeError, match="pipeline is a UNet2DConditionModel"):
            add_negative_guidance(build_tiny_pipeline().unet, 3)

    def test_the_pipeline_s_own_denoiser(self):
        pipeline = build_tiny_pipeline()
        with pytest.raises(ValueError, match="the pipeline's own denoiser"):
            add_negative_guidance(pipeline, pipeline)

    def test_an_empty_folder_and_pickled_weights(self, tmp_path):
        with pytest.raises(ValueError, match="no model to load"):
            add_negative_guidance(build_tiny_pipeline(), tmp_path)
        (tmp_path / "unet.ckpt").write_bytes(b"x")
        with pytest.raises(ValueError, match="convert them to safetensors"):
            add_negative_guidance(build_tiny_pipeline(), tmp_path)

    def test_another_architecture_is_named(self, tmp_path):
        from diffusers import UNet2DConditionModel

        config = {**build_tiny_pipeline().unet.config, "block_out_channels": (32, 32)}
        other = UNet2DConditionModel.from_config(config)
        with pytest.raises(ValueError, match=r"another architecture.*\d+ parameters differ, first"):
            add_negative_guidance(build_tiny_pipeline(), other)
        other.save_pretrained(tmp_path)
        config_file = tmp_path / "config.json"
        config_file.write_text(config_file.read_text().replace("UNet2DConditionModel", "FluxTransformer2DModel"))
        with pytest.raises(ValueError, match=r"a FluxTransformer2DModel, and the pipeline's denoiser a UNet2DCond"):
            add_negative_guidance(build_tiny_pipeline(), tmp_path)

    @pytest.mark.parametrize("damage", ["rank", "targets", "size"])
    def test_a_lora_that_does_not_fit_leaves_the_pipeline_as_it_was(self, damage, lora, tmp_path):
        from safetensors import safe_open

        with safe_open(lora / "pytorch_lora_weights.safetensors", "pt") as opened:
            metadata = opened.metadata()
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        first = next(key for key in tensors if "lora_A" in key)
        if damage == "rank":
            tensors[first] = torch.zeros(3, tensors[first].shape[1])
        elif damage == "size":
            tensors[first] = torch.zeros(2, 5)
        else:
            tensors = {key.replace("attn1", "attn7"): tensor for key, tensor in tensors.items()}
        save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata=metadata)
        pipeline = build_tiny_pipeline()
        before = snapshot(pipeline)
        with pytest.raises(ValueError, match="does not fit the pipeline's UNet2DConditionModel"):
            add_negative_guidance(pipeline, tmp_path)
        assert snapshot(pipeline) == before

    def test_a_fused_lora(self, lora, positive_lora):
        pipeline = build_tiny_pipeline()
        pipeline.load_lora_weights(positive_lora)
        pipeline.fuse_lora()
        with pytest.raises(ValueError, match="fused"):
            add_negative_guidance(pipeline, lora)

    def test_a_denoiser_that_cannot_be_copied(self):
        pipeline = build_tiny_pipeline()
        pipeline.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
        with pytest.raises(ValueError, match="carries hooks of diffusers"):
            add_negative_guidance(pipeline, moved_unet())
        assert not hasattr(pipeline.unet, "_negative_guidance")

    def test_a_distilled_pipeline(self, lora):
        pipeline = build_tiny_pipeline()
        pipeline.unet.register_to_config(time_cond_proj_dim=8)
        with pytest.raises(ValueError, match="no classifier-free guidance"):
            add_negative_guidance(pipeline, lora)

    def test_a_second_negative_and_impossible_strengths(self, lora):
        pipeline = build_tiny_pipeline()
        add_negative_guidance(pipeline, lora)
        with pytest.raises(ValueError, match="has a negative model already"):
            add_negative_guidance(pipeline, lora)
        for options in ({"alpha": -1.0}, {"beta": float("nan")}):
            with pytest.raises(ValueError, match="must be a number from 0 on"):
                add_negative_guidance(build_tiny_pipeline(), lora, **options)


class TestWhatUsersDoMeanwhile:
    """Expected images are those of the same pipeline set up before the guidance, or of UNets merged by hand."""

    @pytest.mark.parametrize("kind", ["lora", "full"])
    @pytest.mark.parametrize("when", ["before", "inside"])
    def test_offloading_holds_image_after_image(self, kind, when, lora):
        negative = lora if kind == "lora" else moved_unet()
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, negative):
            expected = generate(pipeline)
        if when == "before":
            pipeline.enable_model_cpu_offload(device="cpu")
        with negative_guidance(pipeline, negative):
            if when == "inside":
                pipeline.enable_model_cpu_offload(device="cpu")
            for _ in range(3):
                np.testing.assert_array_equal(generate(pipeline), expected)
        np.testing.assert_array_equal(generate(pipeline), generate(build_tiny_pipeline()))

    def test_scaling_and_switching_adapters(self, lora, positive_lora):
        pipeline, other = build_tiny_pipeline(), build_tiny_pipeline()
        pipeline.load_lora_weights(positive_lora, adapter_name="mine")
        other.load_lora_weights(positive_lora, adapter_name="mine")
        other.set_adapters(["mine"], [0.2])
        with negative_guidance(other, lora):
            expected = generate(other)
        with negative_guidance(pipeline, lora):
            generate(pipeline)
            pipeline.set_adapters(["mine"], [0.2])
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=1e-5)
            pipeline.disable_lora()
            off = generate(pipeline)
        with negative_guidance(build_tiny_pipeline(), lora) as plain:
            np.testing.assert_allclose(off, generate(plain), rtol=0, atol=1e-5)

    def test_a_second_denoiser_follows_the_user_s_adapters(self, lora, positive_lora):
        pipeline, other = build_tiny_pipeline(), build_tiny_pipeline()
        for each in (pipeline, other):
            each.load_lora_weights(positive_lora, adapter_name="mine")
        other.set_adapters(["mine"], [0.2])
        with negative_guidance(other, moved_unet()):
            expected = generate(other)
        with negative_guidance(pipeline, moved_unet()):
            pipeline.set_adapters(["mine"], [0.2])
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=1e-5)
            pipeline.load_lora_weights(lora, adapter_name="later")
            pipeline.set_adapters(["mine", "later"])
            with pytest.raises(RuntimeError, match="'later' was loaded after the guidance"):
                generate(pipeline)

    def test_loading_an_adapter(self, lora, positive_lora):
        pipeline, other = build_tiny_pipeline(), build_tiny_pipeline()
        other.load_lora_weights(positive_lora, adapter_name="mine")
        alone = generate(other)
        with negative_guidance(other, lora):
            expected = generate(other)
        with negative_guidance(pipeline, lora):
            generate(pipeline)
            pipeline.load_lora_weights(positive_lora, adapter_name="mine")
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(generate(pipeline), alone, rtol=0, atol=1e-5)

    def test_unloading_all_adapters_is_an_error_and_not_plain_guidance(self, lora):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, lora):
            pipeline.unload_lora_weights()
            with pytest.raises(RuntimeError, match="was unloaded while its guidance was on"):
                generate(pipeline)
        np.testing.assert_array_equal(generate(pipeline), generate(build_tiny_pipeline()))

    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_an_adapter_of_theirs_called_negative_is_theirs(self, kind, lora, positive_lora):
        images = []
        for name in ("mine", "negative"):
            pipeline = build_tiny_pipeline()
            pipeline.load_lora_weights(positive_lora, adapter_name=name)
            before = generate(pipeline)
            with negative_guidance(pipeline, lora if kind == "lora" else moved_unet(), 0.5, 0.7):
                images.append(generate(pipeline))
            np.testing.assert_array_equal(generate(pipeline), before)
        np.testing.assert_allclose(*images, rtol=0, atol=1e-6)

    def test_another_precision(self):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, moved_unet()):
            pipeline.to(torch.bfloat16)
            assert np.isfinite(generate(pipeline)).all()

    def test_a_denoiser_trained_in_place_keeps_its_own_adapter_alone(self, lora):
        from peft import get_peft_model

        pipeline = build_tiny_pipeline()
        model = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        expected = generate(pipeline)
        with negative_guidance(pipeline, lora):
            assert np.abs(generate(pipeline) - expected).max() > 1e-3
        np.testing.assert_array_equal(generate(pipeline), expected)
        assert list(model.peft_config) == ["default"]


class TestFusing:
    @pytest.mark.parametrize("kind", ["lora", "full"])
    def test_fusing_while_guided_is_an_error_until_unfused(self, kind, lora, positive_lora):
        pipeline = build_tiny_pipeline()
        pipeline.load_lora_weights(positive_lora)
        with negative_guidance(pipeline, lora if kind == "lora" else moved_unet(), 0.5):
            expected = generate(pipeline)
            pipeline.fuse_lora()
            with pytest.raises(ValueError, match="LoRA is fused"):
                generate(pipeline)
            pipeline.unfuse_lora()
            np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=1e-5)
            pipeline.fuse_lora()
        pipeline.unfuse_lora()
        np.testing.assert_allclose(generate(pipeline), generate_with(positive_lora), rtol=0, atol=1e-5)


class TestStrength:
    def test_setting_alpha_and_beta_acts_on_the_next_image(self, lora, positive_lora):
        def start():
            pipeline = build_tiny_pipeline()
            pipeline.load_lora_weights(positive_lora)
            return pipeline

        with negative_guidance(start(), lora, 0.3, 0.6) as pipeline:
            expected = generate(pipeline)
        pipeline = start()
        guidance = add_negative_guidance(pipeline, lora)
        assert np.abs(generate(pipeline) - expected).max() > 1e-3
        guidance.alpha, guidance.beta = 0.3, 0.6
        np.testing.assert_array_equal(generate(pipeline), expected)
        with pytest.raises(ValueError, match=r"beta=-1.*a number from 0 on"):
            guidance.beta = -1.0

    def test_setting_a_merged_strength_says_what_to_do(self, lora):
        guidance = add_negative_guidance(build_tiny_pipeline(), moved_unet())
        with pytest.raises(AttributeError, match=r"beta is part of merged weights.*beta=0.5"):
            guidance.beta = 0.5
        guidance.alpha = 0.5  # scales LoRAs alone
        guidance = add_negative_guidance(build_tiny_pipeline(), lora, base=build_tiny_pipeline())
        with pytest.raises(AttributeError, match="alpha is part of merged weights"):
            guidance.alpha = 0.5
        guidance.beta = 0.5
        assert guidance.beta == 0.5 and guidance.alpha == 1.0


class TestThreads:
    @pytest.mark.parametrize("kind", ["batched", "separate"])
    def test_two_threads_generate_the_images_that_each_generates_alone(self, kind, lora):
        pipeline = build_tiny_pipeline()
        unet = pipeline.unet
        embeddings = [torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]

        @contextmanager
        def cache_context(name):
            yield

        if kind == "separate":
            unet.cache_context = cache_context

        def predict(seed):
            """What a pipeline does in its steps, with a prompt of its own."""
            states, results = embeddings[seed], []
            for step in range(20):
                sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1000 * seed + step))
                with torch.no_grad():
                    if kind == "batched":
                        results.append(unet(torch.cat([sample] * 2), 5, states, return_dict=False)[0])
                        continue
                    for row, name in enumerate(("uncond", "cond")):
                        with unet.cache_context(name):
                            results.append(unet(sample, 5, states[row : row + 1], return_dict=False)[0])
            return torch.cat(results)

        with negative_guidance(pipeline, lora, batches_both_sides=kind == "batched"):
            expected = [predict(seed) for seed in range(2)]
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(predict, range(2)))
        for one, other in zip(together, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_a_side_that_another_thread_names_is_not_taken(self, lora):
        """Both threads are within a side's context before the first calls the denoiser, and until the second has."""
        pipeline = build_tiny_pipeline()
        unet, together_there = pipeline.unet, Barrier(2, timeout=60)
        unet.cache_context = lambda name: nullcontext()
        sample, states = torch.ones(1, 4, 8, 8), torch.ones(1, 4, 32)

        def predict(name, wait=lambda: None):
            with unet.cache_context(name), torch.no_grad():
                wait()
                prediction = unet(sample, 5, states, return_dict=False)[0]
                wait()
                return prediction

        with negative_guidance(pipeline, lora, batches_both_sides=False):
            expected = [predict(name) for name in ("uncond", "cond")]
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(lambda name: predict(name, together_there.wait), ("uncond", "cond")))
        assert (expected[0] - expected[1]).abs().max() > 1e-3
        for one, other in zip(together, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    def test_a_guided_denoiser_cannot_be_copied(self, lora):
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, lora), pytest.raises(TypeError, match="Call remove"):
            copy.deepcopy(pipeline.unet)


class TestSharedDenoiser:
    @pytest.mark.parametrize("scale", [1.0, 4.0])
    def test_another_pipeline_is_guided_by_its_own_scale(self, scale, lora):
        """Whatever the guided pipeline generated last, and with latents that are the same for all samples."""

        def two_images(pipeline, scale, latents):
            options = {"num_inference_steps": 2, "output_type": "np", "latents": latents.repeat(2, 1, 1, 1)}
            generator = torch.Generator().manual_seed(0)
            return pipeline(PROMPTS[:2], guidance_scale=scale, generator=generator, **options).images

        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        pipeline = build_tiny_pipeline()
        with negative_guidance(pipeline, lora):
            expected = two_images(pipeline, scale, latents)
            other = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
            other.set_progress_bar_config(disable=True)
            for last in (1.0, 4.0):
                two_images(pipeline, last, latents)
                np.testing.assert_array_equal(two_images(other, scale, latents), expected)

    def test_another_pipeline_of_an_unknown_class_is_an_error(self, lora):
        class MyPipeline(StableDiffusionPipeline):
            pass

        pipeline = build_tiny_pipeline()
        other = MyPipeline(**pipeline.components, requires_safety_checker=False)
        with negative_guidance(pipeline, lora), pytest.raises(RuntimeError, match="A MyPipeline shares the denoiser"):
            generate(other)
        generate(other)


class TestWrapped:
    def test_a_wrapped_denoiser_raises_and_is_left_alone(self, lora):
        from peft import get_peft_model

        pipeline = build_tiny_pipeline()
        pipeline.unet = get_peft_model(pipeline.unet, LoraConfig(r=2, target_modules=["to_q"]))
        with pytest.raises(ValueError, match=r"wrapped in a PeftModel.*get_base_model"):
            add_negative_guidance(pipeline, lora)
        assert list(pipeline.unet.peft_config) == ["default"]

    def test_a_peft_model_as_negative_is_its_adapter_at_its_scale(self, lora):
        from peft import get_peft_model

        source = build_tiny_pipeline()
        config = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q"], init_lora_weights=False)
        model = get_peft_model(source.unet, config)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_scale("default", 0.3)
        merged = {name: tensor.clone() for name, tensor in build_tiny_pipeline().unet.state_dict().items()}
        for name, layer in source.unet.named_modules():
            if isinstance(layer, BaseTunerLayer):
                merged[f"{name}.weight"] += (
                    0.3 * 6 / 2 * layer.lora_B["default"].weight.data @ layer.lora_A["default"].weight.data
                )
        pipeline = build_tiny_pipeline()
        expected = reference_images(pipeline.unet.state_dict(), merged)
        for negative in (model, source):
            with negative_guidance(pipeline, negative):
                np.testing.assert_allclose(generate(pipeline), expected, rtol=0, atol=2e-5)
        model.disable_adapter_layers()
        with pytest.raises(ValueError, match="switched off"):
            add_negative_guidance(pipeline, model)


class TestPipelinesThatAreNotKnown:
    def test_they_raise_unless_batches_both_sides_is_passed(self, lora):
        class MyPipeline(StableDiffusionPipeline):
            pass

        pipeline = MyPipeline(**build_tiny_pipeline().components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match=r"MyPipeline calls its denoiser.*batches_both_sides"):
            add_negative_guidance(pipeline, lora)
        with negative_guidance(build_tiny_pipeline(), lora) as known:
            expected = generate(known)
        with negative_guidance(pipeline, lora, batches_both_sides=True):
            np.testing.assert_array_equal(generate(pipeline), expected)

    def test_a_family_from_outside_brings_its_layout(self, lora, monkeypatch):
        class OutsidePipeline(StableDiffusionPipeline):
            pass

        class OutsideFamily(StableDiffusionFamily):
            pipeline_class = "OutsidePipeline"
            guided_pipelines = ()

        with negative_guidance(build_tiny_pipeline(), lora) as known:
            expected = generate(known)
        monkeypatch.setattr(families, "_FAMILIES", dict(families._FAMILIES))
        families.register_family(OutsideFamily())
        pipeline = OutsidePipeline(**build_tiny_pipeline().components, requires_safety_checker=False)
        with negative_guidance(pipeline, lora):
            np.testing.assert_array_equal(generate(pipeline), expected)

    def test_image_to_image(self, lora):
        from diffusers import StableDiffusionImg2ImgPipeline

        def start(**options):
            pipeline = StableDiffusionImg2ImgPipeline(
                **build_tiny_pipeline().components, requires_safety_checker=False
            )
            pipeline.set_progress_bar_config(disable=True)
            image = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            return pipeline, {"image": image, "strength": 0.8, "num_inference_steps": 4, **options}

        def zero_negative(pipeline, scale, options):
            return pipeline(
                PROMPTS,
                guidance_scale=scale,
                generator=[torch.Generator().manual_seed(i) for i in range(3)],
                output_type="latent",
                **options,
            ).images

        plain, options = start()
        plain.unet.register_forward_hook(lambda module, args, output: (3.0 * output[0],))
        expected = zero_negative(plain, 1.0, options)
        pipeline, options = start()
        guidance = add_negative_guidance(pipeline, moved_unet())
        guidance.second.register_forward_hook(lambda module, args, output: (torch.zeros_like(output[0]),))
        torch.testing.assert_close(zero_negative(pipeline, 3.0, options), expected, rtol=1e-4, atol=1e-4)


class TestPlaces:
    @pytest.mark.parametrize("place", ["/absent/folder", "./absent", "no-such-owner/model"])
    def test_a_place_that_is_neither_here_nor_on_the_hub_is_named(self, place):
        with pytest.raises(ValueError, match=f"{place} is no file or folder here"):
            add_negative_guidance(build_tiny_pipeline(), place)

    def test_a_folder_of_two_runs(self, lora, tmp_path):
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(
            (lora / "pytorch_lora_weights.safetensors").read_bytes()
        )
        moved_unet().save_pretrained(tmp_path / "unet")
        with pytest.raises(ValueError, match="of two runs"):
            add_negative_guidance(build_tiny_pipeline(), tmp_path)
        with negative_guidance(build_tiny_pipeline(), tmp_path / "unet"):
            pass
