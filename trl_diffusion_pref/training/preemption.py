"""Ends a run that a signal asks to stop: after the present step, with a checkpoint of it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


# What cluster managers send before they kill: SLURM the second where `--signal` asks for it. Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(SystemExit):
    """A run that was asked to stop and is saved: the process ends with status 0, unless this is caught."""

    def __init__(self, message: str) -> None:
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopSignal:
    """Whether this process was asked to stop while it trains.

    Attributes:
        received: The signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, signals that nobody else handles are noted; a second one changes nothing."""
        self.received = None
        # Python runs handlers in the main thread alone, and only there they can be set.
        main = threading.current_thread() is threading.main_thread()
        own = [number for number in SIGNALS if main and signal.getsignal(number) is signal.SIG_DFL]
        for number in own:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number in own:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
