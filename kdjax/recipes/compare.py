"""``kdjax compare``: the control and every method, over several seeds, with equal updates and equally tuned.

One teacher teaches all. A seed sets a student's initial weights, the order of examples and the views; every method
meets the same seeds, so differences are paired. A cell (a method with a seed) that is finished is never run again, and
one that was interrupted goes on from its checkpoint.
"""

import contextlib
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import build, checkpoint, cluster, metrics, results, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.compare import report as compare_report
from kdjax.compare import results as contract
from kdjax.data.sources import Split
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, Experiment
from kdjax.model import Variables, parameter_count
from kdjax.recipes import difficulty, distill, methods, population, program, score_classification
from kdjax.state import inference_variables
from kdjax.tasks import classification
from kdjax.writers import JsonlWriter, write_atomic

FACTORS = (1.0, 0.1, 10.0, 0.3, 3.0, 0.03, 30.0)  # of a method's weight, in the order in which tuning tries them
HOLDOUT = 0.2  # of the student's training examples, on which methods are tuned
TUNING_SEED = 1000  # apart from the seeds of the comparison
Say = Callable[[str], None]


class Study(NamedTuple):
    """What all cells share."""

    config: ConfigDict
    workdir: Path
    seeds: list[int]
    teachers: dict[str, Variables]
    teacher_sha256: dict[str, str]
    teacher_logits: np.ndarray  # of the test split
    score: Callable[[Variables, Split], np.ndarray]  # of the student, which is the same network for every method
    say: Say


