"""The cache of prompt embeddings: found again where nothing changed, and made anew where anything did."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from tokenizers.normalizers import Lowercase, Replace, Sequence

from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.data.prompts import encode_prompt_table, text_fingerprint
from trl_diffusion_pref.families import family_for, pixart_sigma
from trl_diffusion_pref.families.flux import FluxFamily


PROMPTS = ["a red circle", "a blue ring"]


def encode(pipeline, folder: Path):
    family, full = family_for(pipeline), EncodingOptions(cache_dtype="float32")
    return encode_prompt_table(PROMPTS, pipeline, family, cache_folder=folder, batch_size=2, options=full)


def other_normalizer(pipeline) -> None:
    """The same vocabulary, for texts that are changed first."""
    tokenizer = pipeline.tokenizer.backend_tokenizer
    tokenizer.normalizer = Sequence([Replace("red", "green"), Lowercase()])


def other_weights(pipeline) -> None:
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight.mul_(2)


def zeros_for_the_empty_prompt(pipeline) -> None:
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)


def no_guidance_embedding(pipeline) -> None:
    pipeline.transformer.register_to_config(guidance_embeds=False)


def shorter(pipeline) -> None:
    pipeline.tokenizer.model_max_length = 8
    pipeline.tokenizer_2.model_max_length = 8


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("stable_diffusion", other_normalizer),
        ("stable_diffusion", other_weights),
        ("stable_diffusion_xl", zeros_for_the_empty_prompt),
        ("stable_diffusion_xl", shorter),
        ("flux_dev", no_guidance_embedding),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_whatever_changes_the_embeddings_makes_another_table(name, change, tmp_path):
    pipeline = tiny.build(name)
    first = encode(pipeline, tmp_path)
    change(pipeline)
    changed = encode(pipeline, tmp_path)
    assert len(list(tmp_path.glob("prompts-*"))) == 2
    (tmp_path / "elsewhere").mkdir()
    fresh = encode(pipeline, tmp_path / "elsewhere")
    prompts = ["", *PROMPTS]
    for key, expected in fresh(prompts).items():
        torch.testing.assert_close(changed(prompts)[key], expected)
    differ = first([""]).keys() != changed([""]).keys() or any(
        values.shape != changed(prompts)[key].shape or not torch.equal(values, changed(prompts)[key])
        for key, values in first(prompts).items()
    )
    assert differ


@pytest.mark.parametrize("name", ["wan", "pixart_sigma"])
def test_packages_that_clean_prompts_make_another_table(name, tmp_path, monkeypatch):
    """Both pipelines mend and strip prompts as far as ftfy and bs4 are installed, which they are not here."""
    pipeline = tiny.build(name)
    encode(pipeline, tmp_path)
    mended = SimpleNamespace(fix_text=lambda text: text.replace("\u00e2\u20ac\u201c", "\u2013"))
    if name == "wan":
        # Where `prompt_clean` is at home; the family has to ask it.
        module = sys.modules[type(pipeline).__module__]
        monkeypatch.setattr(module, "is_ftfy_available", lambda: True)
        monkeypatch.setattr(module, "ftfy", mended, raising=False)
    else:
        monkeypatch.setattr(pixart_sigma, "is_bs4_available", lambda: True)
        monkeypatch.setattr(pixart_sigma, "is_ftfy_available", lambda: True)

        def clean(texts, clean_caption=False):
            return [mended.fix_text(text) for text in ([texts] if isinstance(texts, str) else texts)]

        monkeypatch.setattr(pipeline, "_text_preprocessing", clean)
    encode(pipeline, tmp_path)
    assert len(list(tmp_path.glob("prompts-*"))) == 2


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_another_version_makes_another_table_and_whatever_was_made_from_the_old_one_is_known_as_old(
    library, tmp_path, monkeypatch
):
    pipeline = tiny.build("stable_diffusion")
    family = family_for(pipeline)
    encode(pipeline, tmp_path)
    before = text_fingerprint(pipeline, family)
    monkeypatch.setattr(f"{library}.__version__", "0.99")
    encode(pipeline, tmp_path)
    assert len(list(tmp_path.glob("prompts-*"))) == 2
    # References and likelihoods are kept with this, see the trainers' records.
    assert text_fingerprint(pipeline, family) != before


def test_another_guidance_in_training_makes_another_table(tmp_path):
    pipeline = tiny.build("flux_dev")
    for guidance in (1.0, 3.5):
        family = FluxFamily(training_guidance=guidance)
        table = encode_prompt_table(PROMPTS, pipeline, family, cache_folder=tmp_path, batch_size=2)
        assert table(PROMPTS)["guidance"].tolist() == [guidance] * 2


@pytest.mark.parametrize("name", tiny.marked(tiny.CASES))
def test_the_same_pipeline_loaded_anew_finds_its_table(name, tmp_path):
    """Encoding leaves its marks on tokenizers (sides, truncation), which are no change."""
    first = encode(tiny.build(name), tmp_path)
    pipeline = tiny.build(name)
    for _ in range(2):
        again = encode(pipeline, tmp_path)
    assert len(list(tmp_path.glob("prompts-*"))) == 1
    assert {key: tuple(value.shape) for key, value in again([""]).items()} == {
        key: tuple(value.shape) for key, value in first([""]).items()
    }


@pytest.mark.parametrize("name", tiny.marked(tiny.CASES))
def test_the_row_of_the_empty_prompt_is_the_sampler_s_unconditional_one(name, tmp_path):
    pipeline = tiny.build(name)
    table = encode(pipeline, tmp_path)
    family = family_for(pipeline)
    expected = family.encode_unconditional(pipeline)
    for key, values in table([PROMPTS[1], ""]).items():
        wanted = expected[key]
        if key in family.prompt_masks:
            # What the denoiser does not look at is not stored.
            wanted = wanted * expected[family.prompt_masks[key]][..., None]
        torch.testing.assert_close(values[1:], wanted)
