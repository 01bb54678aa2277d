"""kdjax's own step, over and over, for every pair."""

import itertools


def make(teacher, student, terms, optimizer, teacher_variables, student_variables, batches, setting=None):
    """A function that does the next step on the batches in turn, waits for it and gives its loss."""
    import jax

    from kdjax import objective, state, step

    goal = objective.make_objective(terms, setting=setting)
    update = jax.jit(step.make_train_step(student, {"teacher": teacher}, goal, optimizer), donate_argnums=0)
    fresh = jax.jit(lambda key: state.create_state(student, optimizer, key))(jax.random.key(0))
    # Copies, because the step donates its state.
    copied = jax.tree.map(lambda x: x.copy(), student_variables)
    current = fresh._replace(params=copied["params"], model_state=copied["state"])
    batches = itertools.cycle(batches)

    def once():
        nonlocal current
        current, metrics = update(current, {"teacher": teacher_variables}, next(batches), goal.hparams)
        return float(metrics["loss"][0])

    return once
