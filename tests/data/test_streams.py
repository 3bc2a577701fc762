"""Streams: which process and worker reads which row, in which order, from where a resumed run goes on, bad rows."""

import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import active_children

import pytest
import torch
from datasets import Dataset, IterableDataset, interleave_datasets, load_dataset
from datasets.distributed import split_dataset_by_node
from helpers.encoding import encoder_of
from helpers.layout_files import pick_a_pic, pick_a_pic_tars
from helpers.pipelines import build_tiny_pipeline, image_pairs, png
from PIL import Image

from trl_diffusion_pref.data import EncodedStream, EncodingOptions, Layout, StreamLoader, load_pairs
from trl_diffusion_pref.data.bad_rows import BadRowPolicy
from trl_diffusion_pref.families import family_for
from trl_diffusion_pref.shapes import preference_pairs


NUMBERS = Layout(scalars=("n",))
SIZES = (5, 9, 1, 7)  # of files


@pytest.fixture(scope="module")
def encoder():
    """Encodes rows of a prompt and a number, by which tests know them."""
    pipeline = build_tiny_pipeline()
    return encoder_of(pipeline, family_for(pipeline), EncodingOptions(), layout=NUMBERS)


def rows(first: int, count: int) -> list[dict]:
    return [{"prompt": f"row {n}", "n": n} for n in range(first, first + count)]


def stored(count: int) -> Dataset:
    return Dataset.from_list(rows(0, count))


def generated(starts: list[int]):
    for start in starts:
        yield from rows(start, SIZES[start // 100])


def write(folder, kind: str) -> list[str]:
    """Files of unequal sizes; the rows of the i-th are numbered from 100 i."""
    files = []
    for index, size in enumerate(SIZES):
        part, file = Dataset.from_list(rows(100 * index, size)), folder / f"{index}.{kind}"
        # Row groups of two rows, so that a place may be within one and between two.
        part.to_parquet(file, batch_size=2) if kind == "parquet" else part.to_json(file)
        files.append(str(file))
    return files


def doubled(batch):
    return {name: [value for value in values for _ in range(2)] for name, values in batch.items()}


def source_of(kind: str, folder) -> IterableDataset:
    if kind in ("parquet", "json"):
        return load_dataset(kind, data_files=write(folder, kind), split="train", streaming=True)
    if kind == "generator":
        return IterableDataset.from_generator(generated, gen_kwargs={"starts": [0, 100, 200, 300]})
    if kind == "interleaved":
        parts = [Dataset.from_list(rows(first, 6)).to_iterable_dataset(num_shards=2) for first in (0, 100)]
        return interleave_datasets(
            parts, probabilities=[0.3, 0.7], seed=1, stopping_strategy="all_exhausted_without_replacement"
        )
    if kind == "mapped":
        return stored(11).to_iterable_dataset(num_shards=4).map(doubled, batched=True, batch_size=3)
    if kind == "shuffled":
        return stored(24).to_iterable_dataset(num_shards=4).shuffle(seed=3, buffer_size=5)
    count, shards = map(int, kind.split(" in "))
    return stored(count).to_iterable_dataset(num_shards=shards)


KINDS = [
    "24 in 4",
    "23 in 1",
    "21 in 3",
    "22 in 2",
    "parquet",
    "json",
    "generator",
    "interleaved",
    "mapped",
    "shuffled",
]


def loader(encoder, source, process=(0, 1), **options) -> StreamLoader:
    options = {"workers": 0, "block": 0, "seed": 0, "batch_size": 3, **options}
    stream = encoder.encode(source, "train_dataset")
    return StreamLoader(stream, options.pop("batch_size"), process=process, **options)


def take(loader: StreamLoader, count: int) -> list[list[int]]:
    """The numbers in the next batches."""
    batches = [[int(n) for n in batch["scalars"]["n"]] for batch in islice(loader, count)]
    loader.close()
    return batches


def through_json(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(json.loads(json.dumps(tensor.tolist())), dtype=torch.uint8)
        for name, tensor in state.items()
    }


# ---- Every row once --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("workers", "block"),
    [(2, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 0), (2, 0), (2, 1000)))],
)
def test_two_processes_read_every_row_once_per_epoch(kind, workers, block, encoder, tmp_path):
    source = source_of(kind, tmp_path)
    everything = sorted(row["n"] for row in source)
    read = {0: [], 1: []}
    for index in range(2):
        part = loader(encoder, source, (index, 2), workers=workers, block=block, batch_size=1)
        for batch in part:
            if part.progress.epoch == 2:
                break
            read[part.progress.epoch] += [int(batch["scalars"]["n"])]
        part.close()
    assert sorted(read[0]) == sorted(read[1]) == everything


