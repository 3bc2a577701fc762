"""Every published layout, as files on disk and as columns, becomes pairs."""

import json
import logging
import pickle
import random
from dataclasses import FrozenInstanceError
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset, Image, List, load_dataset
from helpers.layout_files import (
    IMAGES,
    LAYOUTS,
    cell,
    contents,
    image_parquet,
    image_reward_db,
    jpeg,
    known,
    write_table,
)

from trl_diffusion_pref import load_pairs
from trl_diffusion_pref.data import PairOptions, PairReport, as_pairs, pair_report, pairs_and_report
from trl_diffusion_pref.data.known_layouts import KNOWN_LAYOUTS, recognise_layout


def convert(rows: list[dict], label: str = "train_dataset", **options) -> list[tuple]:
    """Rows as pairs, with their soft labels if there are any; streamed and stored."""
    dataset = Dataset.from_list(rows)
    stored, streamed = (
        [tuple(row.values()) for row in as_pairs(data, label, PairOptions(**options))]
        for data in (dataset, dataset.to_iterable_dataset())
    )
    assert stored == streamed
    return stored


def pick_a_pic(*labels: float, **columns) -> list[dict]:
    return [
        {"caption": f"p{row}", "jpg_0": f"{row}a", "jpg_1": f"{row}b", "label_0": label, **columns}
        for row, label in enumerate(labels)
    ]


def ranking(scores: list, column: str = "scores") -> list[dict]:
    return [{"prompt": "p", "images": [chr(97 + index) for index in range(len(scores))], column: scores}]


# ---- Every layout ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_pairs_are_read_from_every_layout(name, tmp_path):
    write, pairs = LAYOUTS[name]
    assert contents(load_pairs(write(tmp_path))) == known(pairs)


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "image_reward_db"])
def test_a_stream_gives_the_same_pairs(name, tmp_path):
    write, pairs = LAYOUTS[name]
    assert contents(load_pairs(write(tmp_path), streaming=True)) == known(pairs)


def test_rankings_with_several_rows_cannot_be_streamed(tmp_path):
    with pytest.raises(ValueError, match="ImageRewardDB, in which a ranking has several rows.*without streaming"):
        load_pairs(image_reward_db(tmp_path), streaming=True)


def test_every_entry_of_the_table_is_recognised_by_its_own_columns():
    for layout in KNOWN_LAYOUTS:
        assert recognise_layout([*layout.needed, "user_id"], "x").layout is layout


