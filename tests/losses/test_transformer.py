"""The transformer losses against float64 NumPy, the originals' output, and a model's own attention."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax.errors import UserError
from kdjax.losses import transformer
from kdjax.losses.transformer import attention_maps, attention_scores, layer_map, mix_layers, split_heads
from kdjax.model import from_nnx
from kdjax.models import build
from kdjax.models.layers import attention

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "transformer.npz"))
GOLDEN_TOKENS = GOLDEN["tokens"]
V2 = {"relation_heads": 6, "query_weight": 1.0, "key_weight": 0.5, "value_weight": 2.0}
W = np.random.default_rng(99).standard_normal((12, 24)).astype(np.float32)
LOSSES = {
    "tinybert_attention": lambda s, t, tokens: transformer.tinybert_attention(s[:2], t[:2], tokens),
    "tinybert_hidden": lambda s, t, tokens: transformer.tinybert_hidden({"kernel": W}, s, t, tokens),
    "distilbert_cosine": transformer.distilbert_cosine,
    "minilm": transformer.minilm,
    "minilmv2": partial(transformer.minilmv2, **V2),
}
ON_STATES = ("tinybert_hidden", "distilbert_cosine")
TOKENS = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0]], np.float32)  # padding on either side
every_loss = pytest.mark.parametrize("name", LOSSES)


@partial(jax.jit, static_argnames="name")
def loss_and_gradient(name, student, teacher, tokens=None):
    """The per-example loss, and the gradient of its weighted sum by the student's arrays."""

    def total(student):
        loss = LOSSES[name](student, teacher, tokens)
        return jnp.sum(loss * jnp.arange(1.0, len(loss) + 1)), loss

    gradient, loss = jax.grad(total, has_aux=True)(student)
    return loss, gradient


def some_case(name, seed, batch=3, length=5):
    """Student and teacher: hidden states, or (q, k, v) of 3 heads (MiniLMv2: 2 and 4) of widths 12 and 24."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    if name in ON_STATES:
        return draw(batch, length, 12), draw(batch, length, 12 if name == "distilbert_cosine" else 24)
    heads = (2, 4) if name == "minilmv2" else (3, 3)
    return tuple(
        tuple(draw(batch, n, length, width // n) for _ in range(3)) for n, width in zip(heads, (12, 24), strict=True)
    )


# The papers' formulas in float64, one sequence without padding at a time.
def scores64(a, b):
    return a @ b.T / np.sqrt(a.shape[-1])


def kl64(a_t, b_t, a_s, b_s):
    """Sum over positions of KL between rows of the softmax of two relations."""
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = softmax(scores64(a_t, b_t)), softmax(scores64(a_s, b_s))
    return (p * np.log(p / q)).sum()


def cut(x, example, tokens):
    """One example's real tokens in float64: [t, c] or [n, t, d]."""
    return np.asarray(x, np.float64)[example].compress(tokens[example] > 0, axis=-2)


def relation_heads64(x, heads):
    """[n, t, d] to [heads, t, n d / heads] by concatenation and splitting."""
    return np.split(np.concatenate(list(x), axis=-1), heads, axis=-1)


def formula(name, student, teacher, tokens=None):
    batch, length = (student if name in ON_STATES else student[0][:, 0]).shape[:2]
    tokens = np.ones((batch, length)) if tokens is None else tokens
    loss = np.zeros(batch)
    for i in range(batch):
        if name in ON_STATES:
            h_s, h_t = cut(student, i, tokens), cut(teacher, i, tokens)
            if name == "tinybert_hidden":
                loss[i] = ((h_s @ W.astype(np.float64) - h_t) ** 2).mean()
            else:
                cos = [s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in zip(h_s, h_t, strict=True)]
                loss[i] = np.mean(1 - np.array(cos))
            continue
        s, t = ([cut(x, i, tokens) for x in side] for side in (student, teacher))
        n, count = len(s[0]), int(tokens[i].sum())
        if name == "tinybert_attention":
            matrices = zip(*s[:2], *t[:2], strict=True)
            loss[i] = np.mean([((scores64(q, k) - scores64(q_t, k_t)) ** 2).mean() for q, k, q_t, k_t in matrices])
        elif name == "minilm":
            (q, k, v), (q_t, k_t, v_t) = s, t
            loss[i] = sum(kl64(q_t[h], k_t[h], q[h], k[h]) + kl64(v_t[h], v_t[h], v[h], v[h]) for h in range(n))
            loss[i] /= n * count
        else:
            for weight, a_s, a_t in zip((1.0, 0.5, 2.0), s, t, strict=True):
                heads = zip(relation_heads64(a_s, 6), relation_heads64(a_t, 6), strict=True)
                loss[i] += weight * sum(kl64(r_t, r_t, r_s, r_s) for r_s, r_t in heads) / (6 * count)
    return loss


