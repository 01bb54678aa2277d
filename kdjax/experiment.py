"""From a config to its arms: everything that can be refused is refused here, before any device time is spent."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from numpy.typing import NDArray

from kdjax import chain, checkpoint, models, objective, optimizer, reuse, schedules, sharding, state, train
from kdjax import config as configs
from kdjax.catalogue import TERMS
from kdjax.data import curriculum, pipeline, sources
from kdjax.data.sources import Dataset, Split
from kdjax.errors import UserError, unknown
from kdjax.model import Model, Variables, from_nnx, tap_shapes
from kdjax.stages import Plan, make_plan
from kdjax.step import make_train_step
from kdjax.taps import Network
from kdjax.tasks import classification

MAIN = "teacher"  # the name of the first teacher; more have the names that the config gives them
STUDENTS = ALONE, DISTILLED = ("student_alone", "student_distilled")
DTYPES = ("float32", "bfloat16")


class Link(NamedTuple):
    """What differs in the experiment in which a link of a chain is the distilled student; see ``chain``."""

    config: ConfigDict
    teachers: dict[str, Model]
    distilled: Model


class Experiment(NamedTuple):
    """A config made real: the data, the devices and the models, nothing trained yet."""

    config: ConfigDict
    dataset: Dataset  # as the teacher sees it
    student_train: Split  # as the student sees it: labels hidden, a class left out
    mesh: Mesh
    teachers: dict[str, Model]
    student: Model
    distilled: Model  # the student as it is distilled: itself, or with the teacher's classifier
    config_sha256: str
    links: Mapping[str, Link] = MappingProxyType({})  # by arm, the distilled student the last; empty without a chain
    peers: tuple[Model, ...] = ()  # that learn beside the distilled student
    difficulty: NDArray[np.float32] | None = None  # of each example of student_train, for a curriculum

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.dataset.class_names)

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm by name, in the order of training."""
        return (*self.teachers, *(name for name in self.links if name != DISTILLED), *STUDENTS)


def prepare(config: ConfigDict, dataset: Dataset | None = None) -> Experiment:
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
    mesh = sharding.make_mesh(config.mesh.to_dict())
    sharding.check_batch(config.data.batch_size, mesh, config.train.accumulate)
    sharding.check_batch(config.data.eval_batch_size, mesh, what="data.eval_batch_size")
    dataset = dataset or sources.load(config.data)
    sources.validate(dataset)
    curriculum.check(config.data.curriculum)
    if config.teacher.combine == "routed":
        sources.check_routes(dataset, [MAIN, *config.more_teachers])
    shape = tuple(dataset.train.inputs.shape[1:])
    build = lambda part: _bundled(
        part.name, part.options.to_dict(), len(dataset.class_names), shape, config.train.dtype
    )
    members = {MAIN: config.teacher, **config.more_teachers}
    student = build(config.student)
    experiment = Experiment(
        config=config,
        dataset=_relabelled(dataset, config.teacher.labels, config.seed),
        student_train=_student_view(dataset, config),
        mesh=mesh,
        teachers={name: build(member(config, name)) for name in members},
        student=student,
        distilled=student,
        config_sha256=configs.sha256(config),
        peers=tuple(build(config.peers[name]) for name in config.peers),
    )
    experiment = _with_classifier(_with_links(experiment, build))
    for name in (MAIN, *experiment.links, *STUDENTS):
        arm = make_arm(experiment, name)  # every objective, schedule and optimiser once, to refuse what cannot be built
        asks = any(stage.objective and stage.objective.uses_teacher for stage in arm.stages)
        terms = [term for stage in arm.stages if stage.objective for term in stage.objective.terms]
        if name == DISTILLED and experiment.peers and "mutual" not in terms:
            raise UserError("peers learn by losses.mutual, which is off: set its weight, or leave out peers.")
        if name in experiment.links and not asks:
            raise UserError(
                "assistants and generations hand on what the teacher says, and no loss term asks it: set the weight of "
                "one that does, such as losses.kl.weight."
            )
    return experiment


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
    some = {"inputs": jnp.asarray(experiment.dataset.train.inputs[:8])}
    images = classification.make_normalise(experiment.dataset)(some)["inputs"]
    link = experiment.links.get(DISTILLED)
    teacher = (link or experiment).teachers[MAIN]
    distilled = reuse.reuse_classifier(experiment.student, teacher, images)
    links = {**experiment.links, DISTILLED: link._replace(distilled=distilled)} if link else {}
    return experiment._replace(distilled=distilled, links=links)


