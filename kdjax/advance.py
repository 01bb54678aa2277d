"""How a compiled stage goes from batch to batch: plain, or with the teachers a batch ahead of the student."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh, NamedSharding

from kdjax import sharding
from kdjax.model import Variables
from kdjax.state import TrainState
from kdjax.step import Lesson, Step

Host = Mapping[str, np.ndarray]  # this process's share of a batch
# advance(state, next_batch, last) -> (state, [2, metrics]): one step; ``last`` says that no batch follows.
Advance = Callable[[TrainState, Callable[[], Host], bool], tuple[TrainState, jax.Array]]
Program = tuple[Any, list[str]]  # a compiled step, and the names of its metrics
Programs = dict[Any, Any]  # what is compiled so far, by the function that it is of
Teachers = Mapping[str, Variables]


def compile_step(step: Callable, mesh: Mesh, shardings: Any, *args: Any) -> Program:
    """Compiles a step ahead of time: ``(compiled, metric names)``, where ``compiled`` returns ``(state, [2,
    metrics])``.

    Only the state is donated. All metrics come back as one array of sums and counts, since each array that the host
    fetches costs about as much as a small one.
    """
    names: list[str] = []

    def packed(state, *others):
        state, metrics = step(state, *others)
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


def plain(
    step: Step, mesh: Mesh, state: TrainState, teachers: Teachers, batch: Host, hparams: Any, programs: Programs
) -> tuple[Advance, Program]:
    """The teachers' forward pass and the student's update of the same batch, in one program.

    Args:
      step: the step.
      mesh: the devices.
      state: where the run stands, or its shapes.
      teachers: their weights on the mesh.
      batch: one like all that will come.
      hparams: on the mesh.
      programs: takes what is compiled, and gives what was.
    """
    if step not in programs:
        example = sharding.abstract_batch(batch, mesh)
        programs[step] = compile_step(step, mesh, _shardings(state), state, teachers, example, hparams)
    program = programs[step]

    def advance(state, next_batch, last):
        return program[0](state, teachers, sharding.put_batch(next_batch(), mesh), hparams)

    return advance, program


def overlapped(
    step: Step, mesh: Mesh, state: TrainState, teachers: Teachers, batch: Host, hparams: Any, programs: Programs
) -> tuple[Advance, Program]:
    """The teachers' forward pass of the next batch and the student's update of this one, in one program.

    Neither half needs the other, so the compiler may run them side by side. Arguments are those of ``plain``.
    """

    def ahead(carry, teachers, batch, hparams):
        state, lesson = carry
        following = _apart(step.teach)(teachers, batch, state.view_key)
        state, metrics = step.learn(state, lesson, hparams)
        return (state, following), metrics

    if step not in programs:
        example = sharding.abstract_batch(batch, mesh)
        teach, lesson = _compile_teach(step, teachers, example, state.view_key)
        carry = (_shardings(state), _shardings(lesson))
        programs[step] = compile_step(ahead, mesh, carry, (state, lesson), teachers, example, hparams)
        programs[step.teach] = teach
    program, teach = programs[step], programs[step.teach]
    held: list[Any] = []  # the lesson of this batch, and the batch

    def advance(state, next_batch, last):
        if not held:
            first = sharding.put_batch(next_batch(), mesh)
            held[:] = teach(teachers, first, state.view_key), first
        lesson, batch = held
        batch = batch if last else sharding.put_batch(next_batch(), mesh)
        (state, lesson), packed = program[0]((state, lesson), teachers, batch, hparams)
        held[:] = lesson, batch
        return state, packed

    return advance, program


def on_two_meshes(
    step: Step,
    mesh: Mesh,
    teacher_mesh: Mesh,
    state: TrainState,
    teachers: Teachers,
    batch: Host,
    hparams: Any,
    programs: Programs,
) -> tuple[Advance, Program]:
    """The teachers on devices of their own, a batch ahead; what they say goes over while the student learns.

    Arguments are those of ``plain``, but ``teachers`` lie on ``teacher_mesh``. What does not depend on the batch, such
    as a language model's head, goes over once.
    """
    view_key = jax.device_put(state.view_key, sharding.replicated(teacher_mesh))
    size = sharding.global_size(batch)

    def target(x: Any) -> NamedSharding:
        split = x.ndim and x.shape[0] == size
        return sharding.over_batch(mesh) if split else sharding.replicated(mesh)

    example = sharding.abstract_batch(batch, teacher_mesh)
    if step not in programs:
        teach, lesson = _compile_teach(step, teachers, example, view_key)
        there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target(x)), lesson)
        programs[step] = compile_step(step.learn, mesh, _shardings(state), state, there, hparams)
        programs[step.teach] = teach
    program, teach = programs[step], programs[step.teach]
    weights = len(jax.tree.leaves(teachers))
    constant = _independent(jax.make_jaxpr(step.teach)(teachers, example, view_key).jaxpr, weights)
    once: dict[int, jax.Array] = {}
    held: list[Lesson] = []

    def lesson_of(batch: Host) -> Lesson:
        lesson = teach(teachers, sharding.put_batch(batch, teacher_mesh), view_key)
        leaves, structure = jax.tree.flatten(lesson)
        for number in constant:
            if number not in once:
                once[number] = jax.device_put(leaves[number], target(leaves[number]))
        moved = [once[i] if i in once else jax.device_put(x, target(x)) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(structure, moved)

    def advance(state, next_batch, last):
        lesson = held.pop() if held else lesson_of(next_batch())
        if not last:
            held.append(lesson_of(next_batch()))  # asked for before the student's step, so that it is under way
        return program[0](state, lesson, hparams)

    return advance, program


def _apart(teach: Callable[..., Lesson]) -> Callable[..., Lesson]:
    """Compiled to the same operations wherever it stands: a resumed run makes its first lesson by itself."""
    barrier = jax.lax.optimization_barrier
    return lambda *args: barrier(teach(*barrier(args)))


def _compile_teach(step: Step, *args: Any) -> tuple[Any, Any]:
    """The teachers' half alone, compiled, and the shapes and shardings of a lesson."""
    jitted = jax.jit(_apart(step.teach))
    compiled = jitted.lower(*args).compile()
    shapes = jax.eval_shape(jitted, *args)
    placed = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return compiled, jax.tree.map(placed, shapes, compiled.output_shardings)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def _independent(jaxpr: Any, weights: int) -> list[int]:
    """The numbers of the outputs that depend on the first ``weights`` inputs alone."""
    varying = set(jaxpr.invars[weights:])
    for equation in jaxpr.eqns:
        if any(isinstance(v, core.Var) and v in varying for v in equation.invars):
            varying.update(equation.outvars)
    return [i for i, v in enumerate(jaxpr.outvars) if isinstance(v, core.Var) and v not in varying]