@every_loss
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tokens", [None, TOKENS], ids=["all", "padded"])
def test_every_loss_is_its_papers_formula(name, seed, tokens):
    student, teacher = some_case(name, seed)
    loss, _ = loss_and_gradient(name, student, teacher, tokens)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, formula(name, student, teacher, tokens), rtol=1e-5, atol=1e-7)


@every_loss
def test_gradients_are_the_formulas(name):
    student, teacher = some_case(name, 3)
    _, gradient = loss_and_gradient(name, student, teacher, TOKENS)
    rng = np.random.default_rng(4)
    direction = jax.tree.map(lambda x: rng.standard_normal(x.shape), student)
    step = lambda eps: jax.tree.map(lambda x, d: x.astype(np.float64) + eps * d, student, direction)
    total = lambda eps: formula(name, step(eps), teacher, TOKENS) @ [1.0, 2.0, 3.0]
    slope = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    np.testing.assert_allclose(slope, (total(1e-4) - total(-1e-4)) / 2e-4, rtol=1e-3)


# The originals' output.


def golden_heads(who):
    return tuple(GOLDEN[f"{letter}_{who}"] for letter in "qkv")


@pytest.mark.parametrize("who", ["student", "teacher"])
def test_heads_are_those_of_bert(who):
    heads = split_heads(GOLDEN[f"qkv_{who}"], 3)
    for got, want in zip(heads, golden_heads(who), strict=True):
        np.testing.assert_array_equal(got, want)
    if who == "student":
        q, k, v = heads
        np.testing.assert_allclose(attention_scores(q, k), GOLDEN["scores_student"], rtol=1e-5, atol=1e-5)
        context = (attention_maps(q, k) @ v).transpose(0, 2, 1, 3).reshape(3, 5, 12)
        np.testing.assert_allclose(context, GOLDEN["context_student"], rtol=1e-5, atol=1e-5)


def test_tinybert_attention_is_that_of_its_authors_and_of_textbrewer():
    loss = partial(LOSSES["tinybert_attention"], golden_heads("student"), golden_heads("teacher"))
    np.testing.assert_allclose(loss(None), GOLDEN["tinybert_attention"], rtol=1e-5)
    np.testing.assert_allclose(loss(GOLDEN_TOKENS), GOLDEN["tinybert_attention_tokens"], rtol=1e-5)
    np.testing.assert_allclose(loss(GOLDEN_TOKENS), GOLDEN["textbrewer_attention_tokens"], rtol=1e-5)


def test_tinybert_hidden_is_that_of_its_authors_and_of_textbrewer():
    params = {"kernel": GOLDEN["fit_kernel"], "bias": GOLDEN["fit_bias"]}
    loss = partial(transformer.tinybert_hidden, params, GOLDEN["hidden_student"], GOLDEN["hidden_teacher"])
    np.testing.assert_allclose(loss(), GOLDEN["tinybert_hidden"], rtol=1e-5)
    np.testing.assert_allclose(loss(GOLDEN_TOKENS), GOLDEN["textbrewer_hidden_tokens"], rtol=1e-5)


def test_distilbert_cosine_is_torchs_and_textbrewers():
    loss = partial(transformer.distilbert_cosine, GOLDEN["hidden_student"], GOLDEN["hidden_other"])
    np.testing.assert_allclose(loss(), GOLDEN["torch_cosine"], rtol=1e-5)
    np.testing.assert_allclose(loss(GOLDEN_TOKENS), GOLDEN["textbrewer_cosine_tokens"], rtol=1e-5)


def test_minilm_is_torchs_kl():
    loss = transformer.minilm(golden_heads("student"), golden_heads("teacher"), GOLDEN_TOKENS)
    np.testing.assert_allclose(loss, GOLDEN["torch_minilm_tokens"], rtol=1e-5)


@pytest.mark.parametrize("relation_heads", [1, 6])
def test_minilmv2_is_bloombergs(relation_heads):
    options = V2 | {"relation_heads": relation_heads}
    loss = transformer.minilmv2(golden_heads("student"), golden_heads("teacher"), GOLDEN_TOKENS, **options)
    np.testing.assert_allclose(loss, GOLDEN[f"minilmv2_{relation_heads}"], rtol=1e-5)
    np.testing.assert_allclose(loss.mean(), GOLDEN[f"minilmv2_{relation_heads}_batch"], rtol=1e-5)


