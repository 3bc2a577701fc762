"""Unfinished trajectories, kept from one training step to the next."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


_CONDITIONING = "conditioning/"


class TrajectoryPool:
    """One trajectory per slot: latents, position on the solver's grid, and the prompt's conditioning.

    A slot is a sample's place within the optimiser step of one process, so that the pool is as large as a step's
    batch, however it is split into micro-batches.
    """

    def __init__(self) -> None:
        self._slots: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def unfinished(self, slot: int) -> bool:
        """Whether a slot holds a trajectory that has not reached the end."""
        return slot in self._slots and int(self._slots[slot]["position"]) > 0

    def get(self, slot: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Latents `(...)`, position `()` and conditioning of a slot."""
        stored = self._slots[slot]
        conditioning = {
            name.removeprefix(_CONDITIONING): tensor
            for name, tensor in stored.items()
            if name.startswith(_CONDITIONING)
        }
        return stored["x"], stored["position"], conditioning

    def put(self, slots: list[int], x: Tensor, position: Tensor, conditioning: dict[str, Tensor]) -> None:
        """Stores a batch, row i in `slots[i]`."""
        for row, slot in enumerate(slots):
            self._slots[slot] = {"x": x[row], "position": position[row].cpu()}
            self._slots[slot] |= {_CONDITIONING + name: tensor[row] for name, tensor in conditioning.items()}

    def clear(self) -> None:
        """Forgets all trajectories."""
        self._slots.clear()

    @staticmethod
    def file_name(process: int) -> str:
        """Where a process keeps its pool within a checkpoint."""
        return f"trajectory_pool-{process}.safetensors"

    def save(self, folder: Path, process: int, record: dict[str, Any]) -> None:
        """Writes the pool of one process, with what its places depend on."""
        tensors = {
            f"{slot}/{name}": tensor.detach().cpu().clone()
            for slot, stored in self._slots.items()
            for name, tensor in stored.items()
        }
        save_file(tensors, folder / self.file_name(process), metadata={"record": json.dumps(record)})

    def load(self, folder: Path, process: int, device: torch.device, record: dict[str, Any]) -> None:
        """Reads what `save` wrote.

        Raises:
            ValueError: The stored trajectories belong to another grid or other latents; the message says what differs.
        """
        self.clear()
        file = folder / self.file_name(process)
        with safe_open(file, "pt") as opened:
            stored = json.loads((opened.metadata() or {}).get("record", "{}"))
            different = [
                f"{key} was {stored.get(key)!r} and is {value!r}"
                for key, value in json.loads(json.dumps(record)).items()
                if stored.get(key) != value
            ]
            if different:
                raise ValueError(
                    f"The trajectories in {file} cannot be continued: {'; '.join(different)}. Resume with the options "
                    "of the run, or start a new one."
                )
            for key in opened.keys():  # noqa: SIM118
                slot, name = key.split("/", 1)
                tensor = opened.get_tensor(key)
                self._slots.setdefault(int(slot), {})[name] = tensor if name == "position" else tensor.to(device)
