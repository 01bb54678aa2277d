"""The decoder: causality, packing, rotation, taps, remat, precision, initial loss, sharding and bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdjax import sharding
from kdjax.errors import UserError
from kdjax.model import EVERY, first_mismatch, logits_of, parameter_count, tap_shapes
from kdjax.models.decoder import REMAT, DecoderConfig, RopeScaling, make_decoder, rope_frequencies

TINY = DecoderConfig(
    vocabulary=61, width=32, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_width=48, context=64, rope_theta=1e4
)
FAMILIES = {
    "llama2": TINY._replace(norm_eps=1e-5, kv_heads=4),
    "llama3": TINY._replace(rope_theta=5e5, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 32), tied=True),
    "qwen2": TINY._replace(qkv_bias=True, tied=True),
    "qwen3": TINY._replace(qk_norm=True, head_dim=16),
}


def variables_of(config, seed=0, spread=0.2):
    """Parameters far from their initial values, so that every one of them, and the order of tokens, matters."""
    fresh = make_decoder(config).init(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten(
        leaf + spread * jax.random.normal(k, leaf.shape) for leaf, k in zip(leaves, keys, strict=True)
    )


def tokens_of(*shape, config=TINY, seed=0):
    return np.random.default_rng(seed).integers(0, config.vocabulary, shape).astype(np.int32)


def run(config, variables, inputs, taps=(), **options):
    model = make_decoder(config, **options)
    return jax.jit(lambda v, x: model.apply(v, x, train=False, taps=taps)[0])(variables, inputs)


def mean_loss(logits, tokens):
    """Cross-entropy of each next token."""
    log_probs = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1).mean()


def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(
        np.asarray(found, np.float64), np.asarray(wanted, np.float64), rtol=tolerance, atol=tolerance
    )


def in_numpy(config, params, tokens):
    """One sequence through the same decoder in float64, a position and a head at a time: the hidden states [t, d]."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    frequencies = 1 / config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)

    def rms(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale

    def turn(x, position):
        pairs = x[: config.head_dim // 2] + 1j * x[config.head_dim // 2 :]
        pairs = pairs * np.exp(1j * position * frequencies)
        return np.concatenate([pairs.real, pairs.imag])

    x = p["embed"]["embedding"][tokens]
    for layer in range(config.layers):
        block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        normed, heads = rms(x, block["attention_norm"]["scale"]), {}
        for name in "qkv":
            weights = block["attention"][name]
            heads[name] = (normed @ weights["kernel"] + weights.get("bias", 0)).reshape(len(x), -1, config.head_dim)
            if name != "v":
                if config.qk_norm:
                    heads[name] = rms(heads[name], block["attention"][f"{name}_norm"]["scale"])
                heads[name] = np.array([[turn(head, t) for head in row] for t, row in enumerate(heads[name])])
        mixed = np.zeros_like(heads["q"])
        for t in range(len(x)):
            for h in range(config.heads):
                shared = h // (config.heads // config.kv_heads)
                weights = np.exp(heads["k"][: t + 1, shared] @ heads["q"][t, h] / math.sqrt(config.head_dim))
                mixed[t, h] = weights / weights.sum() @ heads["v"][: t + 1, shared]
        x = x + mixed.reshape(len(x), -1) @ block["attention"]["o"]["kernel"]
        normed = rms(x, block["mlp_norm"]["scale"])
        gate, up = (normed @ block["mlp"][name]["kernel"] for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ block["mlp"]["down"]["kernel"]
    return rms(x, p["norm"]["scale"])


@pytest.mark.parametrize("family", ["llama2", "qwen2", "qwen3"])
def test_hidden_states_and_logits_are_those_of_a_plain_float64_decoder(family):
    config, tokens = FAMILIES[family], tokens_of(2, 9)
    variables = variables_of(config)
    outputs = run(config, variables, tokens)
    wanted = np.stack([in_numpy(config, variables["params"], row) for row in tokens])
    close(outputs.hidden, wanted, 1e-4)
    params = variables["params"]
    kernel = params["embed"]["embedding"] if config.tied else params["head"]["kernel"]
    close(logits_of(outputs), wanted @ np.asarray(kernel, np.float64).T, 1e-4)
    assert outputs.logits is None and logits_of(outputs).dtype == jnp.float32


def test_a_later_token_changes_nothing_before_it():
    variables, tokens = variables_of(TINY), tokens_of(2, 12)
    changed = tokens.copy()
    changed[:, 7] = (changed[:, 7] + 1) % TINY.vocabulary
    before, after = (run(TINY, variables, x).hidden for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert (np.abs(np.asarray(before - after))[:, 7:].max(-1) > 1e-3).all()


@pytest.mark.parametrize(
    ("family", "with_positions"), [("llama2", True), ("llama3", True), ("llama3", False), ("qwen3", True)]
)
def test_packed_documents_are_each_as_alone(family, with_positions):
    config, lengths = FAMILIES[family], (5, 1, 8)
    variables, tokens = variables_of(config, spread=0.1), tokens_of(1, 16)
    segments = np.array([[1] * 5 + [2] * 1 + [3] * 8 + [0] * 2], np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None].astype(np.int32)
    inputs = {"tokens": tokens, "segments": segments} | ({"positions": positions} if with_positions else {})
    packed, start = run(config, variables, inputs).hidden, 0
    assert np.isfinite(packed).all()
    for length in lengths:
        alone = run(config, variables, tokens[:, start : start + length]).hidden
        close(packed[:, start : start + length], alone)
        start += length


def test_positions_count_from_the_start_and_only_their_differences_matter():
    variables, tokens = variables_of(TINY), tokens_of(2, 10)
    plain = run(TINY, variables, tokens).hidden
    places = np.broadcast_to(np.arange(10, dtype=np.int32), (2, 10))
    np.testing.assert_array_equal(
        plain, run(TINY, variables, {"tokens": tokens, "positions": places, "other": 1}).hidden
    )
    close(run(TINY, variables, {"tokens": tokens, "positions": places + 7}).hidden, plain, 1e-4)
    assert np.abs(run(TINY, variables, {"tokens": tokens, "positions": places * 2}).hidden - plain).max() > 1e-2


@pytest.mark.parametrize("scaling", [None, RopeScaling(8.0, 1.0, 4.0, 8192), RopeScaling(32.0, 1.0, 4.0, 8192)])
def test_rotation_is_that_of_transformers(scaling):
    torch = pytest.importorskip("torch", reason="the reference of the rotation is transformers'")
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = TINY._replace(head_dim=64, rope_theta=500000.0, rope_scaling=scaling, context=2**17, layers=1)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling:
        rope |= scaling._asdict() | {"rope_type": "llama3"}
        rope["original_max_position_embeddings"] = rope.pop("original_context")
    theirs = LlamaConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context,
        rope_parameters=rope,
    )
    rotary = LlamaRotaryEmbedding(theirs)
    frequencies = ROPE_INIT_FUNCTIONS["llama3"](theirs)[0] if scaling else rotary.inv_freq
    np.testing.assert_allclose(rope_frequencies(config), frequencies.numpy(), rtol=3e-7)

    # q and k at position 0 are not rotated; transformers' own function turns them to where they should be.
    positions = np.array([[0, 1, 17, 300, 4000]], np.int32)
    still, turned = (
        np.array(
            run(
                config,
                variables_of(config),
                {"tokens": tokens_of(1, 5), "positions": p},
                taps=("blocks.0.attention.qkv",),
            ).taps["blocks.0.attention.qkv"]
        ).reshape(1, 5, 3, config.heads, config.head_dim)
        for p in (np.zeros_like(positions), positions)
    )
    cos, sin = rotary(torch.zeros(1), torch.tensor(positions))
    wanted = apply_rotary_pos_emb(
        *(torch.tensor(still[:, :, i]) for i in (0, 1)), cos.float(), sin.float(), unsqueeze_dim=2
    )
    for i in (0, 1):
        # An angle of 4000 radians is known to 4000 * 2 ** -24 in float32.
        np.testing.assert_allclose(turned[:, :, i], wanted[i].numpy(), rtol=1e-3, atol=1e-3 * np.abs(still).max())
    np.testing.assert_array_equal(turned[:, :, 2], still[:, :, 2])


def test_every_tap_has_its_shape_and_only_those_asked_for_come():
    model, tokens = make_decoder(TINY), tokens_of(2, 6)
    shapes = {f"blocks.{n}": (2, 6, 32) for n in range(3)}
    shapes |= {f"blocks.{n}.attention.qkv": (2, 6, 3 * 4 * 8) for n in range(3)}
    assert tap_shapes(model, {"tokens": tokens}) == shapes
    variables = variables_of(TINY)
    every, asked = run(TINY, variables, tokens, EVERY), ("blocks.2", "blocks.0.attention.qkv", "blocks.0")
    some = run(TINY, variables, tokens, asked)
    assert set(some.taps) == set(asked) and run(TINY, variables, tokens).taps == {}
    for name in asked:
        close(some.taps[name], every.taps[name], 1e-6)


def test_taps_are_the_residual_stream_after_each_block():
    variables, tokens = variables_of(TINY), tokens_of(2, 6)
    outputs = run(TINY, variables, tokens, EVERY)
    for layers in (1, 2, 3):
        params = variables["params"] | {
            "blocks": jax.tree.map(lambda x, n=layers: x[:n], variables["params"]["blocks"])
        }
        stream = np.asarray(outputs.taps[f"blocks.{layers - 1}"], np.float64)
        normed = stream / np.sqrt((stream**2).mean(-1, keepdims=True) + TINY.norm_eps)
        shallow = run(TINY._replace(layers=layers), {"params": params, "state": {}}, tokens).hidden
        close(shallow, normed * np.asarray(params["norm"]["scale"]))


def test_taps_of_q_k_and_v_give_the_attention_of_the_block():
    """Softmax over them, times v and o, is what the block adds before its feedforward, which is silenced here."""
    variables, tokens = variables_of(TINY), tokens_of(2, 6)
    variables["params"]["blocks"]["mlp"]["down"]["kernel"] *= 0
    taps = run(TINY, variables, tokens, EVERY).taps
    q, k, v = np.moveaxis(np.asarray(taps["blocks.1.attention.qkv"], np.float64).reshape(2, 6, 3, 4, 8), 2, 0)
    scores = np.where(np.tri(6, dtype=bool), np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v).reshape(2, 6, 32)
    o = np.asarray(variables["params"]["blocks"]["attention"]["o"]["kernel"][1], np.float64)
    close(taps["blocks.1"] - taps["blocks.0"], mixed @ o, 1e-4)


def test_shared_keys_and_values_are_as_if_each_head_had_its_own():
    shared, own = FAMILIES["qwen2"], FAMILIES["qwen2"]._replace(kv_heads=4)
    variables, tokens = variables_of(shared), tokens_of(2, 7)

    def repeat(x):
        heads = x.reshape(*x.shape[:-1], shared.kv_heads, shared.head_dim)
        return jnp.repeat(heads, 2, axis=-2).reshape(*x.shape[:-1], -1)

    params = variables["params"]
    attention = params["blocks"]["attention"]
    attention = attention | {name: jax.tree.map(repeat, attention[name]) for name in "kv"}
    wide = {"params": params | {"blocks": params["blocks"] | {"attention": attention}}, "state": {}}
    a, b = run(shared, variables, tokens, EVERY), run(own, wide, tokens, EVERY)
    close(a.hidden, b.hidden)
    for name in a.taps:
        close(a.taps[name], b.taps[name])


@pytest.fixture(scope="module")
def remat_results():
    """Value, gradient and bytes of working memory of a loss over hidden states and taps, by remat."""
    config = TINY._replace(layers=8, width=64, mlp_width=256)
    variables = variables_of(config, spread=0.05)
    inputs = {"tokens": tokens_of(4, 32), "segments": np.repeat([[1] * 20 + [2] * 8 + [0] * 4], 4, 0).astype(np.int32)}

    def results(remat, taps):
        model = make_decoder(config, remat=remat)

        def loss(params):
            outputs, _ = model.apply({"params": params, "state": {}}, inputs, train=True, taps=taps)
            return (logits_of(outputs) ** 2).mean() + sum((tap**2).mean() for tap in outputs.taps.values())

        compiled = jax.jit(jax.value_and_grad(loss)).lower(variables["params"]).compile()
        return *compiled(variables["params"]), compiled.memory_analysis().temp_size_in_bytes

    return lambda remat, taps=("blocks.1", "blocks.6.attention.qkv"): results(remat, taps)


def test_remat_changes_memory_and_not_the_value_or_the_gradient(remat_results):
    values, gradients, memory = zip(*(remat_results(name) for name in REMAT), strict=True)
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        close(value, values[0], 1e-6)
        jax.tree.map(close, gradient, gradients[0])
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[0]))
    none, dots, full = memory
    assert none > 1.2 * dots > 1.2 * 1.2 * full


def test_one_tap_costs_less_memory_than_all(remat_results):
    tap = 4 * 4 * 32 * 96  # bytes
    one = remat_results("full", ("blocks.6.attention.qkv",))[2]
    every = remat_results("full", tuple(f"blocks.{n}.attention.qkv" for n in range(8)))[2]
    assert every - one > 6 * tap


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("vocabulary", "width"), [(257, 64), (257, 1536), (4096, 512), (151_936, 64)])
def test_an_untrained_model_finds_all_tokens_equally_likely(vocabulary, width, tied):
    config = DecoderConfig(vocabulary, width, 2, 4, 2, width // 4, 2 * width, 64, tied=tied, qk_norm=tied)
    model = make_decoder(config)
    tokens = tokens_of(4, 48 if vocabulary < 10_000 else 12, config=config)

    @jax.jit
    def loss(key):
        return mean_loss(logits_of(model.apply(model.init(key), tokens, train=False)[0]), tokens)

    assert abs(float(loss(jax.random.key(0))) / math.log(vocabulary) - 1) < 0.01


def test_init_depends_on_the_key_alone_and_has_the_published_size():
    """Qwen3-0.6B has 596,049,920 parameters and Llama-3.2-1B 1,235,814,400, the tied embeddings counted once."""
    a, b, c = (make_decoder(TINY).init(jax.random.key(seed))["params"] for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a["blocks"]["mlp"]["up"]["kernel"], c["blocks"]["mlp"]["up"]["kernel"])
    assert not np.array_equal(a["blocks"]["mlp"]["up"]["kernel"][0], a["blocks"]["mlp"]["up"]["kernel"][1])
    assert abs(float(a["blocks"]["mlp"]["down"]["kernel"].std()) * math.sqrt(6) / 0.02 - 1) < 0.1
    for config, size in (
        (DecoderConfig(151_936, 1024, 28, 16, 8, 128, 3072, 40_960, qk_norm=True, tied=True), 596_049_920),
        (DecoderConfig(128_256, 2048, 16, 32, 8, 64, 8192, 131_072, tied=True), 1_235_814_400),
    ):
        shapes = jax.eval_shape(make_decoder(config).init, jax.random.key(0))["params"]
        assert parameter_count(shapes) == size


def test_bfloat16_is_near_float32():
    variables, tokens = variables_of(FAMILIES["qwen3"], spread=0.05), tokens_of(2, 16)
    wide = run(FAMILIES["qwen3"], variables, tokens, EVERY)
    half = run(FAMILIES["qwen3"], variables, tokens, EVERY, dtype=jnp.bfloat16)
    assert half.hidden.dtype == jnp.bfloat16 and {tap.dtype for tap in half.taps.values()} == {jnp.dtype("bfloat16")}
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(wide), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) < 0.02 * np.linalg.norm(b)