def make_arm(
    experiment: Experiment,
    name: str,
    teacher_variables: dict[str, Variables] | None = None,
    *,
    members: Sequence[ConfigDict] = (),
    chunk: int = 0,
) -> train.Arm:
    """The arm of that name: a teacher (by its name), a link of the chain, ``student_alone`` or ``student_distilled``.

    Both students start from the same weights and see the same batches: only the objective differs.

    Args:
      experiment: the run.
      name: of the arm.
      teacher_variables: the weights of the arm's teachers by name, where it needs them; in a chain, those of the link
        before it, as ``MAIN``.
      members: of a population, a config for each, which differ from the experiment's in traced numbers and in
        ``student.seed`` alone; none for a plain run.
      chunk: how many of them run at a time; 0 for all.
    """
    if name in experiment.links:
        arm = make_arm(within(experiment, name), DISTILLED, teacher_variables, members=members, chunk=chunk)
        return arm._replace(name=name)
    config = experiment.config
    is_student = name in STUDENTS
    split = experiment.student_train if is_student else experiment.dataset.train
    section, length = (config.optimizer, config.train) if is_student else (config.teacher.optimizer, config.teacher)
    per_epoch = len(split.labels) / config.data.batch_size
    where = "train" if is_student else "teacher"
    total = schedules.steps_of("", _length(length), None, per_epoch, where=where)
    if total is None:
        raise UserError(f"{where}.epochs and {where}.steps are both 0: say how long to train.")
    model = model_of(experiment, name)
    if name == DISTILLED and config.student.reuse_classifier and teacher_variables:
        model = reuse.with_classifier(model, teacher_variables[MAIN])
    plans = _plans(config, name, total, per_epoch)
    of_members = [_plans(one, name, total, per_epoch) for one in members] or [plans]
    augment = config.data.augment.to_dict() | ({} if is_student else config.teacher.augment.to_dict())
    goals = [_objective(experiment, name, plan, len(split.labels), per_epoch) for plan in plans]
    _check_balance(config, name, goals)
    init_objective = _joined([goal.init for goal in goals])
    learned = jax.eval_shape(init_objective, jax.random.key(0))["params"]
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    transform = optimizer.make(section, state.trainable(params, learned))
    ema = config.train.ema if is_student else 0.0

    def create(keys: train.Keys) -> state.TrainState:
        one = lambda key: state.create_state(
            model, transform, key, keys.views, init_objective=init_objective, ema=ema > 0
        )
        if not members:
            return one(keys.student)
        made = jax.vmap(one)(keys.student)
        return made._replace(step=made.step[0], view_key=made.view_key[0])

    # Teachers differ by their place among them; both students share one key.
    number = 1 if is_student else 2 + list(experiment.teachers).index(name)
    return train.Arm(
        name=name,
        create=create,
        keys=_keys(config, number, members if is_student else ()),
        stages=[
            _stage(experiment, model, transform, goal, same, per_epoch, augment, ema, len(members), chunk)
            for goal, same in zip(goals, zip(*of_members, strict=True), strict=True)
        ],
        batches=_batches(experiment, name, config.seed, total, bool(teacher_variables)),
        batch_size=config.data.batch_size,
        teacher_variables=teacher_variables or {},
        rules=config.sharding.student if is_student else config.sharding.teacher,
        teacher_rules=config.sharding.teacher,
        members=len(members),
    )


def within(experiment: Experiment, name: str) -> Experiment:
    """The experiment in which a link is the distilled student; this one, where the name is no link's."""
    if name not in experiment.links:
        return experiment
    return experiment._replace(**experiment.links[name]._asdict(), links={})


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


def reseeded(experiment: Experiment, arm: train.Arm, seed: int) -> train.Arm:
    """A student's arm with the weights, the order of examples and the views of another ``seed``, and the same compiled
    programs; the teacher and the choice of labels stay. Members of a population keep the differences among them."""
    assert arm.name in STUDENTS
    config = ConfigDict(experiment.config.to_dict(), type_safe=False)
    config.seed = seed
    keys = _keys(config, 1, [config] * arm.members)
    batches = _batches(experiment, arm.name, seed, arm.stages[-1].stop, bool(arm.teacher_variables))
    return arm._replace(keys=keys, batches=batches)


