import ast
import dataclasses
import re
import textwrap
import typing
import warnings
from contextlib import nullcontext

import pytest
import torch
from transformers import TrainingArguments
from trl import TrlParser

from trl_diffusion_pref import DiffusionDPOConfig, DiffusionSFTConfig, FlowRWRConfig, MaPOConfig, SelfNPOConfig
from trl_diffusion_pref.algorithms.self_npo.config import PRESETS
from trl_diffusion_pref.diffusion.noise import TIMESTEP_SAMPLINGS
from trl_diffusion_pref.shapes import preference_pairs
from trl_diffusion_pref.training.config import DiffusionPreferenceConfig, documented
from trl_diffusion_pref.training.option_checks import range_in_words


CONFIGS = [DiffusionPreferenceConfig, MaPOConfig, DiffusionDPOConfig, SelfNPOConfig, DiffusionSFTConfig, FlowRWRConfig]


@pytest.mark.parametrize("config_class", CONFIGS)
def test_the_defaults_run_on_this_machine_without_a_warning(config_class, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = config_class(output_dir=str(tmp_path))
        # A copy takes what the first one made of its options.
        assert dataclasses.replace(config) == config
    assert config.bf16 is (torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False))
    assert config.dataloader_pin_memory is torch.cuda.is_available()
    assert config.activation_checkpointing is config.gradient_checkpointing is True
    assert config.checkpointing_is_default


