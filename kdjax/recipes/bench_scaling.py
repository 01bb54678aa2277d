"""``kdjax bench scaling``: what one of n devices computes, keeps and says to the others, as compiled."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.table import Table

from kdjax import build, memory, train
from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, Experiment
from kdjax.memory import bytes_text
from kdjax.model import flatten_paths
from kdjax.recipes import bench_hlo, bench_process, bench_step, program

DEVICES = 8
ONE_CHUNK = 2**30  # more tokens than any batch has


def measure(config: ConfigDict, devices: int = DEVICES) -> dict[str, Any]:
    """Compiles the same step, its batch and all, for 1, 2, 4 ... devices, and reads what each of them does.

    On a CPU, or a single accelerator, they are fake devices of fresh processes and nothing is run; where there are
    several accelerators they are these, and a step is timed as well. The batch is split over the axis ``data``; at the
    largest number also over ``fsdp``, with the config's sharding rules.

    A language model's loss is walked over in one chunk here, since the compiler counts the body of a loop once and
    chunks of another length would count otherwise.

    Raises:
      UserError: ``devices`` below 2, or a batch that two devices cannot share.
    """
    counts = [2**power for power in range(devices.bit_length()) if 2**power <= devices]
    size = config.data.batch_size
    counts = [count for count in counts if size % count == 0]
    if len(counts) < 2:
        raise UserError(
            f"bench scaling needs 2 devices or more that share data.batch_size={size}: give --devices of at least 2, "
            "and an even batch."
        )
    meshes = [{"data": count, "fsdp": 1} for count in counts] + [{"data": 1, "fsdp": counts[-1]}]
    # Only a process of its own may look at accelerators that others will use after it.
    ask = lambda axes, env: bench_process.ask("scaling", _on(config, axes), env=env)
    real = bench_process.ask("scaling", _on(config, meshes[0]))
    is_real = real["environment"]["there"] > 1 and real["environment"]["platform"] != "cpu"
    rows = []
    for axes in meshes:
        size = axes["data"] * axes["fsdp"]
        if is_real and size > real["environment"]["there"]:
            continue
        rows.append(real if is_real and size == 1 else ask(axes, {} if is_real else bench_process.fake_devices(size)))
    first = rows[0]
    for row in rows:
        row["flops_over_share"] = row["flops_per_device"] * row["devices"] / first["flops_per_device"]
    environment = {**rows[-1]["environment"]}
    for row in rows:
        row.pop("environment", None)
    return {
        "benchmark": "scaling",
        "real_devices": is_real,
        "meshes": rows,
        "flops_over_share": next(row["flops_over_share"] for row in reversed(rows) if row["axes"]["fsdp"] == 1),
        "unasked_gathers": sum(len(row["unasked_gathers"]) for row in rows),
        **environment,
    }


def on_mesh(config: ConfigDict) -> dict[str, Any]:
    """Compiles the first stage's step on the config's mesh in this process, and describes it."""
    experiment = program.in_one_part(build.prepare(config))
    mesh = experiment.mesh
    arm = build.make_arm(experiment, DISTILLED)
    found = program.compile_stage(experiment, arm, arm.stages[0], arm.batch_size)
    said = bench_hlo.collectives(found.compiled.as_text())
    state = train.abstract_state(arm, mesh)
    whole, split = parameters(experiment, arm)
    is_real = jax.default_backend() != "cpu"
    environment = bench_step.environment(experiment) | {"there": len(jax.devices()), "platform": jax.default_backend()}
    return {
        "axes": dict(mesh.shape),
        "devices": mesh.size,
        "flops_per_device": program.flops(found.compiled),
        "bytes_per_device": program.bytes_accessed(found.compiled),
        "temp_bytes": found.temp_bytes,
        "weights_bytes": {
            "teacher": memory.per_device(program.abstract_teachers(experiment)),
            "student": memory.per_device((state.params, state.model_state)),
            "optimiser": memory.per_device(state.opt_state),
        },
        "collectives": bench_hlo.by_kind(said),
        "unasked_gathers": bench_hlo.unasked(said, whole, split),
        **({"step_ms": 1e3 * _seconds(config)} if is_real else {}),
        "environment": environment,
    }


def parameters(experiment: Experiment, arm: train.Arm) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """The shapes of the parameters of student and teachers by path, and the paths of those that the rules split."""
    both = {"student": train.abstract_state(arm, experiment.mesh).params, **program.abstract_teachers(experiment)}
    found = flatten_paths(both)
    split = [path for path, leaf in found.items() if not leaf.sharding.is_fully_replicated]
    return {path: leaf.shape for path, leaf in found.items()}, split


def _seconds(config: ConfigDict) -> float:
    from kdjax.recipes import bench_host

    bench = bench_step.prepare(config)
    return bench_host.device(bench, bench_host.block(partial(bench_host.device, bench)))


def _on(config: ConfigDict, axes: Mapping[str, int]) -> ConfigDict:
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.mesh = dict(axes)
    changed.data.eval_batch_size = config.data.batch_size  # which nothing here evaluates, and the mesh divides
    changed.train.accumulate = 1
    if config.task == "language":
        changed.train.tokens_per_chunk = ONE_CHUNK
    return configs.resolve(changed)


def table(values: Mapping[str, Any]) -> Table:
    """A row per mesh, for people."""
    return bench_step.table_of(*cells(values), caption(values))


def cells(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of that table."""
    header = ["mesh", "FLOPs a device", "x n / of one (goal ≤ 1.03)", "temporary", "teacher, student, optimiser"]
    header += ["collectives", "gathers not asked for"]
    timed = any("step_ms" in row for row in values["meshes"])
    rows = []
    for row in values["meshes"]:
        axes = ", ".join(f"{name} {size}" for name, size in row["axes"].items() if size > 1) or "one device"
        said = [f"{one['count']} {kind}, {bytes_text(one['bytes'])}" for kind, one in row["collectives"].items()]
        weights = ", ".join(bytes_text(row["weights_bytes"][part]) for part in ("teacher", "student", "optimiser"))
        flops = f"{row['flops_per_device']:.4g}", f"{row['flops_over_share']:.3f}"
        gathers = str(len(row["unasked_gathers"]))
        rows.append([axes, *flops, bytes_text(row["temp_bytes"]), weights, "; ".join(said) or "none", gathers])
        rows[-1] += [f"{row['step_ms']:.3g}"] if timed else []
    return header + (["step ms"] if timed else []), rows


def caption(values: Mapping[str, Any]) -> str:
    """What was compiled, and what the columns count."""
    kind = "devices of this machine" if values["real_devices"] else "fake CPU devices, compiled and not run"
    return (
        f"{', '.join(values['teacher'])} -> {values['student']}, {values['data']}, batch {values['batch_size']} over "
        f"all devices; {kind}. FLOPs: as compiled, the body of a loop once. Collectives and bytes of their results: "
        "of a step on one device, in a loop as often as it runs"
    )
