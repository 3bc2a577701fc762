"""From words and YAML to options: both give the same, and what cannot be used is one line that names it."""

import dataclasses
import json
import subprocess
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import yaml
from accelerate import PartialState

from trl_diffusion_pref import TRAINERS, SelfNPOConfig
from trl_diffusion_pref.cli import UsageError, check, launch, main, sampling_commands
from trl_diffusion_pref.cli.commands import commands
from trl_diffusion_pref.cli.run_options import LaunchOptions


FILE = ["--dataset_name", "pairs.jsonl"]
RUN = ["--model_name_or_path", "shapes", "--dataset_name", "shapes:8"]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "a.png", "rejected": "b.png"}\n')
    return tmp_path


def written(folder, content) -> str:
    (folder / "run.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return "run.yaml"


@pytest.mark.parametrize("name", TRAINERS)
def test_flags_and_yaml_agree_on_every_kind_of_option(name, in_folder):
    options = {
        "output_dir": "there",
        "max_steps": 7,
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "use_cpu": True,
        "activation_checkpointing": False,
        "report_to": "none",
        "prompt_dropout": 0.25,
        "run_name": "2024",
        "model_init_kwargs": {"variant": "fp16"},
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "use_peft": True,
        "lora_target_modules": ["to_q", "to_v"],
        "dataset_weights": [0.5, 1.5],
        "resume_from_checkpoint": True,
    }
    words = [*RUN[:3], "shapes:8", "shapes:9"]
    for option, value in options.items():
        entries = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
        words += [f"--{option}", *map(str, entries)]
    file = {"model_name_or_path": "shapes", "dataset_name": ["shapes:8", "shapes:9"], **options}
    by_flags = check([name, *words])
    by_file = check([name, "--config", written(in_folder, file)])
    for flags, from_file in zip(by_flags.options, by_file.options, strict=True):
        values, others = ({k: str(v) for k, v in vars(entry).items() if k[0] != "_"} for entry in (flags, from_file))
        # Time and place of the run.
        for changing in ("logging_dir", "distributed_state"):
            values.pop(changing, None), others.pop(changing, None)
        assert values == others
    config = by_flags.options[-1]
    assert (config.max_steps, config.learning_rate, config.model_init_kwargs) == (7, 3e-4, {"variant": "fp16"})
    assert config.resume_from_checkpoint is True and config.run_name == "2024"
    assert set(by_file.origins.values()) == {"run.yaml"}


def test_flags_win_over_the_file(in_folder):
    file = written(in_folder, {"max_steps": 5, "seed": 3, "model_name_or_path": "other"})
    parsed = check(["mapo", *RUN, "--config", file, "--max-steps", "9"])
    assert (parsed.options[-1].max_steps, parsed.options[-1].seed) == (9, 3)
    assert parsed.options[0].model_name_or_path == "shapes"
    assert (parsed.origins["max_steps"], parsed.origins["seed"]) == ("--max_steps", "run.yaml")


@pytest.mark.parametrize("name", TRAINERS)
def test_every_option_of_a_config_is_a_flag_under_a_subject(name, capsys):
    with pytest.raises(SystemExit) as exit:
        main([name, "--help"])
    page = capsys.readouterr().out
    assert exit.value.code == 0
    for field in dataclasses.fields(TRAINERS[name][0]):
        assert f"\n  --{field.name} " in page
    assert "Training:\n" in page and "Learning Rate & Scheduler:\n" in page and "Data sets:\n" in page


def test_every_command_explains_each_of_its_options(capsys):
    for name, command in commands().items():
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert command.summary.split()[0].capitalize() in capsys.readouterr().out
        unexplained = [action.dest for action in command.parser()._actions if not action.help]
        assert not unexplained, name
        further = [group for group in command.parser()._action_groups if group.title == "Further options"]
        # transformers' options may lack a subject.
        if not any(kind.__name__.endswith("Config") for kind in command.kinds):
            assert not further[0]._group_actions, name


def one_line(capsys, argv, *parts):
    assert main(argv) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and not printed.out, printed
    for part in parts:
        assert part in lines[0], lines[0]


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["mapoo"], ["'mapoo'", "mapo"]),
        (["inspekt", "x"], ["'inspekt'", "inspect"]),
        (["mapo", *RUN, "--learning_rat", "1"], ["--learning_rat", "--learning_rate"]),
        (["mapo", *RUN, "--max_step=3"], ["--max_step", "--max_steps"]),
        (["mapo", *RUN, "--max_steps", "many"], ["--max_steps", "many"]),
        (["mapo", *RUN, "--loss_type", "dpo"], ["--loss_type", "dpo", "mapo_v2"]),
        (["mapo", "--dataset_name", "shapes"], ["model_name_or_path", "missing"]),
        (["mapo", *RUN, "--config", "no.yaml"], ["no.yaml"]),
        (["mapo", *RUN, "--beta", "-1"], ["beta", "-1"]),
        (["mapo", *RUN, "--lora_r", "4"], ["lora_r", "--use_peft"]),
        (["mapo", *RUN, "--num_processes", "4"], ["num_processes", "accelerate_config"]),
        (["mapo", *RUN, "--accelerate_config", "fsdp"], ["'fsdp'", "fsdp2"]),
        (["mapo", *RUN, "stray"], ["'shapes:8'", "shapes:512"]),
        (["mapo", "stray", *RUN], ["'stray'", "--"]),
        (["mapo", *RUN, "--seed", "1", "--seed=2"], ["--seed", "twice"]),
        (["mapo", *RUN, "--model_init_kwargs", '{"a":x}'], ["--model_init_kwargs", "no JSON"]),
        (["mapo", *RUN, "--num_processes", "0", "--accelerate_config", "single_gpu"], ["num_processes=0"]),
        (["mapo", *RUN[:2], "--dataset_name", "no/where.jsonl"], ["no/where.jsonl"]),
        (["mapo", *RUN, "--dataset_train_split", "tst"], ["shapes:8", "train and test", "'tst'"]),
        (["mapo", *RUN, "--dataset_weights", "1", "2"], ["dataset_weights", "2 numbers for 1"]),
        (["mapo", *RUN, "--dataset_weights", "0"], ["dataset_weights", "0.0", "positive"]),
        (["mapo", "--model_name_or_path", "no/where", *RUN[2:]], ["no/where"]),
        (["mapo", *RUN[:2], *FILE, "--eval_strategy", "epoch"], ["pairs.jsonl", "no splits", "--eval_dataset_name"]),
        (["mapo", *RUN[:2], *FILE, "--dataset_train_split", "test"], ["pairs.jsonl", "no splits", "dataset_train"]),
        (["mapo", *RUN, "--eval_dataset_name", "shapes:4"], ["eval_dataset_name", "--eval_strategy"]),
        (["encode", *RUN, "--trainer", "mappo"], ["'mappo'", "mapo"]),
        (
            [
                "make-pairs",
                "--model_name_or_path",
                "shapes",
                "--prompts",
                "p.txt",
                "--output",
                "o",
                "--rewards",
                "shapes",
            ],
            ["p.txt"],
        ),
        (
            ["compare", "--model_name_or_path", "shapes", "--tuned", "a", "b/a", "--prompts", "p", "--output", "o"],
            ["a"],
        ),
        (["score", "shapes:4", "--rewards", "PickScor", "--output", "o"], ["'PickScor'", "PickScore"]),
        (["score", "shapes:4", "--rewards", "nowhere:f", "--output", "o"], ["'nowhere:f'"]),
        (["score", "shapes:4", "--output", "o"], ["rewards", "PickScore"]),
        (["export", "a", "b", "--dtype", "float16"], ["--merge"]),
        (["push", "no/folder", "me/name"], ["no/folder"]),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:]) if value and value[0] in commands() else "",
)
def test_what_cannot_be_used_is_one_line_with_status_2(argv, parts, capsys, in_folder):
    if "stray" == argv[-1]:
        # A word behind a list of data sets is one of them.
        parts = ["stray"]
    one_line(capsys, argv, *parts)


