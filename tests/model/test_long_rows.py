"""Rows of 32,768 tokens over eight devices: their memory, their loss, and documents kept apart."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import assert_trees_equal, mean_loss, packed_batch, tiny_model

from jaxreason.model.execution import Execution
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh

DOCUMENTS = [9_000, 15_000, 700, 6_500]  # and 1,568 positions of padding
LENGTH = 32_768
EXECUTION = Execution(scan_layers=True, remat="full")


@functools.cache
def row():
    return packed_batch([DOCUMENTS], LENGTH, loss_share=0.9)


@functools.cache
def learnt(context: int, exchange: str = "ring") -> tuple[int, float]:
    """(temp bytes of a device, loss) of the row's loss and gradient over so many devices."""
    mesh = None if context == 1 else make_mesh({"context": context})
    execution = dataclasses.replace(EXECUTION, context=exchange)
    model = tiny_model(mesh, execution=execution, num_layers=1, num_heads=2, num_kv_heads=1)
    params, batch = jax.jit(model.init)(jax.random.key(0)), row()
    if mesh is not None:
        params, batch = jax.device_put(params, model.shardings()), hosts.to_global(mesh, batch)
    step = jax.jit(jax.value_and_grad(functools.partial(mean_loss, model)))
    program = step.lower(params, batch).compile()
    return program.memory_analysis().temp_size_in_bytes, float(program(params, batch)[0])


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_a_long_row_takes_a_fifth_of_the_memory_and_has_the_same_loss(exchange):
    (alone, want), (shared, got) = learnt(1), learnt(8, exchange)
    print(f"temp: {alone:,} bytes on one device, {shared:,} on each of eight")
    assert shared <= alone / 5
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    "first, second, length",
    [(60, 50, 128), pytest.param(9_000, 20_000, LENGTH, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("exchange", ["ring", pytest.param("gather", marks=pytest.mark.slow)])
def test_another_first_document_leaves_the_second_bit_equal_over_devices(
    exchange, first, second, length
):
    """Its logits and the gradient of its loss; both documents cross stripes and devices."""
    mesh = make_mesh({"context": 8})
    execution = dataclasses.replace(EXECUTION, context=exchange)
    model = tiny_model(mesh, execution=execution, num_layers=1, num_heads=2, num_kv_heads=1)
    batch = packed_batch([[first, second]], length, seed=1)
    only = np.arange(length) >= first
    batch = dataclasses.replace(batch, weights_BT=batch.weights_BT * only)
    other = packed_batch([[first]], length, seed=2).tokens_BT
    changed = dataclasses.replace(batch, tokens_BT=np.where(only, batch.tokens_BT, other))

    @jax.jit
    def run(params, batch):
        def loss(params):
            h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
            total, _ = model.xent(params, h_BTD, batch.targets_BT, batch.weights_BT)
            return total, jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))

        (_, logits_BTV), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        of_second = model.rows.arranged(batch.segments_BT) == 2
        return jnp.where(of_second[..., None], logits_BTV, 0), gradients

    params = jax.device_put(jax.jit(model.init)(jax.random.key(0)), model.shardings())
    before, after = (run(params, hosts.to_global(mesh, b)) for b in (batch, changed))
    assert (before[0] != 0).any()
    assert_trees_equal(after, before)
    # The check can fail: as one document, everything differs.
    joined = [
        dataclasses.replace(b, segments_BT=np.minimum(b.segments_BT, 1)) for b in (batch, changed)
    ]
    one, two = (run(params, hosts.to_global(mesh, b))[1] for b in joined)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert (a != b).any()