def test_sharded_over_eight_devices_is_as_on_one():
    config = FAMILIES["qwen3"]._replace(vocabulary=512, width=128, mlp_width=256)
    model, key = make_decoder(config, remat="full"), jax.random.key(3)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    shardings = sharding.by_rules(jax.eval_shape(model.init, key), mesh, ((".*", "fsdp"),))
    sharded = jax.jit(model.init, out_shardings=shardings)(key)
    single = jax.jit(model.init)(key)
    for kernel in (sharded["params"]["blocks"]["mlp"]["up"]["kernel"], sharded["params"]["embed"]["embedding"]):
        assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    jax.tree.map(close, sharded, single)

    @jax.jit
    def loss_and_gradient(variables, inputs):
        def loss(params):
            outputs, _ = model.apply(variables | {"params": params}, inputs, train=True, taps=("blocks.1",))
            return mean_loss(logits_of(outputs), inputs["tokens"]) + (outputs.taps["blocks.1"] ** 2).mean()

        return jax.value_and_grad(loss)(variables["params"])

    batch = {"tokens": tokens_of(8, 12), "segments": np.repeat([[1] * 7 + [2] * 5], 8, 0).astype(np.int32)}
    found = loss_and_gradient(sharded, sharding.put_batch(batch, mesh))
    jax.tree.map(close, found, loss_and_gradient(single, batch))


