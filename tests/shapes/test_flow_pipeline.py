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
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

from trl_diffusion_pref.shapes import load_pipeline, pipeline_folder, prompts, sample, summarize
from trl_diffusion_pref.shapes.train import CountedKey, build_flow_pipeline


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


def test_it_draws_what_is_asked_and_outlines_in_a_minority(pipeline):
    summary = summarize(sample(pipeline, ASKED), ASKED)
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


def test_one_counted_zero_vector_stands_for_all_of_the_silent_encoder_s(pipeline):
    """What makes training affordable is exact; in float64, since the trained transformer enlarges roundings."""
    x_t, timestep = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([300.0, 900.0])
    transformer = copy.deepcopy(pipeline.transformer).double()

    def predict(embeddings: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return transformer(x_t.double(), embeddings, pooled, timestep, return_dict=False)[0]

    with torch.no_grad():
        embeddings, _, pooled, _ = pipeline.encode_prompt(ASKED[:2], None, None, do_classifier_free_guidance=False)
        embeddings, pooled = embeddings.double(), pooled.double()
        whole, uncounted = predict(embeddings, pooled), predict(embeddings[:, :17], pooled)
        with CountedKey(256):
            counted = predict(embeddings[:, :17], pooled)
    assert (counted - whole).abs().max() < 1e-4
    assert (uncounted - whole).abs().max() > 1e-3


def test_the_t5_encoder_says_nothing(pipeline):
    embeddings = pipeline.encode_prompt(ASKED[:2], None, None, do_classifier_free_guidance=False)[0]
    assert embeddings.shape == (2, 16 + 256, 128)
    assert embeddings[:, :16].abs().sum() > 0 and embeddings[:, 16:].abs().sum() == 0


def test_a_base_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="filled_only.*mixed and flow"):
        pipeline_folder("filled_only")
