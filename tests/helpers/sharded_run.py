"""One process of tests/training/test_sharded.py: trains four steps of four rows and writes the weights.

python sharded_run.py <algorithm> <folder> whole|fsdp full|lora [resume]
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from helpers.algorithms import trainer_for
from helpers.processes import world_size
from helpers.sharding import FSDP, options_of, shard_on_a_cpu


def main() -> None:
    torch.set_num_threads(1)
    name, folder, weights, kind, *resume = sys.argv[1:]
    options = {"per_device_train_batch_size": 4 // world_size(), "use_cpu": True, "optim": "adamw_torch"}
    # With the usual epsilon Adam makes much of gradients near 0, which differ by rounding.
    options |= {"save_strategy": "steps", "save_steps": 2, "learning_rate": 3e-3, "adam_epsilon": 1e-2}
    if weights == "fsdp":
        shard_on_a_cpu()
        options |= FSDP | options_of(name)
    trainer = trainer_for(name, Path(folder), kind == "lora", **options)
    trainer.train(resume_from_checkpoint=bool(resume))
    assert trainer.is_fsdp_enabled == (weights == "fsdp")
    trainer.save_model()
    if trainer.args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
        if not resume:
            # The folder to resume in: as a run that was stopped in its third step leaves it.
            shutil.rmtree(Path(folder) / "output" / "checkpoint-4")


if __name__ == "__main__":
    main()
