"""One arm of a run: build, restore, loop. The order of operations in :func:`run` is the law: resume depends on it."""

import contextlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import sharding, state
from kdjax.checkpoint import Checkpoints
from kdjax.errors import UserError
from kdjax.model import Variables, first_mismatch
from kdjax.objective import Objective
from kdjax.state import TrainState
from kdjax.step import HPARAMS, Step
from kdjax.writers import JsonlWriter, Progress, TensorBoardWriter

# With several CPU devices in a process, more than about 32 steps in flight deadlock without a message.
MAX_IN_FLIGHT = 16
Writer = JsonlWriter | TensorBoardWriter


class Stage(NamedTuple):
    """A stretch of steps with one compiled step: from ``start`` up to, but without, ``stop``."""

    start: int
    stop: int
    step: Step
    hparams: Any  # host values of the schedules that the step takes
    objective: Objective | None = None  # what it minimises, for those who look into it


class Keys(NamedTuple):
    """Where an arm's randomness comes from: ``student`` (weights, dropout; one per member of a population) and
    ``views`` (augmentation)."""

    student: jax.Array
    views: jax.Array


class Arm(NamedTuple):
    """All that training one model, or a population of them, needs; ``rules`` are sharding rules."""

    name: str
    create: Callable[[Keys], TrainState]  # the state at step 0; pure
    keys: Keys
    stages: list[Stage]
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]]  # first step -> this process's share of each batch
    batch_size: int
    teacher_variables: Mapping[str, Variables] = MappingProxyType({})
    rules: sharding.Rules = ((".*", "replicate"),)
    teacher_rules: sharding.Rules = ((".*", "replicate"),)
    members: int = 0  # how many students, each with its share of every metric; 0 for a plain run
    first: Callable[[], Variables] | None = None  # makes the model at step 0; that of ``create`` without it


class Every(NamedTuple):
    """How often things happen, in steps; 0 is never (a checkpoint is always written at the end of an arm)."""

    log: int = 20
    evaluate: int = 0
    save: int = 0
    stop_on_nan: bool = True


class Finished(NamedTuple):
    """What a run leaves: the final state and how fast it went (``None`` where nothing was trained)."""

    state: TrainState
    examples_per_s: float | None


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved. ``signal`` is its number."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.signal = number


def run(
    arm: Arm,
    mesh: Mesh,
    *,
    every: Every | None = None,
    checkpoints: Checkpoints | None = None,
    meta: Mapping[str, Any] | None = None,
    writers: Sequence[Writer] = (),
    evaluate: Callable[[Variables], float] | None = None,
    programs: dict[Step, tuple[Callable, list[str]]] | None = None,
    say: Callable[[str], None] = print,
) -> Finished:
    """Trains an arm to its last step, from its newest checkpoint if there is one.

    Args:
      arm: what to train.
      mesh: the devices.
      every: how often to log, evaluate and save.
      checkpoints: where to save and to resume from; ``None`` to keep nothing.
      meta: what identifies the run, saved with each checkpoint; one of other ``meta`` is refused.
      writers: take a line of metrics at each log.
      evaluate: ``evaluate(variables) -> accuracy``.
      programs: the compiled steps so far, for runs that share them; what is compiled here is added.
      say: takes a sentence for the user.

    Raises:
      UserError: the loss is NaN, the teacher is not the one that the checkpoint was trained with, or the disk is full.
      Interrupted: a signal came; the state is saved.
    """
    meta, every = dict(meta or {}), every or Every()
    current, done, clock = _start(arm, mesh, checkpoints, meta, say)
    for writer in writers:
        writer.truncate(arm.name, done)
    shardings = jax.tree.map(lambda x: x.sharding, current)
    teachers = put_teachers(arm.teacher_variables, mesh, arm.teacher_rules)
    last_step = arm.stages[-1].stop
    log = _Log(arm, every, writers, (done, clock.seconds), last_step)

    with _Signals() as signals, log.progress:
        for stage in arm.stages:
            if done >= stage.stop:
                continue
            batches = arm.batches(done)
            first: dict[str, jax.Array] | None = sharding.put_batch(next(batches), mesh)
            hparams = jax.device_put(stage.hparams, sharding.replicated(mesh))
            if programs is None or stage.step not in programs:
                compiled = compile_step(stage.step, mesh, shardings, current, teachers, first, hparams)
                programs = {} if programs is None else programs
                programs[stage.step] = compiled
            step, names = programs[stage.step]
            pending: deque[tuple[int, jax.Array]] = deque()
            clock.resume()
            # NOTE: do not change the order of operations. The batch is fetched after the save, and its position is the
            # step number, so a resumed run sees the batches that this one would have seen.
            with jax.transfer_guard("disallow"):
                while done < stage.stop:
                    batch = first if first is not None else sharding.put_batch(next(batches), mesh)
                    first = None
                    current, packed = step(current, teachers, batch, hparams)
                    done += 1
                    pending.append((done, packed))
                    # Read once: a signal that comes while this step is handled is the next one's, which then saves.
                    stopping = signals.received
                    evaluates = evaluate is not None and _due(done, every.evaluate, last_step)
                    saves = checkpoints is not None and (_due(done, every.save, last_step) or stopping)
                    # NaN must never reach a checkpoint, so all that is in flight is read before a save.
                    bound = 0 if evaluates or saves or done == stage.stop else MAX_IN_FLIGHT
                    while len(pending) > bound:
                        log.take(*pending.popleft(), names, stage.stop, clock, checkpoints)
                    if evaluates or saves:
                        clock.pause()
                        accuracy = evaluate(state.inference_variables(current)) if evaluate and evaluates else None
                        log.evaluated(done, accuracy)
                        if checkpoints and saves:
                            checkpoints.save(done, current, {**meta, "seconds": clock.seconds}, accuracy)
                        if done < stage.stop:
                            clock.resume()
                    if stopping:
                        raise _interrupted(arm, done, checkpoints, stopping)
            clock.pause()
        if signals.received:  # during the last step, whose state is saved as any arm's end is
            raise _interrupted(arm, done, checkpoints, signals.received)
    if checkpoints:
        checkpoints.wait()
    rate = done * arm.batch_size / clock.seconds if clock.seconds else None
    return Finished(current, rate)