@pytest.mark.parametrize(
    ("files", "process", "expected"), [(1, (1, 2), [1, 3, 5, 7, 9]), (2, (1, 2), [5, 6, 7, 8, 9])]
)
def test_processes_share_files_or_else_rows(files, process, expected, encoder):
    """Of one file every second row, of two files one: so `datasets` divides a stream among nodes."""
    part = loader(encoder, stored(10).to_iterable_dataset(num_shards=files), process, batch_size=5)
    assert take(part, 1) == [expected]


def test_batches_are_full_and_an_epoch_ends_for_all_workers_together(encoder, tmp_path):
    """Seven rows of each file to three: the workers' parts of an epoch are unequal, and so are those of the next."""
    source = source_of("parquet", tmp_path)
    everything = sorted(row["n"] for row in source)
    batches = take(loader(encoder, source, workers=2, block=4, batch_size=4), 11)
    assert {len(batch) for batch in batches} == {4}
    read = [n for batch in batches for n in batch]
    assert sorted(read[:22]) == sorted(read[22:44]) == everything
    assert read[:22] != read[22:44]


def test_a_buffer_shuffles_within_itself_and_by_the_seed(encoder):
    def order(**options) -> list[int]:
        return sum(take(loader(encoder, stored(12).to_iterable_dataset(), **options), 4), [])

    kept, shuffled = order(), order(block=6)
    assert kept == order(block=1) == list(range(12))
    assert shuffled != kept and sorted(shuffled[:6]) == list(range(6))
    assert shuffled == order(block=6) != order(block=6, seed=1)
    assert order(block=6, batch_size=6)[:12] == shuffled


def test_each_epoch_has_an_order_of_its_own(encoder):
    first, second = take(loader(encoder, stored(12).to_iterable_dataset(), block=12, batch_size=12), 2)
    assert sorted(first) == sorted(second) and first != second


def test_threads_may_encode_prompts_at_once(encoder, monkeypatch):
    """A tokenizer keeps padding and truncation between calls; a thread must not get another's."""

    def tokens(tokenizer, prompts):
        asked = {"padding": "max_length", "max_length": 77, "truncation": True}
        return {"ids": tokenizer(prompts, return_tensors="pt", **asked).input_ids.float()}

    stream = encoder.encode(stored(4).to_iterable_dataset(), "train_dataset")
    asked = [["a red circle"], ["a " * 200, "a blue square"]]
    monkeypatch.setattr(stream.family, "encode_prompts", lambda pipeline, prompts: tokens(pipeline.tokenizer, prompts))
    alone = [stream._conditioning(prompts) for prompts in asked]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(stream._conditioning, 400 * asked))
    finally:
        sys.setswitchinterval(before)
    for number, found in enumerate(together):
        for row, expected in zip(found, alone[number % 2], strict=True):
            assert all(torch.equal(row[name], tensor) for name, tensor in expected.items())


# ---- Going on --------------------------------------------------------------------------------------------------


