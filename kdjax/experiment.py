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

from kdjax import chain, checkpoint, low_precision, reuse, sharding
from kdjax import config as configs
from kdjax.data import cache, curriculum, packing, sources, text
from kdjax.errors import UserError, unknown
from kdjax.model import Model, Variables, from_nnx
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
    teachers: dict[str, Model]  # as they are asked, with the weights that teacher.weights stores
    student: Model
    distilled: Model  # the student as it is distilled: itself, or with the teacher's classifier
    config_sha256: str
    links: Mapping[str, Link] = MappingProxyType({})  # by arm, the distilled student the last; empty without a chain
    teacher_mesh: Mesh | None = None  # devices of the teachers' own while the distilled student learns
    peers: tuple[Model, ...] = ()  # that learn beside the distilled student
    difficulty: NDArray[np.float32] | None = None  # of each example of student_train, for a curriculum
    signals: cache.Cache | None = None  # what the teacher said beforehand, in its place
    floats: Mapping[str, Model] = MappingProxyType({})  # of teachers with stored weights, as they are trained

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
    _check_low_precision(config)
    task = TASKS[config.task]
    mesh, teacher_mesh = sharding.make_meshes(config.mesh.to_dict(), config.teacher_mesh.to_dict())
    if teacher_mesh is not None:
        sharding.check_batch(config.data.batch_size, teacher_mesh)
    if (config.train.overlap or teacher_mesh is not None) and (config.train.accumulate > 1 or config.teacher.cache):
        raise UserError(
            "teachers that run a batch ahead (train.overlap, teacher_mesh) need whole batches and run themselves: set "
            "train.accumulate to 1 and leave out teacher.cache."
        )
    sharding.check_batch(config.data.batch_size, mesh, config.train.accumulate)
    sharding.check_batch(config.data.eval_batch_size, mesh, what="data.eval_batch_size")
    curriculum.check(config.data.curriculum)
    dataset = task.load(config, dataset)
    members = {MAIN: config.teacher, **config.more_teachers}
    classes = task.classes(config, dataset)
    build = lambda part: _model(config, part, dataset, classes)
    teachers = {name: build(member(config, name)) for name in members}
    kinds = {name: kind for name in members if (kind := member(config, name).weights)}
    stores = {name: low_precision.of_stored(teachers[name], kind) for name, kind in kinds.items()}
    student = build(config.student)
    experiment = Experiment(
        config=config,
        source=dataset,
        dataset=task.teacher_view(dataset, config),
        student_train=task.student_view(dataset, config),
        classes=classes,
        mesh=mesh,
        teacher_mesh=teacher_mesh,
        teachers=teachers | stores,
        student=student,
        distilled=student,
        config_sha256=configs.sha256(config),
        peers=tuple(build(config.peers[name]) for name in config.peers),
        floats={name: model._replace(init=teachers[name].init) for name, model in stores.items()},
    )
    return _with_signals(_with_classifier(_with_links(experiment, build)))


def _check_low_precision(config: ConfigDict) -> None:
    """Refuses what is stored or computed in few bits where that is not known or cannot be."""
    if config.train.products not in low_precision.PRODUCTS:
        raise unknown("train.products", config.train.products, low_precision.PRODUCTS[1:])
    for name in (MAIN, *config.more_teachers):
        kind = member(config, name).weights
        if kind and kind not in low_precision.STORED:
            raise unknown(f"weights of {name}", kind, low_precision.STORED)
    if not config.teacher.weights:
        return
    stored = f"teacher.weights={config.teacher.weights}"
    for key, takes in {
        "student.init=teacher": config.student.init == language.FROM_TEACHER,
        "student.reuse_classifier": config.student.reuse_classifier,
        "a step of compress with of=teacher": any(step.of == MAIN for step in config.compress.values()),
    }.items():
        if takes:
            raise UserError(f"{key} takes over weights of the teacher, which {stored} rounds: leave out one of both.")


def _model(config: ConfigDict, part: ConfigDict, dataset: Any, classes: int) -> Model:
    """The model of a part of the config, its dense products in what ``train.products`` says."""
    task = TASKS[config.task]
    if not config.train.products:
        return task.make_model(config, part, dataset, classes)
    if task is classification:
        factory = task.make_factory(config, part, dataset, classes)
        if part is config.student:
            low_precision.check_dense(factory)
        return from_nnx(low_precision.float8_modules(factory))
    return low_precision.float8_decoder(task.make_model(config, part, dataset, classes))


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
    link = experiment.links[name]
    floats = experiment.floats if link.teachers is experiment.teachers else {}  # a link's weights are never stored
    return experiment._replace(**link._asdict(), links={}, floats=floats)


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
    students = {ALONE: experiment.student, DISTILLED: experiment.distilled}
    return {**experiment.teachers, **experiment.floats, **students}[name]


def asked(experiment: Experiment) -> dict[str, Model]:
    """Who answers in the distilled student's step: the teachers, or the cache of what one of them said."""
    return {MAIN: language.SIGNALLED} if experiment.signals else experiment.teachers


def load_teacher(experiment: Experiment, name: str) -> Variables | None:
    """The weights that ``init`` of a teacher or an assistant names; ``None`` where it is to be trained.

    Those of a checkpoint come to the host; those of a Hugging Face folder straight onto the mesh, by the teacher's
    sharding rules and in the dtype of the computation, since a frozen model needs no other. What ``teacher.weights``
    stores comes to the host either way.

    Raises:
      UserError: no checkpoint there, a damaged one, one of another architecture (names the first parameter), or a
        teacher whose signals are not those of ``teacher.cache``.
    """
    place = init_of(experiment.config, name)
    if not place:
        return None
    if language.is_folder(place):
        rules, dtype = experiment.config.sharding.teacher, jnp.dtype(experiment.config.train.dtype)
        # A model that is too large for the devices before its weights are stored may fit them afterwards.
        mesh = _host_mesh() if name in experiment.floats else experiment.mesh
        return as_cached(experiment, stored(experiment, name, language.load_weights(place, mesh, rules, dtype)))
    variables = load_weights(model_of(experiment, name), checkpoint_folder(place))
    return as_cached(experiment, stored(experiment, name, variables))


def stored(experiment: Experiment, name: str, variables: Variables) -> Variables:
    """The weights with which an arm teaches: a teacher's as ``teacher.weights`` stores them, on the host; else as they
    are."""
    kind = member(experiment.config, name).weights if name in experiment.floats else ""
    return low_precision.store(variables, kind) if kind else variables


def _host_mesh() -> Mesh:
    """One device, the host's, whatever the accelerators."""
    try:
        return Mesh(np.asarray(jax.local_devices(backend="cpu")[:1]), ("data",))
    except RuntimeError as error:  # JAX_PLATFORMS names accelerators alone
        raise UserError(
            "teacher.weights stores a Hugging Face folder on the host, and JAX was told to leave it out: add cpu to "
            "JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu."
        ) from error


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
