"""Every algorithm of the package and the made-up ones, each with rows and a trainer on the tiny pipeline."""

from pathlib import Path

from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig

from trl_diffusion_pref.algorithms import TRAINERS
from trl_diffusion_pref.shapes import preference_pairs

from . import ranking, votes
from .pipelines import build_tiny_pipeline


ALL = TRAINERS | {
    "votes": (votes.VoteConfig, votes.VoteTrainer),
    "ranking": (ranking.RankingConfig, ranking.RankingTrainer),
}


def rows(name: str) -> Dataset:
    """Eight rows in the algorithm's layout."""
    pairs = preference_pairs(8, seed=7)
    if name == "votes":
        labels = [float(index % 2) for index in range(8)]
        return pairs.rename_column("chosen", "image").remove_columns("rejected").add_column("label", labels)
    if name == "flow-rwr":
        rewards = [0.1 * index for index in range(8)]
        return pairs.rename_column("chosen", "image").remove_columns("rejected").add_column("reward", rewards)
    if name in ("ranking", "rank-dpo"):
        columns = {"prompt": pairs["prompt"], "scores": [[1.0, 0.2, -0.5]] * 8}
        columns["images"] = [[row["chosen"], row["rejected"], pairs[i - 1]["rejected"]] for i, row in enumerate(pairs)]
        kinds = {"prompt": Value("string"), "scores": List(Value("float32")), "images": List(Image())}
        return Dataset.from_dict(columns, features=Features(kinds))
    return pairs


def config_for(name: str, folder: Path, **options):
    """Of a short run of an algorithm."""
    config_class, _ = ALL[name]
    defaults = {
        "output_dir": str(folder / "output"),
        "dataset_cache_dir": str(folder / "cache"),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "activation_checkpointing": False,
        "report_to": "none",
    }
    guard = {"divergence_guard": "off"} if hasattr(config_class, "divergence_guard") else {}
    return config_class(**{**defaults, **guard, **options})


def trainer_for(name: str, folder: Path, lora: bool = False, **options):
    config, data = config_for(name, folder, **options), rows(name)
    peft_config = LoraConfig(r=2, lora_alpha=4) if lora else None
    return ALL[name][1](build_tiny_pipeline(), config, data, data.select(range(3)), peft_config=peft_config)