def _keys(config: ConfigDict, number: int, members: Sequence[ConfigDict]) -> train.Keys:
    views = jax.random.fold_in(jax.random.key(config.seed), number)
    if number > 1:
        return train.Keys(views, views)
    of_seed = lambda seed: jax.random.fold_in(views, seed) if seed else views
    if members:
        return train.Keys(jnp.stack([of_seed(one.student.seed) for one in members]), views)
    return train.Keys(of_seed(config.student.seed), views)


def _batches(experiment: Experiment, name: str, seed: int, total: int, has_teachers: bool) -> Any:
    """The batches of an arm from a step on: a curriculum's for the distilled student, where the config has one."""
    config = experiment.config
    split = experiment.student_train if name in STUDENTS else experiment.dataset.train
    plan = config.data.curriculum.to_dict()

    def batches(first: int) -> Any:
        common = {
            "batch_size": config.data.batch_size,
            "seed": seed,
            "start_step": first,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
        }
        # An arm without teachers is there to be looked at, not to be trained, and nobody has scored its examples.
        if name != DISTILLED or plan["pacing"] == "none" or not has_teachers:
            return pipeline.train_batches(split, **common)
        if experiment.difficulty is None:
            raise UserError(
                f"data.curriculum.pacing={plan['pacing']} needs the difficulty of each example, which nobody has "
                "scored (kdjax.recipes.difficulty): use kdjax distill, or set it to none."
            )
        return curriculum.batches(split, experiment.difficulty, total_steps=total, **plan, **common)

    return batches


def _plans(config: ConfigDict, name: str, total: int, per_epoch: float) -> list[Plan]:
    section = config.optimizer if name in STUDENTS else config.teacher.optimizer
    losses = {DISTILLED: config.losses, ALONE: config.control.losses}.get(name, config.teacher.losses)
    sections = config.stages.to_dict() if name == DISTILLED else {}
    return make_plan(sections, losses.to_dict(), section.to_dict()["learning_rate"], total, per_epoch)


def _objective(experiment: Experiment, name: str, plan: Plan, examples: int, per_epoch: float) -> objective.Objective:
    config = experiment.config
    is_student = name in STUDENTS
    section = config.student if is_student else config.teacher
    weights = {teacher: member(config, teacher).weight for teacher in experiment.teachers}
    shape = (config.data.batch_size, *experiment.dataset.train.inputs.shape[1:])
    setting = objective.Setting(
        student=_network(model_of(experiment, name), shape, section),
        teacher=_network(experiment.teachers[MAIN], shape, config.teacher),
        classes=experiment.classes,
        examples=examples,
        epoch_steps=max(round(per_epoch), 1),
        peers=experiment.peers,
    )
    balance = config.balance if name == DISTILLED else "fixed"
    goal = objective.make_objective(plan.losses, weights, config.teacher.combine, setting=setting, balance=balance)
    on_labels = [term for term in goal.terms if TERMS[term].on_labels]
    if on_labels and is_student and (experiment.student_train.labels < 0).all():
        raise UserError(
            f"losses.{on_labels[0]} needs labels and the student sees none: set its weight to 0, or raise data.labels."
        )
    return goal


def _check_balance(config: ConfigDict, name: str, goals: Sequence[objective.Objective]) -> None:
    if name != DISTILLED or config.balance == "fixed":
        return
    if config.train.accumulate > 1:
        raise UserError(
            f"balance={config.balance} weighs the losses of whole batches: set train.accumulate to 1, or balance to "
            "fixed."
        )
    if len({frozenset(goal.terms) for goal in goals}) > 1:
        raise UserError(f"balance={config.balance} needs the same terms in all stages: set balance to fixed.")


def _network(model: Model, shape: tuple[int, ...], section: ConfigDict) -> Network:
    return Network(_tap_shapes(model, shape), models.heads(section.name, section.options))


