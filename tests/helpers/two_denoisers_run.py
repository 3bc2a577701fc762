"""One process of tests/training/test_two_denoisers.py: trains both transformers, one video in each process."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_from_disk

from helpers.recorder import Recorder
from helpers.tiny_wan_2_2 import build_wan_2_2
from trl_diffusion_pref import MaPOConfig, MaPOTrainer


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    config = MaPOConfig(
        output_dir=str(folder / "output"),
        dataset_cache_dir=str(folder / "cache"),
        per_device_train_batch_size=1,
        max_steps=6,
        learning_rate=1e-3,
        resolution=16,
        num_frames=5,
        save_strategy="no",
        activation_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    pipeline = build_wan_2_2()
    recorders = [Recorder(pipeline.transformer), Recorder(pipeline.transformer_2)]
    trainer = MaPOTrainer(pipeline, config, load_from_disk(sys.argv[2]))
    trainer.train()
    seen = {
        "calls": [len(recorder.calls) for recorder in recorders],
        "weights": {name: tensor.double().sum().item() for name, tensor in trainer.model.state_dict().items()},
    }
    (folder / f"rank-{config.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
