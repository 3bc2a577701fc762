"""One process of tests/training/test_preemption.py: trains until a signal ends it, or to the end.

python preempted_run.py <folder> [signal <step> <rank>]

With a signal it sends that to its own process after so many steps, in the rank given.
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


class Ask(TrainerCallback):
    """Sends the signal in the middle of a step, as a cluster's manager does."""

    def __init__(self, number: int, step: int, rank: int) -> None:
        self.number, self.step, self.rank = number, step, rank

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and args.process_index == self.rank:
            os.kill(os.getpid(), self.number)


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    # Of each step two micro-batches, and no checkpoint is due.
    options = {"per_device_train_batch_size": 2 // world_size(), "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "no", "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "use_cpu": True}
    trainer = trainer_for("diffusion-dpo", folder, max_steps=6, reference="copy", **options)
    if len(sys.argv) > 2:
        name, step, rank = sys.argv[2:]
        trainer.add_callback(Ask(getattr(signal, name), int(step), int(rank)))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    if trainer.args.process_index == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: value.double().sum().item() for name, value in trainer.model.state_dict().items()}
        (folder / "result.json").write_text(json.dumps({"weights": weights, "losses": [e["loss"] for e in logs]}))


if __name__ == "__main__":
    main()