# Hand-computed cases.


def test_two_tokens_by_hand():
    a = lambda *rows: jnp.array([[rows]], jnp.float32)  # one example, one head
    q_t, k = a([np.log(3.0)], [0.0]), a([1.0], [0.0])
    q_s = a([0.0], [0.0])
    np.testing.assert_allclose(attention_maps(q_t, k)[0, 0], [[0.75, 0.25], [0.5, 0.5]], rtol=1e-6)
    # four entries, of which one differs, by log 3
    np.testing.assert_allclose(transformer.tinybert_attention((q_s, k), (q_t, k)), [np.log(3.0) ** 2 / 4], rtol=1e-6)
    # KL(teacher || student) of the first row, mean over two positions; the values agree
    forward = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    np.testing.assert_allclose(transformer.minilm((q_s, k, k), (q_t, k, k)), [forward / 2], rtol=1e-6)
    states = jnp.array([[[1.0, 0.0], [0.0, 2.0]]]), jnp.array([[[3.0, 0.0], [0.0, -1.0]]])
    np.testing.assert_allclose(transformer.distilbert_cosine(*states), [(0 + 2) / 2], rtol=1e-6)
    w = {"kernel": 2 * jnp.eye(2)}
    np.testing.assert_allclose(transformer.tinybert_hidden(w, *states), [(1 + 0 + 0 + 25) / 4], rtol=1e-6)


# Identities.


@every_loss
@pytest.mark.parametrize("junk", [1e30, np.nan])
def test_padding_changes_neither_value_nor_gradient(name, junk):
    student, teacher = some_case(name, 5)
    slots = np.array([1, 2, 4, 5, 7])  # of 8 tokens

    def padded(x, fill):
        wide = np.full((*x.shape[:-2], 8, x.shape[-1]), fill, np.float32)
        wide[..., slots, :] = x
        return wide

    tokens = padded(np.ones((3, 5, 1)), 0)[..., 0]
    want, want_gradient = loss_and_gradient(name, student, teacher)
    got, gradient = loss_and_gradient(name, *jax.tree.map(lambda x: padded(x, junk), (student, teacher)), tokens)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, padded(w, 0.0), rtol=1e-4, atol=1e-6), gradient, want_gradient
    )


@every_loss
def test_student_equal_to_teacher_is_a_fixed_point(name):
    student, _ = some_case(name, 6)
    teacher = student @ W if name == "tinybert_hidden" else student
    loss, gradient = loss_and_gradient(name, student, teacher, TOKENS)
    np.testing.assert_allclose(loss, np.zeros(3), atol=1e-6)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_allclose(leaf, np.zeros(leaf.shape), atol=2e-6)


@every_loss
def test_examples_are_independent(name):
    student, teacher = some_case(name, 7)
    loss, gradient = loss_and_gradient(name, student, teacher, TOKENS)
    order = np.array([2, 0, 1])
    permuted, _ = loss_and_gradient(name, *jax.tree.map(lambda x: x[order], (student, teacher)), TOKENS[order])
    np.testing.assert_allclose(permuted, loss[order], rtol=1e-5)
    alone, alone_gradient = loss_and_gradient(name, *jax.tree.map(lambda x: x[:1], (student, teacher)), TOKENS[:1])
    np.testing.assert_allclose(alone, loss[:1], rtol=1e-5)
    jax.tree.map(lambda a, g: np.testing.assert_allclose(a, g[:1], rtol=1e-4, atol=1e-6), alone_gradient, gradient)


@every_loss
def test_degenerate_inputs_have_finite_gradients(name):
    student, teacher = some_case(name, 8)
    no_tokens = np.zeros((3, 5), np.float32)
    for scale_s, scale_t, tokens in ((0, 1, None), (0, 0, None), (1, 0, TOKENS), (100, 100, None), (1, 1, no_tokens)):
        scaled = (jax.tree.map(lambda x, s=s: s * x, tree) for s, tree in ((scale_s, student), (scale_t, teacher)))
        loss, gradient = loss_and_gradient(name, *scaled, tokens)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((loss, gradient)))
        if tokens is no_tokens:
            assert not any(np.any(leaf) for leaf in jax.tree.leaves((loss, gradient)))


@every_loss
def test_bf16_inputs_are_upcast_first(name):
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), some_case(name, 9))
    loss, _ = loss_and_gradient(name, *half)
    want, _ = loss_and_gradient(name, *jax.tree.map(lambda x: x.astype(jnp.float32), half))
    np.testing.assert_array_equal(loss, want)