FIRST = ("21 in 3", "generator", "interleaved", "shuffled")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize(("workers", "block"), [(2, 4), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_a_resumed_stream_goes_on_with_the_next_row(kind, workers, block, encoder, tmp_path):
    """Also in the second epoch, in the middle of a shuffled block and where one worker has read all of its part."""
    source, options = source_of(kind, tmp_path), {"workers": workers, "block": block}
    part, read, states = loader(encoder, source, (0, 2), **options), [], []
    for batch in islice(part, 9):
        read.append([int(n) for n in batch["scalars"]["n"]])
        states.append(through_json(part.state_dict()))
    part.close()
    assert part.progress.epoch >= 1
    for taken in (1, 3, 4, 6, 7):
        resumed = loader(encoder, source, (0, 2), **options)
        resumed.load_state_dict(states[taken - 1])
        assert take(resumed, 2) == read[taken : taken + 2]


def test_a_stream_of_a_user_s_buffer_is_read_again_up_to_its_place(encoder, caplog):
    """`datasets` would lose the rows in the buffer."""
    source = stored(24).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=8)
    whole, part, resumed = (loader(encoder, source, batch_size=4) for _ in range(3))
    read = take(whole, 6)
    assert sorted(sum(read, [])) == list(range(24)) and read[0] != [0, 1, 2, 3]
    assert take(part, 2) == read[:2] and not caplog.records
    resumed.load_state_dict(through_json(part.state_dict()))
    assert take(resumed, 4) == read[2:]
    assert "has a shuffle buffer of its own" in caplog.text


def test_another_batch_size_goes_on_with_the_next_row(encoder):
    first = loader(encoder, stored(16).to_iterable_dataset(num_shards=2), workers=2, batch_size=3)
    read = take(first, 2)
    second = loader(encoder, stored(16).to_iterable_dataset(num_shards=2), workers=2, batch_size=5)
    second.load_state_dict(first.state_dict())
    assert sorted(sum(read + take(second, 2), [])) == list(range(16))


def test_readings_of_one_stream_do_not_move_each_other(encoder):
    """`datasets` keeps places and epoch in the parts of a stream."""
    stream = encoder.encode(IterableDataset.from_generator(partial(rows, 0, 20)), "train_dataset")
    first, second, resumed = (
        StreamLoader(stream, 2, process=process, workers=0, block=0, seed=0) for process in ((0, 2), (1, 2), (0, 2))
    )
    batches = iter(first), iter(second)
    for _ in range(3):
        next(batches[0])
        assert len(list(stream.evaluation_batches(5, process=(0, 1)))) == 4
        next(batches[1])
    first.close()
    assert [take(second, 1), take(second, 2)[1]] == [[[13, 15]], [1, 3]]
    resumed.load_state_dict(first.state_dict())
    assert take(resumed, 2) == [[12, 14], [16, 18]]
    assert stream.source.epoch == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("workers", 0, "the number of readers in each process (dataloader_num_workers) was 2 and is 1"),
        ("process", (0, 4), "the number of processes was 2 and is 4"),
        ("block", 9, "shuffle_buffer was 4 and is 9"),
        ("seed", 1, "data_seed was 0 and is 1"),
    ],
)
def test_what_a_place_depends_on_is_compared_by_name(option, value, message, encoder):
    options = {"process": (0, 2), "workers": 2, "block": 4}
    source = stored(32).to_iterable_dataset(num_shards=8)
    first = loader(encoder, source, **options).depends_on()
    second = loader(encoder, source, **{**options, option: value}).depends_on()
    [name] = [name for name in first if first[name] != second[name]]
    assert f"{name} was {first[name]} and is {second[name]}" == message


# ---- The reading's end and its speed ---------------------------------------------------------------------------


