"""The main job: the teacher, the same student alone, and the distilled student, each trained, scored and reported.

Between the teacher and the distilled student there may be links, assistants or generations, each an arm of its own.
"""

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
from ml_collections import ConfigDict

from kdjax import build, checkpoint, cluster, memory, train
from kdjax import config as configs
from kdjax import experiment as experiments
from kdjax.errors import UserError, unknown
from kdjax.experiment import ALONE, DISTILLED, MAIN, STUDENTS, Experiment
from kdjax.model import Variables
from kdjax.recipes import difficulty, score_classification, score_language
from kdjax.recipes.arms import Outcome, Trained
from kdjax.state import inference_variables
from kdjax.tasks import language
from kdjax.untrusted import parse_json
from kdjax.writers import JsonlWriter, TensorBoardWriter, WandbWriter, write_atomic

Say = Callable[[str], None]
# Scores all arms on the whole test set and writes results.json and report.html.
SCORERS: dict[str, Callable[[Experiment, Path, dict[str, Trained]], Outcome]] = {
    "classification": score_classification.run,
    "language": score_language.run,
}


def run(config: ConfigDict, workdir: Path, *, say: Say = print) -> Outcome:
    """Trains all arms in ``workdir`` (resuming what is there), scores them and writes the report."""
    experiment = build.prepare(config)
    with claimed(workdir, experiment.config):
        _check_disk(experiment, workdir, experiment.arms)
        return _all_arms(experiment, workdir, say)


def run_one(config: ConfigDict, workdir: Path, arm: str, *, say: Say = print) -> Trained:
    """Trains one arm only: a teacher, or a student (from the teacher in ``workdir`` or in ``teacher.init``).

    What teaches the arm and is not there yet is trained before it.
    """
    experiment = build.prepare(config)
    if arm not in experiment.arms:
        raise unknown("arm", arm, experiment.arms)
    with claimed(workdir, experiment.config):
        _check_disk(experiment, workdir, (arm,))
        return obtain_arm(experiment, arm, workdir, say=say)


def obtain_arm(experiment: Experiment, arm: str, workdir: Path, *, say: Say = print) -> Trained:
    """An arm at its last step, loaded where it is there already, and else trained with all that comes before it; in a
    workdir that is claimed."""
    first = None
    if arm in STUDENTS and experiment.config.student.init:
        asks = experiment.config.student.init == language.FROM_TEACHER
        first = first_weights(experiment, obtain_teachers(experiment, workdir, say=say) if asks else {})
    experiment, teachers = obtain_teachers_of(experiment, arm, workdir, say=say)
    return train_arm(experiment, arm, workdir, teachers=teachers, first=first, say=say)


def evaluate(config: ConfigDict, workdir: Path, *, say: Say = print) -> Outcome:
    """Scores the arms of a finished workdir again and rewrites its results and report; trains nothing."""
    experiment = build.prepare(config)
    with claimed(workdir, experiment.config):
        for name in experiment.arms:
            if not experiments.init_of(experiment.config, name):
                require_finished(experiment, name, workdir)
        return _all_arms(experiment, workdir, say)


def _all_arms(experiment: Experiment, workdir: Path, say: Say) -> Outcome:
    """Trains what is not finished and loads what is, then scores and reports."""
    links = [name for name in experiment.links if name != DISTILLED]
    experiment, done = _obtain(experiment, links, workdir, say)
    first = first_weights(experiment, done)
    for name in STUDENTS:
        taught = taught_by(experiment, name, done)
        done[name] = train_arm(experiment, name, workdir, teachers=taught, first=first, say=say)
    return SCORERS[experiment.config.task](experiment, workdir, done)


def saved_config(workdir: Path) -> ConfigDict:
    """The config that a workdir was made with."""
    path = Path(workdir) / "config.json"
    try:
        return ConfigDict(parse_json(path.read_text())["config"], type_safe=False)
    except FileNotFoundError as error:
        raise UserError(f"{workdir} is not a workdir of kdjax: it has no config.json.") from error
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore it, or choose another --workdir.") from error


