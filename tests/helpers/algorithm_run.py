"""One process of tests/contracts/test_algorithms.py: trains, is killed, goes on, or shares steps of four rows.

python algorithm_run.py <algorithm> <folder> train|kill|resume|share|share-lora|share-fsdp|share-fsdp-lora
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from helpers.algorithms import trainer_for
from helpers.processes import world_size
from helpers.sharding import FSDP, options_of, shard_on_a_cpu


class KillAfter(TrainerCallback):
    """Kills the process when a step has been saved, in the middle of the next one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def weights(model: torch.nn.Module) -> float:
    return sum(parameter.detach().double().square().sum().item() for parameter in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    name, folder, what = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    options = {"save_strategy": "steps", "save_steps": 1, "use_cpu": True}
    if what.startswith("share"):
        # Adam would make much of gradients near 0, which differ by rounding.
        batch = 4 // world_size()
        options |= {"per_device_train_batch_size": batch, "optim": "sgd", "learning_rate": 1e-2}
    if "fsdp" in what:
        options |= options_of(name)
        # One process has nothing to shard.
        if world_size() > 1:
            shard_on_a_cpu()
            options |= FSDP
    trainer = trainer_for(name, folder, what.endswith("lora"), **options)
    if what == "kill":
        trainer.add_callback(KillAfter(2))
    seen = {}
    if not trainer.is_fsdp_enabled:
        seen = {"start": weights(trainer.model), "before": trainer.evaluate()["eval_loss"]}
    trainer.train(resume_from_checkpoint=what == "resume")
    trainer.save_model()
    if not trainer.is_fsdp_enabled:
        seen["weights"] = weights(trainer.model)
    seen["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / f"rank-{trainer.args.process_index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