def test_the_next_batch_is_encoded_while_the_caller_uses_the_present_one(encoder, monkeypatch):
    """The first batch is only used up when the encoding of the second has begun; else this would wait for ever."""
    part, begun = loader(encoder, stored(12).to_iterable_dataset()), []
    second, encode = threading.Event(), EncodedStream.encode

    def noted(self, *args):
        begun.append(threading.current_thread())
        if len(begun) == 2:
            second.set()
        return encode(self, *args)

    monkeypatch.setattr(EncodedStream, "encode", noted)
    batches = iter(part)
    next(batches)
    assert second.wait(timeout=30)
    assert threading.main_thread() not in begun
    part.close()


def workers_gone() -> bool:
    """Ended processes need a moment."""
    deadline = time.monotonic() + 10
    while active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not active_children()


@pytest.mark.parametrize("how", ["loader", "generator", "dropped", "again"])
def test_workers_end_with_the_reading(how, encoder):
    part = loader(encoder, stored(24).to_iterable_dataset(num_shards=4), workers=2)
    batches = iter(part)
    next(batches)
    assert len(active_children()) == 2
    if how == "loader":
        part.close()
    elif how == "generator":
        batches.close()
    elif how == "dropped":
        del batches
    else:
        again = iter(part)
        next(again)
        assert next(batches, None) is None and len(active_children()) == 2
        part.close()
    assert workers_gone()


def fails_at(row, n):
    if row["n"] == n:
        raise OSError(f"no such file: {n}")
    return row


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_reading_arrives_and_ends_it(workers, encoder):
    source = stored(24).to_iterable_dataset(num_shards=4).map(fails_at, fn_kwargs={"n": 13})
    part = loader(encoder, source, workers=workers)
    with pytest.raises(OSError, match="no such file: 13") as error:
        take(part, 8)
    # While the traceback is held.
    assert error.traceback and workers_gone()


def test_workers_without_a_file_are_not_started_and_the_warning_says_why(encoder, caplog):
    part = loader(encoder, stored(8).to_iterable_dataset(num_shards=2), (0, 2), workers=2)
    assert part.workers == 1
    assert "1 of 2 loader workers in each process read, since the stream has 2 shards for 2 processes" in caplog.text


def test_a_stream_that_processes_cannot_share_raises(encoder):
    split = split_dataset_by_node(stored(8).to_iterable_dataset(), 0, 2)
    with pytest.raises(ValueError, match="train_dataset was split by split_dataset_by_node"):
        encoder.encode(split, "train_dataset")
    for source in (
        stored(8).to_iterable_dataset().shuffle(),
        interleave_datasets([stored(8).to_iterable_dataset()] * 2, [0.5, 0.5]),
    ):
        with pytest.raises(ValueError, match="without a seed.*leave it to shuffle_buffer"):
            encoder.encode(source, "train_dataset")


def test_a_process_without_rows_is_named(encoder):
    with pytest.raises(ValueError, match="train_dataset, which is streamed, has no rows .* for process 1 of 2"):
        take(loader(encoder, stored(1).to_iterable_dataset(), (1, 2)), 1)


# ---- Rows that cannot be used ----------------------------------------------------------------------------------


def with_bad(count: int, bad: dict[int, object]) -> Dataset:
    """Rows of which some have another prompt."""
    return Dataset.from_list([row | {"prompt": bad.get(row["n"], row["prompt"])} for row in rows(0, count)])


def skipping(encoder, share=0.5):
    return encoder_of(
        encoder.pipeline,
        encoder.family,
        EncodingOptions(bad_rows=BadRowPolicy("skip", max_bad_share=share)),
        layout=NUMBERS,
    )


