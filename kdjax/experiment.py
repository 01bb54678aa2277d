"""From a config to data, devices and models, all fitting together; ``build`` makes the arms of it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from numpy.typing import NDArray

from kdjax import chain, checkpoint, reuse, sharding
from kdjax import config as configs
from kdjax.data import cache, curriculum, packing, sources, text
from kdjax.errors import UserError, unknown
from kdjax.model import Model, Variables
from kdjax.tasks import classification, language

MAIN = "teacher"  # the name of the first teacher; more have the names that the config gives them
STUDENTS = ALONE, DISTILLED = ("student_alone", "student_distilled")
DTYPES = ("float32", "bfloat16")
TASKS: dict[str, Any] = {"classification": classification, "language": language}
Dataset = sources.Dataset | text.TextDataset
Split = sources.Split | packing.TextSplit


class Link(NamedTuple):
    """What differs in the experiment in which a link of a chain is the distilled student; see ``chain``."""

    config: ConfigDict
    teachers: dict[str, Model]
    distilled: Model


class Experiment(NamedTuple):
    """A config made real: the data, the devices and the models, nothing trained yet."""

    config: ConfigDict
    source: Any  # Dataset, as it was loaded
    dataset: Any  # as the teacher sees it
    student_train: Any  # Split, as the student sees it: labels hidden, a class left out
    classes: int
    mesh: Mesh
    teachers: dict[str, Model]
    student: Model
    distilled: Model  # the student as it is distilled: itself, or with the teacher's classifier
    config_sha256: str
    links: Mapping[str, Link] = MappingProxyType({})  # by arm, the distilled student the last; empty without a chain
    peers: tuple[Model, ...] = ()  # that learn beside the distilled student
    difficulty: NDArray[np.float32] | None = None  # of each example of student_train, for a curriculum
    signals: cache.Cache | None = None  # what the teacher said beforehand, in its place

    @property
    def task(self) -> Any:
        """The module of ``kdjax.tasks`` that says what a batch means."""
        return TASKS[self.config.task]

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm by name, in the order of training."""
        return (*self.teachers, *(name for name in self.links if name != DISTILLED), *STUDENTS)


def load(config: ConfigDict, dataset: Any = None) -> Experiment:
    """Loads the data, shapes the models and checks that all parts fit together.

    Args:
      config: the experiment; see ``config.default``.
      dataset: data already in memory, instead of ``config.data.name``.

    Raises:
      UserError: anything in the config or the data that cannot work.
    """
    config = configs.resolve(config)
    if config.train.dtype not in DTYPES:
        raise unknown("train.dtype", config.train.dtype, DTYPES)
    if config.task not in TASKS:
        raise unknown("task", config.task, TASKS)
    task = TASKS[config.task]
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.check_batch(config.data.batch_size, mesh, config.train.accumulate)
    sharding.check_batch(config.data.eval_batch_size, mesh, what="data.eval_batch_size")
    curriculum.check(config.data.curriculum)
    dataset = task.load(config, dataset)
    members = {MAIN: config.teacher, **config.more_teachers}
    classes = task.classes(config, dataset)
    build = lambda part: task.make_model(config, part, dataset, classes)
    teachers = {name: build(member(config, name)) for name in members}
    student = build(config.student)
    experiment = Experiment(
        config=config,
        source=dataset,
        dataset=task.teacher_view(dataset, config),
        student_train=task.student_view(dataset, config),
        classes=classes,
        mesh=mesh,
        teachers=teachers,
        student=student,
        distilled=student,
        config_sha256=configs.sha256(config),
        peers=tuple(build(config.peers[name]) for name in config.peers),
    )
    return _with_signals(_with_classifier(_with_links(experiment, build)))


def _with_signals(experiment: Experiment) -> Experiment:
    """With the cache that ``teacher.cache`` names, of this data and tokenizer; the teacher it is of is compared where
    its weights are known."""
    place = experiment.config.teacher.cache
    if not place:
        return experiment
    if experiment.config.task != "language" or len(experiment.teachers) > 1 or experiment.links:
        raise UserError("teacher.cache stands for one teacher of a language model: leave it out of this config.")
    found = cache.open_cache(place)
    language.check_cache(found, experiment.dataset)
    return experiment._replace(signals=found)


def _with_links(experiment: Experiment, build: Callable[[ConfigDict], Model]) -> Experiment:
    """With the models between teacher and student, each the teacher of the next."""
    taken = (*experiment.teachers, *STUDENTS)
    links, teachers = {}, experiment.teachers
    for name, config in chain.configs_of(experiment.config, taken, DISTILLED).items():
        model = experiment.student if name == DISTILLED else build(config.student)
        links[name] = Link(config, teachers, model)
        teachers = {MAIN: model}
    return experiment._replace(links=links)


