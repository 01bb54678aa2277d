"""``kdjax bench taps``: what a feature term costs a step beyond its own arithmetic."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from rich.table import Table

from kdjax import build, optimizer
from kdjax import config as configs
from kdjax.catalogue import TERMS
from kdjax.experiment import DISTILLED, MAIN
from kdjax.model import Outputs, Variables
from kdjax.recipes import bench_step, program
from kdjax.recipes.bench_step import Bench, environment
from kdjax.state import inference_variables
from kdjax.tasks import classification

NAMES = ("similarity", "fitnets", "attention_transfer")
REPEATS = 5  # of the timed comparison, which share bench_step.SECONDS


class Alone(NamedTuple):
    """A term by itself, compiled: ``own, taught = run(own, taught)``, where ``own`` is what it learns and remembers."""

    compiled: Any  # jax.stages.Compiled: (own, given) -> (own, the value, the gradient at the student's features)
    own: Any
    given: Any  # the features, and the batch


def measure(config: ConfigDict, names: Sequence[str] = NAMES) -> dict[str, Any]:
    """The step with each term against the step without it plus the term alone: seconds, FLOPs and bytes accessed.

    The term alone is one compiled program from given features to its value, the gradient at the student's features, and
    the update of what the term learns, such as a projector. The step without it has the config's losses, but no other
    feature term. Weights are fresh. Takes about a minute.
    """
    without = bench_step.prepare(_with_term(config))
    steps = {name: bench_step.prepare(_with_term(config, name)) for name in names}
    alone = {name: term_alone(_with_term(config, name, only=True), steps[name]) for name in names}
    rounds = [_seconds(without, steps, alone) for _ in range(REPEATS)]
    terms = {}
    for name in names:
        ratios = [times[f"with {name}"] / (times["without"] + times[f"alone {name}"]) for times in rounds]
        programs = steps[name].program.compiled, without.program.compiled, alone[name].compiled
        middle = lambda key: statistics.median(times[key] for times in rounds) * 1e3
        terms[name] = {
            "seconds_over_parts": statistics.median(ratios),
            "seconds_over_parts_range": [min(ratios), max(ratios)],
            "flops_over_parts": _over_parts(*map(program.flops, programs)),
            "bytes_over_parts": _over_parts(*map(program.bytes_accessed, programs)),
            "step_ms": middle(f"with {name}"),
            "without_ms": middle("without"),
            "alone_ms": middle(f"alone {name}"),
            "flops_alone": program.flops(alone[name].compiled) * without.experiment.mesh.size,
            "bytes_alone": program.bytes_accessed(alone[name].compiled) * without.experiment.mesh.size,
        }
    return {"benchmark": "taps", "terms": terms, **environment(without.experiment)}


def term_alone(config: ConfigDict, bench: Bench) -> Alone:
    """Compiles the one term of ``config``, and makes the features of ``bench``'s batch that it is given."""
    experiment = build.prepare(config, bench.experiment.source)
    goal = build.make_arm(experiment, DISTILLED, bench.teachers).stages[0].objective
    assert goal is not None, "build.make_arm sets it"
    learned = jax.jit(goal.init)(jax.random.key(0))
    transform = optimizer.make(experiment.config.optimizer, learned["params"]) if learned["params"] else None
    own = learned, transform.init(learned["params"]) if transform else None
    hparams = jax.device_put(jax.tree.map(jnp.float32, goal.hparams))

    def run(own: Any, given: Any) -> Any:
        learned, opt_state = own
        student, taught, batch, hparams = given

        def loss(taps: Mapping[str, jax.Array], params: Variables) -> Any:
            whole = {"params": params, "state": learned["state"]}
            outputs = student._replace(taps=taps)
            key = jax.random.key(0)
            total, (_, memory) = goal.loss(outputs, taught, batch, hparams, goal.counts(batch), whole, key)
            return total, memory

        (value, memory), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(student.taps, learned["params"])
        to_student, to_learned = grads
        params = learned["params"]
        if transform:
            updates, opt_state = transform.update(to_learned, opt_state, params, learning_rate=jnp.float32(1e-3))
            params = optax.apply_updates(params, updates)
        return ({"params": params, "state": memory}, opt_state), value, to_student

    student, taught = features(bench, goal.student_taps, goal.teacher_taps)
    batch = {name: value for name, value in bench.batch.items() if name != "inputs"}
    given = student, taught, batch, hparams
    compiled = jax.jit(run, donate_argnums=0).lower(own, given).compile()
    return Alone(compiled, own, given)