def run(
    config: ConfigDict,
    workdir: Path,
    *,
    names: Sequence[str],
    seeds: int = 5,
    trials: int = 1,
    grid: Mapping[str, Sequence[Any]] | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Runs what is missing of a comparison, and writes ``results.json`` and ``report.html``.

    Args:
      config: the experiment; its ``losses`` give way to each method's.
      workdir: where the comparison lives.
      names: the methods (``methods.METHODS``; ``a+b`` for both); the control is always among them.
      seeds: how many, from ``config.seed`` on.
      trials: how many weights each method is given to choose from, on held-out training examples.
      grid: of traced numbers, over the config's own losses.

    Returns:
      What ``results.json`` holds.
    """
    config, names = configs.resolve(config), methods.check(list(names))
    if not 1 <= trials <= len(FACTORS):
        raise UserError(f"--tune={trials}: a method is given 1 to {len(FACTORS)} weights to choose from.")
    if grid:
        population.make_members(config, 1, grid)  # refuses a key that is not traced before anything runs
    experiment = build.prepare(config)
    experiments.refuse_language(experiment, "a comparison")
    experiments.refuse_chain(experiment, "a comparison")
    if experiment.config.student.reuse_classifier:
        raise UserError(
            "student.reuse_classifier makes another student than the control's: leave it off in a comparison."
        )
    prepared = {name: _of_method(experiment, name) for name in names}  # refuses what no method can do
    with distill.claimed(workdir, experiment.config):
        taught = distill.obtain_teachers(experiment, workdir, say=say)
        teachers = {name: teacher.variables for name, teacher in taught.items()}
        size = experiment.config.data.eval_batch_size
        study = Study(
            config=experiment.config,
            workdir=Path(workdir),
            seeds=[config.seed + index for index in range(seeds)],
            teachers=teachers,
            teacher_sha256={name: checkpoint.digest(variables) for name, variables in teachers.items()},
            teacher_logits=_teacher_logits(experiment, teachers, experiment.dataset.test),
            score=classification.make_score(experiment.student, experiment.dataset, experiment.mesh, size),
            say=say,
        )
        found = {}
        for number, (name, own) in enumerate(prepared.items()):
            say(f"compare: {name} ({number + 1} of {len(prepared)})")
            found[name] = _method(study, name, own, trials)
        cells = _grid(study, experiment, grid) if grid else None
        whole = _results(study, experiment, found, trials, cells)
        if cluster.is_first():
            contract.write(Path(workdir) / "results.json", whole)
            compare_report.write_report(Path(workdir) / "report.html", whole)
    return whole


# ------------------------------------------------------------------------------------------------------ one method


def _of_method(experiment: Experiment, name: str, factor: float = 1.0) -> Experiment:
    config = ConfigDict(experiment.config.to_dict(), type_safe=False)
    config.losses = methods.with_method(config.losses.to_dict(), name, factor)
    try:
        return build.prepare(config, experiment.source)
    except UserError as error:
        raise UserError(f"method {name}: {error}") from error


def _method(study: Study, name: str, experiment: Experiment, trials: int) -> dict[str, Any]:
    """A method's part of the results: tuned where there is a choice, then run with every seed."""
    folder = study.workdir / "cells" / name
    folder.mkdir(parents=True, exist_ok=True)
    choice = _remembered(
        folder / "tuned.json", lambda: {"trials": trials, "tuned": _tune(study, name, experiment, trials)}
    )
    if choice["trials"] != trials:
        raise UserError(
            f"{name} in {study.workdir} chose among {choice['trials']} weights: give --tune={choice['trials']}, or "
            "another --workdir."
        )
    tuned = choice["tuned"]
    if tuned:
        term = methods.tuned_term(name)
        assert term is not None, "a method without a term of its own is not tuned"
        experiment = _of_method(experiment, name, tuned["chosen"] / methods.losses_of(name)[term]["weight"])
    arm = cache(partial(_arm, study, name, experiment))  # made once, if any cell is missing: all share its programs
    run = partial(_cell, study, name, experiment, arm, {})
    cells = []
    for seed in study.seeds:
        cell = _remembered(folder / f"seed-{seed}.json", partial(run, seed))
        if cell["config_sha256"] != experiment.config_sha256:
            raise UserError(f"{folder} was trained with another definition of {name}: choose another --workdir.")
        shutil.rmtree(folder / f"seed-{seed}", ignore_errors=True)  # its checkpoints, now that its result stands
        cells.append(cell)
    speeds = [cell["examples_per_s"] for cell in cells]
    kept = ("seed", "accuracy", "nll", "ece", "agreement", "kl", "params_sha256")
    return {
        "losses": {term: options for term, options in experiment.config.losses.to_dict().items() if options["weight"]},
        "tuned": tuned,
        "flops_per_step": max(cell["flops_per_step"] for cell in cells),
        "ms_per_step": 1e3 * experiment.config.data.batch_size / statistics.median(speeds),
        "cells": [{key: cell[key] for key in kept} for cell in cells],
    }


def _remembered(path: Path, compute: Callable[[], Any]) -> Any:
    """What the file holds; where there is none, what ``compute`` gives, which is then written."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())
    value = compute()
    write_atomic(path, json.dumps(value) + "\n")
    return value


def _cell(
    study: Study, name: str, experiment: Experiment, base: Callable[[], train.Arm], programs: dict, seed: int
) -> dict[str, Any]:
    """Trains a method with one seed, from its checkpoint if there is one, and scores it."""
    arm = build.reseeded(experiment, base(), seed)
    arm = arm._replace(name=f"{name}/seed-{seed}")
    folder = study.workdir / "cells" / name / f"seed-{seed}"
    meta = {
        "config_sha256": experiment.config_sha256,
        "seed": seed,
        "teacher_sha256": {key: study.teacher_sha256[key] for key in arm.teacher_variables},
    }
    config = experiment.config
    every = build.every_of(config)
    with (
        checkpoint.Checkpoints(folder, 1, False) as checkpoints,
        JsonlWriter(study.workdir / "metrics.jsonl") as writer,
    ):
        done = train.run(
            arm,
            experiment.mesh,
            every=every,
            checkpoints=checkpoints,
            meta=meta,
            writers=[writer] if cluster.is_first() else [],
            programs=programs,
            say=study.say,
        )
    variables = inference_variables(done.state)
    split = experiment.dataset.test
    logits, labels = study.score(variables, split), split.labels
    test, fidelity = metrics.classification(logits, labels), metrics.fidelity(logits, study.teacher_logits)
    compiled = programs.get(arm.stages[0].step)  # none where the run was killed between its end and its result
    flops = program.flops(compiled[0]) * experiment.mesh.size if compiled else 0.0
    return {
        "config_sha256": experiment.config_sha256,
        "seed": seed,
        **{key: test[key] for key in ("accuracy", "nll", "ece")},
        **fidelity,
        "params_sha256": checkpoint.digest(variables),
        "examples_per_s": done.examples_per_s,
        "flops_per_step": flops,
    }


def _arm(study: Study, name: str, experiment: Experiment) -> train.Arm:
    kind = ALONE if name == methods.CONTROL else DISTILLED
    taught = {} if kind == ALONE else study.teachers
    return build.make_arm(difficulty.scored(experiment, study.teachers, study.workdir), kind, taught)


def _teacher_logits(experiment: Experiment, teachers: Mapping[str, Variables], split: Split) -> np.ndarray:
    """What the teachers say together of a split."""
    size = experiment.config.data.eval_batch_size
    of = lambda name: classification.make_score(experiment.teachers[name], experiment.dataset, experiment.mesh, size)
    return score_classification.combined(experiment, {name: of(name)(teachers[name], split) for name in teachers})


# ---------------------------------------------------------------------------------------------------------- tuning


def _tune(study: Study, name: str, experiment: Experiment, trials: int) -> dict[str, Any] | None:
    """Chooses a method's weight among as many as every method is given, as a population, on held-out examples.

    They count as right by their label, or by the teacher's answer where the student may not see the label. The teacher
    has learnt from the held-out examples; the student has not.
    """
    term = methods.tuned_term(name)
    if trials == 1 or term is None:
        return None
    weights = [methods.losses_of(name)[term]["weight"] * factor for factor in FACTORS[:trials]]
    train_part, held_out = _held_out(experiment)
    said = _teacher_logits(experiment, study.teachers, held_out).argmax(-1).astype(held_out.labels.dtype)
    held_out = held_out._replace(labels=np.where(held_out.labels >= 0, held_out.labels, said))
    dataset = experiment.dataset._replace(test=held_out)
    experiment = experiment._replace(student_train=train_part, dataset=dataset)
    key = f"losses.{term}.weight"
    # All terms of the method keep their proportions: one factor for all.
    changed = [_of_method(experiment, name, factor).config for factor in FACTORS[:trials]]
    experiment = difficulty.scored(experiment, study.teachers)  # of this part of the examples alone
    arm = build.make_arm(experiment, DISTILLED, study.teachers, members=changed)
    arm = build.reseeded(experiment, arm, TUNING_SEED)._replace(name=f"{name}/tuning")
    done = train.run(
        arm, experiment.mesh, every=train.Every(experiment.config.log.every, stop_on_nan=False), say=study.say
    )
    scored = population.score(experiment, inference_variables(done.state), trials)
    accuracy = [one["accuracy"] for one in scored]
    return {"key": key, "tried": weights, "accuracy": accuracy, "chosen": weights[int(np.argmax(accuracy))]}


def _held_out(experiment: Experiment) -> tuple[Split, Split]:
    """The student's training split in two: to train on, and to tune on."""
    split = experiment.student_train
    order = np.random.default_rng(TUNING_SEED).permutation(len(split.labels))
    count = max(round(HOLDOUT * len(order)), 1)
    part = lambda ids: jax.tree.map(lambda x: x[np.sort(ids)], split)
    return part(order[count:]), part(order[:count])


# ------------------------------------------------------------------------------------------------------------ grid


def _grid(study: Study, experiment: Experiment, grid: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Every combination of the grid's values, with every seed: a population for each seed, one program for all."""
    members = population.make_members(study.config, 1, grid)
    experiment = build.prepare(members.template, experiment.source)
    folder = study.workdir / "cells" / "grid"
    folder.mkdir(parents=True, exist_ok=True)
    digest = configs.to_json({"members": members.changes})
    experiment = difficulty.scored(experiment, study.teachers, study.workdir)
    base = build.make_arm(experiment, DISTILLED, study.teachers, members=members.configs)
    programs: dict = {}
    cells = []
    for seed in study.seeds:

        def trained(seed=seed):
            arm = build.reseeded(experiment, base, seed)._replace(name=f"grid/seed-{seed}")
            every = train.Every(experiment.config.log.every, stop_on_nan=False)
            done = train.run(arm, experiment.mesh, every=every, programs=programs, say=study.say)
            scored = population.score(experiment, inference_variables(done.state), len(members.changes))
            return {"members": digest, "accuracy": [one["accuracy"] for one in scored]}

        found = _remembered(folder / f"seed-{seed}.json", trained)
        if found["members"] != digest:
            raise UserError(f"{folder} holds another grid: give the same --grid, or another --workdir.")
        for change, accuracy in zip(members.changes, found["accuracy"], strict=True):
            cells.append({"values": [change[key] for key in grid], "seed": seed, "accuracy": accuracy})
    return {"keys": list(grid), "values": [list(values) for values in grid.values()], "cells": cells}


# --------------------------------------------------------------------------------------------------------- results


def _results(
    study: Study, experiment: Experiment, found: dict[str, Any], trials: int, grid: dict[str, Any] | None
) -> dict[str, Any]:
    test = experiment.dataset.test
    held_out = len(_held_out(experiment)[1].labels) if trials > 1 else 0
    student = jax.eval_shape(experiment.student.init, jax.random.key(0))["params"]
    whole = {
        "schema": contract.SCHEMA,
        "kind": contract.KIND,
        "config_sha256": experiment.config_sha256,
        "environment": results.environment(),
        "seeds": study.seeds,
        "test_examples": len(test.labels),
        "updates": build.make_arm(experiment, ALONE).stages[-1].stop,
        "teacher": {
            "accuracy": metrics.classification(study.teacher_logits, test.labels)["accuracy"],
            "params": sum(parameter_count(variables["params"]) for variables in study.teachers.values()),
        },
        "student": {"params": parameter_count(student)},
        "control": methods.CONTROL,
        "baseline": methods.BASELINE if methods.BASELINE in found else None,
        "tuning": {"trials": trials, "holdout_examples": held_out} if trials > 1 else None,
        "methods": found,
        "grid": grid,
    }
    return json.loads(json.dumps(whole))  # with lists for tuples, as the file has it