def test_a_bad_row_is_named_by_what_is_known_of_it(encoder):
    source = stored(12).map(lambda row: {"n": float("nan") if row["n"] == 7 else row["n"]})
    with pytest.raises(ValueError) as error:
        take(loader(encoder, source.to_iterable_dataset(), batch_size=4), 3)
    assert str(error.value).startswith(
        "train_dataset, which is streamed, has rows that cannot be used:\n"
        "  row 7, column 'n' (prompt 'row 7'): is nan, not a finite number\n1 of 8 rows: 1 unusable label."
    )
    with pytest.raises(ValueError) as error:
        take(loader(encoder, source.to_iterable_dataset(num_shards=2), (0, 1), batch_size=4, workers=2), 3)
    assert "which is streamed (rows as loader worker 1 of process 0 counts them in epoch 0)," in str(error.value)
    assert "row 1, column 'n' (prompt 'row 7')" in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_leaves_out_the_bad_rows_alone_and_fills_the_batches(workers, encoder, caplog):
    source = with_bad(24, {3: "", 4: " ", 11: ""}).to_iterable_dataset(num_shards=2)
    part = loader(skipping(encoder), source, workers=workers)
    batches = take(part, 7)
    assert {len(batch) for batch in batches} == {3}
    assert sorted(sum(batches, [])) == sorted(set(range(24)) - {3, 4, 11})
    assert part.dataset.left_out == {"empty prompt": 3}
    assert caplog.text.count("has rows that are left out; the first: row 3, column 'prompt': is empty") == 1


def test_a_resumed_stream_leaves_out_the_same_rows(encoder):
    source = with_bad(24, {3: "", 7: "", 8: "", 15: ""}).to_iterable_dataset(num_shards=2)
    whole = take(loader(skipping(encoder), source, workers=2), 12)
    for taken in range(1, 8):
        part, resumed = (loader(skipping(encoder), source, workers=2) for _ in range(2))
        take(part, taken)
        resumed.load_state_dict(part.state_dict())
        assert take(resumed, 4) == whole[taken : taken + 4]


def test_too_many_bad_rows_stop_the_run_with_their_share(encoder):
    bad = dict.fromkeys(range(0, 300, 5), "")
    with pytest.raises(
        ValueError, match=r"4\d of the first 2\d\d rows cannot be used, 20% \(4\d empty prompt\).*max_bad_share=0.1 "
    ):
        take(loader(skipping(encoder, 0.1), with_bad(300, bad).to_iterable_dataset(), batch_size=50), 6)
    # Few rows at the beginning say nothing, but all of a short stream do.
    short = loader(skipping(encoder, 0.1), with_bad(12, {0: "", 1: ""}).to_iterable_dataset(), batch_size=5)
    with pytest.raises(ValueError, match="2 of the first 12 rows cannot be used, 17%"):
        take(short, 3)
    assert len(take(loader(skipping(encoder, 0.2), with_bad(12, {0: "", 1: ""}).to_iterable_dataset()), 9)) == 9


def test_a_stream_without_a_usable_row_ends(encoder):
    with pytest.raises(ValueError, match="has no rows that can be used"):
        take(loader(skipping(encoder, 1.0), with_bad(3, dict.fromkeys(range(3), "")).to_iterable_dataset()), 1)


# ---- Evaluation ------------------------------------------------------------------------------------------------


def evaluated(encoder, source, size, count) -> list[list[list[int]]]:
    """By process, the numbers in each batch, which are also the rows'."""
    stream, found = encoder.encode(source, "eval_dataset"), []
    for index in range(count):
        batches = list(stream.evaluation_batches(size, process=(index, count)))
        assert all(batch["row"].tolist() == batch["scalars"]["n"].tolist() for batch in batches)
        found.append([batch["row"].tolist() for batch in batches])
    return found


def test_an_evaluation_has_equally_many_batches_in_all_processes(encoder):
    source = stored(9).to_iterable_dataset(num_shards=3)
    assert evaluated(encoder, source, 4, 1) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8]]]
    # In the last turn there is one row for two processes.
    assert evaluated(encoder, source, 2, 2) == [[[0, 2], [4, 6], [8]], [[1, 3], [5, 7], [8]]]


