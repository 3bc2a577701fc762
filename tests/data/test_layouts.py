import pytest
from datasets import Dataset, DatasetDict

from trl_diffusion_pref.data import Layout, check_columns
from trl_diffusion_pref.data.cells import prompt_problems
from trl_diffusion_pref.data.layouts import labelled_datasets, named_datasets


@pytest.mark.parametrize(
    ("given", "named", "labels"),
    [
        (None, [], []),
        ("pairs", [("", "pairs")], ["eval_dataset"]),
        ({"a": "x", "b": "y"}, [("a", "x"), ("b", "y")], ["eval_dataset['a']", "eval_dataset['b']"]),
    ],
    ids=["none", "one", "several"],
)
def test_none_one_and_several_evaluation_sets_are_handled_alike(given, named, labels):
    assert list(named_datasets(given)) == named
    assert list(labelled_datasets(given)) == list(zip(labels, (dataset for _, dataset in named), strict=True))


def test_pick_a_pic_is_not_told_to_rename_alone():
    columns = {"caption": ["a"], "jpg_0": [b""], "jpg_1": [b""], "label_0": [0.0], "label_1": [1.0]}
    with pytest.raises(ValueError, match="lacks the columns prompt, chosen, rejected.*jpg_0 is chosen where label_0"):
        check_columns(Dataset.from_dict(columns), "train_dataset")


@pytest.mark.parametrize("label", ["label_0", "label_1"])
def test_renamed_columns_beside_their_labels_are_an_error(label):
    columns = {"prompt": ["a"], "chosen": ["x.png"], "rejected": ["y.png"], label: [0.0]}
    with pytest.raises(ValueError, match=f"chosen and rejected beside {label}.*wrong order"):
        check_columns(Dataset.from_dict(columns), "train_dataset")


def test_a_layout_says_which_columns_it_needs_and_where_samples_stand():
    ranking = Layout(samples=("images",), samples_per_cell=3, conditions=("source",), scalars=("scores",))
    assert ranking.needed == ("prompt", "images", "source", "scores")
    assert ranking.num_samples == 3
    assert ranking.places[1] == "column 'images', number 1" and ranking.places[-1] == "column 'source'"
    cells = ranking.cells({"images": ["a", "b", "c"], "source": "d"})
    assert cells == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
    place, reason = ranking.problem({"images": ["a", "b"], "source": "d"})
    assert (place, reason) == ("column 'images'", "found a list of 2, wanted a list of 3")


def test_missing_data_set_is_named():
    with pytest.raises(ValueError, match="train_dataset is missing.*prompt, chosen, rejected"):
        check_columns(None, "train_dataset")


def test_missing_columns_are_named_with_those_found(pairs):
    with pytest.raises(ValueError, match="lacks the columns prompt, rejected; found: caption, chosen"):
        check_columns(Dataset.from_dict({"caption": ["x"], "chosen": ["y"]}), "train_dataset")
    with pytest.raises(ValueError, match="lacks the column rejected; found: prompt, chosen"):
        check_columns(pairs.to_iterable_dataset().remove_columns("rejected"), "train_dataset")


def test_other_containers_are_refused(pairs):
    with pytest.raises(TypeError, match="DatasetDict"):
        check_columns(DatasetDict(train=pairs), "train_dataset")
    with pytest.raises(TypeError, match="list"):
        check_columns([{"prompt": "x"}], "train_dataset")


def test_empty_data_set_is_refused(pairs):
    with pytest.raises(ValueError, match="eval_dataset has no rows"):
        check_columns(pairs.select([]), "eval_dataset")


def test_bad_prompts_are_listed_by_row():
    problems = prompt_problems(["a", "  ", None, "b", ["c", ""], []])
    assert [str(problem) for problem in problems] == [
        "row 1, column 'prompt': is empty",
        "row 2, column 'prompt': is None",
        "row 4, column 'prompt': is empty",
        "row 5, column 'prompt': is empty",
    ]