def _with_classifier(experiment: Experiment) -> Experiment:
    """With the teacher's classifier in the place of the distilled student's, where the config asks for that."""
    if not experiment.config.student.reuse_classifier:
        return experiment
    if experiment.task is not classification:
        raise UserError("student.reuse_classifier is for classification: set it to False.")
    some = {"inputs": jnp.asarray(experiment.dataset.train.inputs[:8])}
    images = classification.make_normalise(experiment.dataset)(some)["inputs"]
    link = experiment.links.get(DISTILLED)
    teacher = (link or experiment).teachers[MAIN]
    distilled = reuse.reuse_classifier(experiment.student, teacher, images)
    links = {**experiment.links, DISTILLED: link._replace(distilled=distilled)} if link else {}
    return experiment._replace(distilled=distilled, links=links)


def within(experiment: Experiment, name: str) -> Experiment:
    """The experiment in which a link is the distilled student; this one, where the name is no link's."""
    if name not in experiment.links:
        return experiment
    return experiment._replace(**experiment.links[name]._asdict(), links={})


def refuse_language(experiment: Experiment, what: str) -> None:
    """Raises a UserError where the config is for a language model, and ``what`` scores classes."""
    if experiment.task is not classification:
        raise UserError(f"{what} is for classification, and task={experiment.config.task}: use kdjax distill.")


def refuse_chain(experiment: Experiment, what: str) -> None:
    """Raises a UserError where the config has links between teacher and student, and ``what`` trains one student."""
    if experiment.links:
        raise UserError(
            f"{what} has one teacher for all: train assistants and generations with kdjax distill first, and name the "
            "last one's checkpoints in teacher.init."
        )


def model_of(experiment: Experiment, name: str) -> Model:
    """The model that the arm of that name trains."""
    if name in experiment.links:
        return experiment.links[name].distilled
    return {**experiment.teachers, ALONE: experiment.student, DISTILLED: experiment.distilled}[name]


def asked(experiment: Experiment) -> dict[str, Model]:
    """Who answers in the distilled student's step: the teachers, or the cache of what one of them said."""
    return {MAIN: language.SIGNALLED} if experiment.signals else experiment.teachers


def load_teacher(experiment: Experiment, name: str) -> Variables | None:
    """The weights that ``init`` of a teacher or an assistant names; ``None`` where it is to be trained.

    Those of a checkpoint come to the host; those of a Hugging Face folder straight onto the mesh, by the teacher's
    sharding rules and in the dtype of the computation, since a frozen model needs no other.

    Raises:
      UserError: no checkpoint there, a damaged one, one of another architecture (names the first parameter), or a
        teacher whose signals are not those of ``teacher.cache``.
    """
    place = init_of(experiment.config, name)
    if not place:
        return None
    if language.is_folder(place):
        rules, dtype = experiment.config.sharding.teacher, jnp.dtype(experiment.config.train.dtype)
        return as_cached(experiment, language.load_weights(place, experiment.mesh, rules, dtype))
    return as_cached(experiment, load_weights(model_of(experiment, name), checkpoint_folder(place)))


def load_weights(model: Model, folder: Path) -> Variables:
    """The weights of the newest checkpoint in a folder, which must be the model's, on the host.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another architecture (names the first parameter).
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return jax.device_get(checkpoint.load_model(folder, like)[0])


def as_cached(experiment: Experiment, variables: Variables) -> Variables:
    """A teacher's weights; refused, before a student is trained, where the cache that speaks for it is another's."""
    if experiment.signals:
        language.check_cache(experiment.signals, experiment.dataset, checkpoint.digest(variables))
    return variables


def init_of(config: ConfigDict, name: str) -> str:
    """The checkpoint that stands for an arm; "" where it is to be trained, as every student and generation is."""
    if name == MAIN or name in config.more_teachers:
        return member(config, name).init
    return chain.inits(config).get(name, "")


def checkpoint_folder(place: str | Path) -> Path:
    """The folder of checkpoints that a user means: a workdir stands for its teacher's."""
    place = Path(place)
    return place / "checkpoints" / MAIN if (place / "checkpoints").is_dir() else place


def member(config: ConfigDict, name: str) -> ConfigDict:
    """A teacher's part of the config: what one of ``more_teachers`` leaves out is as in ``teacher``, but ``init``."""
    main = {key: config.teacher[key] for key in configs.MEMBER_KEYS}
    if name == MAIN:
        return ConfigDict(main)
    return ConfigDict(main | {"init": "", "weight": 1.0} | config.more_teachers[name].to_dict())
