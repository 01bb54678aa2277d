"""One arm of a run: build, restore, loop. The order of operations in :func:`run` is the law: resume depends on it."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kdjax import advance, memory, sharding, state
from kdjax.advance import Advance, Program
from kdjax.checkpoint import Checkpoints
from kdjax.clock import Clock, Profile, Watchdog
from kdjax.errors import UserError
from kdjax.interrupts import Interrupted, Signals
from kdjax.log import Log, Writer, due
from kdjax.model import Variables, first_mismatch
from kdjax.objective import Objective
from kdjax.state import TrainState
from kdjax.step import Step

# With several CPU devices in a process, more than about 32 steps in flight deadlock without a message.
MAX_IN_FLIGHT = 16


class Stage(NamedTuple):
    """A stretch of steps with one compiled step: from ``start`` up to, but without, ``stop``."""

    start: int
    stop: int
    step: Step
    hparams: Any  # host values of the schedules that the step takes
    objective: Objective | None = None  # what it minimises, for those who look into it
    ahead: bool = False  # whether the teachers are a batch ahead


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
    teacher_mesh: Mesh | None = None  # devices of the teachers' own, who are a batch ahead


class Every(NamedTuple):
    """When things happen, in steps if not said otherwise; 0 is never (a checkpoint is always written at the end)."""

    log: int = 20
    evaluate: int = 0
    save: int = 0
    stop_on_nan: bool = True
    skip_nan: int = 0  # how many steps in a row may be skipped for NaN, where the step skips them at all
    stall_s: float = 0.0  # of seconds in which nothing moves: say what is waited for
    exit_s: float = 0.0  # and then end the process
    profile: tuple[int, int] | None = None  # the first and the last step of a profiler trace


class Finished(NamedTuple):
    """What a run leaves: the final state and how fast it went (``None`` where nothing was trained)."""

    state: TrainState
    examples_per_s: float | None


def run(
    arm: Arm,
    mesh: Mesh,
    *,
    every: Every | None = None,
    checkpoints: Checkpoints | None = None,
    meta: Mapping[str, Any] | None = None,
    writers: Sequence[Writer] = (),
    evaluate: Callable[[Variables], float] | None = None,
    programs: dict[Step, Program] | None = None,
    profile: Path | None = None,
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
      profile: the folder of a profiler trace of the steps ``every.profile``.
      say: takes a sentence for the user.

    Raises:
      UserError: the loss is NaN, the teacher is not the one that the checkpoint was trained with, the disk is full, or
        the devices have too little memory.
      Interrupted: a signal came; the state is saved.
    """
    meta, every, clock = dict(meta or {}), every or Every(), Clock()
    alone = programs is None  # else it is one of many, of which nobody wants to read a line each
    programs = {} if programs is None else programs
    last_step = arm.stages[-1].stop
    like = abstract_state(arm, mesh)
    trees = _trees(arm, mesh, like)
    needs = {what: memory.per_device(tree) for what, tree in trees.items()}
    memory.check(arm.name, needs, mesh.local_devices[0])
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        watchdog = stack.enter_context(Watchdog(arm.name, clock, every.stall_s, every.exit_s))
        with clock.on("restore"):
            current, done, before = _start(arm, mesh, like, checkpoints, meta, say)
            teachers = put_teachers(arm.teacher_variables, arm.teacher_mesh or mesh, arm.teacher_rules)
        trained = before
        log = stack.enter_context(Log(arm, every, writers, clock, checkpoints))
        log.begin(done)
        trace = stack.enter_context(Profile(every.profile, profile))

        def save(done: int, state: TrainState, accuracy: float | None = None) -> None:
            assert checkpoints is not None
            with clock.on("save"):
                checkpoints.save(done, state, {**meta, "seconds": trained}, accuracy)

        for stage in arm.stages:
            if done >= stage.stop:
                continue
            batches = arm.batches(done)
            with clock.on("input"):
                fetched = deque([next(batches)])
            with clock.on("compile"):
                step, (compiled, names) = _compiled(arm, stage, mesh, current, teachers, fetched[0], programs)
            fits = memory.check(arm.name, needs | {"activations": _temporary(compiled)}, mesh.local_devices[0])
            if alone:
                say(fits)
                for what, rules in (("teacher", arm.teacher_rules), ("student", arm.rules)) if mesh.size > 1 else ():
                    for whole in memory.replicated(trees[what], mesh, rules)[:3]:
                        say(f"  whole on every device: {what} {whole}")

            def next_batch(fetched=fetched, batches=batches):
                with clock.on("input"):
                    return fetched.popleft() if fetched else next(batches)

            if signals.received:  # while it was compiled
                if checkpoints and done and checkpoints.latest_step() != done:
                    save(done, current)
                raise _interrupted(arm, done, checkpoints, signals.received)
            pending: deque[tuple[int, jax.Array]] = deque()
            # NOTE: do not change the order of operations. Batches are fetched after the save, and their position is the
            # step number, so a resumed run sees the batches that this one would have seen.
            with jax.transfer_guard("disallow"):
                while done < stage.stop:
                    trace.begin(done + 1)
                    current, packed = step(current, next_batch, done + 1 == stage.stop)
                    done += 1
                    pending.append((done, packed))
                    watchdog.step = done
                    # Read once: a signal that comes while this step is handled is the next one's, which then saves.
                    stopping = signals.stopping()
                    evaluates = evaluate is not None and due(done, every.evaluate, last_step)
                    saves = checkpoints is not None and (due(done, every.save, last_step) or stopping)
                    # NaN must never reach a checkpoint, so all that is in flight is read before a save.
                    bound = 0 if evaluates or saves or done == stage.stop or trace.ends_at(done) else MAX_IN_FLIGHT
                    while len(pending) > bound:
                        log.take(*pending.popleft(), names, stage.stop)
                    trained = before + clock.training()
                    trace.end(done)
                    accuracy = None
                    if evaluate and evaluates:
                        with clock.on("evaluate"):
                            accuracy = evaluate(state.inference_variables(current))
                        log.evaluated(done, accuracy)
                    if saves:
                        save(done, current, accuracy)
                    if stopping:
                        raise _interrupted(arm, done, checkpoints, stopping)
        if signals.received:  # during the last step, whose state is saved as any arm's end is
            raise _interrupted(arm, done, checkpoints, signals.received)
    if checkpoints:
        checkpoints.wait()
    return Finished(current, done * arm.batch_size / trained if trained else None)