def features(
    bench: Bench, student_taps: Sequence[str], teacher_taps: Sequence[str]
) -> tuple[Outputs, dict[str, Outputs]]:
    """What both models say of the batch, with these taps."""
    experiment = bench.experiment

    def both(student: Variables, teachers: Mapping[str, Variables], inputs: jax.Array) -> Any:
        said = experiment.distilled.apply(student, inputs, train=True, key=jax.random.key(0), taps=student_taps)[0]
        return said, {
            name: model.apply(teachers[name], inputs, train=False, taps=teacher_taps if name == MAIN else ())[0]
            for name, model in experiment.teachers.items()
        }

    inputs = classification.make_normalise(experiment.dataset)(bench.batch)["inputs"]
    return jax.jit(both)(inference_variables(bench.state()), bench.teachers, inputs)


def _seconds(without: Bench, steps: Mapping[str, Bench], alone: Mapping[str, Alone]) -> dict[str, float]:
    """Median seconds of the step without, each step with a term, and each term alone, which take turns."""
    calls = {"without": _stepping(without)}
    for name, bench in steps.items():
        calls |= {f"with {name}": _stepping(bench), f"alone {name}": _repeating(alone[name])}
    return bench_step.medians(calls, bench_step.FEWEST, bench_step.SECONDS / REPEATS)


def _stepping(bench: Bench) -> Callable[[], None]:
    state = bench.state()

    def call() -> None:
        nonlocal state
        state, packed = bench.program.compiled(state, bench.teachers, bench.batch, bench.hparams)
        jax.block_until_ready((state, packed))

    return call


def _repeating(alone: Alone) -> Callable[[], None]:
    own = jax.tree.map(jnp.copy, alone.own)  # what is given to the compiled program is donated

    def call() -> None:
        nonlocal own
        own, *found = alone.compiled(own, alone.given)
        jax.block_until_ready((own, found))

    return call


def _over_parts(whole: float, *parts: float) -> float:
    return whole / sum(parts)


def _with_term(config: ConfigDict, name: str = "", *, only: bool = False) -> ConfigDict:
    """The config with one feature term, or none; with ``only``, no other term either."""
    changed = ConfigDict(config.to_dict(), type_safe=False)
    changed.stages, changed.assistants, changed.generations = {}, {}, 1
    for term, options in changed.losses.items():
        if only or TERMS[term].reads == "taps":
            options.weight = 0.0
    if name:
        changed.losses[name].weight = 1.0
    changed.train.accumulate = 1
    return configs.resolve(changed)


def table(values: Mapping[str, Any]) -> Table:
    """The measurements for people."""
    return bench_step.table_of(*cells(values), caption(values))


def cells(values: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of that table."""
    header = [
        "term",
        "seconds\n(goal ≤ 1.05)",
        "lowest, highest",
        "FLOPs",
        "bytes",
        "step ms",
        "without ms",
        "alone ms",
    ]
    rows = []
    for name, found in values["terms"].items():
        low, high = found["seconds_over_parts_range"]
        ratios = (f"{found[f'{what}_over_parts']:.4g}" for what in ("flops", "bytes"))
        times = (f"{found[f'{what}_ms']:.3g}" for what in ("step", "without", "alone"))
        rows.append([name, f"{found['seconds_over_parts']:.3f}", f"{low:.3f}, {high:.3f}", *ratios, *times])
    return header, rows


def caption(values: Mapping[str, Any]) -> str:
    """What was compared, on which pair."""
    return (
        f"step with the term / (step without it + the term alone); {values['teacher'][0]} -> "
        f"{values['student']}, {values['data']}, batch {values['batch_size']}"
    )