@lru_cache(maxsize=64)
def _tap_shapes(model: Model, shape: tuple[int, ...]) -> Mapping[str, tuple[int, ...]]:
    return tap_shapes(model, jax.ShapeDtypeStruct(shape, jnp.float32))


def _joined(inits: Sequence[Any]) -> Any:
    """What all stages' objectives learn and remember; a term that several have is the first one's."""

    def init(key: jax.Array) -> Variables:
        made = [init(key) for init in reversed(inits)]
        return {
            part: {name: value for one in made for name, value in one[part].items()} for part in ("params", "state")
        }

    return init


def load_teacher(experiment: Experiment, name: str) -> Variables | None:
    """The weights that ``init`` of a teacher or an assistant names, on the host; ``None`` where it is to be trained.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another architecture (names the first parameter).
    """
    place = init_of(experiment.config, name)
    if not place:
        return None
    model = model_of(experiment, name)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    variables, _ = checkpoint.load_model(checkpoint_folder(place), like)
    return jax.device_get(variables)


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


def _bundled(name: str, options: dict[str, Any], classes: int, shape: Any, dtype: str) -> Model:
    return from_nnx(
        lambda rngs: models.build(
            name, classes=classes, input_shape=shape, rngs=rngs, dtype=jnp.dtype(dtype), **options
        )
    )


def _relabelled(dataset: Dataset, share: float, seed: int) -> Dataset:
    if not 0.0 <= share <= 1.0:
        raise UserError(f"a share of labels is between 0 and 1, not {share}.")
    labels = dataset.train.labels if share == 1.0 else sources.hide_labels(dataset.train.labels, share, seed)
    return dataset._replace(train=dataset.train._replace(labels=labels))


def _student_view(dataset: Dataset, config: ConfigDict) -> Split:
    split = _relabelled(dataset, config.data.labels, config.seed).train
    omitted = config.data.omit_class
    if omitted == -1:
        return split
    if not 0 <= omitted < len(dataset.class_names):
        raise UserError(
            f"data.omit_class={omitted} is not a class: there are {len(dataset.class_names)}, counted from 0."
        )
    kept = np.flatnonzero(dataset.train.labels != omitted)
    return sources.take(split, kept)


def _length(section: Mapping[str, Any]) -> dict[str, Any]:
    """``steps`` where it is set, else ``epochs``; else nothing."""
    given = {unit: section[unit] for unit in ("steps", "epochs") if section[unit]}
    return {"steps": given["steps"]} if "steps" in given else given


def _stage(
    experiment: Experiment,
    model: Model,
    transform: Any,
    goal: objective.Objective,
    plans: Sequence[Plan],  # of each member; of a plain run: its own
    per_epoch: float,
    augment: dict[str, Any],
    ema: float,
    members: int,
    chunk: int,
) -> train.Stage:
    plan = plans[0]
    make = partial(schedules.make, steps_per_epoch=per_epoch)
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for one in plans:
        numbers = _numbers(goal.hparams, one.losses)
        terms = {
            name: make(spec, total_steps=one.stop - one.start, name=f"losses.{name}") for name, spec in numbers.items()
        }
        speed = make(one.learning_rate, total_steps=one.rate_stop - one.rate_start, name="learning_rate")
        found.append((terms, {"learning_rate": speed}))
    terms, rate = found[0]

    def hparams_at(params, step):
        values = schedules.at(terms, params, step - plan.start)
        return values | schedules.at(rate, params, step - plan.rate_start)

    step = make_train_step(
        model,
        experiment.teachers if goal.uses_teacher else {},
        goal,
        transform,
        preprocess=classification.make_preprocess(experiment.dataset, augment),
        hparams_at=hparams_at,
        accumulate=experiment.config.train.accumulate,
        ema_decay=ema,
        members=members,
        chunk=chunk,
    )
    values = [schedules.values(terms | rate) for terms, rate in found]
    hparams = jax.tree.map(lambda *x: np.stack(x), *values) if members else values[0]
    return train.Stage(plan.start, plan.stop, step, hparams, goal)


def _numbers(hparams: Mapping[str, Any], losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of an objective as another member of the population has them."""
    found = dict(hparams)
    for name in hparams:
        term, _, option = name.partition(".")
        found[name] = losses.get(term, {}).get(option, hparams[name])
    return found
