"""Several processes as one run: how they find each other, act as one, stop together, and learn that one is gone."""

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from kdjax.errors import UserError, first_line

GONE = 75  # exit code: another process is gone, or nothing moves; to be tried again (EX_TEMPFAIL of sysexits.h)
_PULSES, _ENDED = "kdjax/pulse/", "kdjax/ended/"  # where processes say that they live, and why they end
_JAX_HEARTBEAT_S = 100  # JAX's own default, after which it aborts
_PR_SET_PDEATHSIG = 1
_calls = itertools.count(1)
_pulse: "_Pulse | None" = None
Result = TypeVar("Result")


class Cluster(NamedTuple):
    """How a process finds the others.

    Attributes:
      coordinator: ``HOST:PORT`` of the first process; "" where JAX finds everything out (SLURM, Open MPI, Kubernetes,
        TPU pods).
      processes: how many there are.
      process: which one this is, from 0.
      heartbeat: seconds without a sign of life after which a process counts as gone.
    """

    coordinator: str = ""
    processes: int = 0
    process: int = 0
    heartbeat: float = 30.0

    @property
    def name(self) -> str:
        """This process in words."""
        return f"process {self.process} of {self.processes}" if self.coordinator else "this process"


def supervise(cluster: Cluster, work: Callable[[], int]) -> int:
    """Runs ``work`` in a child process and returns its exit code; where it did not end by itself, says why.

    JAX aborts a process whose coordinator is gone, with a stack trace that names nobody, and nothing in that process
    can prevent it. Call it before JAX has started. Signals are passed on, and the child dies with its parent.
    """
    child = 0
    for passed_on in (signal.SIGTERM, signal.SIGINT):
        signal.signal(passed_on, lambda number, _: os.kill(child, number) if child else None)
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _die_with_parent()
        code = 1
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    if number == signal.SIGABRT:
        who = f"process 0, which coordinates at {cluster.coordinator}," if cluster.coordinator else "the first process"
        sentence = f"{cluster.name} ended because {who} is gone: see what that one said"
        if cluster.coordinator and (cluster.process == 0 or _answers(cluster.coordinator)):
            sentence = f"{cluster.name} was ended by JAX's runtime: see the lines above"
        _say(f"{sentence}. {_GO_ON}")
        return GONE
    _say(f"{cluster.name} was killed by {signal.Signals(number).name}; checkpoints written before are kept.")
    return 128 + number


_GO_ON = "Run the same command again: it goes on from the newest checkpoint."


def join(cluster: Cluster) -> None:
    """Makes this process one of several, before JAX has started; only the first one's output is shown.

    Raises:
      UserError: there is no cluster. Where the others do not come, the process ends with ``GONE``.
    """
    global _pulse
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given: dict[str, Any] = {}
    if cluster.coordinator:
        given = dict(zip(("coordinator_address", "num_processes", "process_id"), cluster, strict=False))
        # Else JAX asks the scheduler that it finds itself under for what is left, such as devices.
        given["cluster_detection_method"] = "deactivate"
    timeout = max(_JAX_HEARTBEAT_S, int(3 * cluster.heartbeat))  # ours speaks first
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=timeout)
    except ValueError as error:
        raise UserError(
            f"there is no cluster to join ({first_line(error)}): start kdjax by the scheduler, or give --coordinator."
        ) from error
    except RuntimeError as error:  # a time that ran out
        where = f"the processes at {cluster.coordinator}" if cluster.coordinator else "the other processes"
        _say(f"{cluster.name} did not reach {where} ({first_line(error)}): are all of them started? {_GO_ON}")
        os._exit(GONE)
    # C libraries (gloo) write to the first descriptor too, and it is for what the command prints.
    sys.stdout.flush()
    shown = os.dup(1) if is_first() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout = os.fdopen(shown, "w", buffering=1)
    os.dup2(2, 1)
    _pulse = _Pulse(cluster.heartbeat)


