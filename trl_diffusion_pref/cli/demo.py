"""The commands demo, on the embedded pipeline, and completion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

from diffusers import DiffusionPipeline

from ..algorithms import TRAINERS
from ..host_libraries import quiet_loading
from ..shapes import compare_with_base, comparison_picture, comparison_table, prompts, sample, sample_base
from ..training.documented import documented
from .command import Command
from .parser import PROGRAM, Parsed, UsageError
from .train import build_trainer, train, training_command


@documented
@dataclass(kw_only=True)
class DemoOptions:
    """
    > The demo

        output_dir (`str`, *optional*, defaults to `"demo"`):
            Folder for the tuned pipeline, the picture and the comparison.
        max_steps (`int`, *optional*, defaults to `60`):
            Training steps, at least 1.
        comparison (`bool`, *optional*, defaults to `True`):
            Writes the page that compares the tuned model with the base.
    """

    output_dir: str = "demo"
    max_steps: int = 60
    comparison: bool = True


def _run_demo(parsed: Parsed, words: Sequence[str]) -> int:
    (options,) = parsed.options
    config_class, trainer_class = TRAINERS["mapo"]
    command = training_command("mapo", config_class, trainer_class)
    file = files(__package__) / "demo.yaml"
    run = ["--config", str(file), "--output_dir", options.output_dir, "--max_steps", str(options.max_steps)]
    train(build_trainer(trainer_class, command.parse(run)))
    folder = Path(options.output_dir)
    with quiet_loading():
        tuned = DiffusionPipeline.from_pretrained(folder)
    prompted = (4 * prompts())[:64]
    images = {"before": sample_base("mixed", prompted), "after": sample(tuned, prompted)}
    print(comparison_table(images, prompted, preferred_style="outlined"))
    print(f"figure: {comparison_picture(images, folder / 'before_after.png')}")
    if options.comparison:
        found = compare_with_base(folder, folder / "comparison")
        print(f"\n{found.to_markdown()}\npage: {folder / 'comparison' / 'index.html'}")
    return 0


@documented
@dataclass(kw_only=True)
class CompletionOptions:
    """
    > Shell

        shell (`str`):
            The shell that the script is for.
    """

    shell: Literal["bash", "zsh", "tcsh"]


def completion_command(all_commands: Callable[[], dict[str, Command]]) -> Command:
    """The command that prints a script for a shell; it knows the options of all commands."""

    def run(parsed: Parsed, words: Sequence[str]) -> int:
        import argparse

        try:
            import shtab
        except ImportError as error:
            raise UsageError('completion needs shtab: pip install "trl-diffusion-pref[completion]"') from error
        root = argparse.ArgumentParser(prog=PROGRAM)
        below = root.add_subparsers()
        for name, command in all_commands().items():
            parser = below.add_parser(name, help=command.summary, add_help=False, allow_abbrev=False)
            for action in command.parser()._actions:
                parser._add_action(action)
        print(shtab.complete(root, parsed.options[0].shell))
        return 0

    return Command(
        "completion",
        f"prints a completion script: {PROGRAM} completion bash > FILE, which the shell then reads",
        [CompletionOptions],
        run,
        positional=("shell",),
    )


DEMO = Command(
    "demo", "aligns the embedded pipeline with MaPO, in a few minutes on two CPU cores", [DemoOptions], _run_demo
)