def test_pairs_are_returned_as_they_are():
    dataset = Dataset.from_dict({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"], "category": ["c"]})
    assert as_pairs(dataset, "x", PairOptions(ties="half", ranking_pairs="all")) is dataset
    assert pair_report(dataset, "x") == pairs_and_report(dataset, "x")[1] == PairReport("pairs", 1, 1, 1)
    stream = dataset.to_iterable_dataset()
    assert as_pairs(stream, "x") is stream


def test_a_condition_image_is_kept(tmp_path):
    write, _ = LAYOUTS["edit_reward"]
    dataset = load_pairs(write(tmp_path)).cast_column("image", Image(decode=False))
    assert [image["bytes"] for image in dataset["image"]] == [jpeg(300 + row) for row in range(8)]


def test_a_list_of_captions_stays_a_list():
    rows = pick_a_pic(1.0, 0.0)
    for row in rows:
        row["caption"] = [row["caption"], "another"]
    assert convert(rows) == [(["p0", "another"], "0a", "0b"), (["p1", "another"], "1b", "1a")]


@pytest.mark.parametrize(
    ("dimension", "chosen"), [("VQ", "A"), ("MQ", "B"), ("TA", "A"), ("majority", "A")], ids=lambda value: value
)
def test_a_dimension_of_video_align_can_be_chosen(dimension, chosen):
    row = {"path_A": "A", "path_B": "B", "prompt": "p", "VQ": "A", "MQ": "B", "TA": "A"}
    assert convert([row], preference_dimension=dimension)[0][1] == chosen


def test_contradicting_dimensions_are_a_tie():
    row = {"path_A": "A", "path_B": "B", "prompt": "p", "VQ": "A", "MQ": "B", "TA": "same"}
    assert convert([row, {**row, "TA": "B"}]) == [("p", "B", "A")]


def test_media_keep_their_types(tmp_path):
    for name in ("open_image_preferences", "edit_reward", "images_with_scores", "image_reward_db"):
        dataset = load_pairs(LAYOUTS[name][0](tmp_path / name))
        assert dataset.features["chosen"] == dataset.features["rejected"] == Image()


def test_data_loader_workers_can_pickle_a_stream(tmp_path):
    for name in ("hpdv2_test", "pick_a_pic_tars", "edit_reward"):
        stream = load_pairs(LAYOUTS[name][0](tmp_path / name), streaming=True)
        assert contents(pickle.loads(pickle.dumps(stream))) == known(IMAGES)


# ---- Soft labels, ties, rankings ---------------------------------------------------------------------------------


def test_shares_of_votes_are_soft_labels():
    rows = [
        {"prompt": "p", "image1": "a", "image2": "b", "votes_image1": first, "votes_image2": second}
        for first, second in [(3, 1), (2, 8), (5, 5)]
    ]
    assert convert(rows) == [("p", "a", "b", 0.75), ("p", "b", "a", 0.8)]
    assert convert(rows, ties="keep")[2] == ("p", "a", "b", 0.5)


def test_confidence_is_a_soft_label_of_at_least_one_half():
    rows = [{"prompt": "p", "path1": "a", "path2": "b", "confidence": value} for value in (0.95, 0.25, None)]
    assert convert(rows) == [("p", "a", "b", 0.95), ("p", "b", "a", 0.75), ("p", "a", "b", 1.0)]
    assert convert(rows, min_score_difference=0.9) == [("p", "a", "b", 0.95), ("p", "a", "b", 1.0)]


def test_ties_are_dropped_halved_or_kept():
    rows = pick_a_pic(0.5, 0.0, 0.5)
    assert convert(rows) == [("p1", "1b", "1a")]
    assert convert(rows, ties="half") == [("p0", "0a", "0b", 0.5), ("p1", "1b", "1a", 1.0), ("p2", "2a", "2b", 0.5)]
    assert convert(rows, ties="keep") == [("p0", "0a", "0b"), ("p1", "1b", "1a"), ("p2", "2a", "2b")]


@pytest.mark.parametrize(
    ("policy", "ties", "expected"),
    [
        ("best_worst", "drop", ["dc"]),
        ("all", "drop", ["da", "db", "dc", "ac", "bc"]),
        ("all", "keep", ["da", "db", "dc", "ab", "ac", "bc"]),
        ("adjacent", "drop", ["da", "bc"]),
        ("adjacent", "keep", ["da", "ab", "bc"]),
    ],
)
def test_rankings_give_the_pairs_of_the_policy(policy, ties, expected):
    for rows in (ranking([2.0, 2.0, 1.0, 4.0]), ranking([2, 2, 3, 1], "ranks")):
        pairs = convert(rows, ranking_pairs=policy, ties=ties)
        assert [chosen + rejected for _, chosen, rejected in pairs] == expected


def test_pairs_beside_halved_ties_have_the_soft_label_that_is_asked_for():
    rows = pick_a_pic(1.0, 0.5)
    expected = [("p0", "0a", "0b", 0.95), ("p1", "1a", "1b", 0.5)]
    assert convert(rows, ties="half", soft_label=0.95) == expected


def test_a_ranking_of_equal_samples_is_a_tie():
    assert convert(ranking([1.0, 1.0, 1.0]) + ranking([0.0, 1.0])) == [("p", "b", "a")]
    assert convert(ranking([1.0, 1.0, 1.0]), ties="half") == [("p", "a", "c", 0.5)]


def test_close_scores_and_ranks_are_left_out():
    rows = ranking([0.3, 0.2, 0.05])
    pairs = convert(rows, ranking_pairs="all", min_score_difference=0.1)
    assert [chosen + rejected for _, chosen, rejected in pairs] == ["ab", "ac", "bc"]
    pairs = convert(rows, ranking_pairs="all", min_score_difference=0.12)
    assert [chosen + rejected for _, chosen, rejected in pairs] == ["ac", "bc"]
    assert len(convert(ranking([1, 2, 3, 4], "ranks"), ranking_pairs="all", min_score_difference=2)) == 3


@pytest.mark.parametrize("policy", ["best_worst", "all", "adjacent"])
def test_a_ranking_in_rows_gives_what_it_gives_as_a_list(policy):
    ranks = {"cat": [3, 1, 2], "dog": [1, 4, 1, 2]}
    rows = [
        {"prompt_id": f"id {prompt}", "prompt": prompt, "image": f"{prompt}{number}", "rank": rank}
        for prompt, values in ranks.items()
        for number, rank in enumerate(values)
    ]
    lists = [
        {"prompt": prompt, "images": [f"{prompt}{number}" for number in range(len(values))], "ranks": values}
        for prompt, values in ranks.items()
    ]
    options = PairOptions(ranking_pairs=policy, ties="half")
    grouped = as_pairs(Dataset.from_list(rows), "x", options)
    assert grouped.to_list() == as_pairs(Dataset.from_list(lists), "x", options).to_list()
    shuffled = random.Random(0).sample(rows, len(rows))
    assert len(as_pairs(Dataset.from_list(shuffled), "x", options)) == len(grouped)


# ---- Label noise -------------------------------------------------------------------------------------------------


def test_label_noise_swaps_its_share_of_pairs():
    dataset = Dataset.from_list(pick_a_pic(*[1.0] * 4000))
    swapped = [row["chosen"].endswith("b") for row in as_pairs(dataset, "x", PairOptions(label_noise=0.3))]
    both = [one and other for one, other in zip(swapped[::2], swapped[1::2], strict=True)]
    # Four standard deviations of binomial distributions; neighbours are independent.
    assert abs(sum(swapped) - 1200) < 4 * (4000 * 0.3 * 0.7) ** 0.5
    assert abs(sum(both) - 180) < 4 * (2000 * 0.09 * 0.91) ** 0.5


def test_label_noise_depends_on_row_and_seed_alone():
    rows = pick_a_pic(*[1.0, 0.0] * 50)
    options = {"label_noise": 0.5}
    first = convert(rows, seed=1, **options)
    convert(rows, seed=2, **options)
    assert convert(rows, seed=1, **options) == first != convert(rows, seed=2, **options)
    # Ties that are dropped, and rows that follow, do not change what happens to a row.
    with_tie = rows[:10] + pick_a_pic(0.5) + rows[11:] + pick_a_pic(1.0)
    assert convert(with_tie, seed=1, **options)[:10] == first[:10]
    assert convert(with_tie, seed=1, **options)[10:-1] == first[11:]


def test_label_noise_makes_soft_labels_wrong():
    """With 1 - s, a swapped pair would say the same as before."""
    rows = [{"prompt": "p", "path1": "a", "path2": "b", "confidence": 0.75}] * 40
    assert set(convert(rows, label_noise=0.5)) == {("p", "a", "b", 0.75), ("p", "b", "a", 0.75)}


def test_label_noise_swaps_pairs_and_keeps_their_other_columns():
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "soft_label": 0.875, "category": str(row)} for row in range(40)
    ]
    pairs = [row[:3] + row[4:] for row in convert(rows, label_noise=0.5)]
    assert set(pairs) == {("p", "a", "b", 0.875), ("p", "b", "a", 0.875)}
    assert [row[3] for row in convert(rows, label_noise=0.5)] == [str(row) for row in range(40)]


