"""Attention over a row split over devices: the reference on the whole row, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxreason.kernels import reference, ring
from jaxreason.model.attention import IMPLEMENTATIONS
from jaxreason.types import AttentionMask

B, T, N, K, H = 2, 48, 4, 2, 8
# Row 0 ends in padding; row 1 has it in the middle. Stripes of 3 to 12 positions cut documents.
SEGMENTS = jnp.repeat(jnp.array([[1, 2, 3, 0], [1, 0, 2, 3]]), jnp.array([7, 20, 17, 4]), axis=1)
PACKED = AttentionMask(q_segments_BT=SEGMENTS, kv_segments_BS=SEGMENTS)
MASKS = {
    "causal": AttentionMask(),
    "packed": PACKED,
    "all": dataclasses.replace(PACKED, window=9, soft_cap=2.0, scale=0.7),
}


@functools.cache
def inputs():
    keys = jax.random.split(jax.random.key(0), 5)
    q, dout = (jax.random.normal(key, (B, T, N, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:4])
    return q, k, v, dout, jax.random.normal(keys[4], (B, T, N))


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(attention, mask, q, k, v, dout, dlse):
    (out, lse), vjp = jax.vjp(lambda *qkv: attention(*qkv, mask), q, k, v)
    return out, lse, vjp((dout, jnp.where(lse == -jnp.inf, 0.0, dlse)))


def over_devices(number: int, kernel: str, exchange: str):
    """`attention` of whole rows, cut into stripes for that many devices and put together again."""
    mesh, row = Mesh(np.array(jax.devices()[:number]), ("context",)), PartitionSpec(None, "context")
    order = ring.stripes(T, number)
    config = ring.Ring(IMPLEMENTATIONS[kernel].kernel, "context", exchange)

    def attention(q, k, v, mask):
        parts = jax.tree.map(lambda x: x[:, order], (q, k, v, mask))
        found = jax.shard_map(
            functools.partial(ring.attention, config), mesh=mesh, check_vma=False,
            in_specs=jax.tree.map(lambda _: row, parts), out_specs=(row, row),
        )(*parts)  # fmt: skip
        return jax.tree.map(lambda x: x[:, np.argsort(order)], found)

    return attention


@pytest.mark.parametrize("exchange", ring.EXCHANGES)
@pytest.mark.parametrize(
    "name, number, kernel",
    [("causal", 2, "blockwise"), ("packed", 8, "blockwise"), ("all", 4, "reference"),
     ("all", 8, "blockwise"), pytest.param("all", 4, "flash", marks=pytest.mark.slow)],
)  # fmt: skip
@pytest.mark.usefixtures("simulated_kernels")
def test_a_row_over_devices_is_the_row(name, number, kernel, exchange):
    want = outputs_and_gradients(reference.attention, MASKS[name], *inputs())
    got = outputs_and_gradients(over_devices(number, kernel, exchange), MASKS[name], *inputs())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # float32 sums of at most 48 terms of order 1, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert (want[1] == -jnp.inf).any() == (name != "causal")  # padding reads nothing, and says so


def test_stripes_share_causal_work():
    """Queries times keys that may be read: the same on each of four devices."""
    parts = ring.stripes(32, 4).reshape(4, 8)
    assert sorted(parts.flat) == list(range(32))
    work = [(part + 1).sum() for part in parts]
    assert len(set(work)) == 1


def test_a_ring_passes_neighbours_and_a_gather_fetches_all():
    """The compiled collectives: of the ring, no device ever holds more than two devices' keys."""
    q, k, v, *_ = inputs()

    def text(exchange):
        attention = over_devices(8, "blockwise", exchange)
        compiled = jax.jit(lambda q, k, v: attention(q, k, v, PACKED)[0]).lower(q, k, v).compile()
        return compiled.as_text()

    around, gathered = text("ring"), text("gather")
    assert "collective-permute" in around and "all-gather" in gathered
    whole = f"f32[8,2,{B},{T // 16},{K},{H}]"
    assert whole in gathered and whole not in around