@pytest.mark.parametrize(
    "content, parts",
    [
        ("max_step: 3", ["run.yaml", "'max_step'", "max_steps"]),
        ("max_steps: 3\nseed: 1\nmax_steps: 4", ["run.yaml", "max_steps", "twice", "lines 1 and 3"]),
        ("max_steps: many", ["run.yaml", "max_steps", "'many'", "whole number"]),
        ("max_steps: true", ["run.yaml", "max_steps", "true", "whole number"]),
        ("max_steps: [1, 2]", ["run.yaml", "max_steps", "list"]),
        ("max_steps: {a: 1}", ["run.yaml", "max_steps", "mapping"]),
        ("max_steps:", ["run.yaml", "max_steps", "empty"]),
        ("use_cpu: maybe", ["run.yaml", "use_cpu", "'maybe'", "true or false"]),
        ("loss_type: dpo", ["run.yaml", "loss_type", "'dpo'", "mapo_v2"]),
        ("- a\n- b", ["run.yaml", "list"]),
        ("a: [", ["run.yaml", "YAML"]),
        ("env: {A: 1}", ["run.yaml", "'env'"]),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(content, parts, capsys, in_folder):
    one_line(capsys, ["mapo", *RUN, "--config", written(in_folder, content)], *parts)


def test_a_plain_no_in_yaml_is_the_choice_no(in_folder):
    assert check(["mapo", *RUN, "--config", written(in_folder, "save_strategy: no")]).options[-1].save_strategy == "no"


def test_the_trainer_of_a_file_decides_about_the_options(in_folder, capsys):
    file = written(in_folder, "trainer: self-npo\nsolver_steps: 4\ntruncated_steps: 2\nuse_peft: true\nlora_r: 4")
    for command, more in (("encode", RUN), ("estimate-memory", RUN[:2])):
        parsed = check([command, *more, "--config", file])
        assert isinstance(parsed.options[-1], SelfNPOConfig) and parsed.options[-1].solver_steps == 4
    one_line(capsys, ["encode", *RUN, "--config", written(in_folder, "trainer: mappo")], "'mappo'", "self-npo")


def test_launching_follows_the_run_s_precision_and_the_user_s_file(in_folder, monkeypatch):
    """A file that comes with the package has no precision of its own; one of the user's is taken as it is."""
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert launch.launch(LaunchOptions(accelerate_config="single_gpu"), "mapo", ["--seed", "1"], "no") == 0
    (in_folder / "accelerate_configs").mkdir()
    own = in_folder / "accelerate_configs" / "mine.yaml"
    own.write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 8\nmixed_precision: fp16\n")
    assert launch.launch(LaunchOptions(accelerate_config=str(own)), "mapo", [], "no") == 0
    shipped, mine = launched
    assert (shipped.mixed_precision, shipped.num_processes) == ("no", 1)
    assert (
        shipped.training_script_args == ["mapo", "--seed", "1"] and "trl_diffusion_pref.cli" in shipped.training_script
    )
    assert mine.num_processes is None and mine.mixed_precision is None and mine.config_file == str(own)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UsageError, match="torchrun or accelerate"):
        launch.launch(LaunchOptions(accelerate_config="single_gpu"), "mapo", [], "no")


def test_a_folder_s_name_may_have_an_equals_sign(in_folder):
    (in_folder / "lr=1e-4").mkdir()
    named = sampling_commands._named_models(["lr=1e-4", "runs/lr=2/dpo", "mine=runs/lr=3", "me/model"])
    assert named == {"lr=1e-4": "lr=1e-4", "dpo": "runs/lr=2/dpo", "mine": "runs/lr=3", "model": "me/model"}


def test_held_out_rows_are_read_without_choosing_a_device(in_folder):
    """A config that asked for the CPU would move everything after it there."""
    PartialState._reset_state()
    sampling_commands.RowsOptions(dataset_name="shapes:4").read()
    assert not PartialState._shared_state.get("_cpu")


def test_debug_shows_the_traceback():
    for argv in (["--debug", "mapoo"], ["mapo", *RUN, "--no_such", "--debug"]):
        with pytest.raises(UsageError, match="There is no"):
            main(argv)
    # Before a value it is transformers' own option.
    assert check(["mapo", *RUN, "--debug", "underflow_overflow"]).options[-1].debug == ["underflow_overflow"]


def test_choices_of_commands_are_those_of_the_functions(in_folder):
    """A command's options are made from the function's signature."""
    from trl_diffusion_pref import make_pairs

    parsed = check(["make-pairs", *RUN[:2], "--prompts", "p", "--output", "o", "--strategy", "all"])
    hints = get_type_hints(make_pairs)
    assert get_origin(hints["strategy"]) is Literal and "all" in get_args(hints["strategy"])
    assert parsed.options[0].strategy == "all" and parsed.options[0].samples_per_prompt == 4
    with pytest.raises(UsageError, match="--strategy"):
        check(["make-pairs", *RUN[:2], "--prompts", "p", "--output", "o", "--strategy", "worst"])


def test_bash_completes_commands_and_options(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    ask = (
        f"source {script}; COMP_WORDS=({{words}}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        '_shtab_trl_diffusion_pref; echo "${COMPREPLY[@]}"'
    )
    for words, expected in (
        ("trl-diffusion-pref ma", "mapo"),
        ("trl-diffusion-pref mapo --learning_r", "--learning_rate"),
    ):
        asked = ask.replace("{words}", f"trl-diffusion-pref {words}").replace("{{", "{").replace("}}", "}")
        done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
        assert expected in done.stdout.split(), (words, done)
