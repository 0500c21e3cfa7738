"""Eight devices give the loss and the gradients of one."""

import functools

import jax
import jax.numpy as jnp
import pytest
from tiny_models import (
    assert_gradients_close,
    assert_trees_close,
    moved_by_an_ulp,
    packed_batch,
    tiny_model,
    tiny_params,
)

from jaxreason.model.execution import Execution
from jaxreason.model.lora import LoraConfig
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh

ROWS = [[20, 12], [32], [5, 6, 7], [30], [3, 3], [16, 16], [9], [31]]
BATCH = packed_batch(ROWS, length=35, vocab=50, loss_share=0.6)
# The mesh, valid entries of a table of 64 (with 50 the second shard is part padding), how it runs.
CASES = [
    ({"data": 8}, None, {}),
    ({"fsdp": 8}, None, {}),
    ({"tensor": 2, "fsdp": 4}, 50, {}),
    ({"context": 4, "data": 2}, None, {}),
    ({"context": 2, "tensor": 2, "fsdp": 2}, 50, {"context": "gather", "remat": "save_attention"}),
]


def evaluate(model, params, batch):
    """(mean loss, log-probs of the targets), gradients."""

    def loss(p):
        h_BTD = model.hidden(p, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        total, _ = model.xent(p, h_BTD, batch.targets_BT, batch.weights_BT)
        return total / batch.weights_BT.sum(), model.logprobs(p, h_BTD, batch.targets_BT)[0]

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parametrize("shape, valid_vocab, execution", CASES, ids=str)
def test_sharded_equals_unsharded(shape, valid_vocab, execution):
    mesh = make_mesh(shape)
    model = tiny_model(mesh, valid_vocab, Execution(scan_layers=True, **execution))
    alone = tiny_model(None, valid_vocab)
    want = jax.jit(functools.partial(evaluate, alone))(tiny_params(), BATCH)
    params = jax.device_put(tiny_params(), model.shardings())
    rows = hosts.to_global(mesh, BATCH)
    got = jax.jit(functools.partial(evaluate, model))(params, rows)
    assert all(jnp.abs(gradient).max() > 0 for gradient in jax.tree.leaves(want[1]))
    # float32 sums over rows in another order: 1e-6 of the largest entry, with room.
    assert_trees_close(got, want, 1e-5)


def test_adapters_and_biases_on_a_mesh():
    """Each of them gets the gradient that it has on one device: B's is of split sums, A's too."""
    mesh, changes = make_mesh({"tensor": 2, "fsdp": 2, "context": 2}), dict(family="qwen2")
    lora = LoraConfig(rank=3)
    model, alone = (tiny_model(m, **changes).adapted(lora) for m in (mesh, None))
    base = jax.jit(tiny_model(**changes).init)(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noise = lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype)
    base = jax.tree.map(noise, base)
    adapters = jax.tree.map(noise, alone.init(jax.random.key(2)))

    def run(model, adapters, base, batch):
        return evaluate(model, {**base, **adapters}, batch)

    run_alone = jax.jit(functools.partial(run, alone))
    want = run_alone(adapters, base, BATCH)
    got = jax.jit(functools.partial(run, model))(
        jax.device_put(adapters, model.shardings()),
        jax.device_put(base, tiny_model(mesh, **changes).shardings()),
        hosts.to_global(mesh, BATCH),
    )
    assert all(jnp.abs(gradient).max() > 0 for gradient in jax.tree.leaves(want[1]))
    # float32 sums in another order, as in test_lora.py.
    moved = [
        run_alone(moved_by_an_ulp(adapters, i), moved_by_an_ulp(base, 9 + i), BATCH)
        for i in range(4)
    ]
    assert_gradients_close(got, want, moved)


def test_weights_and_rows_are_split_as_the_table_says():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = tiny_model(mesh)
    local = lambda x: x.sharding.shard_shape(x.shape)
    params = jax.device_put(tiny_params(), model.shardings())
    assert local(params["embedding"]) == (32, 16)
    assert local(params["layers"]["wq"]) == (2, 16, 2, 8)
    assert local(params["layers"]["wo"]) == (2, 2, 8, 16)
    assert local(params["layers"]["w_down"]) == (2, 24, 16)
    assert local(params["final_norm"]) == (32,)
    assert local(hosts.to_global(mesh, BATCH).tokens_BT) == (2, 35)


def test_a_weight_that_does_not_divide_is_named_when_the_model_is_built():
    mesh = make_mesh({"tensor": 8})
    with pytest.raises(
        ValueError,
        match=r"weight layers/wk: dim 2 \(kv_heads\) = 2 is not a multiple of mesh axis tensor = 8",
    ):
        tiny_model(mesh, num_heads=8)
