"""Unfinished trajectories, kept from one training step to the next."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
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

    def save(self, folder: Path, process: int) -> None:
        """Writes the pool of one process."""
        tensors = {
            f"{slot}/{name}": tensor.detach().cpu().clone()
            for slot, stored in self._slots.items()
            for name, tensor in stored.items()
        }
        save_file(tensors, folder / self.file_name(process))

    def load(self, folder: Path, process: int, device: torch.device) -> None:
        """Reads what `save` wrote."""
        self.clear()
        for key, tensor in load_file(folder / self.file_name(process)).items():
            slot, name = key.split("/", 1)
            self._slots.setdefault(int(slot), {})[name] = tensor if name == "position" else tensor.to(device)
