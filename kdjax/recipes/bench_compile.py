"""``kdjax bench compile``: seconds to trace, lower and compile the step, cold and from a cache, and by depth."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from kdjax import build
from kdjax import config as configs
from kdjax.experiment import DISTILLED
from kdjax.recipes import bench_process, bench_step, program

EVENTS = {
    "trace_s": "/jax/core/compile/jaxpr_trace_duration",
    "lower_s": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compile_s": bench_step.COMPILED,
}
DEPTHS = ("layers", "depth")  # the options of models that say how many blocks they have
MEANING = {
    "trace_s": "seconds in which Python writes down the step of the first stage, in a fresh process",
    "lower_s": "of turning that into the compiler's input",
    "compile_s": "of compiling it, nothing cached",
    "cached_compile_s": "the same in the next process, from the persistent compilation cache",
    "cached_over_cold": "trace, lower and compile from that cache / without",
    "prepare_s": "before that: the data, the models' shapes, and everything that can be refused",
    "instructions": "of the compiled program",
    "program_bytes": "of it in the cache, compressed",
    "peak_host_bytes": "the process's largest memory, compiling included",
    "twice_depth": "trace, lower and compile with twice the layers / with the config's (a scan over layers: about 1)",
    "twice_depth_instructions": "instructions of the two",
    "depth": "layers of teacher and student in the config",
    **bench_step.ENVIRONMENT,
}


def measure(config: ConfigDict) -> dict[str, Any]:
    """Compiles the distilled student's first step in fresh processes: cold, from a cache, and twice as deep.

    Weights are neither made nor loaded. Models whose options name no depth are compiled at theirs alone, and the keys
    ``twice_depth...`` are left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold, warm = (
            bench_process.ask("compile", config, env=bench_process.cached_in(folder)) for _ in ("cold", "warm")
        )
        entries = [entry.stat().st_size for entry in Path(folder).glob("jit_packed-*-cache")]
    values = {
        "benchmark": "compile",
        **{name: cold[name] for name in (*EVENTS, "prepare_s", "instructions", "peak_host_bytes")},
        "cached_compile_s": warm["compile_s"],
        "cached_over_cold": _whole(warm) / _whole(cold),
        "cache_hits": warm["cache_hits"],
        "program_bytes": sum(entries),
    }
    deeper = twice_as_deep(config)
    if deeper is not None:
        found = bench_process.ask("compile", deeper)
        values |= {
            "depth": depth_of(config),
            "twice_depth": _whole(found) / _whole(cold),
            "twice_depth_instructions": found["instructions"] / cold["instructions"],
        }
    return values | cold["environment"]


def compiled(config: ConfigDict) -> dict[str, Any]:
    """Compiles the step in this process and says how long each part took."""
    taken, hits = dict.fromkeys(EVENTS, 0.0), [0]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        for name, wanted in EVENTS.items():
            if event == wanted and "packed" in str(kwargs.get("fun_name")):
                taken[name] += duration_secs

    def count(event: str, **_: str | int) -> None:
        hits[0] += event == "/jax/compilation_cache/cache_hits"

    start = time.perf_counter()
    experiment = program.in_one_part(build.prepare(config))
    arm = build.make_arm(experiment, DISTILLED)
    prepared = time.perf_counter() - start
    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.monitoring.register_event_listener(count)
    found = program.compile_stage(experiment, arm, arm.stages[0], arm.batch_size)
    jax.monitoring.unregister_event_duration_listener(listen)
    return {
        **taken,
        "prepare_s": prepared,
        "cache_hits": hits[0],
        "instructions": found.compiled.as_text().count(" = "),
        "peak_host_bytes": peak_bytes(),
        "environment": bench_step.environment(experiment),
    }


def depth_of(config: ConfigDict) -> dict[str, int]:
    """The number of layers of teacher and student, of those whose options name it."""
    found: dict[str, int] = {}
    for part in ("teacher", "student"):
        options = config[part].options.to_dict() if config[part].options else {}
        # A decoder that is not told how many layers it has has two.
        given = [options[key] for key in DEPTHS if key in options]
        if config[part].name == "decoder" and not config[part].get("init", ""):
            given.append(2)
        if given:
            found[part] = given[0]
    return found


def twice_as_deep(config: ConfigDict) -> ConfigDict | None:
    """The config with twice the layers in teacher and student; ``None`` where neither's options name a depth."""
    changed, depths = ConfigDict(config.to_dict(), type_safe=False), depth_of(config)
    for part, depth in depths.items():
        given = changed[part].options
        given[next((key for key in DEPTHS if key in given), "layers")] = 2 * depth
    return configs.resolve(changed) if depths else None


def peak_bytes() -> int:
    """The most memory that this process ever had, bytes; 0 where the platform does not say."""
    if os.name != "posix":
        return 0
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(most if sys.platform == "darwin" else 1024 * most)


def _whole(found: dict[str, Any]) -> float:
    return sum(found[name] for name in EVENTS)