# ---- column_map --------------------------------------------------------------------------------------------------


def test_other_names_are_mapped_to_pairs():
    rows = [{"text": "p", "good": "a", "bad": "b", "id": 7}]
    mapping = {"prompt": "text", "chosen": "good", "rejected": "bad"}
    dataset = as_pairs(Dataset.from_list(rows), "x", PairOptions(column_map=mapping))
    assert dataset.to_list() == [{"prompt": "p", "chosen": "a", "rejected": "b", "id": 7}]


def test_a_mapped_prompt_replaces_another_one():
    rows = [{"prompt": "short", "long": "p", "chosen": "a", "rejected": "b"}]
    assert convert(rows, column_map={"prompt": "long"}) == [("p", "a", "b")]


def test_names_of_a_layout_are_mapped():
    rows = [{"text": "p", "left": "a", "right": "b", "label_0": 0.0}]
    assert convert(rows, column_map={"prompt": "text", "jpg_0": "left", "jpg_1": "right"}) == [("p", "b", "a")]


@pytest.mark.parametrize(
    ("column_map", "message"),
    [
        ({"prompt": "txt"}, "no column 'txt', which column_map names; found: prompt, chosen, rejected"),
        ({"promt": "prompt"}, "it has no column 'promt', which column_map names"),
    ],
)
def test_a_wrong_column_map_is_an_error(column_map, message):
    with pytest.raises(ValueError, match=message):
        convert([{"prompt": "p", "chosen": "a", "rejected": "b"}], column_map=column_map)


