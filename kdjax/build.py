"""From an experiment to its arms: objectives, schedules, optimisers and steps.

Everything that can be refused is refused in :func:`prepare`, before any device time is spent.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kdjax import experiment as experiments
from kdjax import objective, optimizer, reuse, schedules, sharding, state, train
from kdjax.catalogue import TERMS
from kdjax.data import curriculum, pipeline
from kdjax.errors import UserError
from kdjax.experiment import ALONE, DISTILLED, MAIN, STUDENTS, Experiment, member, model_of, within
from kdjax.model import Model, Variables, tap_shapes
from kdjax.stages import Plan, make_plan
from kdjax.step import make_train_step
from kdjax.taps import Network
from kdjax.tasks import language

_OF_WHOLE_EXAMPLES = ("mutual", "past_predictions")  # terms that take an example, and not a token, for a position


def prepare(config: ConfigDict, dataset: Any = None) -> Experiment:
    """The experiment of a config, with each of its arms built once, to refuse what cannot be built.

    Args:
      config: the experiment; see ``config.default``.
      dataset: data already in memory, instead of ``config.data.name``.

    Raises:
      UserError: anything in the config or the data that cannot work.
    """
    experiment = experiments.load(config, dataset)
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
    per_epoch = pipeline.length(split) / config.data.batch_size
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
    goals = [_objective(experiment, name, plan, pipeline.length(split), per_epoch) for plan in plans]
    _check_balance(config, name, goals)
    init_objective = _joined([goal.init for goal in goals])
    learned = jax.eval_shape(init_objective, jax.random.key(0))["params"]
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    transform = optimizer.make(section, state.trainable(params, learned))
    ema = config.train.ema if is_student else 0.0
    rules = config.sharding.student if is_student else config.sharding.teacher
    if section.get("sparsify"):  # a workdir may be older than this key
        if ema:
            raise UserError("optimizer.sparsify makes zeros that train.ema would blur: set train.ema to 0.")
        options, example = section.sparsify.to_dict(), state.trainable(params, learned)
        transform = optimizer.thinning(transform, options, example, total_steps=total, steps_per_epoch=per_epoch)

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
            _stage(experiment, model, rules, transform, goal, same, per_epoch, augment, ema, len(members), chunk)
            for goal, same in zip(goals, zip(*of_members, strict=True), strict=True)
        ],
        batches=_batches(experiment, name, config.seed, total, bool(teacher_variables)),
        batch_size=config.data.batch_size,
        teacher_variables=teacher_variables or {},
        rules=rules,
        teacher_rules=config.sharding.teacher,
        members=len(members),
        teacher_mesh=experiment.teacher_mesh if name == DISTILLED else None,
    )


def every_of(config: ConfigDict, *, evaluate: int = 0) -> train.Every:
    """When an arm logs, saves and stops, by the config; ``evaluate`` is in steps, 0 for never."""
    log = config.log
    if log.profile and (len(log.profile) != 2 or not 1 <= log.profile[0] <= log.profile[1]):
        raise UserError(f"log.profile={tuple(log.profile)}: give the first and the last step, such as (10, 12).")
    return train.Every(
        log=log.every,
        evaluate=evaluate,
        save=config.checkpoint.every,
        stop_on_nan=config.train.stop_on_nan,
        skip_nan=config.train.skip_nan,
        stall_s=log.stall_s,
        exit_s=log.stall_exit_s,
        profile=tuple(log.profile) or None,
    )


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
        if name == DISTILLED and experiment.signals:
            return language.with_signals(pipeline.train_batches(split, **common), experiment.signals)
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
    setting = objective.Setting(
        student=_network(experiment, model_of(experiment, name), section),
        teacher=_network(experiment, experiment.teachers[MAIN], config.teacher),
        classes=experiment.classes,
        examples=examples,
        epoch_steps=max(round(per_epoch), 1),
        peers=experiment.peers,
        signals=name == DISTILLED and experiment.signals is not None,
        **experiment.task.setting(config, experiment.mesh),
    )
    balance = config.balance if name == DISTILLED else "fixed"
    goal = objective.make_objective(plan.losses, weights, config.teacher.combine, setting=setting, balance=balance)
    if unfit := [term for term in goal.terms if setting.sequences and term in _OF_WHOLE_EXAMPLES]:
        raise UserError(f"losses.{unfit[0]} is for classification: set its weight to 0.")
    on_labels = [term for term in goal.terms if TERMS[term].on_labels]
    if on_labels and is_student and not experiment.task.has_labels(experiment.student_train):
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


def _network(experiment: Experiment, model: Model, section: ConfigDict) -> Network:
    task, config, dataset = experiment.task, experiment.config, experiment.dataset
    shapes = task.inputs(dataset, config.data.batch_size)
    leaves, structure = jax.tree.flatten(shapes)
    sizes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return Network(_tap_shapes(model, structure, sizes), task.heads(config, section, dataset))


@lru_cache(maxsize=64)
def _tap_shapes(model: Model, structure: Any, sizes: tuple[Any, ...]) -> Mapping[str, tuple[int, ...]]:
    leaves = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in sizes]
    return tap_shapes(model, jax.tree.unflatten(structure, leaves))


def _joined(inits: Sequence[Any]) -> Any:
    """What all stages' objectives learn and remember; a term that several have is the first one's."""

    def init(key: jax.Array) -> Variables:
        made = [init(key) for init in reversed(inits)]
        return {
            part: {name: value for one in made for name, value in one[part].items()} for part in ("params", "state")
        }

    return init


def _length(section: Mapping[str, Any]) -> dict[str, Any]:
    """``steps`` where it is set, else ``epochs``; else nothing."""
    given = {unit: section[unit] for unit in ("steps", "epochs") if section[unit]}
    return {"steps": given["steps"]} if "steps" in given else given


def _stage(
    experiment: Experiment,
    model: Model,
    rules: sharding.Rules,
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

    config = experiment.config
    asked = experiments.asked(experiment) if goal.uses_teacher else {}
    places = (experiment.teacher_mesh or experiment.mesh, config.sharding.teacher)
    asked = {name: sharding.gathered(teacher, *places) for name, teacher in asked.items()}
    model = sharding.gathered(model, experiment.mesh, rules)
    step = make_train_step(
        model,
        asked,
        goal,
        transform,
        preprocess=experiment.task.make_preprocess(experiment.dataset, augment),
        hparams_at=hparams_at,
        accumulate=config.train.accumulate,
        ema_decay=ema,
        members=members,
        chunk=chunk,
        skip_nan=config.train.skip_nan > 0,
    )
    values = [schedules.values(terms | rate) for terms, rate in found]
    hparams = jax.tree.map(lambda *x: np.stack(x), *values) if members else values[0]
    ahead = bool(asked) and (config.train.overlap or experiment.teacher_mesh is not None)
    return train.Stage(plan.start, plan.stop, step, hparams, goal, ahead)


def _numbers(hparams: Mapping[str, Any], losses: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of an objective as another member of the population has them."""
    found = dict(hparams)
    for name in hparams:
        term, _, option = name.partition(".")
        found[name] = losses.get(term, {}).get(option, hparams[name])
    return found
