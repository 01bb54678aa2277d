"""``kdjax bench variants``: the step in another dtype, with its teacher stored smaller, and with its teachers a batch
ahead, each beside the step as it is configured."""

import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from rich.table import Table

from kdjax import advance, build, sharding, train
from kdjax import config as configs
from kdjax.errors import UserError
from kdjax.experiment import Experiment
from kdjax.memory import bytes_text
from kdjax.recipes import bench_host, bench_limits, bench_step, program

# What is tried, one at a time; what the config has already is left out.
CHANGES = (
    "train.dtype=float32",
    "train.dtype=bfloat16",
    "teacher.weights=bfloat16",
    "teacher.weights=int8",
    "teacher.weights=float8_e4m3",
    "train.products=float8",
    "train.overlap=True",
)
ROUNDS, MOST = 5, 20
SECONDS = 10.0


class Runner(NamedTuple):
    """A compiled step, ready to go on from batch to batch."""

    steps: Callable[[int], float]  # makes so many steps and says how many seconds each took
    loss: float  # of the first step
    products: float  # FLOPs of its matrix products and convolutions
    bytes: dict[str, int]  # of one device, as compiled


def measure(config: ConfigDict, seconds: float = SECONDS) -> dict[str, Any]:
    """The step of the config's first stage as it is, and with each of :data:`CHANGES`.

    A changed step and the one as configured take turns, so that a ratio is of two that ran side by side. Weights are
    fresh and the same everywhere, so the first losses differ by rounding alone. The host puts the same batch again and
    again, as training puts its own. A change that the config has already is left out, and of one that is refused the
    reason is kept. Gradient accumulation and ``teacher_mesh`` are switched off. ``seconds`` are those of the turns of
    two steps, unless the fewest rounds take longer.

    Raises:
      UserError: a cache stands for the teacher.
    """
    config = ConfigDict(config.to_dict(), type_safe=False)
    config.train.accumulate, config.teacher_mesh = 1, {}
    experiment = build.prepare(config)
    if experiment.signals:
        raise UserError("kdjax bench variants is about a teacher in the step, and teacher.cache stands for it.")
    peak = functools.cache(lambda dtype: bench_limits.peak(experiment.mesh, dtype))
    plain = runner(experiment)
    steps = bench_host.block(plain.steps)
    rows = [_row("", plain, [plain.steps(steps) for _ in range(ROUNDS)], peak(config.train.dtype))]
    for change in CHANGES:
        changed = configs.override(config, [f"--config.{change}"])
        if changed.to_dict() == config.to_dict():
            continue
        print(f"{rows[-1]['change'] or 'as configured'}: {rows[-1].get('step_ms', 'refused')} ms; next {change}")
        try:
            other = runner(build.prepare(changed, experiment.source))
        except UserError as error:
            rows.append({"change": change, "refused": str(error)})
            continue
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            rows.append({"change": change, "refused": "it needs more memory than the device has."})
            continue
        measures = {"plain": functools.partial(plain.steps, steps), "other": functools.partial(other.steps, steps)}
        taken = bench_host.turns(measures, ROUNDS, seconds, MOST)
        ratios = [ours / its for its, ours in zip(taken["plain"], taken["other"], strict=True)]
        rows.append(
            _row(change, other, taken["other"], peak(changed.train.dtype))
            | {
                "over_plain": statistics.median(ratios),
                "over_plain_range": [min(ratios), max(ratios)],
                "loss_over_plain": other.loss / plain.loss,
            }
        )
        del other, measures  # and with them the weights
    return {"benchmark": "variants", "rows": rows, **bench_step.environment(experiment)}


def runner(experiment: Experiment) -> Runner:
    """The compiled step of an experiment, on fresh weights; its first step is made."""
    mesh = experiment.mesh
    teachers = bench_step.fresh_teachers(experiment)
    experiment, arm = bench_step.with_arm(experiment, teachers)
    stage, state = arm.stages[0], train.fresh_state(arm, mesh)
    batch = next(arm.batches(0))
    hparams = jax.device_put(stage.hparams, sharding.replicated(mesh))
    products = program.products(stage.step, state, teachers, sharding.abstract_batch(batch, mesh), hparams)
    make = advance.overlapped if stage.ahead else advance.plain
    step, (compiled, names) = make(stage.step, mesh, state, teachers, batch, hparams, {})
    found = compiled.memory_analysis()
    current, packed = step(state, lambda: batch, False)
    total, count = jax.device_get(packed)[:, names.index("loss")]

    def steps(count: int) -> float:
        nonlocal current
        pending = deque[jax.Array]()
        start = time.perf_counter()
        for _ in range(count):
            current, packed = step(current, lambda: batch, False)
            pending.append(packed)
            if len(pending) > train.MAX_IN_FLIGHT:
                jax.block_until_ready(pending.popleft())
        jax.block_until_ready((current, pending))
        return (time.perf_counter() - start) / count

    sizes = {"arguments": found.argument_size_in_bytes, "temporary": found.temp_size_in_bytes}
    return Runner(steps, float(total / count), products, sizes)


def _row(change: str, found: Runner, taken: Sequence[float], peak: float) -> dict[str, Any]:
    seconds = statistics.median(taken)
    return {
        "change": change,
        "step_ms": 1e3 * seconds,
        "peak_fraction": found.products / seconds / peak,
        "products": found.products,
        "bytes": found.bytes,
        "loss": found.loss,
    }


def table(values: Mapping[str, Any]) -> Table:
    """A row per step, for people."""
    return bench_step.table_of(*cells(values), caption(values))


def cells(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of that table."""
    header = ["step", "ms", "over the plain one's, range", "share of peak", "arguments", "temporary"]
    header.append("first loss / plain - 1")
    rows = []
    for row in values["rows"]:
        name = f"`{row['change']}`" if row["change"] else f"as configured ({values['dtype']})"
        if "refused" in row:
            rows.append([name, "refused", row["refused"], *[""] * (len(header) - 3)])
            continue
        over, off = "", ""
        if row["change"]:
            low, high = row["over_plain_range"]
            over, off = f"{row['over_plain']:.3f} ({low:.3f} to {high:.3f})", f"{row['loss_over_plain'] - 1:+.1e}"
        sizes = [bytes_text(row["bytes"][part]) for part in ("arguments", "temporary")]
        rows.append([name, f"{row['step_ms']:.3g}", over, f"{row['peak_fraction']:.3f}", *sizes, off])
    return header, rows


def caption(values: Mapping[str, Any]) -> str:
    """What was measured, and what the columns are."""
    return (
        f"{', '.join(values['teacher'])} -> {values['student']}, {values['data']}, batch {values['batch_size']}, on "
        f"{values['devices']} {values['device']}. Each changed step took turns with the one as configured. Share of "
        "peak: matrix products and convolutions of the step in its time, against the best square product of the same "
        "dtype; bytes are those of one device, as compiled"
    )
