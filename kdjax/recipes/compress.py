"""``kdjax compress``: a chain of steps from a model to ever smaller ones, with what each step cost and gained.

Each step is scored as it is made, then trained with its teacher and, as a control, for as many updates without one.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kdjax import build, checkpoint, cluster, metrics, sharding, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax import results as contract
from kdjax.compress import report, steps
from kdjax.compress.steps import BEFORE, Made, Spec, Step
from kdjax.errors import UserError, unknown
from kdjax.experiment import ALONE, DISTILLED, MAIN, Experiment
from kdjax.model import Model, Variables
from kdjax.recipes import distill, score_classification
from kdjax.recipes.arms import Trained
from kdjax.tasks import classification, language
from kdjax.writers import write_atomic

FOLDER = "compress"  # of a workdir: the steps' specs, checkpoints and metrics
Say = Callable[[str], None]
Score = Callable[[Model, Variables], dict[str, float]]


class Held(NamedTuple):
    """A model at hand: what it is, its weights, and how it scores."""

    spec: Spec
    model: Model
    variables: Variables
    score: dict[str, float]


class Compressed(NamedTuple):
    """A finished step as an export takes it."""

    spec: Spec
    model: Model
    variables: Variables


def run(config: ConfigDict, workdir: Path, *, say: Say = print) -> dict[str, Any]:
    """Runs the steps of ``config.compress`` in a workdir, with the arms that they begin with; what is there is loaded.

    Writes ``compress.json`` and ``compress.html``.

    Returns:
      What ``compress.json`` holds; see ``kdjax.compress.report``.

    Raises:
      UserError: a step that cannot be made, or whatever is wrong with the config.
    """
    experiment = build.prepare(config)
    plan = steps.plan(experiment.config)
    workdir = Path(workdir)
    with distill.claimed(workdir, experiment.config):
        teachers = distill.obtain_teachers(experiment, workdir, say=say)
        score = _make_score(experiment, teachers)
        held: dict[str, Held] = {}
        for arm in dict.fromkeys([MAIN, *(step.of for step in plan if step.of in steps.STARTS)]):
            held[arm] = _of_arm(experiment, arm, teachers, workdir, score, say)
        starts, rows = list(held), []
        for number, step in enumerate(plan):
            say(f"compress: {step.name} ({number + 1} of {len(plan)}), {step.method} of {step.of}")
            held[step.name], row = _step(experiment, step, held[step.of], teachers, workdir, score, say)
            rows.append(row)
        found = report.build(
            config_sha256=experiment.config_sha256,
            seed=experiment.config.seed,
            task=experiment.config.task,
            models={name: _described(held[name]) for name in starts},
            steps=rows,
        )
        if cluster.is_first():
            report.write(workdir / "compress.json", found)
            report.write_html(workdir / "compress.html", found, experiment.config.to_dict())
    return found


def names(workdir: Path) -> list[str]:
    """The steps that a workdir has models of."""
    return sorted(path.stem for path in (Path(workdir) / FOLDER).glob("*.json"))


def load(experiment: Experiment, workdir: Path, name: str) -> Compressed:
    """A finished step of a workdir, trained with its teacher; ``experiment`` is the workdir's.

    Raises:
      UserError: no such step, or it is not finished.
    """
    workdir = Path(workdir)
    if name not in names(workdir):
        raise unknown("compressed model", name, names(workdir))
    place = workdir / FOLDER / f"{name}.json"
    saved = contract.read_json(place, "run kdjax compress", "run kdjax compress again")
    if not saved["steps"]:
        raise UserError(f"{name} in {workdir} was not trained: give it epochs, or export the model that it is made of.")
    folder = workdir / FOLDER / "checkpoints" / name
    if not (folder / str(saved["steps"])).is_dir():
        raise UserError(f"{name} in {workdir} is not finished: run kdjax compress with this --workdir to finish it.")
    model = steps.build(experiment, saved["spec"])
    return Compressed(saved["spec"], model, experiments.load_weights(model, folder))


# --------------------------------------------------------------------------------------------------------- one step


def _of_arm(
    experiment: Experiment, arm: str, teachers: dict[str, Trained], workdir: Path, score: Score, say: Say
) -> Held:
    spec = steps.spec_of(experiment, arm)
    trained = teachers[MAIN] if arm == MAIN else distill.obtain_arm(experiment, arm, workdir, say=say)
    model = experiments.model_of(experiment, arm)
    return Held(spec, model, jax.device_get(trained.variables), score(model, trained.variables))


def _step(
    experiment: Experiment,
    step: Step,
    before: Held,
    teachers: dict[str, Trained],
    workdir: Path,
    score: Score,
    say: Say,
) -> tuple[Held, dict[str, Any]]:
    """Makes the model of a step, scores and trains it; the model at its end, and its row of the table."""
    made = steps.make(experiment, step, before.spec, before.variables)
    model = steps.build(experiment, made.spec)
    row: dict[str, Any] = {
        "name": step.name,
        "method": step.method,
        "of": step.of,
        "teacher": step.teacher,
        "options": step.options,
        "spec": made.spec,
        "before": before.score,
        "made": score(model, made.variables),
        "alone": None,
        "distilled": None,
        "updates": 0,
        "seconds": None,
    }
    held = Held(made.spec, model, made.variables, row["made"])
    if step.trained:
        taught = {MAIN: Trained(before.variables, 0, None)} if step.teacher == BEFORE else teachers
        own = _experiment(experiment, step, made, model, before)
        learn = partial(distill.train_arm, own, workdir=workdir / FOLDER, first=lambda: made.first, say=say)
        if step.control:
            alone = learn(ALONE, teachers={}, called=f"{step.name}_alone")
            row["alone"] = score(model, alone.variables)
        trained = learn(DISTILLED, teachers=taught, called=step.name)
        speed, size = trained.examples_per_s, experiment.config.data.batch_size
        held = Held(made.spec, model, jax.device_get(trained.variables), score(model, trained.variables))
        row |= {"distilled": held.score, "updates": trained.steps}
        row["seconds"] = trained.steps * size / speed if speed else None
    if cluster.is_first():
        kept = {"name": step.name, "spec": made.spec, "steps": row["updates"]}
        (workdir / FOLDER).mkdir(exist_ok=True)
        write_atomic(workdir / FOLDER / f"{step.name}.json", json.dumps(kept, indent=2) + "\n")
    return held, row | _size(held)


def _experiment(experiment: Experiment, step: Step, made: Made, model: Model, before: Held) -> Experiment:
    """The experiment in which a step's model is the student."""
    config = ConfigDict(experiment.config.to_dict(), type_safe=False)
    config.generations, config.assistants, config.peers, config.stages = 1, {}, {}, {}
    config.teacher.cache, config.data.curriculum.pacing = "", "none"
    of = lambda spec: {"name": spec["name"], "init": "", "options": spec["options"]}
    config.student = {**config.student.to_dict(), **of(made.spec), "reuse_classifier": False}
    teachers = experiment.teachers
    if step.teacher == BEFORE:
        config.teacher = {**config.teacher.to_dict(), **of(before.spec)}
        config.more_teachers, teachers = {}, {MAIN: before.model}
    for term, changes in step.losses.items():
        config.losses[term].update(changes)
    config.train.update(epochs=step.epochs, steps=step.steps)
    if step.learning_rate is not None:
        config.optimizer.learning_rate = step.learning_rate
    config.optimizer.update(made.optimizer)
    config = configs.resolve(config)
    # What a checkpoint is of: the step's own config and all that came before it.
    begun = [configs.sha256(config), json.dumps(made.spec, sort_keys=True), checkpoint.digest(made.first)]
    return experiment._replace(
        config=config,
        teachers=teachers,
        student=model,
        distilled=model,
        links={},
        peers=(),
        signals=None,
        config_sha256=hashlib.sha256(" ".join(begun).encode()).hexdigest(),
    )


