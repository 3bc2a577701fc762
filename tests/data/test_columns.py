import pytest
from datasets import Dataset, DatasetDict

from trl_diffusion_pref.data import check_columns
from trl_diffusion_pref.data.columns import check_prompts


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
    with pytest.raises(ValueError, match="row 4, column 'prompt': is empty\n  row 5, column 'prompt': is NoneType"):
        check_prompts(["a", "  ", None, "b"], [3, 4, 5, 6], "train_dataset")


def test_long_lists_of_problems_are_cut_and_counted():
    with pytest.raises(ValueError, match="and 15 more"):
        check_prompts([""] * 25, list(range(25)), "train_dataset")
