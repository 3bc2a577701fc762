"""Prompts beyond a tokenizer's limit are counted as the pipelines cut them, and named once."""

import logging

import pytest
import torch
from helpers import tiny
from helpers.encoding import encoder_of
from helpers.pipelines import image_pairs
from PIL import Image

from trl_diffusion_pref import MaPOConfig, MaPOTrainer
from trl_diffusion_pref.data import EncodingOptions
from trl_diffusion_pref.data.prompts import cut_prompts, encode_prompt_table, truncation_report
from trl_diffusion_pref.families import family_for


# These cut in silence.
SILENT = (
    "sana",
    "qwen_image",
    "wan",
    "wan_5b",
    "wan_image_to_video",
    "wan_2_2_image_to_video",
    "chroma",
    "z_image",
    "hunyuan_video",
    "hunyuan_video15",
    "ace_step",
)
SILENT += tuple(name for name in tiny.CASES if name.startswith("flux2") or name == "kolors")
# Nothing is cut where the text encoder sees images.
WITHOUT_LIMIT = ("qwen_image_edit", "qwen_image_edit_plus")


class Messages(logging.Handler):
    """What diffusers says of a pipeline's cut prompts."""

    def __init__(self, pipeline) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger(type(pipeline).__module__).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "was truncated because" in record.getMessage():
            self.texts.append(record.getMessage())


def words(count: int, last: str = "a") -> str:
    return " ".join(["a"] * (count - 1) + [last])


def last_uncut(name: str, pipeline, family) -> list[int]:
    """The longest prompt, in words, that each tokenizer still takes whole."""
    counts = []
    for tokenizer in family.token_limits(pipeline):
        # Flux.2-dev's is inside a processor.
        own_limit = getattr(getattr(pipeline, tokenizer), "model_max_length", 4)
        if own_limit < 4 or not cut_by(tokenizer, 1100, pipeline, family):
            continue
        low, high = 1, 1100
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if cut_by(tokenizer, middle, pipeline, family) else (middle, high)
        counts.append(low)
    return counts


def cut_by(tokenizer: str, count: int, pipeline, family) -> bool:
    return tokenizer in cut_prompts([words(count)], pipeline, family)


@pytest.mark.parametrize("name", [name for name in tiny.CASES if name not in (*SILENT, *WITHOUT_LIMIT)])
def test_prompts_are_counted_where_diffusers_says_that_it_cuts(name):
    pipeline = tiny.build(name)
    family, said = family_for(pipeline), Messages(tiny.build(name))
    boundaries = last_uncut(name, pipeline, family)
    assert boundaries
    for count in {max(boundary + step, 1) for boundary in boundaries for step in (0, 1, 2)}:
        said.texts.clear()
        family.encode_prompts(pipeline, [words(count)])
        assert len(cut_prompts([words(count)], pipeline, family)) == len(said.texts), count
        if count - 1 in boundaries:
            assert said.texts


@pytest.mark.parametrize("name", SILENT)
def test_prompts_are_counted_where_their_end_is_not_read(name):
    pipeline = tiny.build(name)
    family = family_for(pipeline)
    # HunyuanVideo's second tokenizer says that it cuts.
    boundary, *_ = last_uncut(name, pipeline, family)

    def last_word_is_read(count: int) -> bool:
        # one with another last word, which is no longer
        one, other = (family.encode_prompts(pipeline, [words(count, last)])["prompt_embeds"] for last in "ab")
        return not torch.equal(one, other)

    assert last_word_is_read(boundary)
    # What closes the text is cut before the words are; Qwen's templates close with up to 33 letters.
    closing = {"qwen_image": 20, "z_image": 20, "hunyuan_video15": 20, "ace_step": 60}
    closing |= {name: 30 for name in SILENT if name.startswith("flux2_klein")}
    assert not last_word_is_read(boundary + closing.get(name, 2))


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(0, 255, (16, 16, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture
def long_pairs():
    return image_pairs([(words(count), noise(2 * count), noise(2 * count + 1)) for count in (3, 30, 40)])


def test_the_data_set_s_long_prompts_are_named_in_one_line(long_pairs, tiny_pipeline, tmp_path, caplog):
    said = Messages(tiny_pipeline)
    cfg = MaPOConfig(output_dir=str(tmp_path / "output"), resolution=16, dataset_cache_dir=str(tmp_path / "cache"))
    MaPOTrainer(tiny_pipeline, cfg, long_pairs)
    ours = [record.getMessage() for record in caplog.records if "distinct prompts" in record.getMessage()]
    assert len(ours) == 1 and "Of 3 distinct prompts" in ours[0] and "2 at the 16 tokens of tokenizer" in ours[0]
    assert not said.texts
    assert not [record for record in caplog.records if "Token indices" in record.getMessage()]


def test_a_stream_s_long_prompts_are_named_once(long_pairs, tiny_pipeline, caplog):
    said, family = Messages(tiny_pipeline), family_for(tiny_pipeline)
    encoder = encoder_of(tiny_pipeline, family, EncodingOptions(resolution=16))
    stream = encoder.encode(long_pairs.to_iterable_dataset(), "train_dataset")
    assert len(list(stream.evaluation_batches(1, process=(0, 1)))) == 3
    ours = [record.getMessage() for record in caplog.records if "distinct prompts" in record.getMessage()]
    assert len(ours) == 1 and ours[0].startswith("train_dataset is streamed")
    assert not said.texts


def test_nothing_is_said_of_prompts_that_fit(tiny_pipeline, tmp_path):
    family = family_for(tiny_pipeline)
    assert truncation_report(["a red circle", "a"], tiny_pipeline, family) is None
    said = Messages(tiny_pipeline)
    encode_prompt_table([words(30)], tiny_pipeline, family, cache_folder=tmp_path, batch_size=1)
    assert not said.texts
    # and the pipeline says it again when it is asked itself
    family.encode_prompts(tiny_pipeline, [words(30)])
    assert said.texts
