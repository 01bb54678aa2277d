"""SIGTERM and SIGINT as a flag that the loop reads, so that it can save first."""

import contextlib
import os
import signal
import threading
from typing import Any

import jax

from kdjax import cluster


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved. ``signal`` is its number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


class Signals(contextlib.AbstractContextManager):
    """Catches signals while it is entered; a second one ends the process.

    Of several processes all must stop at the same step, whichever of them was told to: JAX's own handler of SIGTERM
    sees to that, so it is left in place, and SIGINT is passed on to it.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._receive, signal.SIGINT: self._receive}
            if jax.process_count() > 1:
                handlers = {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
            for number, handler in handlers.items():
                self._previous[number] = signal.signal(number, handler)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def stopping(self) -> int:
        """The signal for which the loop stops after this step; 0 for none. To be asked once a step."""
        if jax.process_count() > 1 and not self.received and cluster.stop_requested():
            self.received = signal.SIGTERM
        return self.received

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        self.received = number
