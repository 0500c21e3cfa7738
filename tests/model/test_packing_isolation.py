"""A packed row is its documents, each on its own: bit for bit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated_kernels import RUN_HERE
from tiny_models import (
    assert_trees_close,
    assert_trees_equal,
    packed_batch,
    tiny_model,
    tiny_params,
)

from jaxreason.model.execution import Execution

FIRST, SECOND, LENGTH = 40, 50, 100  # two blocks of queries; document 2 is in both
SPAN = slice(FIRST, FIRST + SECOND)


def two_rows(segments: bool):
    """The same row twice, but for the tokens of document 1; only document 2 has a loss."""
    batch = packed_batch([[FIRST, SECOND]], length=LENGTH, seed=1)
    weights = np.zeros_like(batch.weights_BT)
    weights[:, SPAN] = batch.weights_BT[:, SPAN]
    batch = dataclasses.replace(batch, weights_BT=weights)
    if not segments:
        batch = dataclasses.replace(batch, segments_BT=np.ones_like(batch.segments_BT))
    other = packed_batch([[FIRST]], length=LENGTH, seed=2)
    tokens = np.where(np.arange(LENGTH) < FIRST, other.tokens_BT, batch.tokens_BT)
    return batch, dataclasses.replace(batch, tokens_BT=tokens)


@functools.cache
def document_2(attention: str):
    """jitted (params, batch) -> document 2's hidden states, its logits, gradient of its loss."""
    model = tiny_model(execution=Execution(attention=attention, scan_layers=True))

    @jax.jit
    def run(params, batch):
        def loss(p):
            h_BTD = model.hidden(p, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
            total, _ = model.xent(p, h_BTD, batch.targets_BT, batch.weights_BT)
            logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(p))
            return total, (h_BTD[:, SPAN], logits_BTV[:, SPAN])

        (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return *outputs, gradients

    return lambda batch: run(tiny_params(), batch)


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("attention", RUN_HERE)
def test_another_first_document_leaves_the_second_bit_equal(attention):
    before, after = map(document_2(attention), two_rows(segments=True))
    assert_trees_equal(after, before)


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("attention", RUN_HERE)
def test_without_segments_the_documents_leak(attention):
    """The check above can fail: with one segment for the whole row every array differs."""
    before, after = map(document_2(attention), two_rows(segments=False))
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (a != b).any()


def test_packed_equals_each_document_in_a_row_of_its_own():
    sizes = [9, 14, 5]
    packed = packed_batch([sizes], length=32, seed=3)
    starts = np.cumsum([0, *sizes[:-1]])

    def unpack(x_BT):
        rows_BT = np.zeros((len(sizes), 32), x_BT.dtype)
        for row, (start, size) in enumerate(zip(starts, sizes)):
            rows_BT[row, :size] = x_BT[0, start : start + size]
        return rows_BT

    alone = jax.tree.map(unpack, packed)
    alone = dataclasses.replace(alone, segments_BT=np.minimum(alone.segments_BT, 1))
    model = tiny_model()

    @jax.jit
    def gradients(params, batch):
        def loss(p):
            h_BTD = model.hidden(p, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
            return model.xent(p, h_BTD, batch.targets_BT, batch.weights_BT)[0]

        return jax.value_and_grad(loss)(params)

    # The same sums in another order: 1e-6 of the largest entry, with room.
    assert_trees_close(gradients(tiny_params(), alone), gradients(tiny_params(), packed), 1e-5)