def test_a_state_without_direction_has_cosine_0():
    student = jnp.zeros((1, 2, 3)).at[0, 1].set(1.0)
    np.testing.assert_allclose(transformer.distilbert_cosine(student, student), [(1 + 0) / 2])


def test_maps_are_distributions_over_the_real_keys():
    (q, k, _), _ = some_case("minilm", 10)
    maps = attention_maps(q, k, TOKENS)
    np.testing.assert_allclose(maps.sum(-1), np.broadcast_to(TOKENS[:, None], (3, 3, 5)), rtol=1e-6)
    padding = TOKENS[:, None, :, None] * TOKENS[:, None, None, :] == 0
    assert not np.any(np.where(padding, maps, 0))
    assert not np.any(np.where(padding, attention_scores(q, k, TOKENS), 0))


def test_minilmv2_with_the_models_own_heads_is_minilms_value_relation():
    student, teacher = some_case("minilm", 11)
    only_values = transformer.minilmv2(
        student, teacher, TOKENS, relation_heads=3, query_weight=0.0, key_weight=0.0, value_weight=1.0
    )
    v_s, v_t = student[2], teacher[2]
    attention_agrees = transformer.minilm((v_t, v_t, v_s), (v_t, v_t, v_t), TOKENS)
    np.testing.assert_allclose(only_values, attention_agrees, rtol=1e-5)


def test_weights_may_be_traced():
    student, teacher = some_case("minilmv2", 12)
    loss = partial(transformer.minilmv2, student, teacher, TOKENS, relation_heads=2)
    many = jax.jit(jax.vmap(lambda w: loss(query_weight=w, key_weight=1.0, value_weight=0.0)))(jnp.array([0.0, 2.0]))
    q, k = (loss(query_weight=w, key_weight=1 - w, value_weight=0.0) for w in (1.0, 0.0))
    np.testing.assert_allclose(many, np.stack([k, 2 * q + k]), rtol=1e-5)


# A real model.


def test_the_maps_of_a_tap_are_the_models_own_attention():
    vit = partial(build, "vit_ti", classes=10, input_shape=(8, 8, 1), patch=4, width=32, depth=2, heads=2)
    model = from_nnx(lambda rngs: vit(rngs=rngs))
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    variables = jax.jit(model.init)(jax.random.key(1))
    qkv, whole = "blocks.1.attention.qkv", "blocks.1.attention"

    def mixed(tap):
        q, k, v = split_heads(tap, 2)
        maps = attention_maps(q, k)
        return maps, jnp.einsum("bnqk,bnkd->bqnd", maps, v).reshape(3, 5, 32)

    def through_the_model(params):
        taps = model.apply({**variables, "params": params}, images, train=False, taps=(qkv, whole))[0].taps
        q, k, v = split_heads(taps[qkv], 2)
        return transformer.minilm((q, k, v), jax.lax.stop_gradient((v, q, k))).sum(), taps

    gradient, taps = jax.jit(jax.grad(through_the_model, has_aux=True))(variables["params"])
    out = variables["params"]["blocks"]["1"]["attention"]["out"]
    maps, context = mixed(taps[qkv])
    assert maps.shape == (3, 2, 5, 5)
    np.testing.assert_allclose(context @ out["kernel"] + out["bias"][None, None], taps[whole], rtol=1e-4, atol=1e-6)
    # Fresh weights attend almost evenly, where a wrong map would pass too: sharpen.
    maps, context = mixed(20 * taps[qkv])
    assert jnp.max(maps) > 0.5
    np.testing.assert_allclose(context, attention(20 * taps[qkv], 2), rtol=1e-4, atol=1e-5)
    assert jnp.any(gradient["blocks"]["0"]["attention"]["qkv"]["kernel"] != 0)
    assert not jnp.any(gradient["head"]["kernel"] != 0)


# Layer maps.


