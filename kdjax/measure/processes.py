"""One process per model: started on the same cores with the same number of threads, and asked one thing at a time."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import kdjax
from kdjax.errors import UserError

COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS", "NPROC")


class Worker(NamedTuple):
    """A running process, and where its warnings go."""

    name: str
    process: subprocess.Popen[str]
    log: Path


def choose_cores(threads: int) -> list[int] | None:
    """The cores on which every model runs: the last ones, since interrupts favour the first; ``None`` where the
    platform cannot pin.

    Raises:
      UserError: more threads than cores.
    """
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not 1 <= threads <= len(allowed):
        raise UserError(f"{threads} threads and {len(allowed)} cores that may be used: give between 1 and that many.")
    return allowed[-threads:] if hasattr(os, "sched_setaffinity") else None


@contextlib.contextmanager
def started(names: list[str], cores: list[int] | None, threads: int) -> Iterator[list[Worker]]:
    """A process for each name, ended on leaving."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = []
        for number, name in enumerate(names):
            log = Path(folder) / f"{number}.log"
            with log.open("w") as errors, _pinned(cores):
                process = subprocess.Popen(
                    [sys.executable, "-m", "kdjax.measure.worker"],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
                    env=environment(threads),
                )  # fmt: skip
            stack.callback(_end, process)
            workers.append(Worker(name, process, log))
        yield workers


def ask(worker: Worker, do: str, **options: Any) -> dict[str, Any]:
    """One request and its answer.

    Raises:
      UserError: what the worker could not do, or a worker that died (with the last line it wrote).
    """
    process = worker.process
    assert process.stdin is not None and process.stdout is not None
    line = ""
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    if not line:
        code = process.wait()
        said = worker.log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        why = f"killed by signal {-code}, as when memory runs out" if code < 0 else said[-1]
        raise UserError(
            f"{worker.name}: its process ended while it should {do} ({why}): try it alone, or a smaller one."
        )
    answer = json.loads(line)
    if "error" in answer:
        raise UserError(f"{worker.name}: {answer['error']}")
    return answer


def environment(threads: int) -> dict[str, str]:
    """The variables of a worker: so many threads in every library, JAX on the CPU, and nobody else's XLA flags."""
    serial = "--xla_cpu_multi_thread_eigen=false" if threads == 1 else ""
    root = str(Path(kdjax.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **dict.fromkeys(COUNTS, str(threads)),
        "XLA_FLAGS": serial,
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONSAFEPATH": "1",  # so that a module in the folder that kdjax is called in, with the models, is not run
        "PYTHONPATH": os.pathsep.join(paths),
    }


@contextlib.contextmanager
def _pinned(cores: list[int] | None) -> Iterator[None]:
    """This thread on those cores, for a process that is started meanwhile inherits them: all its threads do."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
        process.communicate(timeout=5)  # the end of its input ends it
    if process.poll() is None:
        process.kill()
        process.wait()
