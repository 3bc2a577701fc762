import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.attention_processor import JointAttnProcessor2_0
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModelWithProjection

from trl_diffusion_pref.shapes import load_pipeline, pipeline_folder, prompts, sample, sample_base, summarize
from trl_diffusion_pref.shapes.train import build_flow_pipeline


ASKED = (4 * prompts())[:64]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load_pipeline("flow")


def test_the_weights_are_float16_safetensors_of_at_most_eight_megabytes():
    files = [path for path in pipeline_folder("flow").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert len(weights) == 5
    dtypes = {tensor.dtype for path in weights for tensor in load_file(path).values() if tensor.is_floating_point()}
    assert dtypes == {torch.float16}


def test_it_is_made_of_the_real_classes_and_loads_without_any_option():
    pipeline = DiffusionPipeline.from_pretrained(pipeline_folder("flow"))
    assert type(pipeline) is StableDiffusion3Pipeline
    assert type(pipeline.transformer) is SD3Transformer2DModel
    assert type(pipeline.vae) is AutoencoderKL
    assert type(pipeline.text_encoder) is type(pipeline.text_encoder_2) is CLIPTextModelWithProjection
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a red circle", num_inference_steps=2).images
    assert image.size == (32, 32)


def test_it_draws_what_is_asked_and_outlines_in_a_minority():
    summary = summarize(sample_base("flow", ASKED), ASKED)
    assert 0.02 <= summary.preferred <= 0.5
    assert summary.colour >= 0.95 and summary.shape >= 0.95
    assert summary.clean >= 0.6


def test_samples_depend_on_the_seed_and_not_on_the_batch(pipeline):
    three, two = sample(pipeline, ASKED[:3], steps=4), sample(pipeline, ASKED[:3], steps=4, batch_size=2)
    for ours, theirs in zip(three, two, strict=True):
        assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
    assert sample(pipeline, ASKED[:1], steps=4, seed=1)[0].tobytes() != three[0].tobytes()


def test_vae_and_text_encoder_are_the_other_pipeline_s(pipeline):
    base = load_pipeline()
    pairs = [(pipeline.vae, base.vae)]
    pairs += [(encoder.text_model, base.text_encoder) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)]
    for ours, theirs in pairs:
        theirs = theirs.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())


def test_the_training_script_builds_the_shipped_architecture(pipeline):
    built = build_flow_pipeline(load_pipeline()).transformer
    ours, theirs = built.state_dict(), pipeline.transformer.state_dict()
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert dict(built.config)["qk_norm"] == pipeline.transformer.config.qk_norm


def predictions(transformer: nn.Module, pipeline: StableDiffusion3Pipeline, **changed) -> torch.Tensor:
    """In float64, since the trained transformer enlarges roundings."""
    embeddings, _, pooled, _ = pipeline.encode_prompt(ASKED[:2], None, None, do_classifier_free_guidance=False)
    x_t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    given = {
        "timestep": torch.tensor([300.0, 900.0]),
        "encoder_hidden_states": embeddings.double(),
        "pooled_projections": pooled.double(),
    }
    return transformer(hidden_states=x_t, **{**given, **changed}, return_dict=False)[0]


@pytest.fixture
def counting(pipeline) -> SD3Transformer2DModel:
    """A copy, as a frozen reference is one."""
    return copy.deepcopy(pipeline.transformer).double()


@pytest.fixture
def whole() -> SD3Transformer2DModel:
    """The transformer as diffusers loads it."""
    return SD3Transformer2DModel.from_pretrained(pipeline_folder("flow") / "transformer").double()


def test_counting_the_silent_tokens_changes_neither_outputs_nor_gradients(pipeline, counting, whole):
    """What makes training and sampling affordable is exact."""
    ours, theirs = (predictions(transformer, pipeline) for transformer in (counting, whole))
    assert (ours - theirs).abs().max() < 1e-4
    ours.square().mean().backward()
    theirs.square().mean().backward()
    for (name, parameter), expected in zip(counting.named_parameters(), whole.parameters(), strict=True):
        error, size = (parameter.grad - expected.grad).norm(), expected.grad.norm()
        assert error <= 1e-4 * size + 1e-9, name


def test_one_silent_token_that_is_not_counted_does_change_them(pipeline, whole):
    embeddings = pipeline.encode_prompt(ASKED[:2], None, None, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        uncounted = predictions(whole, pipeline, encoder_hidden_states=embeddings[:, :17].double())
        assert (uncounted - predictions(whole, pipeline)).abs().max() > 1e-3


def test_the_transformer_computes_with_one_silent_token(pipeline, counting):
    lengths = []
    counting.context_embedder.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    with torch.no_grad():
        predictions(counting, pipeline)
    assert lengths == [17]


@pytest.mark.parametrize("case", ["T5 embeddings that speak", "another attention processor"])
def test_nothing_is_counted_where_counting_would_be_wrong(case, pipeline, counting, whole):
    changed = {}
    if case == "T5 embeddings that speak":
        generator = torch.Generator().manual_seed(1)
        changed["encoder_hidden_states"] = torch.randn(2, 272, 128, generator=generator, dtype=torch.float64)
    else:
        counting.set_attn_processor(JointAttnProcessor2_0())
    with torch.no_grad():
        assert torch.equal(predictions(counting, pipeline, **changed), predictions(whole, pipeline, **changed))


def test_the_t5_encoder_says_nothing(pipeline):
    embeddings = pipeline.encode_prompt(ASKED[:2], None, None, do_classifier_free_guidance=False)[0]
    assert embeddings.shape == (2, 16 + 256, 128)
    assert embeddings[:, :16].abs().sum() > 0 and embeddings[:, 16:].abs().sum() == 0


def test_a_base_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="filled_only.*mixed and flow"):
        pipeline_folder("filled_only")