@pytest.mark.newest
def test_checkpointing_can_be_switched_off_by_either_name(tmp_path):
    assert MaPOConfig(output_dir=str(tmp_path), activation_checkpointing=False).activation_checkpointing is False
    # Older versions of transformers know this name alone, and do not warn.
    deprecated = "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    with pytest.warns(FutureWarning, match="gradient_checkpointing") if deprecated else nullcontext():
        assert MaPOConfig(output_dir=str(tmp_path), gradient_checkpointing=False).activation_checkpointing is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": "left"}, "crop='left' is none of center, random"),
        ({"latent_sampling": "mode"}, "latent_sampling='mode' is none of sample, mean"),
        ({"resolution": 0}, "resolution=0"),
        ({"prompt_dropout": 1.0}, "prompt_dropout=1.0 is outside"),
        ({"encode_batch_size": 0}, "encode_batch_size=0"),
        ({"loss_type": "orpo"}, "none of mapo, mapo_v2"),
        ({"beta": -1.0}, "negative"),
        ({"beta": 0.0, "loss_type": "mapo_v2"}, "divides by beta"),
        ({"snr_value": 0.0}, "snr_value=0.0"),
        # Numbers and types
        ({"beta": float("nan")}, "beta=nan: it must be a finite number"),
        ({"snr_value": float("inf")}, "snr_value=inf: it must be a finite number"),
        ({"weight_decay": float("inf")}, "weight_decay=inf: it must be a finite number"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5': it must be a number"),
        ({"snr_value": True}, "snr_value=True: it must be a number"),
        ({"max_steps": 2.5}, "max_steps=2.5: it must be a whole number"),
        ({"encode_batch_size": True}, "encode_batch_size=True: it must be a whole number"),
        ({"num_frames": 4.0}, "num_frames=4.0: it must be a whole number"),
        ({"random_flip": "False"}, "random_flip='False': it must be True or False"),
        ({"crop": None}, "crop=None: set a value, or leave it out for 'center'"),
        # The two losses
        ({"loss_type": "mapo_v2"}, "loss_type='mapo_v2' needs beta"),
        (
            {"loss_type": "mapo_v2", "beta": 8.0, "snr_value": 0.4},
            "snr_value=0.4 does nothing with loss_type",
        ),
        # The loop's options
        ({"learning_rate": -1.0}, "learning_rate=-1.0: it must be at least 0"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: it must be at least 0"),
        ({"adam_beta2": 1.0}, r"adam_beta2=1.0 is outside \[0, 1\)"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0: it must be at least 1"),
        ({"per_device_eval_batch_size": -2}, "per_device_eval_batch_size=-2: it must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0: it must be at least 1"),
        ({"max_steps": 0}, "max_steps=0: it must be at least 1, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs=0: it must be positive"),
        ({"save_steps": 0}, "save_steps=0: with save_strategy='steps'"),
        ({"save_steps": 1.5}, "save_steps=1.5: with save_strategy='steps'"),
        ({"logging_steps": -1}, "logging_steps=-1: with logging_strategy='steps'"),
        ({"eval_strategy": "steps", "eval_steps": 0}, "eval_steps=0: with eval_strategy='steps'"),
        ({"eval_strategy": "always"}, "eval_strategy='always' is none of no, steps, epoch"),
        ({"seed": -1}, "seed=-1 is outside"),
        ({"data_seed": 2**32}, "data_seed=4294967296 is outside"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is for .*Leave it out"),
        ({"report_to": "scrapbook"}, "report_to='scrapbook' is no tracker that transformers knows"),
        ({"report_to": ["clearml"]}, "report_to='clearml': it is not installed"),
        # Schedules
        ({"lr_scheduler_type": "sine"}, "lr_scheduler_type='sine' is none of linear, cosine"),
        ({"warmup_steps": -1, "lr_scheduler_type": "linear"}, "warmup_steps=-1: it must be at least 0"),
        ({"warmup_steps": 5}, "warmup_steps=5 does nothing with lr_scheduler_type='constant'"),
        ({"lr_scheduler_kwargs": {"power": 2}}, "'constant': this schedule takes no options"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"power": 2}}, "'cosine': .*'power'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "'cosine_with_min_lr': .*min_lr"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        # Metrics
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model='accuracy' is not returned .*rewards/margins"),
        ({"metric_for_best_model": "eval_mse/ref_chosen"}, "metric_for_best_model='eval_mse/ref_chosen'"),
        ({"metric_for_best_model": "preference_accuracy", "eval_draws": 0}, "with eval_draws above 0"),
    ],
)
def test_bad_options_are_refused_by_name(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        MaPOConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        (DiffusionDPOConfig, {"sft_weight": float("nan")}, "sft_weight=nan: it must be a finite number"),
        (DiffusionDPOConfig, {"label_smoothing_factor": 0.1}, "Use label_smoothing."),
        (DiffusionDPOConfig, {"dmpo_alpha": 0.1}, "dmpo_alpha=0.1 does nothing .*only with loss_type='dmpo'"),
        (DiffusionDPOConfig, {"soft_label": 0.9}, "soft_label=0.9 does nothing .*only with loss_type='irepo'"),
        (DiffusionDPOConfig, {"soft_label_column": "p"}, "soft_label_column='p' does nothing"),
        (DiffusionDPOConfig, {"reference_draws": 4}, "reference_draws=4 does nothing with reference='auto'"),
        (DiffusionDPOConfig, {"reference_errors_dir": "x"}, "reference_errors_dir='x' does nothing"),
        (DiffusionDPOConfig, {"margin_clip": 1.0, "loss_type": "dspo"}, "margin_clip=1.0 does nothing"),
        (DiffusionDPOConfig, {"ref_model_mixup_alpha": 0.5}, "only with sync_ref_model=True"),
        (DiffusionDPOConfig, {"ref_model_sync_steps": 5}, "ref_model_sync_steps=5 does nothing"),
        (DiffusionDPOConfig, {"divergence_margin": 1.0, "divergence_guard": "off"}, "divergence_margin=1.0 does noth"),
        (DiffusionDPOConfig, {"divergence_window": 9, "divergence_guard": "off"}, "'stop' or divergence_guard='warn'"),
        (SelfNPOConfig, {"ema_decay": 0.9, "teacher": "frozen"}, "ema_decay=0.9 does nothing .*teacher='ema'"),
        (SelfNPOConfig, {"huber_c": 0.1, "preset": "paper"}, "huber_c=0.1 does nothing with loss_type='l2'"),
        (SelfNPOConfig, {"metric_for_best_model": "rewards/margins"}, "loss, x0_error"),
        (FlowRWRConfig, {"temperature": 0.5, "weighting": "raw"}, "temperature=0.5 does nothing with weighting='raw'"),
    ],
)
def test_options_without_an_effect_are_refused(config_class, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config_class(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"logging_steps": 0.1, "save_steps": 0.5, "eval_strategy": "steps", "eval_steps": 0.25},
        {"save_steps": 0, "save_strategy": "no", "learning_rate": 0.0, "max_grad_norm": float("inf")},
        {"max_grad_norm": None, "num_train_epochs": 0, "max_steps": 5, "seed": 2**32 - 1},
        {"warmup_steps": 5, "lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr": 1e-7}'},
        {"metric_for_best_model": "eval_held_out_likelihood_accuracy", "report_to": "all"},
        {"loss_type": "mapo_v2", "beta": 64},
    ],
    ids=str,
)
def test_what_the_loop_can_use_is_accepted(options, tmp_path):
    MaPOConfig(output_dir=str(tmp_path), **options)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"output_dir='.*runs': .*file is a file"):
        MaPOConfig(output_dir=str(tmp_path / "file" / "runs"))


