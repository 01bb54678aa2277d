"""From a config to its arms: everything that can be refused is refused here, before any device time is spent."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from kdjax import checkpoint, models, objective, optimizer, schedules, sharding, train
from kdjax import config as configs
from kdjax.data import pipeline, sources
from kdjax.data.sources import Dataset, Split
from kdjax.errors import UserError, unknown
from kdjax.model import Model, Variables, from_nnx
from kdjax.stages import Plan, make_plan
from kdjax.step import make_train_step
from kdjax.tasks import classification

MAIN = "teacher"  # the name of the first teacher; more have the names that the config gives them
STUDENTS = ALONE, DISTILLED = ("student_alone", "student_distilled")
DTYPES = ("float32", "bfloat16")


class Experiment(NamedTuple):
    """A config made real: the data, the devices and the models, nothing trained yet."""

    config: ConfigDict
    dataset: Dataset  # as the teacher sees it
    student_train: Split  # as the student sees it: labels hidden, a class left out
    mesh: Mesh
    teachers: dict[str, Model]
    student: Model
    config_sha256: str

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.dataset.class_names)


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
    shape = tuple(dataset.train.inputs.shape[1:])
    build = lambda part: _bundled(
        part.name, part.options.to_dict(), len(dataset.class_names), shape, config.train.dtype
    )
    members = {MAIN: config.teacher, **config.more_teachers}
    experiment = Experiment(
        config=config,
        dataset=_relabelled(dataset, config.teacher.labels, config.seed),
        student_train=_student_view(dataset, config),
        mesh=mesh,
        teachers={name: build(member(config, name)) for name in members},
        student=build(config.student),
        config_sha256=configs.sha256(config),
    )
    for arm in (MAIN, *STUDENTS):
        make_arm(experiment, arm)  # builds every objective, schedule and optimiser once, to refuse what cannot be built
    return experiment


def make_arm(experiment: Experiment, name: str, teacher_variables: dict[str, Variables] | None = None) -> train.Arm:
    """The arm of that name: a teacher (by its name), ``student_alone`` or ``student_distilled``.

    Both students start from the same weights and see the same batches: only the objective differs.
    """
    config = experiment.config
    is_student = name in STUDENTS
    split = experiment.student_train if is_student else experiment.dataset.train
    section, length = (config.optimizer, config.train) if is_student else (config.teacher.optimizer, config.teacher)
    per_epoch = len(split.labels) / config.data.batch_size
    where = "train" if is_student else "teacher"
    total = schedules.steps_of("", _length(length), None, per_epoch, where=where)
    if total is None:
        raise UserError(f"{where}.epochs and {where}.steps are both 0: say how long to train.")
    model = experiment.student if is_student else experiment.teachers[name]
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    transform = optimizer.make(section, params)
    losses = {DISTILLED: config.losses, ALONE: config.control.losses}.get(name, config.teacher.losses)
    sections = config.stages.to_dict() if name == DISTILLED else {}
    rate = section.to_dict()["learning_rate"]
    plans = make_plan(sections, losses.to_dict(), rate, total, per_epoch)
    augment = config.data.augment.to_dict() | ({} if is_student else config.teacher.augment.to_dict())
    # Teachers differ by their place among them; both students share one key.
    number = 1 if is_student else 2 + list(experiment.teachers).index(name)
    key = jax.random.fold_in(jax.random.key(config.seed), number)
    return train.Arm(
        name=name,
        model=model,
        optimizer=transform,
        stages=[_stage(experiment, model, transform, plan, per_epoch, augment) for plan in plans],
        batches=lambda first: pipeline.train_batches(
            split,
            batch_size=config.data.batch_size,
            seed=config.seed,
            start_step=first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        batch_size=config.data.batch_size,
        key=key,
        teacher_variables=teacher_variables or {},
        ema=is_student and config.train.ema > 0,
        rules=config.sharding.student if is_student else config.sharding.teacher,
        teacher_rules=config.sharding.teacher,
    )


def load_teacher(experiment: Experiment, name: str) -> Variables | None:
    """The weights that ``init`` of a teacher names, on the host; ``None`` where it is to be trained.

    Raises:
      UserError: no checkpoint there, a damaged one, or one of another architecture (names the first parameter).
    """
    place = member(experiment.config, name).init
    if not place:
        return None
    model = experiment.teachers[name]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    variables, _ = checkpoint.load_model(checkpoint_folder(place), like)
    return jax.device_get(variables)


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
    return Split(split.inputs[kept], split.labels[kept])


def _length(section: Mapping[str, Any]) -> dict[str, Any]:
    """``steps`` where it is set, else ``epochs``; else nothing."""
    given = {unit: section[unit] for unit in ("steps", "epochs") if section[unit]}
    return {"steps": given["steps"]} if "steps" in given else given


def _stage(
    experiment: Experiment, model: Model, transform: Any, plan: Plan, per_epoch: float, augment: dict[str, Any]
) -> train.Stage:
    config = experiment.config
    weights = {name: member(config, name).weight for name in experiment.teachers}
    goal = objective.make_objective(plan.losses, weights, config.teacher.combine)
    make = partial(schedules.make, steps_per_epoch=per_epoch)
    length = plan.stop - plan.start
    terms = {name: make(spec, total_steps=length, name=f"losses.{name}") for name, spec in goal.hparams.items()}
    rate = make(plan.learning_rate, total_steps=plan.rate_stop - plan.rate_start, name="learning_rate")

    def hparams_at(params, step):
        values = schedules.at(terms, params, step - plan.start)
        return values | schedules.at({"learning_rate": rate}, params, step - plan.rate_start)

    step = make_train_step(
        model,
        experiment.teachers if goal.uses_teacher else {},
        goal,
        transform,
        preprocess=classification.make_preprocess(experiment.dataset, augment),
        hparams_at=hparams_at,
        accumulate=config.train.accumulate,
        ema_decay=config.train.ema if model is experiment.student else 0.0,
    )
    return train.Stage(plan.start, plan.stop, step, schedules.values({**terms, "learning_rate": rate}))