# ---- Which layout ------------------------------------------------------------------------------------------------


def test_of_two_layouts_the_one_with_more_columns_is_used():
    rows = [{"prompt": "p", "path1": "a", "path2": "b", "confidence": 0.9}]
    assert convert(rows)[0] == ("p", "a", "b", 0.9)
    votes = {"votes_image1": 1, "votes_image2": 3, "detailed_results": "[]"}
    assert convert([{"prompt": "p", "image1": "a", "image2": "b", **votes}])[0] == ("p", "b", "a", 0.75)
    # As many columns: the earlier entry of the table.
    assert recognise_layout(["ranks", "scores", "images", "prompt"], "x").layout.name == "images with scores"


def test_pairs_are_preferred_to_a_layout_with_more_columns():
    rows = [{**pick_a_pic(0.0)[0], "prompt": "p", "chosen": "a", "rejected": "b"}]
    dataset = Dataset.from_list(rows)
    assert as_pairs(dataset, "x") is dataset


def test_unknown_columns_name_the_nearest_layout_and_what_it_lacks():
    with pytest.raises(
        ValueError, match="train_dataset has no known layout; its columns: prompt, path1, score"
    ) as error:
        convert([{"prompt": "p", "path1": "a", "score": 1.0}])
    assert "HPDv3 without confidence (prompt, path1, path2): it lacks the column path2" in str(error.value)
    assert "column_map={'path2': 'your_column'}" in str(error.value)


@pytest.mark.parametrize(
    "columns",
    [("file_name", "caption", "split"), ("image", "caption", "split"), ("prompt", "image", "label")],
    ids="-".join,
)
def test_single_votes_are_told_from_pairs(columns):
    dataset = Dataset.from_dict({name: ["x"] for name in (*columns, "id")})
    with pytest.raises(ValueError, match="has one sample and what was said of it.*Pairs need two samples"):
        as_pairs(dataset, "train_dataset")


def test_pick_a_pic_without_images_names_the_variant_that_has_them():
    columns = {"caption": ["p"], "label_0": [1.0], "label_1": [0.0], "image_0_uid": ["x"], "has_label": [True]}
    with pytest.raises(ValueError, match="lacks the columns jpg_0, jpg_1.*yuvalkirstain/pickapic_v2 has them"):
        as_pairs(Dataset.from_dict(columns), "train_dataset")