@contextlib.contextmanager
def claimed(workdir: Path, config: ConfigDict) -> Iterator[None]:
    """Makes the workdir, or checks that it belongs to this config, and keeps a second run out of it.

    Raises:
      UserError: it belongs to another config, another run is in it, or it cannot be written.
    """
    # One process holds the workdir for all, and the others learn whether it could.
    lock = cluster.by_first(lambda: _claim(Path(workdir), config))
    with lock or contextlib.nullcontext():
        yield


def _claim(workdir: Path, config: ConfigDict) -> IO[str]:
    """The open lock of a workdir, which is then this config's."""
    saved = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w")  # noqa: SIM115 - held open for as long as the run lasts
    except OSError as error:
        raise UserError(
            f"cannot write in the workdir {workdir}: {error.strerror}; choose another --workdir."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UserError(
            f"another run is in the workdir {workdir}: wait for it, or choose another --workdir."
        ) from error
    try:
        if saved.exists():
            changed = configs.differences(saved_config(workdir), config)
            if changed:
                raise UserError(
                    f"the workdir {workdir} belongs to another config (it differs in {', '.join(changed[:4])}): "
                    "choose another --workdir, or go back to that config."
                )
        write_atomic(
            saved, configs.to_json({"config_sha256": configs.sha256(config), "config": config.to_dict()}) + "\n"
        )
    except UserError:
        lock.close()
        raise
    return lock


def obtain_teachers(experiment: Experiment, workdir: Path, *, say: Say = print) -> dict[str, Trained]:
    """Each teacher by name: loaded where the config names a checkpoint, trained in ``workdir`` otherwise."""
    return _obtain(experiment, [], workdir, say)[1]


def obtain_teachers_of(
    experiment: Experiment, arm: str, workdir: Path, *, say: Say = print
) -> tuple[Experiment, dict[str, Trained]]:
    """Who teaches an arm, by name, loaded or trained in ``workdir`` with all that comes before; and the experiment in
    which the arm can then be trained (a curriculum's examples scored)."""
    if arm == ALONE or arm in experiment.teachers:
        return experiment, {}
    links = list(experiment.links)
    experiment, done = _obtain(experiment, links[: links.index(arm)] if links else [], workdir, say)
    return experiment, taught_by(experiment, arm, done)


def _obtain(
    experiment: Experiment, links: Sequence[str], workdir: Path, say: Say
) -> tuple[Experiment, dict[str, Trained]]:
    """The teachers and these links of the chain by name, loaded or trained, and the experiment as they let it be: with
    the difficulty of its examples, where the config has a curriculum."""
    done: dict[str, Trained] = {}
    loaded = {name: experiments.load_teacher(experiment, name) for name in (*experiment.teachers, *links)}
    for name, variables in loaded.items():
        if variables is None:
            taught = taught_by(experiment, name, done)
            trained = train_arm(experiment, name, workdir, teachers=taught, say=say)
            done[name] = trained._replace(variables=experiments.stored(experiment, name, trained.variables))
            experiments.as_cached(experiment, done[name].variables)
        else:
            done[name] = Trained(variables, 0, None)
        if name == list(experiment.teachers)[-1]:
            experiment = difficulty.scored(experiment, {key: one.variables for key, one in done.items()}, workdir)
    return experiment, done


def taught_by(experiment: Experiment, name: str, done: dict[str, Trained]) -> dict[str, Trained]:
    """Who teaches an arm: in a chain the link before it, under the main teacher's name; else the teachers, if any."""
    links = list(experiment.links)
    if name in links[1:]:
        return {MAIN: done[links[links.index(name) - 1]]}
    if name == DISTILLED or name in links:
        return {teacher: done[teacher] for teacher in experiment.teachers}
    return {}


def first_weights(experiment: Experiment, done: dict[str, Trained]) -> Callable[[], Variables] | None:
    """What makes the weights that both students begin with, where the config names some: ``student.init``."""
    config = experiment.config
    if not config.student.init:
        return None
    weights = lambda: done[MAIN].variables
    # Both students take copies of the same arrays.
    return functools.cache(lambda: language.first_weights(config, experiment.dataset, experiment.mesh, weights))


def train_arm(
    experiment: Experiment,
    name: str,
    workdir: Path,
    *,
    teachers: dict[str, Trained],
    first: Callable[[], Variables] | None = None,
    called: str = "",
    say: Say = print,
) -> Trained:
    """Trains an arm to its last step, or loads it where it is there already; ``teachers`` are the arm's own, ``first``
    makes the weights that it begins with, random ones without it, and its files and messages are of an arm ``called``
    that, where it is not ``name``."""
    config, called = experiment.config, called or name
    taught = {key: value.variables for key, value in teachers.items()}
    meta: dict[str, Any] = {"arm": called, "config_sha256": experiment.config_sha256}
    if taught:
        meta["teacher_sha256"] = {key: checkpoint.digest(variables) for key, variables in taught.items()}
    if taught and name == DISTILLED and experiment.signals:
        taught = {MAIN: language.NO_WEIGHTS}
    arm = build.make_arm(experiment, name, taught)._replace(name=called, first=first)
    model = experiments.model_of(experiment, name)
    accuracy = experiment.task.make_accuracy(model, experiment.dataset, experiment.mesh, config.data.eval_batch_size)
    every = build.every_of(config, evaluate=config.log.eval_every)
    folder = Path(workdir) / "checkpoints" / called
    with (
        checkpoint.Checkpoints(folder, config.checkpoint.keep, config.checkpoint.keep_best) as checkpoints,
        _writers(config, Path(workdir)) as writers,
    ):
        done = train.run(
            arm,
            experiment.mesh,
            every=every,
            checkpoints=checkpoints,
            meta=meta,
            writers=writers,
            evaluate=accuracy,
            profile=Path(workdir) / "profile" / called,
            say=say,
        )
    return Trained(inference_variables(done.state), int(jax.device_get(done.state.step)), done.examples_per_s)


@contextlib.contextmanager
def _writers(config: ConfigDict, workdir: Path) -> Iterator[list[Any]]:
    """Where metrics go; one process writes for all."""
    with contextlib.ExitStack() as stack:
        opened: list[Any] = []
        if cluster.is_first():
            opened.append(stack.enter_context(JsonlWriter(workdir / "metrics.jsonl")))
            if config.log.tensorboard:
                opened.append(TensorBoardWriter(workdir / "tensorboard"))
                stack.callback(opened[-1].close)
            if config.log.get("wandb"):  # a workdir may be older than this key
                opened.append(WandbWriter(config.log.wandb, workdir, config.to_dict()))
                stack.callback(opened[-1].close)
        yield opened


def _check_disk(experiment: Experiment, workdir: Path, arms: Sequence[str]) -> None:
    """Refuses a run whose checkpoints would not fit on the disk: those that are kept, and one that is being written."""
    kept = experiment.config.checkpoint.keep + experiment.config.checkpoint.keep_best + 1
    states = [train.abstract_state(build.make_arm(experiment, arm), experiment.mesh) for arm in arms]
    needed = kept * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(states))
    free = shutil.disk_usage(workdir).free
    if needed > free:
        text = memory.bytes_text
        raise UserError(
            f"the checkpoints in {workdir} will need {text(needed)} and the disk has {text(free)} left: free some "
            "space, lower checkpoint.keep, or choose another --workdir."
        )


def require_finished(experiment: Experiment, name: str, workdir: Path) -> None:
    """Raises a UserError where an arm that is trained in ``workdir`` has not reached its last step."""
    folder = Path(workdir) / "checkpoints" / name
    wanted = build.make_arm(experiment, name).stages[-1].stop
    saved = [int(child) for child in os.listdir(folder) if child.isdigit()] if folder.is_dir() else []
    if wanted not in saved:
        at = f"is at step {max(saved)} of {wanted}" if saved else "has no checkpoint"
        raise UserError(f"{name} in {workdir} {at}: run kdjax distill with this --workdir to finish it first.")