def test_an_evaluation_leaves_out_bad_rows_and_keeps_the_numbers(encoder):
    source = with_bad(12, {1: "", 3: "", 6: "", 8: "", 9: "", 10: "", 11: ""}).to_iterable_dataset()
    # In the first turn the second process has no row that it can use, in the last nobody has.
    expected = [[[0, 2], [4]], [[0], [5, 7]]]
    assert evaluated(skipping(encoder, 0.9), source, 2, 2) == expected
    with pytest.raises(ValueError, match="row 1, column 'prompt': is empty"):
        evaluated(encoder, source, 2, 1)
    with pytest.raises(ValueError, match="7 of the first 12 rows cannot be used, 58%"):
        evaluated(skipping(encoder, 0.5), source, 2, 1)


# ---- What rows hold --------------------------------------------------------------------------------------------


def test_one_of_several_captions_is_drawn_per_epoch(encoder):
    table = Dataset.from_list([{"prompt": [f"first {n}", f"second {n}"], "n": n} for n in range(12)])
    part = loader(encoder, table.to_iterable_dataset(), batch_size=12)
    asked, encode = [], part.dataset.family.encode_prompts

    class Family:
        def __getattr__(self, name):
            return getattr(encoder.family, name)

        def encode_prompts(self, pipeline, prompts):
            asked.append([prompt.split()[0] for prompt in prompts])
            return encode(pipeline, prompts)

    part.dataset.family = Family()
    take(part, 4)
    assert {"first", "second"} == set(asked[0]) and asked[0] != asked[1]
    first = list(asked)
    asked.clear()
    part.reset()
    take(part, 4)
    assert asked[:4] == first[:4]


@pytest.mark.parametrize("style", ["torch", "numpy", "arrow"])
def test_a_stream_may_have_a_format(style, encoder):
    source = stored(6).to_iterable_dataset().with_format(style)
    assert take(loader(encoder, source), 2) == [[0, 1, 2], [3, 4, 5]]


def image_encoder(encoder, **options):
    return encoder_of(encoder.pipeline, encoder.family, EncodingOptions(16, **options))


def latents(batch) -> torch.Tensor:
    return batch["latents"]["mean"].float()


@pytest.mark.parametrize("kind", ["bytes", "tars", "images"])
def test_streamed_files_give_the_stored_data_set_s_latents(kind, encoder, tmp_path):
    """Pick-a-Pic as parquet with plain bytes and as WebDataset tars; and pairs in columns of images."""
    if kind == "images":
        pairs = preference_pairs(8)
        pairs.to_parquet(tmp_path / "pairs.parquet")
        source = load_dataset("parquet", data_files=str(tmp_path / "pairs.parquet"), split="train", streaming=True)
    else:
        file = pick_a_pic(tmp_path) if kind == "bytes" else pick_a_pic_tars(tmp_path / "tars")
        pairs, source = load_pairs(file), load_pairs(file, streaming=True)
    encoded = image_encoder(encoder)
    encoded.add_prompts([pairs])
    expected = encoded.encode(pairs, "train_dataset")
    part = StreamLoader(encoded.encode(source, "train_dataset"), 4, process=(0, 1), workers=2, block=0, seed=0)
    found = torch.cat([latents(batch) for batch in islice(part, 2)])
    part.close()
    wanted = torch.stack([expected[row]["latents/mean"] for row in range(8)]).float()
    # Two workers read a tar each.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_images_of_a_stream_are_held_to_the_options_on_their_size(encoder):
    long, whole = Image.new("RGB", (3, 40)), Image.new("RGB", (16, 16), "red")
    source = image_pairs([("a long one", png(long), png(whole))]).to_iterable_dataset()
    stream = image_encoder(encoder, bad_rows=BadRowPolicy(min_image_side=4)).encode(source, "train_dataset")
    with pytest.raises(ValueError) as error:
        take(StreamLoader(stream, 1, process=(0, 1), workers=0, block=0, seed=0), 1)
    for reason in ("min_image_side is 4", "max_aspect_ratio is 8"):
        assert f"row 0, column 'chosen' (prompt 'a long one'): an image of 3x40 pixels; {reason}" in str(error.value)
