"""Where the seconds of an arm go, by cause, and a watchdog that says what nothing moves for."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from kdjax.cluster import GONE

TRAINING = ("step", "input")  # causes that count as training; the others are what it is interrupted by
# What an arm waits for in each cause.
CAUSES = {
    "step": "the devices to finish a step",
    "input": "the next batch of the input pipeline",
    "compile": "the compiler",
    "evaluate": "an evaluation",
    "save": "a checkpoint to be copied from the devices",
    "restore": "the state to be made or restored",
}


class Clock:
    """Seconds by cause, those of ``step`` where no other is named, on a clock that does not jump with the machine's."""

    def __init__(self) -> None:
        self.cause, self.since = "step", time.perf_counter()
        self._spent = dict.fromkeys(CAUSES, 0.0)
        self._taken = dict(self._spent)

    @contextlib.contextmanager
    def on(self, cause: str) -> Iterator[None]:
        """What is done inside counts as that cause's."""
        before = self.cause
        self._turn(cause)
        try:
            yield
        finally:
            self._turn(before)

    def training(self) -> float:
        """Seconds of steps and their input so far, without what interrupted them."""
        self._turn(self.cause)
        return sum(self._spent[cause] for cause in TRAINING)

    def take(self) -> dict[str, float]:
        """Seconds by cause since the last call."""
        self._turn(self.cause)
        new = {cause: self._spent[cause] - self._taken[cause] for cause in CAUSES}
        self._taken = dict(self._spent)
        return {cause: seconds for cause, seconds in new.items() if seconds > 0}

    def _turn(self, cause: str) -> None:
        now = time.perf_counter()
        self._spent[self.cause] += now - self.since
        self.cause, self.since = cause, now


class Watchdog(contextlib.AbstractContextManager):
    """Says, in a thread of its own, what an arm waits for where nothing has moved for ``stall_s`` seconds, again after
    twice as long and so on; after ``exit_s`` it ends the process with exit code ``cluster.GONE``, which is to be tried
    again. 0 switches either off."""

    def __init__(self, arm: str, clock: Clock, stall_s: float, exit_s: float = 0.0):
        self._arm, self._clock, self._stall_s, self._exit_s = arm, clock, stall_s, exit_s
        self._done = threading.Event()
        self.step = 0  # as far as the arm has come

    def __enter__(self) -> "Watchdog":
        limits = [limit for limit in (self._stall_s, self._exit_s) if limit > 0]
        if limits:
            threading.Thread(target=self._watch, args=(min(limits) / 4,), name="kdjax-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self, every: float) -> None:
        due, seen = self._stall_s, -1.0
        while not self._done.wait(every):
            since = self._clock.since  # a step turns it at least once
            if since != seen:
                due, seen = self._stall_s, since
            waited = time.perf_counter() - since
            what = CAUSES[self._clock.cause]
            if 0 < due <= waited:
                self._say(f"{self._arm} has waited {waited:.0f} s for {what}, after step {self.step}.")
                due *= 2
            if 0 < self._exit_s <= waited:
                self._say(
                    f"{self._arm} stops: it has waited {waited:.0f} s (log.stall_exit_s) for {what}, after step "
                    f"{self.step}; checkpoints written before are kept, so run the same command again."
                )
                os._exit(GONE)

    def _say(self, sentence: str) -> None:
        print(f"kdjax: {sentence}", file=sys.stderr, flush=True)


class Profile(contextlib.AbstractContextManager):
    """A profiler trace of a window of steps in ``folder``, for TensorBoard, XProf or Perfetto; of none where either is
    missing. A run that ends within the window keeps what there is of it."""

    def __init__(self, window: tuple[int, int] | None, folder: Path | None):
        self._window = window if folder else None
        self._folder = folder
        self._running = False

    def begin(self, step: int) -> None:
        """Before a step."""
        if self._window and step == self._window[0]:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def ends_at(self, step: int) -> bool:
        """Whether the trace ends with a step, whose result must then be waited for."""
        return self._running and self._window is not None and step == self._window[1]

    def end(self, step: int) -> None:
        """After a step, and after all before it."""
        if self.ends_at(step):
            self._stop()

    def __exit__(self, *_: object) -> None:
        if self._running:
            self._stop()

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._running = False
