"""The picture of randomly chosen rows."""

import os

import numpy as np
import pytest
from datasets import Dataset
from helpers.media import noise, wav
from helpers.pictures import encoded, picture
from PIL import Image, ImageFont

from trl_diffusion_pref import inspect_dataset
from trl_diffusion_pref.inspection.contact_sheet import SheetChoice, SheetEntry, SheetSample, _wrapped, draw_sheet


RED, BLUE = (220, 30, 30), (30, 30, 220)
# Of one pair: two pictures of 256 pixels, 6 between them, 12 around them; 24 around each pair.
CARD = 2 * 256 + 6 + 2 * 12


def one_colour(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> bytes:
    return encoded(Image.new("RGB", size, colour))


def dataset(count: int, prompt: str = "a prompt") -> Dataset:
    return Dataset.from_list(
        [{"prompt": prompt, "chosen": one_colour(RED), "rejected": one_colour(BLUE, (64, 32))} for _ in range(count)]
    )


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_chosen_is_left_of_rejected_and_shapes_are_kept(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    assert inspect_dataset(dataset(1), contact_sheet=path).contact_sheet == str(path)
    sheet = pixels(path)
    assert sheet.shape[1] == CARD + 2 * 24
    counts = []
    for half in (sheet[:, : sheet.shape[1] // 2], sheet[:, sheet.shape[1] // 2 :]):
        counts.append([int((half == colour).all(axis=2).sum()) for colour in (RED, BLUE)])
    # Whole pictures, without the line around them; the flat one is half as high.
    assert counts == [[254 * 254, 0], [0, 254 * 128]]
    # The lines above them: green on the left, red on the right.
    middle = sheet.shape[1] // 2
    for half, colour in ((sheet[:, :middle], (32, 128, 72)), (sheet[:, middle:], (190, 48, 48))):
        assert (half == colour).all(axis=2).sum() >= 250 * 4
    assert os.listdir(path.parent) == ["sheet.png"]


@pytest.mark.parametrize(
    ("rows", "shown", "columns", "lines"), [(1, 12, 1, 1), (5, 12, 2, 3), (30, 12, 2, 6), (9, 4, 2, 2)]
)
def test_the_size_follows_from_the_number_of_pairs(rows, shown, columns, lines, tmp_path):
    path = tmp_path / "sheet.png"
    inspect_dataset(dataset(rows), contact_sheet=path, contact_sheet_rows=shown)
    width, height = Image.open(path).size
    assert width == columns * (CARD + 24) + 24
    assert (height - 24) % lines == 0 and 300 < (height - 24) // lines < 400


def test_a_choice_is_random_by_seed_and_the_same_for_a_stream(tmp_path):
    rows = Dataset.from_list(
        [{"prompt": f"{row}", "chosen": encoded(picture(row, 16)), "rejected": one_colour(RED)} for row in range(40)]
    )
    sheets = {}
    for name, source, seed in (
        ("stored", rows, 0),
        ("stream", rows.to_iterable_dataset(num_shards=4), 0),
        ("other", rows, 1),
    ):
        inspect_dataset(source, contact_sheet=tmp_path / f"{name}.png", contact_sheet_rows=6, seed=seed)
        sheets[name] = (tmp_path / f"{name}.png").read_bytes()
    assert sheets["stored"] == sheets["stream"] != sheets["other"]


def test_every_row_is_chosen_equally_often():
    counts = np.zeros(20)
    for seed in range(2000):
        choice = SheetChoice(4, seed)
        choice.offer([(row, row) for row in range(20)])
        for row, _ in choice.numbers:
            counts[row] += 1
    # 400 times each; the deviation of a binomial variable is 18.
    assert counts.sum() == 8000 and np.abs(counts - 400).max() < 5 * 18


def test_only_the_cells_that_are_shown_are_kept():
    choice = SheetChoice(3, 0)
    for row in range(1000):
        choice.offer([(row, row)])
        choice.keep([(row, b"cell")])
    assert sorted(choice.cells) == sorted(row for row, _ in choice.numbers)


def edits(*sources: list[bytes]) -> Dataset:
    return Dataset.from_list([{**dataset(1)[0], "image": several} for several in sources])


@pytest.mark.parametrize("streaming", [False, True])
def test_condition_images_are_left_of_the_samples(streaming, tmp_path):
    green, yellow = (20, 200, 20), (220, 220, 30)
    rows = edits([one_colour(green)], [one_colour(green), one_colour(yellow)])
    path = tmp_path / "sheet.png"
    inspect_dataset(rows.to_iterable_dataset() if streaming else rows, contact_sheet=path)
    sheet = pixels(path)
    # Both cards are as wide as that with most images.
    card = 4 * 256 + 3 * 6 + 2 * 12
    assert sheet.shape[1] == 2 * (card + 24) + 24
    line = sheet[24 + 12 + 19 + 4 + 19 + 2 + 128]
    first, second = 24 + 12 + 128, 24 + card + 24 + 12 + 128
    found = [tuple(line[start + place * 262].tolist()) for start in (first, second) for place in range(4)]
    assert found == [green, RED, BLUE, (255, 255, 255), green, yellow, RED, BLUE]


def test_an_edit_that_was_not_made_is_remarked(tmp_path):
    inspect_dataset(edits([one_colour(RED)]), contact_sheet=tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png")[24 + 12 : 24 + 12 + 19] == (190, 48, 48)).all(axis=2).any()
    inspect_dataset(edits([one_colour(BLUE)]), contact_sheet=tmp_path / "b.png")
    assert not (pixels(tmp_path / "b.png")[24 + 12 : 24 + 12 + 19] == (190, 48, 48)).all(axis=2).any()


def test_a_bad_sample_is_shown_as_its_reason_and_remarks_are_red(tmp_path):
    rows = [{"prompt": "p", "chosen": one_colour(BLUE), "rejected": data} for data in (b"damaged", one_colour(BLUE))]
    sheets = []
    for number, row in enumerate(rows):
        inspect_dataset(Dataset.from_list([row]), contact_sheet=tmp_path / f"{number}.png")
        sheets.append(pixels(tmp_path / f"{number}.png"))
    blue = [int((sheet == BLUE).all(axis=2).sum()) for sheet in sheets]
    assert blue == [254 * 254, 2 * 254 * 254]
    # "rejected" and its line stand in red on both; beside the title of the second pair stands "identical".
    red = (190, 48, 48)
    assert [(sheet[24:56] == red).all(axis=2).any() for sheet in sheets] == [False, True]


def test_audio_is_drawn_as_a_waveform(tmp_path):
    rows = [{"prompt": "p", "chosen": wav(noise(0, 1000) // 2), "rejected": wav(noise(1, 1000) // 8)}]
    inspect_dataset(Dataset.from_list(rows), contact_sheet=tmp_path / "sheet.png")
    wave = (pixels(tmp_path / "sheet.png") == (60, 100, 170)).all(axis=2)
    middle = wave.shape[1] // 2
    assert wave[:, :middle].sum() > 2.5 * wave[:, middle:].sum() > 0


def test_long_prompts_are_wrapped_within_the_width_and_cut():
    font = ImageFont.load_default(14)
    text = "several words that are not long " * 40
    lines = _wrapped(text, font, 300)
    assert len(lines) == 4 and lines[-1].endswith("...")
    assert max(font.getlength(line) for line in lines) <= 300
    assert " ".join(lines)[:100] == text[:100]
    assert _wrapped("short", font, 300) == ["short"]


def test_text_without_spaces_is_divided_between_letters():
    font = ImageFont.load_default(14)
    lines = _wrapped("x" * 100, font, 300)
    assert "".join(lines) == "x" * 100 and max(font.getlength(line) for line in lines) <= 300


def test_prompts_whose_letters_no_font_has_are_counted(tmp_path):
    # Letters of an ancient script, which hardly any machine can draw.
    rows = Dataset.from_list([dataset(1)[0], {**dataset(1)[0], "prompt": "\U00012000\U00012001"}])
    found = inspect_dataset(rows, contact_sheet=tmp_path / "a.png")
    assert "not all letters of 1 prompt on the contact sheet" in found.notes[-1]
    assert inspect_dataset(dataset(2, "Latin: äöü é ñ"), contact_sheet=tmp_path / "a.png").notes == []


def test_a_font_with_the_letters_is_chosen():
    from trl_diffusion_pref.inspection import contact_sheet

    latin = ImageFont.load_default(14)
    wide = next((font for font in contact_sheet._installed() if contact_sheet._has(font, "Ж")), None)
    if wide is None:
        pytest.skip("no font with Cyrillic letters")
    assert contact_sheet._font_for("кот Ж", (latin, wide)) == (wide, 0)
    assert contact_sheet._font_for("cat", (latin, wide)) == (latin, 0)


def test_a_font_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "a.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="a.ttf' cannot be read as a TrueType or OpenType font"):
        inspect_dataset(dataset(1), contact_sheet=tmp_path / "sheet.png", font=tmp_path / "a.ttf")
    assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    entries = [SheetEntry("row 0", (), "p", (SheetSample("", one_colour(RED)),))]
    draw_sheet(path, entries, None)
    before = path.read_bytes()

    def fails(self, file, **options):
        file.write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        draw_sheet(path, entries, None)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["sheet.png"]