def test_other_containers_are_refused():
    with pytest.raises(TypeError, match="train_dataset is a list"):
        as_pairs([{"prompt": "p"}], "train_dataset")


# ---- Labels that cannot be used ----------------------------------------------------------------------------------


def hpdv2(paths: object, preference: object) -> dict:
    return {"prompt": "p", "image_path": paths, "human_preference": preference}


def rapidata(**labels: object) -> dict:
    return {"prompt": "p", "image1": "a", "image2": "b", **labels}


BAD_LABELS = {
    "another number": (pick_a_pic(1.0, 0.7), "row 1, column 'label_0': is 0.7, not one of 1, 0, 0.5"),
    "NaN": (pick_a_pic(1.0, float("nan")), "row 1, column 'label_0': is nan, not one of"),
    "None": (pick_a_pic(1.0, None), "row 1, column 'label_0': is None, not one of"),
    "text": (pick_a_pic("1.0"), "row 0, column 'label_0': is '1.0', not one of"),
    "list": (pick_a_pic([1.0]), r"row 0, column 'label_0': is \[1.0\], not one of"),
    "vote": (
        [
            {
                "instruction": "p",
                "source_img": "s",
                "left_output_image": "a",
                "right_output_image": "b",
                "vote_type": "x",
            }
        ],
        "row 0, column 'vote_type': is 'x', not one of leftvote, rightvote, tie",
    ),
    "dimension": (
        [{"path_A": "a", "path_B": "b", "prompt": "p", "VQ": "A", "MQ": "C", "TA": "A"}],
        "row 0, column 'MQ': is 'C', not one of A, B, same",
    ),
    "preference": (
        [hpdv2(["a", "b"], [2, 0])],
        r"row 0, column 'human_preference': is \[2, 0\], not a list of 0 and 1",
    ),
    "preferences of three": (
        [hpdv2(["a", "b"], [1, 0, 0])],
        "row 0, column 'human_preference': has 3 entries for the 2 samples in column 'image_path'",
    ),
    "no list": (
        [hpdv2(["a", "b"], 1)],
        "row 0, column 'human_preference': is 1, not a list with one number per sample",
    ),
    "no paths": ([hpdv2(["a", "b"], [1, 0]), hpdv2(None, [1, 0])], "row 1, column .* 2 entries for the 0 samples"),
    "ranks": (
        [{"prompt": "p", "image_path": ["a", "b", "c"], "rank": [1, 2]}],
        "row 0, column 'rank': has 2 entries for the 3 samples in column 'image_path'",
    ),
    "infinite score": (ranking([1.0, float("inf")]), "row 0, column 'scores': is inf, not a finite number"),
    "NaN in ranks": (ranking([1.0, float("nan")], "ranks"), "row 0, column 'ranks': is nan, not a finite number"),
    "None in scores": (ranking([1.0, None]), "row 0, column 'scores': is None, not a finite number"),
    "confidence": (
        [{"prompt": "p", "path1": "a", "path2": "b", "confidence": 1.5}],
        r"row 0, column 'confidence': is 1.5, not in \[0, 1\]",
    ),
    "votes": ([rapidata(votes_image1=-1, votes_image2=2)], "row 0, columns 'votes_image1' and .*not numbers of votes"),
    "no JSON": ([rapidata(detailed_results="{")], "row 0, column 'detailed_results': is '{', neither the number"),
    "other images": (
        [rapidata(aggregated_results=json.dumps({"x.jpg": 3}))],
        "row 0, column 'aggregated_results': votes for 'x.jpg', but the images are called 'image1' and 'image2'",
    ),
    "soft label": (
        [{"prompt": "p", "chosen": "a", "rejected": "b", "soft_label": 1.5}],
        r"row 0, column 'soft_label': is 1.5, not a probability in \[0, 1\]",
    ),
}