def abstract_state(arm: Arm, mesh: Mesh) -> TrainState:
    """The shapes, dtypes and shardings of an arm's state, without any memory."""
    return sharding.placed(jax.eval_shape(arm.create, arm.keys), mesh, arm.rules, members=arm.members)


def fresh_state(arm: Arm, mesh: Mesh, like: TrainState | None = None) -> TrainState:
    """An arm's state at step 0, born on its shardings: those of ``like``, its ``abstract_state``, where that is known.

    Raises:
      UserError: the weights that it is to begin with are not those of its model (names the first).
    """
    shardings = jax.tree.map(lambda x: x.sharding, like or abstract_state(arm, mesh))
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


def _start(arm, mesh, like, checkpoints, meta, say) -> tuple[TrainState, int, float]:
    """``(state, steps done, seconds trained)``: of the newest checkpoint, or of step 0."""
    restored = checkpoints.restore_newest(like, say) if checkpoints else None
    if restored is None:
        return fresh_state(arm, mesh, like), 0, 0.0
    current, saved = restored
    for name in meta:
        if saved.get(name) != meta[name]:
            raise UserError(
                f"the checkpoint of {arm.name} at step {saved['step']} has another {name} ({saved.get(name)}, "
                f"now {meta[name]}): use the one that it was trained with, or another --workdir."
            )
    if saved["step"] < arm.stages[-1].stop:
        say(f"{arm.name}: resuming from step {saved['step']}.")
    return current, saved["step"], saved["seconds"]


def _interrupted(arm: Arm, done: int, checkpoints: Checkpoints | None, number: int) -> Interrupted:
    if checkpoints:
        checkpoints.wait()
    kept = "its state is saved" if checkpoints and checkpoints.latest_step() == done else "nothing was to be saved"
    return Interrupted(f"{arm.name} stopped by a signal at step {done}; {kept}.", number)


def _compiled(
    arm: Arm, stage: Stage, mesh: Mesh, current: TrainState, teachers: Any, batch: Any, programs: dict[Any, Any]
) -> tuple[Advance, Program]:
    """How a stage goes from batch to batch, and its compiled step."""
    common = (current, teachers, batch, jax.device_put(stage.hparams, sharding.replicated(mesh)), programs)
    if not stage.ahead:
        return advance.plain(stage.step, mesh, *common)
    if arm.teacher_mesh is None:
        return advance.overlapped(stage.step, mesh, *common)
    return advance.on_two_meshes(stage.step, mesh, arm.teacher_mesh, *common)


def _trees(arm: Arm, mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """The shapes and shardings of what an arm keeps on the devices of the student."""
    teachers = dict(arm.teacher_variables) if arm.teacher_mesh is None else {}
    return {
        "teacher": sharding.placed(teachers, mesh, arm.teacher_rules),
        "student": {"params": state.params, "state": state.model_state, "average": state.ema},
        "optimiser": state.opt_state,
        "objective": state.learned,
    }


def _temporary(compiled: Any) -> int:
    """The bytes of each device that a compiled step needs besides its arguments."""
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def put_teachers(teacher_variables: Mapping[str, Variables], mesh: Mesh, rules: sharding.Rules) -> dict[str, Variables]:
    """Puts the teachers' weights on the mesh, by their own rules."""
    teacher_variables = dict(teacher_variables)
    shardings = sharding.by_rules(teacher_variables, mesh, rules)

    def put(x: Any, sharding: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if isinstance(x, jax.Array) and not x.is_fully_addressable:  # on the same devices, in another way
            return jax.jit(lambda x: x, out_shardings=sharding)(x)
        # From NumPy: device_put of a JAX array over several processes builds a broken one.
        return jax.device_put(np.asarray(jax.device_get(x)), sharding)

    return jax.tree.map(put, teacher_variables, shardings)