def test_padding_gives_finite_outputs_and_gradients():
    model, variables = make_decoder(TINY, remat="dots", dtype=jnp.bfloat16), variables_of(TINY)
    segments = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)
    inputs = {"tokens": np.zeros((2, 6), np.int32), "segments": segments, "positions": np.zeros((2, 6), np.int32)}

    def total(params):
        outputs, _ = model.apply({"params": params, "state": {}}, inputs, train=True, taps=EVERY)
        return logits_of(outputs).sum() + sum(tap.astype(jnp.float32).sum() for tap in outputs.taps.values())

    value, gradient = jax.jit(jax.value_and_grad(total))(variables["params"])
    assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_an_id_outside_the_vocabulary_is_not_taken_for_another():
    hidden = run(TINY, variables_of(TINY), np.array([[1, 60], [1, 61]], np.int32)).hidden
    assert np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()


def test_state_is_empty_and_parameters_lie_as_documented():
    model, variables = make_decoder(FAMILIES["qwen2"]), variables_of(FAMILIES["qwen2"])
    assert model.apply(variables, tokens_of(1, 4), train=True)[1] == variables["state"] == {}
    norm, dense = lambda *s: {"scale": np.zeros(s)}, lambda *s: {"kernel": np.zeros(s)}
    biased = lambda n: dense(3, 32, n) | {"bias": np.zeros((3, n))}
    wanted = {
        "embed": {"embedding": np.zeros((61, 32))},
        "blocks": {
            "attention_norm": norm(3, 32),
            "attention": {"q": biased(32), "k": biased(16), "v": biased(16), "o": dense(3, 32, 32)},
            "mlp_norm": norm(3, 32),
            "mlp": {"gate": dense(3, 32, 48), "up": dense(3, 32, 48), "down": dense(3, 48, 32)},
        },
        "norm": norm(32),
    }
    assert first_mismatch(wanted, variables["params"]) is None
    qwen3 = make_decoder(FAMILIES["qwen3"]).init(jax.random.key(0))["params"]
    assert qwen3["blocks"]["attention"]["q_norm"]["scale"].shape == (3, 16)
    assert qwen3["head"]["kernel"].shape == (61, 32) and "bias" not in qwen3["blocks"]["attention"]["q"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 3}, "4 heads cannot have 3 kv_heads"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"layers": 0}, "layers is 0"),
        ({"rope_theta": 0.0}, "rope_theta=0.0"),
        ({"rope_scaling": RopeScaling(8.0, 4.0, 4.0, 8192)}, "low_freq_factor"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make_decoder(TINY._replace(**change))


def test_bad_input_is_refused_before_anything_runs():
    variables = jax.eval_shape(make_decoder(TINY).init, jax.random.key(0))

    def trace(length, taps):
        jax.eval_shape(
            lambda v: make_decoder(TINY).apply(v, tokens_of(1, length), train=False, taps=taps)[0], variables
        )

    trace(64, ())
    with pytest.raises(UserError, match="a sequence of 65 tokens is longer than the model's context of 64"):
        trace(65, ())
    with pytest.raises(
        UserError, match=r"unknown tap 'blocks.3': did you mean 'blocks.\d'\? valid names are blocks.0, "
    ):
        trace(4, ("blocks.0", "blocks.3"))
    with pytest.raises(UserError, match="unknown remat 'ful': did you mean 'full'"):
        make_decoder(TINY, remat="ful")
    with pytest.raises(UserError, match="unknown attention 'flash'"):
        make_decoder(TINY, attention="flash")
    with pytest.raises(UserError, match="attention 'cudnn' cannot compute in float32"):
        make_decoder(TINY, attention="cudnn")