@pytest.mark.parametrize("name", BAD_LABELS)
@pytest.mark.parametrize("streaming", [False, True], ids=["stored", "stream"])
def test_a_label_that_cannot_be_used_is_named_by_row_and_column(name, streaming):
    rows, message = BAD_LABELS[name]
    dataset = Dataset.from_list(rows)
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    with pytest.raises(ValueError, match=message):
        list(as_pairs(dataset, "train_dataset", PairOptions(label_noise=0.5)))


def test_ten_bad_rows_are_listed_and_all_are_counted():
    with pytest.raises(ValueError, match="in 25 of 30 rows") as error:
        convert(pick_a_pic(*[1.0] * 5, *[3.0] * 25))
    assert str(error.value).count("label_0") == 10
    assert "and 15 more\n" in str(error.value) and "dataset.filter(" in str(error.value)


def test_a_mapped_column_is_called_by_its_own_name():
    rows = [{"caption": "p", "jpg_0": "a", "jpg_1": "b", "vote": 3.0}]
    with pytest.raises(ValueError, match="row 0, column 'vote': is 3.0"):
        convert(rows, column_map={"label_0": "vote"})


def test_rows_of_a_ranking_need_one_prompt_and_an_id():
    rows = [{"prompt_id": 1, "prompt": text, "image": "a", "rank": rank} for rank, text in enumerate(["cat", "dog"])]
    with pytest.raises(ValueError, match="row 1, column 'prompt': differs from row 0, of the same ranking"):
        as_pairs(Dataset.from_list(rows), "x")
    with pytest.raises(ValueError, match="row 1, column 'prompt_id': is None"):
        as_pairs(Dataset.from_list([rows[0], {**rows[1], "prompt_id": None}]), "x")


def test_a_column_that_should_hold_lists_is_named():
    with pytest.raises(ValueError, match="column 'images': holds Value\\('string'\\), not lists of samples"):
        as_pairs(Dataset.from_dict({"prompt": ["p"], "images": ["a"], "scores": [[1.0]]}), "x")


def test_samples_of_two_types_are_named():
    rows = [{"caption": "p", "jpg_0": "a", "jpg_1": b"b", "label_0": float(label)} for label in (0, 1)]
    with pytest.raises(ValueError, match=r"jpg_0 \(Value\('string'\)\) and jpg_1 \(Value\('binary'\)\).*cast_column"):
        as_pairs(Dataset.from_list(rows), "x")


