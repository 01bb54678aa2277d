"""A population: many students, of several seeds and any traced numbers, in one program beside one teacher forward.

All members see the same batches. A member is what ``kdjax train`` with its own ``student.seed`` and numbers would give,
up to rounding; the population is saved and resumed as a whole.
"""

import ast
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.table import Table

from kdjax import advance, build, checkpoint, cluster, metrics, objective, sharding, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.catalogue import TERMS
from kdjax.errors import UserError
from kdjax.experiment import DISTILLED, Experiment
from kdjax.model import Variables
from kdjax.recipes import difficulty, distill
from kdjax.state import inference_variables
from kdjax.tasks import classification
from kdjax.writers import JsonlWriter, write_atomic

NAME = "population"
SEED = "student.seed"
_PARTS = ("init", "end", "factor", "warmup_init")  # the numbers of a schedule
_TIMED_STEPS = 7


class Members(NamedTuple):
    """The members of a population: what each changes, its config, and the config of which the program is made."""

    changes: list[dict[str, Any]]
    configs: list[ConfigDict]
    template: ConfigDict


# -------------------------------------------------------------------------------------------------- who takes part


def parse_grid(words: Sequence[str]) -> dict[str, list[Any]]:
    """``["losses.kl.temperature=1,2,4", ...]`` as ``{"losses.kl.temperature": [1, 2, 4]}``."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text:
            raise UserError(f"{word} is no part of a grid: write KEY=VALUE,VALUE, such as losses.kl.temperature=1,2,4.")
        try:
            values = ast.literal_eval(f"[{text}]")
        except (ValueError, SyntaxError) as error:
            raise UserError(f"the values of {word} are not numbers: write KEY=VALUE,VALUE.") from error
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise UserError(f"the values of {word} are not numbers: write KEY=VALUE,VALUE.")
        if len(set(values)) < len(values) or key in grid:
            raise UserError(f"{word} names something twice: give each value once.")
        grid[key.removeprefix("config.")] = values
    return grid


def make_members(config: ConfigDict, seeds: int, grid: Mapping[str, Sequence[Any]]) -> Members:
    """Each combination of the grid's values with each of ``seeds`` student seeds, in that order.

    Raises:
      UserError: a key that is part of the program, so that each value would need another one, or a value out of range.
    """
    template = _changed(config, {key: next((v for v in values if v), values[0]) for key, values in grid.items()})
    traced = _traced(template)
    for key, values in grid.items():
        if not _is_traced(key, traced):
            raise UserError(
                f"--grid {key}: its values are part of the compiled program, so they cannot train side by side; these "
                f"can: {', '.join(sorted(traced))}. Run the others one after the other."
            )
        option = key.rpartition(".")[2]
        for value in values:
            if key.startswith("losses."):
                objective.check_range(key, option, value)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    changes = [{**combination, SEED: seed} for combination in combinations for seed in range(seeds)]
    if not changes:
        raise UserError("a population has at least one member: give --seeds or --grid.")
    if max(grid.get("optimizer.learning_rate", [1.0])) <= 0:
        raise UserError("--grid optimizer.learning_rate: no value is above 0.")
    return Members(changes, [_changed(config, change) for change in changes], template)


def _traced(config: ConfigDict) -> set[str]:
    """The keys whose numbers the compiled step takes as arguments."""
    sections = [config.losses.to_dict(), *(stage.to_dict().get("losses", {}) for stage in config.stages.values())]
    names = {term for section in sections for term, options in section.items() if options.get("weight")}
    numbers = {
        f"losses.{term}.{option}"
        for term in names & set(TERMS)
        for option, default in {"weight": 1.0, **TERMS[term].options}.items()
        if isinstance(default, float)
    }
    return numbers | {"optimizer.learning_rate"}


def _is_traced(key: str, traced: set[str]) -> bool:
    parent, _, last = key.rpartition(".")
    return key in traced or (parent in traced and last in _PARTS)


def _changed(config: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    words = [f"{key}={value!r}" for key, value in changes.items()]
    return configs.resolve(configs.override(config, words))


# ------------------------------------------------------------------------------------------------------- the run


def run(
    config: ConfigDict,
    workdir: Path,
    *,
    seeds: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains a population in ``workdir`` (resuming what is there), scores every member, and writes ``population.json``.

    Returns:
      ``{"chunk", "examples_per_s", "members": [{"changes", "accuracy", ...}]}``, what the file holds.
    """
    members = make_members(configs.resolve(config), seeds, grid or {})
    experiment = build.prepare(members.template)
    experiments.refuse_language(experiment, "a population")
    experiments.refuse_chain(experiment, "a population")
    with distill.claimed(workdir, experiment.config):
        taught = distill.obtain_teachers(experiment, workdir, say=say)
        teachers = {name: teacher.variables for name, teacher in taught.items()}
        experiment = difficulty.scored(experiment, teachers, Path(workdir))
        cluster.by_first(lambda: _claim_members(members, Path(workdir)))
        programs: dict = {}
        arm, chunk = _chosen_arm(experiment, members, teachers, Path(workdir), programs, say)
        meta = {
            "config_sha256": experiment.config_sha256,
            "teacher_sha256": {name: checkpoint.digest(variables) for name, variables in teachers.items()},
        }
        arm = arm._replace(name=NAME)
        done = _train(experiment, arm, meta, Path(workdir), programs, say)
        scores = score(experiment, inference_variables(done.state), len(members.changes))
        found = {
            "chunk": chunk,
            "examples_per_s": done.examples_per_s,
            "members": [{"changes": change, **one} for change, one in zip(members.changes, scores, strict=True)],
        }
        if cluster.is_first():
            write_atomic(Path(workdir) / "population.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    return found


def _claim_members(members: Members, workdir: Path) -> None:
    """Keeps the list of members, or refuses another one: its checkpoints would have other shapes."""
    place = workdir / "members.json"
    if place.exists():
        if json.loads(place.read_text()) != members.changes:
            raise UserError(
                f"the population in {workdir} has other members: give its --seeds and --grid, or another --workdir."
            )
        return
    write_atomic(place, json.dumps(members.changes, indent=1) + "\n")


def _train(
    experiment: Experiment, arm: train.Arm, meta: dict[str, Any], workdir: Path, programs: dict, say: Any
) -> train.Finished:
    config = experiment.config
    every = build.every_of(config)
    with contextlib.ExitStack() as stack:
        folder = workdir / "checkpoints" / NAME
        checkpoints = stack.enter_context(checkpoint.Checkpoints(folder, config.checkpoint.keep, False))
        writers = []
        if cluster.is_first():
            writers.append(stack.enter_context(JsonlWriter(workdir / "metrics.jsonl")))
        return train.run(
            arm,
            experiment.mesh,
            every=every,
            checkpoints=checkpoints,
            meta=meta,
            writers=writers,
            programs=programs,
            say=say,
        )


def score(experiment: Experiment, stacked: Variables, members: int) -> list[dict[str, Any]]:
    """Each member on the test split, from variables with a leading dimension of members."""
    config, test = experiment.config, experiment.dataset.test
    of_one = classification.make_score(
        experiment.distilled, experiment.dataset, experiment.mesh, config.data.eval_batch_size
    )
    # On the host first: a slice of a sharded array would stay sharded.
    stacked = sharding.to_host(stacked)
    results = []
    for index in range(members):
        variables = jax.tree.map(lambda x, index=index: x[index], stacked)
        results.append(
            {
                **metrics.classification(of_one(variables, test), test.labels),
                "params_sha256": checkpoint.digest(variables),
            }
        )
    return results


# ------------------------------------------------------------------------------------------------- how many at a time


def _chosen_arm(
    experiment: Experiment,
    members: Members,
    teachers: dict[str, Variables],
    workdir: Path,
    programs: dict,
    say: Callable[[str], None],
) -> tuple[train.Arm, int]:
    """The arm, and how many members it runs at a time: as configured, as an earlier start of this run chose, or as
    measured; what measuring compiled is kept in ``programs``."""
    make = partial(build.make_arm, experiment, DISTILLED, teachers, members=members.configs)
    count = len(members.changes)
    chunk = experiment.config.population.chunk or (1 if count == 1 else 0)
    if chunk < 0 or (chunk and count % chunk):
        raise UserError(f"population.chunk={chunk} does not divide the {count} members: choose a divisor, or 0.")
    place = workdir / "chunk.json"  # a resumed run must go on with the same program: another one rounds differently
    if not chunk and place.exists():
        chunk = int(json.loads(place.read_text())["chunk"])
    if chunk:
        return make(chunk=chunk), chunk
    arms = {chunk: make(chunk=chunk) for chunk in (count, 1)}
    times = {chunk: time_step(arm, experiment.mesh, programs) for chunk, arm in arms.items()}
    best = cluster.of_first(min(times, key=lambda chunk: times[chunk]))  # times differ, and the program must not
    shown = ", ".join(f"{1e3 * seconds:.1f} ms with {chunk} at a time" for chunk, seconds in times.items())
    say(f"population: a step takes {shown}; going on with {best}.")
    if cluster.is_first():
        write_atomic(place, json.dumps({"chunk": best, "seconds": {str(k): v for k, v in times.items()}}) + "\n")
    return arms[best], best


def measure_chunks(
    experiment: Experiment, members: Members, teachers: dict[str, Variables], chunks: Sequence[int]
) -> dict[int, float]:
    """The median seconds of a step for each number of members at a time, on a real batch."""
    make = partial(build.make_arm, experiment, DISTILLED, teachers, members=members.configs)
    return {chunk: time_step(make(chunk=chunk), experiment.mesh, {}) for chunk in chunks}


def time_step(arm: train.Arm, mesh: Mesh, programs: dict) -> float:
    """The median seconds of an arm's first steps on one real batch; its compiled step is added to ``programs``."""
    state = train.fresh_state(arm, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    placed = train.put_teachers(arm.teacher_variables, mesh, arm.teacher_rules)
    batch = sharding.put_batch(next(arm.batches(0)), mesh)
    hparams = jax.device_put(arm.stages[0].hparams, sharding.replicated(mesh))
    stage = arm.stages[0].step
    programs[stage] = advance.compile_step(stage, mesh, shardings, state, placed, batch, hparams)
    step, _ = programs[stage]
    taken = []
    for _ in range(_TIMED_STEPS + 1):
        start = time.perf_counter()
        state, packed = step(state, placed, batch, hparams)
        jax.block_until_ready((state, packed))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def table(found: Mapping[str, Any]) -> Table:
    """The members for people, the best first."""
    keys = [key for key in found["members"][0]["changes"] if key != SEED]
    shown = Table(*keys, "seed", "accuracy %", "NLL", caption=f"{found['chunk']} members at a time")
    for member in sorted(found["members"], key=lambda member: -member["accuracy"]):
        changes = member["changes"]
        numbers = [f"{changes[key]:g}" for key in keys]
        shown.add_row(*numbers, str(changes[SEED]), f"{100 * member['accuracy']:.2f}", f"{member['nll']:.4f}")
    return shown
