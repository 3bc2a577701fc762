import pytest
from datasets import Image

from trl_diffusion_pref.shapes import judge, preference_pairs


def test_pairs_show_the_prompt_in_both_styles():
    dataset = preference_pairs(40, seed=1)
    assert dataset.column_names == ["prompt", "chosen", "rejected"]
    for column, style in (("chosen", "outlined"), ("rejected", "filled")):
        verdicts = judge(list(dataset[column]))
        assert {verdict.style for verdict in verdicts} == {style}
        assert [verdict.prompt for verdict in verdicts] == list(dataset["prompt"])


def test_images_are_stored_as_png():
    raw = preference_pairs(1).cast_column("chosen", Image(decode=False))
    assert raw[0]["chosen"]["bytes"].startswith(b"\x89PNG")


def test_the_seed_decides_everything():
    first, again, other = (preference_pairs(5, seed=seed) for seed in (3, 3, 4))
    assert first._fingerprint == again._fingerprint != other._fingerprint
    assert [image.tobytes() for image in first["chosen"]] == [image.tobytes() for image in again["chosen"]]


def test_the_preferred_style_and_layout_can_be_set():
    dataset = preference_pairs(20, preferred_style="filled", shared_layout=True)
    assert {verdict.style for verdict in judge(list(dataset["chosen"]))} == {"filled"}
    boxes = [
        [
            image.convert("L").point(lambda value: 255 * (value < 250)).getbbox()
            for image in (row["chosen"], row["rejected"])
        ]
        for row in dataset
    ]
    assert all(chosen == rejected for chosen, rejected in boxes)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="filled, outlined"):
        preference_pairs(1, preferred_style="dotted")
    with pytest.raises(ValueError, match="n=0"):
        preference_pairs(0)