# ---- Options and reports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column_map": "text"}, "column_map='text' is a str; pass a dictionary"),
        ({"ties": "maybe"}, "ties='maybe' is none of drop, half, keep"),
        ({"ranking_pairs": "some"}, "ranking_pairs='some' is none of best_worst, all, adjacent"),
        ({"preference_dimension": "XX"}, "preference_dimension='XX' is none of majority, VQ, MQ, TA"),
        ({"label_noise": 1.0}, r"label_noise=1.0 is outside \[0, 1\)"),
        ({"label_noise": float("nan")}, "label_noise=nan is outside"),
        ({"min_score_difference": -1}, "min_score_difference=-1 must be finite and at least 0"),
        ({"soft_label": 1.5, "ties": "half"}, r"soft_label=1.5 is outside \[0, 1\]"),
        ({"soft_label": 0.9}, "soft_label=0.9 does nothing without ties='half'"),
        ({"min_score_difference": 0.5, "ties": "half"}, "ties='half' keeps pairs without a difference"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PairOptions(**options)


def test_options_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(ValueError, match="min_score_difference=0.1 needs scores.*layout Pick-a-Pic"):
        convert(pick_a_pic(1.0), min_score_difference=0.1)
    with pytest.raises(ValueError, match="preference_dimension='VQ' needs the columns VQ, MQ and TA"):
        convert(pick_a_pic(1.0), preference_dimension="VQ")


def test_the_report_counts_what_became_of_the_rows():
    rows = pick_a_pic(1.0, 0.5, 0.0, has_label=True) + pick_a_pic(-1.0, has_label=False)
    dataset = Dataset.from_list(rows)
    expected = PairReport("Pick-a-Pic", rows=4, rankings=4, pairs=2, ties_dropped=1, unlabelled=1)
    assert pair_report(dataset, "x") == pairs_and_report(dataset, "x")[1] == expected
    scores = ranking([1.0]) + ranking([1.0, 1.05, 3.0])
    report = pair_report(Dataset.from_list(scores), "x", PairOptions(ranking_pairs="all", min_score_difference=0.1))
    assert report == PairReport("images with scores", 2, 2, pairs=2, too_close=1, short_rankings=1)
    with pytest.raises(FrozenInstanceError):
        report.pairs = 3


def test_a_report_of_noise_and_kept_ties_counts_the_pairs():
    dataset = Dataset.from_list(pick_a_pic(*[1.0] * 20, *[0.5] * 5))
    options = PairOptions(label_noise=0.5, ties="half")
    swapped = sum(row["chosen"].endswith("b") for row in as_pairs(dataset, "x", options))
    report = pair_report(dataset, "x", options)
    assert (report.pairs, report.ties_kept, report.swapped, report.left_out) == (25, 5, swapped, 0)


def test_rows_that_are_left_out_are_a_warning_and_others_are_not(caplog):
    with caplog.at_level(logging.INFO, "trl_diffusion_pref"):
        as_pairs(Dataset.from_list(pick_a_pic(1.0, 0.0)), "train_dataset")
        as_pairs(Dataset.from_list(pick_a_pic(1.0, 0.5)), "eval_dataset")
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages == [
        "train_dataset: 2 rows in the layout Pick-a-Pic gave 2 pairs.",
        "eval_dataset: 2 rows in the layout Pick-a-Pic gave 1 pair; left out: 1 tie.",
    ]


def test_a_report_reads_as_a_sentence():
    counts = {"ties_dropped": 2, "unlabelled": 1, "too_close": 1, "short_rankings": 4, "ties_kept": 1, "swapped": 3}
    assert str(PairReport("ImageRewardDB", rows=90, rankings=10, pairs=7, **counts)) == (
        "90 rows in the layout ImageRewardDB, 10 rankings, gave 7 pairs; left out: 2 ties, 1 row without a label, "
        "1 pair closer than min_score_difference, 4 rankings of fewer than 2 samples; kept: 1 tie; "
        "swapped by label_noise: 3 pairs"
    )


def test_no_pairs_are_an_error():
    with pytest.raises(ValueError, match="train_dataset has no pairs: 2 rows .* gave no pairs; left out: 2 ties"):
        as_pairs(Dataset.from_list(pick_a_pic(0.5, 0.5)), "train_dataset")


def test_a_stream_has_no_report():
    stream = Dataset.from_list(pick_a_pic(1.0)).to_iterable_dataset()
    assert pairs_and_report(stream, "x")[1] is None
    with pytest.raises(ValueError, match="x is a stream"):
        pair_report(stream, "x")


# ---- Copies ------------------------------------------------------------------------------------------------------

_SIDE = 150  # about 20 kB per image
# Counts what Arrow allocates while it is in use; it must outlive all of that.
_POOL = pa.proxy_memory_pool(pa.default_memory_pool())


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Dataset:
    """Pick-a-Pic with 4 MB of images, in the cache of `datasets`."""
    folder = tmp_path_factory.mktemp("large")
    rows = [
        {"caption": f"p{row}", "jpg_0": jpeg(row, _SIDE), "jpg_1": jpeg(-row % 1000, _SIDE), "label_0": row % 3 / 2}
        for row in range(100)
    ]
    path = write_table(folder / "a.parquet", rows)
    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(folder / "cache"))


