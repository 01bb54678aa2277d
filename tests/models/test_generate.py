"""Continuing prompts: against a plain loop, the distribution drawn from, stopping, compilation and bad input."""

import jax
import numpy as np
import pytest
from scipy import stats

from kdjax.errors import UserError
from kdjax.model import Model, logits_of
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.models.generate import generate

CONFIG = DecoderConfig(vocabulary=11, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=32, context=16)
MODEL = make_decoder(CONFIG)
PROMPT = np.random.default_rng(0).integers(0, 11, (4, 3)).astype(np.int32)


@pytest.fixture(scope="module")
def variables():
    """Weights large enough that the continuations are not one token over and over."""
    return jax.tree.map(lambda leaf: leaf * 1.0 if leaf.ndim < 2 else leaf * 20, MODEL.init(jax.random.key(1)))


def logits_after(variables, tokens):
    return np.asarray(logits_of(MODEL.apply(variables, tokens, train=False)[0])[:, -1], np.float64)


def test_greedy_is_the_argmax_of_each_next_token(variables):
    wanted = PROMPT
    for _ in range(8):
        wanted = np.concatenate([wanted, logits_after(variables, wanted).argmax(-1)[:, None].astype(np.int32)], 1)
    found = generate(MODEL, variables, PROMPT, new_tokens=8)
    assert found.dtype == np.int32 and len(np.unique(wanted[:, 3:])) > 3
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_samples_follow_the_softmax_of_the_logits(variables, temperature):
    """A chi-square test over 4000 draws of one next token, and of the one after it given the first."""
    prompt = np.repeat(PROMPT[:1], 4000, 0)
    drawn = np.asarray(generate(MODEL, variables, prompt, new_tokens=2, temperature=temperature, key=jax.random.key(5)))

    def follows(counts, logits):
        wanted = np.exp((logits - logits.max()) / temperature)
        wanted *= counts.sum() / wanted.sum()
        large = wanted >= 5  # the rest is one class, as the test needs
        pool = lambda x: np.append(x[large], x[~large].sum() + 1e-9)
        return stats.chisquare(pool(counts.astype(float)), pool(wanted), sum_check=False).pvalue > 1e-3

    assert follows(np.bincount(drawn[:, 3], minlength=11), logits_after(variables, drawn[:1, :3])[0])
    first = np.bincount(drawn[:, 3]).argmax()
    of_first = drawn[drawn[:, 3] == first]
    assert follows(np.bincount(of_first[:, 4], minlength=11), logits_after(variables, of_first[:1, :4])[0])


def test_samples_depend_on_the_key_alone(variables):
    a, b, c = (
        generate(MODEL, variables, PROMPT, new_tokens=8, temperature=2.0, key=jax.random.key(k)) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_a_row_that_generates_stop_repeats_it_and_the_prompt_does_not_count(variables):
    free = np.asarray(generate(MODEL, variables, PROMPT, new_tokens=8))
    stop = int(free[0, 5])
    prompt = PROMPT.copy()
    found = np.asarray(generate(MODEL, variables, prompt, new_tokens=8, stop=stop))
    for row, plain in zip(found, free, strict=True):
        ends = np.flatnonzero(plain[3:] == stop)
        end = 3 + ends[0] if len(ends) else len(plain)
        np.testing.assert_array_equal(row[:end], plain[:end])
        assert (row[end:] == stop).all()
    assert (found[0, 5:] == stop).all() and not np.array_equal(found, free)
    ended = np.full((1, 2), int(free[1, 3]), np.int32)  # a prompt that is nothing but the stop id
    np.testing.assert_array_equal(
        generate(MODEL, variables, ended, new_tokens=1, stop=int(ended[0, 0])),
        generate(MODEL, variables, ended, new_tokens=1),
    )


def test_it_compiles_once_for_a_shape(variables):
    traces = []

    def apply(*args, **kwargs):
        traces.append(1)
        return MODEL.apply(*args, **kwargs)

    counted = Model(MODEL.init, apply)
    generate(counted, variables, PROMPT, new_tokens=4)
    first = len(traces)
    generate(counted, variables, PROMPT + 1, new_tokens=4)
    generate(counted, variables, np.zeros((4, 2)), new_tokens=5)
    assert first and len(traces) == first


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (PROMPT[0], {"new_tokens": 1}, r"a prompt has the shape \(3,\)"),
        (PROMPT[:, :0], {"new_tokens": 1}, r"a prompt has the shape \(4, 0\)"),
        (PROMPT, {"new_tokens": 0}, "new_tokens is 0"),
        (PROMPT, {"new_tokens": 1, "temperature": -1.0}, "temperature is -1.0"),
        (PROMPT, {"new_tokens": 1, "temperature": 1.0}, "there is no key"),
        (PROMPT, {"new_tokens": 14}, "a sequence of 17 tokens is longer than the model's context of 16"),
    ],
)
def test_bad_input_is_refused(variables, prompt, options, message):
    with pytest.raises(UserError, match=message):
        generate(MODEL, variables, prompt, **options)