@pytest.mark.parametrize(
    ("options", "evaluation", "message"),
    [
        ({"eval_strategy": "epoch"}, None, "eval_strategy='epoch' needs an eval_dataset"),
        ({"eval_on_start": True}, None, "eval_on_start=True needs an eval_dataset"),
        ({"metric_for_best_model": "b_loss"}, "one", "metric_for_best_model='b_loss'"),
        ({"metric_for_best_model": "loss"}, "named", "which has a_loss, .*b_loss"),
        ({"max_steps": -1}, "one", "max_steps=-1: train_dataset is streamed"),
        ({"reference": "precomputed"}, "one", "train_dataset is streamed. Use another reference"),
    ],
)
def test_what_the_data_sets_do_not_allow_is_refused(options, evaluation, message, tmp_path):
    pairs = preference_pairs(2)
    config = DiffusionDPOConfig(output_dir=str(tmp_path), **{"max_steps": 1, **options})
    with pytest.raises(ValueError, match=message):
        config.check_data(
            pairs.to_iterable_dataset(), {None: None, "one": pairs, "named": {"a": pairs, "b": pairs}}[evaluation]
        )


def test_what_the_data_sets_allow_is_accepted(tmp_path):
    pairs = preference_pairs(2)
    config = DiffusionDPOConfig(output_dir=str(tmp_path), eval_strategy="epoch", metric_for_best_model="b_mse/chosen")
    config.check_data(pairs, {"a": pairs, "b": pairs})
    assert config.greater_is_better is False


@pytest.mark.parametrize("config_class", CONFIGS)
def test_every_option_of_ours_has_its_docstring_s_text_as_help(config_class):
    text = " ".join(config_class.__doc__.split())
    for field in dataclasses.fields(config_class):
        if field.name in config_class.__annotations__:
            assert re.search(rf" {field.name} \(`[^)]*\): {re.escape(field.metadata['help'])}", text), field.name


@pytest.mark.parametrize("config_class", CONFIGS)
def test_defaults_in_docstrings_are_the_options_defaults(config_class):
    for name, default in re.findall(r"^ +(\w+) \(.*defaults to `(.+)`\):$", config_class.__doc__, re.MULTILINE):
        assert ast.literal_eval(default) == config_class.__dataclass_fields__[name].default, name


class TestDocumented:
    def test_a_help_is_one_paragraph_and_a_base_class_keeps_its_own(self):
        @documented
        @dataclasses.dataclass
        class Config(DiffusionPreferenceConfig):
            """
            Args:
                crop (`str`):
                    All of 100%
                    of it.

                    Not this.
                zoom (`int`):
                    How much.
            """

            crop: str = "all"
            zoom: int = 1
            pan: int = dataclasses.field(default=0, metadata={"help": "To the side."})

        helps = {field.name: field.metadata.get("help") for field in dataclasses.fields(Config)}
        assert (helps["crop"], helps["zoom"], helps["pan"]) == ("All of 100%% of it.", "How much.", "To the side.")
        base = {field.name: field.metadata.get("help") for field in dataclasses.fields(DiffusionPreferenceConfig)}
        assert base["crop"].startswith("Where an image") and helps["resolution"] == base["resolution"]

    @pytest.mark.parametrize("text", ["", "zoom (`int`):\n    How much.\npan (`int`):\n    To the side."])
    def test_an_option_without_a_text_or_a_text_without_an_option_raises(self, text):
        @dataclasses.dataclass
        class Config(DiffusionPreferenceConfig):
            zoom: int = 1

        Config.__doc__ = textwrap.indent(f"Options.\n\n{text}\n", "    ")
        with pytest.raises(TypeError, match=f"Config: {'pan' if text else 'zoom'}: every option"):
            documented(Config)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_helps_give_the_ranges_that_are_checked(config_class):
    for name, interval in config_class._ranges.items():
        assert range_in_words(interval) in config_class.__dataclass_fields__[name].metadata["help"], name


