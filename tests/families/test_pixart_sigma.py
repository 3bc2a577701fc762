import pytest
from helpers import tiny

from trl_diffusion_pref.families import family_for, pixart_sigma


@pytest.mark.parametrize("installed", [True, False])
def test_captions_are_cleaned_where_the_pipeline_can(installed, monkeypatch, caplog):
    pipeline = tiny.build("pixart_sigma")
    for name in ("is_bs4_available", "is_ftfy_available"):
        monkeypatch.setattr(pixart_sigma, name, lambda: installed)
    asked = []
    preprocess = pipeline._text_preprocessing

    def record(text, clean_caption=False):
        asked.append(clean_caption)
        return preprocess(text)

    monkeypatch.setattr(pipeline, "_text_preprocessing", record)
    family_for(pipeline).encode_prompts(pipeline, ["A red circle"])
    assert asked == [installed]
    assert not caplog.records
