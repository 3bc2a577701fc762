"""Prompts from lists and files, each once, and what is wrong with them by line."""

import re

import pytest
from datasets import Dataset

from trl_diffusion_pref.preference_data import read_prompts


FILES = {
    "a.txt": "a cat\r\na dog, \u2028running \nan owl",
    "a.csv": 'id,prompt\n1,a cat\n2,"a dog, \u2028running"\n3,an owl\n',
    "a.jsonl": '{"prompt": "a cat", "id": 1}\n"a dog, \u2028running"\n{"prompt": "an owl"}\n',
    "a.json": '["a cat", {"prompt": "a dog, \u2028running"}, "an owl"]',
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_prompts(name, tmp_path):
    (tmp_path / name).write_bytes(FILES[name].encode("utf-8-sig"))
    assert read_prompts(tmp_path / name) == ["a cat", "a dog, \u2028running", "an owl"]
    assert read_prompts(Dataset.from_dict({"prompt": ["b", "a"]})) == ["b", "a"]


@pytest.mark.parametrize(("name", "text"), [("a.txt", "a\n\n b\na \n\n"), ("a.jsonl", '"a"\n\n"b"\n"a"\n \n')])
def test_duplicates_and_blank_lines_are_left_out_and_counted(name, text, tmp_path, caplog):
    (tmp_path / name).write_text(text)
    assert read_prompts(str(tmp_path / name)) == ["a", "b"]
    assert "2 prompts; left out: 2 blank lines and 1 prompt that came before." in caplog.text
    caplog.clear()
    assert read_prompts(["a", "b", "b", "b"]) == ["a", "b"]
    assert "left out: 2 prompts that came before." in caplog.text


def test_nothing_is_said_where_nothing_is_left_out(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a\nb\n")
    assert read_prompts(tmp_path / "a.txt") == ["a", "b"]
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt has no prompts."),
        ("a.txt", b"\n \n", "a.txt has no prompts."),
        ("a.txt", b"\xff\xfe\xff", "a.txt cannot be read"),
        ("a.csv", b"", "a.csv has no prompts."),
        ("a.csv", b"text\na\n", "a.csv has no column prompt; its columns: text."),
        ("a.csv", b"id,prompt\n1,a\n2\n", "a.csv, line 3: the prompt is empty."),
        ("a.json", b"", "a.json has no prompts."),
        ("a.json", b'{"prompt": "a"}', "a.json holds a dict; wanted a list"),
        ("a.json", b'["a", 3]', "a.json, entry 1: 3 is no text."),
        ("a.json", b'["a"', "a.json: no JSON ("),
        ("a.jsonl", b'"a"\n{"text": "b"}\n', "a.jsonl, line 2: has no prompt; its names: text."),
        ("a.jsonl", b'"a"\nb\n', "a.jsonl, line 2: no JSON ("),
        ("a.jsonl", b'{"prompt": " "}\n', "a.jsonl, line 1: the prompt is empty."),
        ("a.yaml", b"a", "the suffix '.yaml' is none of .txt, .json, .jsonl, .csv"),
        (None, None, "there is no such file"),
    ],
)
def test_what_is_wrong_is_named(name, content, message, tmp_path):
    if name is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_prompts(tmp_path / (name or "missing.txt"))


def test_lists_and_data_sets_are_checked_as_well():
    with pytest.raises(ValueError, match="number 1: the prompt is empty"):
        read_prompts(["a", ""])
    with pytest.raises(ValueError, match="no column prompt; found: text"):
        read_prompts(Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match="prompts has no prompts"):
        read_prompts([])
