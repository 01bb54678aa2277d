"""The process that holds one model while it is measured: ``python -m kdjax.measure.worker``.

It reads one JSON object a line from its standard input, ``{"do": NAME, ...}``, and answers each with one line; it ends
with its input. Arrays come and go as ``.npy`` files. It imports NumPy and what its runtime needs, and nothing else, for
its memory is part of what is measured. ``processes.py`` is the other end.
"""

import gc
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from kdjax.errors import UserError, first_line, unknown
from kdjax.measure import runtimes

WARM_CALLS, WARM_LEAST, WARM_S = 20, 3, 2.0  # calls of a batch size before any is timed: 20, or as many as 2 s allow
SETTLE = 3  # untimed calls at the begin of a slice: the caches are full of what the model before it left there
CHUNK = 32  # examples of a batch that is scored
SLICE_BYTES = 64 * 2**20  # of inputs that a slice takes into memory; a longer one meets them again
Answer = dict[str, Any]


def serve(requests: Any, answers: TextIO) -> None:
    """Answers requests, one JSON object a line, until there are no more; an error is ``{"error": SENTENCE}``."""
    commands: dict[str, Callable[..., Answer]] = {"open": lambda **options: open_model(commands, **options)}
    for line in requests:
        request = json.loads(line)
        name = request.pop("do")
        try:
            if name not in commands:
                raise unknown("request", name, commands)
            answer = commands[name](**request)
        except UserError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), file=answers, flush=True)


def open_model(commands: dict[str, Callable[..., Answer]], *, path: str, runtime: str, threads: int) -> Answer:
    """Opens the model, and adds what can be done with one to the commands."""
    runtimes.start(runtime)
    before = resident_bytes()
    runner = runtimes.open_model(Path(path), runtime, threads=threads)
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection inside of a timed call would be Python's, not the model's
    arrays: dict[str, np.ndarray] = {}
    call = _telling(runner.call, path, runtime)

    def load(**paths: str) -> Answer:
        """Names arrays: ``timed`` and ``test`` inputs, ``labels``. They are mapped, not read."""
        arrays.update({name: np.load(place, mmap_mode="r") for name, place in paths.items()})
        return {}

    commands.update(
        load=load,
        warm=lambda batch: warm(call, arrays["timed"], batch, before),
        time=lambda batch, calls, first: time_slice(call, arrays["timed"], batch, calls, first),
        score=lambda rows, out: score(call, arrays["test"], arrays["labels"], np.load(rows), Path(out)),
        usage=lambda: {"cpu_s": time.process_time()},
    )
    return {
        "input_shape": runner.input_shape,
        "input_dtype": runner.input_dtype,
        "weights_bytes": runner.weights_bytes,
        "version": importlib.metadata.version(runtimes.RUNTIMES[runtime].package),
    }


def warm(call: runtimes.Call, inputs: np.ndarray, batch: int, before: int) -> Answer:
    """Calls the model until it is warm: ``shape`` of its logits, ``call_s`` of the last call, ``peak_bytes`` so far
    over ``before``."""
    given = _batches(inputs, batch, 1, 0)[0]
    begin = time.perf_counter()
    for done in range(1, WARM_CALLS + 1):
        start = time.perf_counter()
        logits = call(given)
        end = time.perf_counter()
        if done >= WARM_LEAST and end - begin > WARM_S:
            break
    return {"shape": logits.shape, "call_s": end - start, "peak_bytes": max(peak_bytes() - before, 0)}


def time_slice(call: runtimes.Call, inputs: np.ndarray, batch: int, calls: int, first: int) -> Answer:
    """Times so many calls, of consecutive examples from the ``first`` on: ``ms`` of each, and ``cpu_s`` of them all.

    A call is timed from an array in memory to an array in memory.
    """
    given = _batches(inputs, batch, calls, first)
    for one in given[:SETTLE]:
        call(one)
    clock, seconds = time.perf_counter, np.empty(calls)
    cpu = time.process_time()
    for i in range(calls):
        one = given[i % len(given)]
        start = clock()
        call(one)
        seconds[i] = clock() - start
    return {"cpu_s": time.process_time() - cpu, "ms": (1e3 * seconds).tolist()}


def score(call: runtimes.Call, inputs: np.ndarray, labels: np.ndarray, rows: np.ndarray, out: Path) -> Answer:
    """What the model says of the given rows of the test split, written as ``first`` and ``log_p`` to an ``.npz`` file.

    Of every labelled place ``first`` is the class of the highest logit, int32, and ``log_p`` the label's
    log-probability, float64; of the others, whose label is -1, ``log_p`` is 0.
    """
    first = np.empty((len(rows), *labels.shape[1:]), np.int32)
    log_p = np.zeros(first.shape, np.float64)
    for begin in range(0, len(rows), CHUNK):
        part = rows[begin : begin + CHUNK]
        logits = call(np.ascontiguousarray(inputs[part])).astype(np.float64)
        if not np.isfinite(logits).all():
            raise UserError("its logits are NaN or infinite on the test split: export it again, at a higher precision.")
        wanted = np.asarray(labels[part])
        shifted = logits - logits.max(-1, keepdims=True)
        of_label = np.take_along_axis(shifted, np.maximum(wanted, 0)[..., None], -1)[..., 0]
        first[begin : begin + CHUNK] = logits.argmax(-1)
        log_p[begin : begin + CHUNK] = np.where(wanted >= 0, of_label - np.log(np.exp(shifted).sum(-1)), 0.0)
    np.savez(out, first=first, log_p=log_p)
    return {}


def resident_bytes() -> int:
    """What the process has in memory now; without /proc, the most that it ever had."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that the process ever had in memory."""
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def _batches(inputs: np.ndarray, batch: int, calls: int, first: int) -> list[np.ndarray]:
    """Copies of consecutive examples, for as many calls as memory is taken for; the split begins anew at its end."""
    kept = max(1, min(calls, SLICE_BYTES // max(batch * inputs[0].nbytes, 1)))
    rows = (first + np.arange(kept * batch)).reshape(kept, batch) % len(inputs)
    return [np.ascontiguousarray(inputs[part]) for part in rows]


def _telling(call: runtimes.Call, path: str, runtime: str) -> runtimes.Call:
    """A failure of the runtime as a UserError with the shape that it failed on."""

    def told(inputs: np.ndarray) -> np.ndarray:
        try:
            return call(inputs)
        except Exception as error:
            raise UserError(
                f"{path} cannot be run by {runtime} on {inputs.dtype} of shape {list(inputs.shape)} "
                f"({first_line(error)[: runtimes.SAID]}): say how it wants its inputs, such as {Path(path).name}:nchw, "
                "or export it for any size of a batch."
            ) from error

    return told


def main() -> None:
    """Serves standard input; what a library prints goes to standard error, for standard output is the protocol."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        serve(iter(sys.stdin.readline, ""), answers)


if __name__ == "__main__":
    main()
