"""Several processes of one run, or several nodes, as threads that share what accelerate would have told them."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def world_size() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def run_helper(name: str, *words: str, processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a script of this folder as a user would start it, in one process or by torchrun in several."""
    helpers = Path(__file__).parent
    tests = helpers.parent
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, *launch, str(helpers / name), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


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