def leave(code: int) -> None:
    """Takes leave of the others at the end of a process, which then may end with ``code``.

    Where all end alike (done, or stopped by a signal) they wait for each other; a process that fails alone tells the
    others, and they end with the same code.
    """
    if _pulse is None:
        return
    if code in (0, 128 + signal.SIGTERM):
        _pulse.stop()
        jax.distributed.shutdown()
    else:
        _pulse.end(code)


def verdict() -> None:
    """Waits until it is known whether another process is gone, and then ends this one; returns where none is.

    An operation over processes fails in all that take part as soon as one is missing, and says not which.
    """
    if _pulse is not None:
        time.sleep(_pulse.heartbeat + 3 * _pulse.every)


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def by_first(function: Callable[[], Result]) -> Result | None:
    """What ``function`` returns in the first process, which alone calls it; ``None`` in the others.

    Raises:
      UserError: in every process, where it is raised in the first.
    """
    sentence, result = "", None
    if is_first():
        try:
            result = function()
        except UserError as error:
            sentence = str(error)
    if jax.process_count() > 1:
        text = np.zeros(2048, np.uint8)
        given = np.frombuffer(sentence.encode()[: len(text)], np.uint8)
        text[: len(given)] = given
        sentence = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).rstrip(b"\0").decode(errors="ignore")
    if sentence:
        raise UserError(sentence)
    return result


def of_first(number: int) -> int:
    """The number that the first process gives."""
    return number if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def all_agree(mine: bool) -> bool:
    """Whether it is true in every process."""
    return mine if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.bool_(mine))))


def stop_requested() -> bool:
    """Whether all processes stop here, since SIGTERM came to one of them: true at the same call in each."""
    return multihost_utils.reached_preemption_sync_point(next(_calls))


class _Pulse:
    """A thread that says every few seconds that this process lives, and ends it where another one does not.

    Seconds are those of the monotonic clock of this process: clocks of machines may differ and jump.
    """

    def __init__(self, heartbeat: float):
        from jax._src import distributed  # jax has no public way to its store of keys

        self.heartbeat, self.every = heartbeat, min(max(heartbeat / 10, 0.2), 5.0)
        self._client: Any = distributed.global_state.client
        self._me, self._all = distributed.global_state.process_id, distributed.global_state.num_processes or 1
        self._stopped = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="kdjax-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def end(self, code: int) -> None:
        """Tells the others how this process ends, and leaves them the time to hear it."""
        self.stop()
        until = time.monotonic() + 3 * self.every
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"{_ENDED}{self._me}", str(code))
            while time.monotonic() < until and len(self._client.key_value_dir_get(_ENDED)) < self._all:
                time.sleep(0.1)

    def _run(self) -> None:
        for beat in itertools.count():
            # Where the coordinator is gone JAX aborts the process, and the supervisor says so.
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(f"{_PULSES}{self._me}", str(beat), allow_overwrite=True)
                if news := self._bad_news():
                    sentence, code = news
                    _say(f"process {self._me} of {self._all} ends: {sentence}.")
                    os._exit(code)
            if self._stopped.wait(self.every):
                return

    def _bad_news(self) -> tuple[str, int] | None:
        found = lambda place: {
            int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(place)
        }
        for process, code in found(_ENDED).items():
            return f"process {process} ended with code {code}, and said why", int(code)
        beats, now = found(_PULSES), time.monotonic()
        for process in range(self._all):
            beat = beats.get(process, "")
            if process not in self._heard or self._heard[process][0] != beat:
                self._heard[process] = (beat, now)
            elif process != self._me and now - self._heard[process][1] > self.heartbeat:
                return f"process {process} has given no sign of life for {self.heartbeat:.0f} s. {_GO_ON[:-1]}", GONE
        return None


def _answers(place: str) -> bool:
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError:
        return False
    return True


def _die_with_parent() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL("libc.so.6").prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(sentence: str) -> None:
    print(f"kdjax: {sentence}", file=sys.stderr, flush=True)