def cached_bytes(dataset: Dataset) -> int:
    folders = {Path(file["filename"]).parent for file in dataset.cache_files} | {
        Path(datasets.config.HF_DATASETS_CACHE)
    }
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("options", [{}, {"ties": "half", "label_noise": 0.5}], ids=["plain", "soft labels"])
@pytest.mark.parametrize("change", ["none", "shuffled"])
def test_two_columns_of_images_become_pairs_without_a_copy(large, options, change):
    assert large.data.nbytes > 2e6
    dataset = large if change == "none" else large.shuffle(seed=0).select(range(50))
    before, default = cached_bytes(large), pa.default_memory_pool()
    pa.set_memory_pool(_POOL)
    try:
        pairs = as_pairs(dataset, "x", PairOptions(**options))
    finally:
        pa.set_memory_pool(default)
    assert cached_bytes(large) == before
    assert _POOL.max_memory() < 2e5
    # The result refers to the files of the data set.
    assert {file["filename"] for file in pairs.cache_files} == {file["filename"] for file in large.cache_files}
    assert pairs[3]["chosen"] in {row[column] for row in dataset for column in ("jpg_0", "jpg_1")}


@pytest.mark.parametrize("shape", ["list", "rows"])
def test_samples_of_rankings_are_copied_once_and_only_those_of_pairs(shape, tmp_path):
    images = [[jpeg(10 * row + number, _SIDE) for number in range(5)] for row in range(20)]
    if shape == "list":
        rows = [
            {"prompt": str(row), "images": [cell(data) for data in samples], "scores": [0, 1, 2, 3, 4]}
            for row, samples in enumerate(images)
        ]
        path = image_parquet(tmp_path / "a.parquet", rows, {"images": List(Image())})
    else:
        rows = [
            {"prompt": str(row), "prompt_id": row, "image": cell(data), "rank": -rank}
            for row, samples in enumerate(images)
            for rank, data in enumerate(samples)
        ]
        path = image_parquet(tmp_path / "a.parquet", rows, {"image": Image()})
    dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    before = cached_bytes(dataset)
    pairs = as_pairs(dataset, "x")
    needed = sum(len(samples[4]) + len(samples[0]) for samples in images)
    assert needed <= cached_bytes(dataset) - before < 1.1 * needed
    assert [row[1:] for row in contents(pairs)] == [(samples[4], samples[0]) for samples in images]


def test_pairs_of_a_selection_are_those_of_its_rows():
    rows = pick_a_pic(1.0, 0.0, 0.5, 1.0, 0.0)
    chosen = Dataset.from_list(rows).select([4, 2, 0, 4]).with_format("numpy")
    pairs = as_pairs(chosen, "x", PairOptions(ties="half")).to_list()
    assert [tuple(pair.values()) for pair in pairs] == [
        ("p4", "4b", "4a", 1.0),
        ("p2", "2a", "2b", 0.5),
        ("p0", "0a", "0b", 1.0),
        ("p4", "4b", "4a", 1.0),
    ]


def test_lists_of_a_selection_are_those_of_its_rows():
    rows = ranking([1.0, 2.0]) + ranking([5.0, 3.0, 4.0]) + ranking([1.0])
    chosen = Dataset.from_list(rows).select([2, 1, 0])
    assert [(pair["chosen"], pair["rejected"]) for pair in as_pairs(chosen, "x")] == [("a", "b"), ("b", "a")]


def test_lists_of_undecoded_images_stay_undecoded():
    rows = [{"prompt": "p", "images": [cell(pair.chosen), cell(b"no image")], "scores": [1.0, 0.0]} for pair in IMAGES]
    dataset = Dataset.from_list(rows).cast_column("images", List(Image()))
    assert [row[2] for row in contents(as_pairs(dataset, "x"))] == [b"no image"] * 8
