"""Several processes of one run, or several nodes, as threads that share what accelerate would have told them."""

import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


class Processes(threading.local):
    """Stands in for `PartialState` and `gather_object` of a module in each of several threads.

    Args:
        monkeypatch: pytest's.
        modules: Where the two names are replaced.
    """

    def __init__(self, monkeypatch, *modules) -> None:
        self.state = SimpleNamespace()
        for module in modules:
            monkeypatch.setattr(module, "PartialState", lambda: self.state)
            monkeypatch.setattr(module, "gather_object", self._gather)

    def _gather(self, values: list) -> list:
        state = self.state
        state.shared[state.process_index] = values
        state.barrier.wait()
        gathered = [value for index in range(state.num_processes) for value in state.shared[index]]
        state.barrier.wait()
        return gathered

    def run(self, work: Callable[[int], Any], count: int, per_node: int) -> list[Any]:
        """What `work` returns in each process; the first error is raised."""
        barrier, shared, results, errors = threading.Barrier(count, timeout=30), {}, [None] * count, []

        def process(index: int) -> None:
            self.state = SimpleNamespace(
                process_index=index,
                num_processes=count,
                local_process_index=index % per_node,
                is_main_process=index == 0,
                is_local_main_process=index % per_node == 0,
                barrier=barrier,
                shared=shared,
            )
            try:
                results[index] = work(index)
            except Exception as error:
                barrier.abort()
                errors.append(error)

        threads = [threading.Thread(target=process, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
        if first:
            raise first[0]
        return results
