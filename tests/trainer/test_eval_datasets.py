import pytest

from trl_diffusion_pref.trainer.eval_datasets import all_datasets, for_each_dataset, named_datasets


@pytest.mark.parametrize(
    ("given", "named", "applied"),
    [
        (None, [], None),
        ("pairs", [("", "pairs")], ("pairs", "eval_dataset")),
        (
            {"a": "x", "b": "y"},
            [("a", "x"), ("b", "y")],
            {"a": ("x", "eval_dataset['a']"), "b": ("y", "eval_dataset['b']")},
        ),
    ],
    ids=["none", "one", "several"],
)
def test_none_one_and_several_are_handled_alike(given, named, applied):
    assert list(named_datasets(given)) == named
    assert for_each_dataset(lambda dataset, what: (dataset, what), given) == applied
    assert all_datasets("train", given) == ["train", *(dataset for _, dataset in named)]