@pytest.mark.parametrize(
    ("config_class", "option", "choices"),
    [
        (SelfNPOConfig, "preset", tuple(PRESETS)),
        (MaPOConfig, "timestep_sampling", TIMESTEP_SAMPLINGS),
    ],
)
def test_choices_are_those_of_the_code_that_reads_them(config_class, option, choices):
    hint = typing.get_type_hints(config_class)[option]
    literal = hint if typing.get_origin(hint) is typing.Literal else typing.get_args(hint)[0]
    assert typing.get_args(literal) == choices


class TestParser:
    def parse(self, tmp_path, *arguments, config_class=MaPOConfig):
        (config,) = TrlParser((config_class,)).parse_args_and_config(["--output_dir", str(tmp_path), *arguments])
        return config

    def test_options_parse_from_a_command_line(self, tmp_path):
        config = self.parse(
            tmp_path, "--beta", "0.25", "--random_flip", "False", "--model_init_kwargs", '{"a": 1}', "--negative"
        )
        assert (config.beta, config.random_flip, config.model_init_kwargs) == (0.25, False, {"a": 1})
        assert (config.negative, config.timestep_sampling, config.lr_scheduler_type) == (True, None, "constant")

    def test_a_dtype_in_text_is_torch_s(self, tmp_path):
        config = self.parse(tmp_path, "--model_init_kwargs", '{"dtype": "bfloat16"}')
        assert config.loading == {"dtype": torch.bfloat16}
        with pytest.raises(ValueError, match="dtype='bf16' is no dtype of torch"):
            MaPOConfig(output_dir=str(tmp_path), model_init_kwargs={"dtype": "bf16"})

    def test_choices_are_the_parser_s_own(self, tmp_path, capsys):
        arguments = ("--loss_type", "mapo_v2", "--beta", "8", "--timestep_sampling", "mode")
        config = self.parse(tmp_path, *arguments)
        assert (config.loss_type, config.beta, config.timestep_sampling) == ("mapo_v2", 8.0, "mode")
        with pytest.raises(SystemExit):
            self.parse(tmp_path, "--teacher", "none", config_class=SelfNPOConfig)
        assert "choose from" in capsys.readouterr().err

    @pytest.mark.parametrize("config_class", CONFIGS)
    def test_the_help_page_shows_every_option(self, config_class):
        page = TrlParser((config_class,)).format_help()
        assert all(f"--{field.name}" in page for field in dataclasses.fields(config_class) if field.init)

    @pytest.mark.parametrize(("text", "value"), [("True", True), ("true", True), ("False", False), ("run/a", "run/a")])
    def test_resuming_can_be_asked_for_as_in_yaml(self, text, value, tmp_path):
        assert self.parse(tmp_path, "--resume_from_checkpoint", text).resume_from_checkpoint == value

    def test_yaml_values_are_checked_like_others(self, tmp_path):
        file = tmp_path / "options.yaml"
        file.write_text("loss_type: mapo_v2\nbeta: 8\nlearning_rate: 1e-5\nresume_from_checkpoint: true\n")
        config = self.parse(tmp_path, "--config", str(file))
        assert (config.loss_type, config.beta, config.learning_rate) == ("mapo_v2", 8, 1e-5)
        assert config.resume_from_checkpoint is True
        file.write_text("crop: left\n")
        with pytest.raises(ValueError, match="crop='left' is none of"):
            self.parse(tmp_path, "--config", str(file))
