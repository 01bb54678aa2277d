"""What a step must at least compute and move, counted exactly; no assertion is on seconds."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from kdjax import sharding
from kdjax.models.decoder import DecoderConfig, make_decoder
from kdjax.recipes import bench_limits, program

shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (1, 1), "padding": "SAME"},
        {"window_strides": (2, 2), "padding": "SAME"},
        {"window_strides": (1, 2), "padding": "VALID", "rhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": ((2, 2), (1, 1)), "lhs_dilation": (2, 1)},
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 4},
    ],
)
def test_convolutions_are_counted_as_the_compiler_counts_them(options):
    kernel = shape(3, 3, 8 // options.get("feature_group_count", 1), 16)
    run = lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)
    arguments = shape(5, 9, 7, 8), kernel
    assert program.products(run, *arguments) == program.flops(jax.jit(run).lower(*arguments))


def test_a_loop_counts_as_often_as_it_runs():
    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=7)[0].sum()

    assert program.products(loop, shape(16, 16)) == 7 * 2 * 16**3
    assert program.products(jax.grad(loop), shape(16, 16)) == 7 * 3 * 2 * 16**3
    again = jax.grad(jax.checkpoint(loop))  # a product that is computed twice counts twice
    assert program.products(again, shape(16, 16)) == 7 * 4 * 2 * 16**3


def test_what_each_device_does_counts_on_all_and_the_longer_branch_counts():
    mesh = sharding.make_mesh({"data": 8})
    each = jax.shard_map(lambda x, y: x @ y, mesh=mesh, in_specs=(PartitionSpec("data"), None), out_specs=jax.P("data"))
    assert program.products(each, shape(32, 4), shape(4, 6)) == 2 * 32 * 4 * 6
    either = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x, lambda x: x @ x, x)
    assert program.products(either, shape(16, 16)) == 2 * 16**3


def test_a_decoder_costs_two_operations_a_parameter_and_token_and_its_attention():
    sizes = DecoderConfig(33, 16, 5, 2, 2, 8, 32, 64)
    model = make_decoder(sizes)
    variables = jax.eval_shape(model.init, jax.random.key(0))
    blocks = sum(x.size for x in jax.tree.leaves(variables["params"]["blocks"]) if x.ndim == 3)
    tokens = jax.ShapeDtypeStruct((3, 64), jnp.int32)
    hidden = lambda variables, tokens: model.apply(variables, tokens, train=False)[0].hidden
    attention = 5 * 2 * 3 * 64 * 64 * 16 * 2  # two products of width 16 for each pair of tokens, in every layer
    assert program.products(hidden, variables, tokens) == 2 * blocks * 3 * 64 + attention


def test_the_fewest_bytes_are_those_of_one_device():
    mesh = sharding.make_mesh({"data": 8})
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    state = {"params": place(jnp.ones((64, 8)), jax.P("data")), "key": place(jax.random.key(0), jax.P())}
    teachers, batch = place(jnp.ones(10), jax.P()), place(jnp.ones((16, 3), jnp.uint8), jax.P("data"))
    assert bench_limits.fewest_bytes(state, teachers, batch) == 2 * 8 * 8 * 4 + 10 * 4 + 2 * 3


def test_the_peak_is_a_rate_of_all_devices():
    assert bench_limits.peak(sharding.make_mesh({"data": 2}), "bfloat16", (32, 64)) > 0.0


def test_cudnns_attention_counts_as_the_products_that_it_stands_for(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91400)  # it is traced and never run
    q, k = (jax.ShapeDtypeStruct((2, 64, heads, 32), jnp.bfloat16) for heads in (4, 2))

    def counts(implementation):
        attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()
        return program.products(loss, q, k, k), program.products(jax.grad(loss, (0, 1, 2)), q, k, k)

    assert counts("cudnn") == counts("xla") == (4 * 2 * 4 * 64 * 64 * 32, 12 * 2 * 4 * 64 * 64 * 32)
