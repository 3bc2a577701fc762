"""Unfinished trajectories, kept from one training step to the next."""

from typing import Any

import torch
from torch import Tensor


_CONDITIONING = "conditioning/"


class TrajectoryPool:
    """One trajectory per slot: latents, position on the solver's grid, and the prompt's conditioning.

    A slot is a sample's place within the optimiser step of one process, so that the pool is as large as a step's
    batch, however it is split into micro-batches.

    Args:
        device: Where latents and conditioning are.
        depends_on: What a stored trajectory's place and latents depend on, by name.
    """

    def __init__(self, device: torch.device, depends_on: dict[str, Any]) -> None:
        self.device, self._depends_on = device, depends_on
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

    # ---- Checkpoints ---------------------------------------------------------------------------------------------

    description = "trajectories"
    per_process = True

    def reset(self) -> None:
        """Forgets all trajectories."""
        self._slots.clear()

    def state_dict(self) -> dict[str, Tensor]:
        return {f"{slot}/{name}": tensor for slot, stored in self._slots.items() for name, tensor in stored.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.reset()
        for key, tensor in state.items():
            slot, name = key.split("/", 1)
            self._slots.setdefault(int(slot), {})[name] = tensor if name == "position" else tensor.to(self.device)

    def depends_on(self) -> dict[str, Any]:
        return self._depends_on
