"""The tokenizers of a saved pipeline, for versions of transformers before 5 as well."""

import json

import pytest
from helpers import tiny

from trl_diffusion_pref.export.weights import save_all_but_denoiser
from trl_diffusion_pref.families import family_for


@pytest.mark.parametrize("name", ["stable_diffusion", "qwen_image"])
def test_byte_pair_vocabularies_are_saved_as_transformers_4_reads_them(name, tmp_path):
    pipeline = tiny.build(name)
    save_all_but_denoiser(pipeline, family_for(pipeline), tmp_path)
    folder = tmp_path / "tokenizer"
    saved = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "vocab.json").read_text()) == saved["vocab"]
    merges = (folder / "merges.txt").read_text().splitlines()
    assert [line.split() for line in merges if not line.startswith("#version")] == [
        list(pair) for pair in saved["merges"]
    ]