# ----------------------------------------------------------------------------------------------------------- scores


def _make_score(experiment: Experiment, teachers: dict[str, Trained]) -> Score:
    """Makes ``score(model, variables) -> {"accuracy", "nll", "agreement", "kl"}`` on the whole test split, the last two
    against the run's teachers; of language models with ``bits_per_byte``."""
    config, dataset, mesh = experiment.config, experiment.dataset, experiment.mesh
    size = config.data.eval_batch_size
    if experiment.task is language:
        placed = train.put_teachers({k: t.variables for k, t in teachers.items()}, mesh, config.sharding.teacher)
        weights = {name: experiments.member(config, name).weight for name in placed}

        @cache  # one program for a model as made, alone and distilled
        def evaluate(model: Model) -> Any:
            return language.make_evaluate(
                model,
                dataset,
                mesh,
                size,
                teachers=experiment.teachers,
                weights=weights,
                combine=config.teacher.combine,
                tokens_per_chunk=config.train.tokens_per_chunk,
            )

        def of_text(model: Model, variables: Variables) -> dict[str, float]:
            found = evaluate(model)(_placed(variables, mesh), placed)
            return {name: found[name] for name in ("accuracy", "nll", "agreement", "kl", "bits_per_byte")}

        return of_text

    make_score = cache(lambda model: classification.make_score(model, dataset, mesh, size))

    def logits_of(model: Model, variables: Variables) -> np.ndarray:
        return make_score(model)(_placed(variables, mesh), dataset.test)

    said = {name: logits_of(model, teachers[name].variables) for name, model in experiment.teachers.items()}
    reference = score_classification.combined(experiment, said)

    def of_images(model: Model, variables: Variables) -> dict[str, float]:
        logits = logits_of(model, variables)
        test = metrics.classification(logits, dataset.test.labels)
        return {"accuracy": test["accuracy"], "nll": test["nll"], **metrics.fidelity(logits, reference)}

    return of_images


def _placed(variables: Variables, mesh: Any) -> Variables:
    return jax.device_put(jax.device_get(variables), sharding.replicated(mesh))


def _described(held: Held) -> dict[str, Any]:
    return {"spec": held.spec, "score": held.score, **_size(held)}


def _size(held: Held) -> dict[str, int]:
    return report.sizes(held.spec, held.variables)
