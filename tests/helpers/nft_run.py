"""One process of a run of DiffusionNFT online: trains, then writes where it ended and what a failing reward did."""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from PIL import ImageStat

from helpers.pipelines import build_tiny_pipeline
from trl_diffusion_pref.algorithms.diffusion_nft.config import DiffusionNFTConfig
from trl_diffusion_pref.algorithms.diffusion_nft.generation import OnlineRewardError
from trl_diffusion_pref.algorithms.diffusion_nft.trainer import DiffusionNFTTrainer
from trl_diffusion_pref.shapes import prompts


def brightness(prompts, samples, **columns):
    return [ImageStat.Stat(sample.convert("L")).mean[0] / 255 for sample in samples]


def main() -> None:
    torch.set_num_threads(1)
    folder, batch = Path(sys.argv[1]), int(sys.argv[2])
    data = Dataset.from_dict({"prompt": prompts()[:4]})

    def trainer(name, reward) -> DiffusionNFTTrainer:
        config = DiffusionNFTConfig(
            output_dir=str(folder / name),
            dataset_cache_dir=str(folder / "cache"),
            start="noise",
            prompts_per_rollout=2,
            num_generations=4,
            num_inference_steps=2,
            sampling_batch_size=1,
            per_device_train_batch_size=batch,
            max_steps=3,
            optim="sgd",
            max_grad_norm=0.0,
            learning_rate=1e-2,
            save_strategy="no",
            activation_checkpointing=False,
            divergence_guard="off",
            disable_tqdm=True,
            report_to="none",
            use_cpu=True,
        )
        return DiffusionNFTTrainer(build_tiny_pipeline(), config, data, reward_funcs=reward)

    whole = trainer("whole", brightness)
    whole.train()
    rank, calls = whole.args.process_index, []

    def fails_in_the_last_process(prompts, samples, **columns):
        calls.append(len(samples))
        if rank == whole.args.world_size - 1 and len(calls) > 1:
            raise OSError("gone")
        return brightness(prompts, samples)

    try:
        trainer("failing", fails_in_the_last_process).train()
        failure = "none"
    except OnlineRewardError as error:
        failure = str(error)
    weights = {name: tensor.double().sum().item() for name, tensor in whole.model.state_dict().items()}
    seen = {"weights": weights, "own": sorted(whole.rollouts.rows), "failure": failure}
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
