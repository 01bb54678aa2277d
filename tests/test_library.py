"""The library call and the README's code, as a user types it."""

import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import linen, nnx

import kdjax
from kdjax.errors import UserError
from tests.helpers import Small, digits

README = Path(__file__).parent.parent / "README.md"


class LinenStudent(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(10)(x.reshape(x.shape[0], -1))


def arrays(examples=512):
    inputs, labels = digits().train[:2]
    return inputs[:examples].astype(np.float32) / 16.0, labels[:examples]


@pytest.fixture(scope="module")
def teacher():
    x, y = arrays()
    net = Small(64, rngs=nnx.Rngs(0))
    graph, params = nnx.split(net)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state):
        loss = lambda p: optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, p)(x), y).mean()
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = update(params, state)
    nnx.update(net, params)
    assert (net(x).argmax(-1) == y).mean() > 0.95
    return net


def agreement(predict, teacher, x):
    return float((np.asarray(predict(x)).argmax(-1) == np.asarray(teacher(x)).argmax(-1)).mean())


def test_nnx_student_learns_the_teacher_and_is_updated_in_place(teacher):
    x, y = arrays()
    student = Small(16, rngs=nnx.Rngs(1))
    result = kdjax.distill(teacher, student, (x, y), epochs=30, batch_size=64, optimizer=optax.adam(1e-2))
    assert agreement(result.predict, teacher, x) > 0.9
    np.testing.assert_allclose(student(x), result.predict(x), rtol=1e-4, atol=1e-5)


def test_linen_student_without_labels_from_inputs_alone(teacher):
    x, _ = arrays()
    losses = {"kl": {"weight": 1.0, "temperature": 2.0}}
    result = kdjax.distill(
        teacher, LinenStudent(), x, epochs=20, batch_size=64, losses=losses, optimizer=optax.adam(1e-2)
    )
    assert agreement(result.predict, teacher, x) > 0.85


def test_linen_teacher_with_its_variables_and_an_iterable_of_batches():
    x, y = arrays(128)
    net = LinenStudent()
    variables = net.init(jax.random.key(0), x[:1])
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 128, 32)]
    student = Small(8, rngs=nnx.Rngs(1))
    before = np.array(student.head.kernel)
    result = kdjax.distill((net, variables), student, batches, epochs=2)
    assert result.steps == 8
    assert not np.array_equal(before, student.head.kernel)
    endless = ({"inputs": a, "labels": b} for a, b in iter(lambda: batches[0], None))
    assert kdjax.distill((net, variables), Small(8, rngs=nnx.Rngs(1)), endless, steps=3).steps == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"student": Small(8, rngs=nnx.Rngs(0), classes=7)},
            r"teacher logits are \(128, 10\) and student logits \(128, 7\)",
        ),
        ({"data": (arrays()[0], arrays()[1] + 5)}, "out of range: 10 classes are numbered 0 to 9"),
        ({"epochs": None}, "say how long to train"),
        ({"batch_size": 30}, "batch_size=30 is not divisible"),
        ({"losses": {"kll": {}}}, "did you mean 'kl'"),
        ({"data": 3}, "data is a int"),
        ({"teacher": 3}, "the teacher has no weights"),
    ],
)
def test_bad_input_is_refused_before_training(teacher, change, message):
    good = {"teacher": teacher, "student": Small(8, rngs=nnx.Rngs(0)), "data": arrays(), "epochs": 1}
    with pytest.raises((UserError, TypeError), match=message):
        kdjax.distill(**{**good, **change})


def test_readme_python_blocks_run_as_written():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, str(README), "exec"), {})