def compile_step(step: Step, mesh: Mesh, shardings: TrainState, *args: Any) -> tuple[Callable, list[str]]:
    """Compiles a step ahead of time: ``(compiled, metric names)``, where ``compiled`` returns ``(state, [2,
    metrics])``.

    Only the state is donated. All metrics come back as one array of sums and counts, since each array that the host
    fetches costs about as much as a small one.
    """
    names: list[str] = []

    def packed(state, teachers, batch, hparams):
        state, metrics = step(state, teachers, batch, hparams)
        names[:] = metrics
        return state, jnp.stack(
            [jnp.stack([jnp.asarray(v, jnp.float32) for v in pair]) for pair in zip(*metrics.values(), strict=True)]
        )

    in_shardings = (shardings, *(jax.tree.map(lambda x: x.sharding, arg) for arg in args[1:]))
    jitted = jax.jit(
        packed,
        donate_argnums=0,
        in_shardings=in_shardings,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    return jitted.lower(*args).compile(), names


def abstract_state(arm: Arm, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of an arm's state, without any memory."""
    shapes = jax.eval_shape(arm.create, arm.keys)
    shardings = sharding.by_rules(shapes, mesh, arm.rules, members=arm.members)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def fresh_state(arm: Arm, mesh: Mesh) -> TrainState:
    """An arm's state at step 0, born on its shardings.

    Raises:
      UserError: the weights that it is to begin with are not those of its model (names the first).
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(arm, mesh))
    fresh = jax.jit(arm.create, out_shardings=shardings)(arm.keys)
    if arm.first is None:
        return fresh
    given = arm.first()
    difference = first_mismatch(fresh.params, given["params"]) or first_mismatch(fresh.model_state, given["state"])
    if difference:
        raise UserError(f"{arm.name} cannot begin with the weights that are given: {difference}.")
    # Copies, since the step donates what it is given and another arm may begin with the same arrays.
    put = lambda x, sharding: jax.jit(jnp.copy, out_shardings=sharding)(x)
    params = jax.tree.map(put, given["params"], shardings.params)
    return fresh._replace(
        params=params,
        model_state=jax.tree.map(put, given["state"], shardings.model_state),
        ema=jax.tree.map(jnp.copy, params) if fresh.ema else fresh.ema,
    )


def _start(arm, mesh, checkpoints, meta, say) -> tuple[TrainState, int, "_Clock"]:
    restored = checkpoints.restore_newest(abstract_state(arm, mesh), say) if checkpoints else None
    if restored is None:
        return fresh_state(arm, mesh), 0, _Clock(0.0)
    current, saved = restored
    for name in meta:
        if saved.get(name) != meta[name]:
            raise UserError(
                f"the checkpoint of {arm.name} at step {saved['step']} has another {name} ({saved.get(name)}, "
                f"now {meta[name]}): use the one that it was trained with, or another --workdir."
            )
    if saved["step"] < arm.stages[-1].stop:
        say(f"{arm.name}: resuming from step {saved['step']}.")
    return current, saved["step"], _Clock(saved["seconds"])


def _interrupted(arm: Arm, done: int, checkpoints: Checkpoints | None, number: int) -> Interrupted:
    if checkpoints:
        checkpoints.wait()
    kept = "its state is saved" if checkpoints else "nothing was to be saved"
    return Interrupted(f"{arm.name} stopped by a signal at step {done}; {kept}.", number)


def put_teachers(teacher_variables: Mapping[str, Variables], mesh: Mesh, rules: sharding.Rules) -> dict[str, Variables]:
    """Puts the teachers' weights on the mesh, by their own rules."""
    teacher_variables = dict(teacher_variables)
    shardings = sharding.by_rules(teacher_variables, mesh, rules)

    def put(x: Any, sharding: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        # From NumPy: device_put of a JAX array over several processes builds a broken one.
        return jax.device_put(np.asarray(jax.device_get(x)), sharding)

    return jax.tree.map(put, teacher_variables, shardings)


def _due(done: int, every: int, last: int) -> bool:
    return done == last or (every > 0 and done % every == 0)


class _Clock:
    """Seconds of training, without the pauses for compiling, evaluating and saving."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since: float | None = None

    def resume(self) -> None:
        self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    def now(self) -> float:
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)


class _Log:
    """Gathers the metrics of the steps into one line every ``every.log`` steps, and stops the run at a NaN."""

    def __init__(self, arm: Arm, every: Every, writers: Sequence[Writer], began: tuple[int, float], last_step: int):
        self.arm, self.every, self.writers = arm, every, writers
        self.began = began  # (step, seconds)
        self.progress = Progress(arm.name, last_step, began[0])
        self._window: list[np.ndarray] = []

    def take(
        self,
        number: int,
        packed: jax.Array,
        names: list[str],
        last: int,
        clock: _Clock,
        checkpoints: Checkpoints | None,
    ) -> None:
        pairs = jax.device_get(packed)
        broken = [name for name, value in zip(names, pairs[0], strict=True) if not np.isfinite(value).all()]
        if broken and self.every.stop_on_nan:
            raise _not_finite(self.arm.name, number, broken, checkpoints)
        self._window.append(pairs)
        if _due(number, self.every.log, last):  # stages have their own metrics, so a window ends with its stage
            self._write(number, names, clock)

    def _write(self, number: int, names: list[str], clock: _Clock) -> None:
        sums, counts = np.asarray(self._window, np.float64).sum(axis=0)
        means = np.where(counts > 0, sums / np.maximum(counts, 1e-30), math.nan)
        values, hparams = {}, {}
        for index, name in enumerate(names):
            if name.startswith(HPARAMS):  # as it was at this step, not the window's mean
                hparams[name.removeprefix(HPARAMS)] = float(self._window[-1][0][index].mean())
            else:
                values[name] = float(means[index].mean())
        members = {}
        if self.arm.members:
            members = {"members": {name: means[names.index(name)].tolist() for name in ("loss", "accuracy")}}
        rate = (number - self.began[0]) * self.arm.batch_size / max(clock.now() - self.began[1], 1e-9)
        self._window = []
        self.progress.update(number, {k: v for k, v in values.items() if k != "grad_norm"}, rate)
        for writer in self.writers:
            record = {"arm": self.arm.name, "step": number, **values, "hparams": hparams, "examples_per_s": rate}
            writer.write(record | members)

    def evaluated(self, number: int, accuracy: float | None) -> None:
        if accuracy is not None:
            for writer in self.writers:
                writer.write({"arm": self.arm.name, "step": number, "eval_accuracy": accuracy})


def _not_finite(arm: str, number: int, names: list[str], checkpoints: Checkpoints | None) -> UserError:
    terms = [name for name in names if name not in ("loss", "grad_norm")] or names
    remedy = "no checkpoint was written before"
    if checkpoints and checkpoints.latest_step():
        remedy = f"the last good checkpoint is step {checkpoints.latest_step()} in {checkpoints.folder}"
    return UserError(
        f"{arm} is not finite at step {number} (in {', '.join(terms)}); {remedy}: lower optimizer.learning_rate, set "
        "optimizer.clip_norm, or look at the data of that step."
    )


class _Signals(contextlib.AbstractContextManager):
    """Turns SIGTERM and SIGINT into a flag, so that the loop can save first; a second one ends the process."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: Any) -> None:
        if self.received:
            signal.signal(number, self._previous[number])
            signal.raise_signal(number)
        self.received = number