def test_layer_maps():
    assert layer_map("uniform", 4, 12) == [(0, 2), (1, 5), (2, 8), (3, 11)]  # g(m) = 3 m, from 1
    assert layer_map("uniform", 3, 7) == [(0, 2), (1, 4), (2, 6)]  # ⌈7/3⌉, ⌈14/3⌉, 7
    assert layer_map("uniform", 4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert layer_map("last", 2, 5) == [(0, 3), (1, 4)]
    assert layer_map("final", 3, 12) == [(2, 11)]
    assert layer_map("middle", 4, 5) == [(1, 2)]
    assert layer_map("learned", 2, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    for kind in ("uniform", "last"):
        assert layer_map(kind, 6, 6) == [(i, i) for i in range(6)]
    for students in range(1, 9):
        for teachers in range(1, 9):
            learned_from = [t for _, t in layer_map("uniform", students, teachers)]
            assert learned_from == sorted(learned_from) and learned_from[-1] == teachers - 1 and learned_from[0] >= 0


def test_mixed_layers():
    losses = np.random.default_rng(13).random((2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(mix_layers(jnp.zeros((2, 3)), losses), losses.mean((0, 1)), rtol=1e-6)
    logits = np.array([[0.0, np.log(2.0), 0.0], [-1e4, 0.0, -1e4]], np.float32)
    want = (0.25 * losses[0, 0] + 0.5 * losses[0, 1] + 0.25 * losses[0, 2] + losses[1, 1]) / 2
    np.testing.assert_allclose(jax.jit(mix_layers)(logits, losses), want, rtol=1e-6)
    gradient = jax.grad(lambda z: mix_layers(z, losses).sum())(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(np.argmin(losses.sum(-1), 1), np.argmax(-gradient, 1))  # towards the easiest layer


def test_fresh_hidden_map():
    shapes = (2, 5, 64), (2, 5, 32)
    params = transformer.init_tinybert_hidden(jax.random.key(0), *shapes)
    assert jax.tree.map(jnp.shape, params) == {"kernel": (64, 32)}
    np.testing.assert_allclose(jnp.std(params["kernel"]) * 8, 1.0, rtol=0.1)
    params = transformer.init_tinybert_hidden(jax.random.key(0), *shapes, variant="huawei-noah")
    assert jax.tree.map(jnp.shape, params) == {"kernel": (64, 32), "bias": (32,)}


def test_bad_input_is_one_sentence():
    (q, k, v), teacher = some_case("minilmv2", 14)  # 2 and 4 heads
    hidden = jnp.zeros((3, 5, 12))
    for loss in (lambda *a: LOSSES["tinybert_attention"](*a, None), transformer.minilm):
        with pytest.raises(UserError, match=r"student has 2 where the teacher has 4: use minilmv2"):
            loss((q, k, v), teacher)
    with pytest.raises(UserError, match="divisor of 12"):
        transformer.minilmv2((q, k, v), teacher, relation_heads=8)
    with pytest.raises(UserError, match="one number of tokens"):
        transformer.minilm((q, k, v), tuple(x[:, :, :4] for x in (q, k, v)))
    with pytest.raises(UserError, match="use split_heads"):
        transformer.minilmv2((hidden,) * 3, teacher, relation_heads=2)
    with pytest.raises(UserError, match="from one attention layer"):
        attention_scores(q, k[..., :2])
    with pytest.raises(UserError, match="token mask of shape"):
        attention_maps(q, k, TOKENS[:, :4])
    with pytest.raises(UserError, match="token mask of shape"):
        transformer.distilbert_cosine(hidden, hidden, TOKENS[:2])
    with pytest.raises(UserError, match="cannot be split"):
        split_heads(hidden, 5)
    with pytest.raises(UserError, match="maps 12 channels to 24"):
        transformer.distilbert_cosine(hidden, jnp.zeros((3, 5, 24)))
    with pytest.raises(UserError, match="same tokens"):
        transformer.distilbert_cosine(hidden, hidden[:, :4])
    with pytest.raises(UserError, match="tap a transformer block"):
        transformer.tinybert_hidden({"kernel": W}, hidden[:, 0], hidden)
    with pytest.raises(UserError, match="init_tinybert_hidden"):
        transformer.tinybert_hidden({"kernel": W}, hidden, hidden)
    with pytest.raises(UserError, match="did you mean 'huawei-noah'"):
        transformer.init_tinybert_hidden(jax.random.key(0), (2, 3, 4), (2, 3, 4), variant="huawei")
    with pytest.raises(UserError, match="tap a transformer block"):
        transformer.init_tinybert_hidden(jax.random.key(0), (2, 4), (2, 3, 4))
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        layer_map("unifrom", 2, 4)
    with pytest.raises(UserError, match="use 'uniform'"):
        layer_map("last", 4, 2)
    with pytest.raises(UserError, match="at least one tap"):
        layer_map("final", 0, 2)
    with pytest.raises(UserError, match="one weight per pair"):
        mix_layers(jnp.zeros((2, 3)), jnp.zeros((3, 2, 4)))
