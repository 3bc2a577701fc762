"""Checks command lines of the documentation without running them."""

import importlib.util
import re
import shlex
import tomllib
from argparse import ArgumentParser
from pathlib import Path

from trl_diffusion_pref import TRAINERS, cli

from .pages import ROOT


# What a run.yaml that a page speaks of holds at least.
RUN_YAML = "model_name_or_path: shapes\ndataset_name: pairs.jsonl\n"
OPERATORS = ("&&", "||", "|", ";")


def commands(block: str) -> list[list[str]]:
    """The words of each command, without comments and variables that are set before it."""
    found = []
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        # Without the file that an output goes to.
        for word in [*shlex.split(re.sub(r" > \S+", "", line), comments=True), ";"]:
            if word not in OPERATORS:
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
            words = []
    return found


def check(words: list[str], page: Path) -> None:
    """Raises where a command cannot be what a reader needs; a program that is not known here raises too."""
    program = Path(words[0]).name
    checks = {
        "make": _make,
        "pip": _pip,
        "pre-commit": _nothing,
        "python": _python,
        "accelerate": _accelerate,
        "torchrun": _torchrun,
        "srun": check,
        "trl-diffusion-pref": _own,
    }
    assert program in checks, f"{page.name}: no check for {' '.join(words)}; add one to {Path(__file__).name}"
    checks[program](words[1:], page)


def _nothing(words: list[str], page: Path) -> None:
    """The program belongs to others, and has been named on purpose."""


def _make(words: list[str], page: Path) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert set(words) <= set(targets), f"{page.name}: make {' '.join(words)}"


def _pip(words: list[str], page: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {re.split(r"[<>=\[]", name)[0] for name in project["dependencies"]}
    assert words[0] == "install"
    for word in words[1:]:
        name, _, extras = word.rstrip("]").partition("[")
        assert name in known | {".", project["name"], "pre-commit"} or word.startswith("-"), f"{page.name}: {word}"
        for extra in filter(None, extras.split(",")):
            assert extra in project["optional-dependencies"], f"{page.name}: there is no extra {extra!r}"


def _own(words: list[str], page: Path) -> None:
    if "--config" in words:
        place = words.index("--config") + 1
        path = Path(words[place])
        if (ROOT / path).exists():
            words = [*words[:place], str(ROOT / path), *words[place + 1 :]]
        elif path.name == "run.yaml" and not path.exists():
            # A run has written it.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(RUN_YAML)
    # A machine without a GPU has to be asked for this precision.
    cli.check([*words, "--use_cpu"] if "--bf16" in words else words)


def _python(words: list[str], page: Path) -> None:
    if words[0] == "-m":
        _script(words[1], words[2:], page, module=True)
    else:
        _script(words[0], words[1:], page, module=False)


def _accelerate(words: list[str], page: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    if words[0] != "launch":
        assert words[0] in ("config", "test", "env"), f"{page.name}: accelerate {words[0]}"
        return
    _launched(launch_command_parser(), words[1:], page)


def _torchrun(words: list[str], page: Path) -> None:
    from torch.distributed.run import get_args_parser

    _launched(get_args_parser(), words, page)


def _launched(parser: ArgumentParser, words: list[str], page: Path) -> None:
    options = parser.parse_args(words)
    _script(options.training_script, options.training_script_args, page, module=options.module)


def _script(script: str, arguments: list[str], page: Path, *, module: bool) -> None:
    if Path(script).name == "trl-diffusion-pref" or (module and script == "trl_diffusion_pref.cli"):
        _own(arguments, page)
        return
    if module:
        spec = importlib.util.find_spec(script)
        assert spec is not None and spec.origin, f"{page.name}: there is no module {script}"
        path = Path(spec.origin)
    else:
        path = ROOT / script
        if script == "train.py" and not path.exists():
            return  # the reader's own
        assert path.exists(), f"{page.name}: there is no file {script}"
    if path.is_relative_to(ROOT):
        source = path.read_text()
        for name in re.findall(r"--(\w+)", " ".join(arguments)):
            assert f'"--{name}"' in source, f"{page.name}: {script} has no option --{name}"


def check_yaml(text: str, page: Path, path: Path) -> None:
    """Checks a file of options: accelerate's, or one of any trainer's command."""
    path.write_text(text)
    if "distributed_type" in text:
        from accelerate.commands.config.config_args import load_config_from_file

        load_config_from_file(str(path))
        return
    errors = {}
    for command in TRAINERS:
        try:
            cli.check([command, "--config", str(path)])
            return
        except ValueError as error:
            errors[command] = str(error)
    raise AssertionError(f"{page.name}: no trainer takes these options: {errors}\n{text}")
