"""Attention over a row that is split over devices: keys and values travel, queries stay.

Each of C devices holds two of the row's 2C equal stripes, number i and number 2C - 1 - i, so that
causal work is the same on all (arXiv 2311.09431). Against another device's stripes j and
2C - 1 - j exactly two pairs have work, whichever of i and j is larger, and none of them meets the
diagonal: its last stripe of queries with the other's first stripe of keys, and one more. A step of
the loop is one call of a one-device kernel on both pairs, merged by log-sum-exp.

The backward pass goes round again with the log-sum-exp over all keys: what a kernel says of a pair
is then its share of the whole gradient (arXiv 2310.01889).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxreason.types import AttentionMask

EXCHANGES = ("ring", "gather")


class Kernel(NamedTuple):
    """Attention on one device, as `reference` defines it."""

    attention: Callable  # (q, k, v, mask) -> (out_BTNH, lse_BTN)
    gradients: Callable  # (q, k, v, mask, lse, delta, dout) -> (dq, dk, dv)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Which kernel, over which mesh axis, and how keys and values come by.

    `ring` passes them from neighbour to neighbour: a device never holds more than two devices'.
    `gather` fetches all at once: fewer and larger messages, for the memory of a whole row of them.
    """

    kernel: Kernel
    axis_name: str
    exchange: str = "ring"


def stripes(length: int, num_devices: int) -> np.ndarray:
    """The order of positions in which each device's part of a row is its two stripes.

    Args:
      length: of the row, a multiple of 2 * num_devices.
    """
    of_stripe = np.arange(length).reshape(2 * num_devices, -1)
    return np.concatenate([of_stripe[[i, -1 - i]] for i in range(num_devices)]).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    ring: Ring, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH, lse_BTN) of this device's two stripes. Inside jax.shard_map, check_vma=False.

    Args:
      mask: causal; its segments are of these stripes too. A window counts along the whole row.
    """
    queries, own = _queries(mask, q_BTNH), _keys(mask, k_BTKH, v_BTKH)
    here, num_devices = _place(ring)

    def fold(parts, keys: _Keys, pairs):
        return _attend(ring.kernel, mask, queries, keys, pairs, parts)

    nothing = jnp.zeros(queries.q.shape, jnp.float32), jnp.full(queries.q.shape[:-1], -jnp.inf)
    parts = fold(nothing, own, _own_pairs(here, num_devices))
    if ring.exchange == "gather":
        everyone = jax.lax.all_gather(own, ring.axis_name)

        def step(parts, s):
            there = (here - s) % num_devices
            keys = jax.tree.map(lambda x: x[there], everyone)
            return fold(parts, keys, _pairs(here, there, num_devices)), None

        parts, _ = jax.lax.scan(step, parts, jnp.arange(1, num_devices))
    else:

        def step(carry, s):
            keys, parts = carry
            there = (here - s) % num_devices
            return (_pass_on(ring, keys), fold(parts, keys, _pairs(here, there, num_devices))), None

        first = (_pass_on(ring, own), parts)
        (keys, parts), _ = jax.lax.scan(step, first, jnp.arange(1, num_devices - 1))
        last = (here + 1) % num_devices  # its keys need not go further
        parts = fold(parts, keys, _pairs(here, last, num_devices))
    out, lse = parts
    return _row(out.astype(q_BTNH.dtype)), _row(lse)


def _attention_fwd(ring, q_BTNH, k_BTKH, v_BTKH, mask):
    outputs = attention(ring, q_BTNH, k_BTKH, v_BTKH, mask)
    out_BTNH, lse_BTN = (checkpoint_name(x, "attention") for x in outputs)
    return (out_BTNH, lse_BTN), (q_BTNH, k_BTKH, v_BTKH, mask, out_BTNH, lse_BTN)


def _attention_bwd(ring, residuals, cotangents):
    q_BTNH, k_BTKH, v_BTKH, mask, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    delta_BTN = (dout_BTNH.astype(jnp.float32) * out_BTNH).sum(-1) - dlse_BTN
    stats = tuple(_stripes(x) for x in (lse_BTN, delta_BTN, dout_BTNH))
    queries, own = _queries(mask, q_BTNH), _keys(mask, k_BTKH, v_BTKH)
    here, num_devices = _place(ring)

    def pull(dq, keys: _Keys, pairs):
        return _pull(ring.kernel, mask, queries, stats, keys, pairs, dq)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (own.k, own.v))
    dq = jnp.zeros(queries.q.shape, jnp.float32)
    dq, d_own = pull(dq, own, _own_pairs(here, num_devices))
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    if ring.exchange == "gather":
        everyone = jax.lax.all_gather(own, ring.axis_name)

        def step(carry, s):
            dq, sums = carry
            there = (here - s) % num_devices
            keys = jax.tree.map(lambda x: x[there], everyone)
            dq, more = pull(dq, keys, _pairs(here, there, num_devices))
            return (dq, jax.tree.map(lambda x, y: x.at[there].add(y), sums, more)), None

        sums = jax.tree.map(lambda x: jnp.zeros((num_devices, *x.shape), x.dtype), zeros)
        (dq, sums), _ = jax.lax.scan(step, (dq, sums), jnp.arange(1, num_devices))
        others = jax.tree.map(lambda x: jax.lax.psum_scatter(x, ring.axis_name), sums)
    else:

        def step(carry, s):  # what is found out of keys travels with them, and ends at home
            keys, dq, found = carry
            there = (here - s) % num_devices
            dq, more = pull(dq, keys, _pairs(here, there, num_devices))
            return (_pass_on(ring, keys), dq, _pass_on(ring, add(found, more))), None

        first = (_pass_on(ring, own), dq, zeros)
        (_, dq, others), _ = jax.lax.scan(step, first, jnp.arange(1, num_devices))
    dk, dv = add(d_own, others)
    dtypes = (q_BTNH.dtype, k_BTKH.dtype, v_BTKH.dtype)
    return *(_row(d).astype(dtype) for d, dtype in zip((dq, dk, dv), dtypes)), None


attention.defvjp(_attention_fwd, _attention_bwd)


# --- stripes: [2, B, T / 2, ...], the earlier one first -------------------------------------------


class _Queries(NamedTuple):
    q: jax.Array
    segments: jax.Array | None


class _Keys(NamedTuple):
    k: jax.Array
    v: jax.Array
    segments: jax.Array | None


class _Pair(NamedTuple):
    """Which of the two stripes of queries meets which of keys, 0 or 1."""

    query: jax.Array | int
    key: jax.Array | int
    distance: jax.Array | int  # in stripes; 0, known when tracing: the same stripe, a diagonal


def _stripes(x_BT):
    return jnp.stack(jnp.split(x_BT, 2, axis=1))


def _row(x_2BT):
    return jnp.concatenate([x_2BT[0], x_2BT[1]], axis=1)


def _queries(mask: AttentionMask, q_BTNH) -> _Queries:
    return jax.tree.map(_stripes, _Queries(q_BTNH, mask.q_segments_BT))


def _keys(mask: AttentionMask, k_BTKH, v_BTKH) -> _Keys:
    return jax.tree.map(_stripes, _Keys(k_BTKH, v_BTKH, mask.kv_segments_BS))


def _place(ring: Ring) -> tuple[jax.Array, int]:
    return jax.lax.axis_index(ring.axis_name), jax.lax.axis_size(ring.axis_name)


def _pass_on(ring: Ring, tree):
    """To the next device; this one gets its predecessor's."""
    num_devices = jax.lax.axis_size(ring.axis_name)
    to_next = [(i, (i + 1) % num_devices) for i in range(num_devices)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, ring.axis_name, to_next), tree)


def _own_pairs(here, num_devices: int) -> tuple[_Pair, ...]:
    return _Pair(0, 0, 0), _Pair(1, 0, 2 * (num_devices - here) - 1), _Pair(1, 1, 0)


def _pairs(here, there, num_devices: int) -> tuple[_Pair, ...]:
    """Against another device's keys."""
    both = jnp.where(there < here, 0, 1)  # its earlier keys for mine, or its later for mine
    return (
        _Pair(1, 0, 2 * num_devices - 1 - here - there),
        _Pair(both, both, jnp.abs(here - there)),
    )


def _pair_mask(mask: AttentionMask, pair: _Pair, queries: _Queries, keys: _Keys) -> AttentionMask:
    diagonal = isinstance(pair.distance, int)
    offset_B = None
    if not diagonal and mask.window is not None:
        B, length = queries.q.shape[1:3]
        offset_B = jnp.broadcast_to(pair.distance * length, (B,))
    return dataclasses.replace(
        mask,
        causal=diagonal,  # elsewhere every key is earlier than every query
        q_offset_B=offset_B,
        q_segments_BT=None if queries.segments is None else queries.segments[pair.query],
        kv_segments_BS=None if keys.segments is None else keys.segments[pair.key],
    )


def _attend(kernel: Kernel, mask, queries: _Queries, keys: _Keys, pairs, parts):
    """`parts` = (out, lse) of the stripes of queries, with these keys besides."""
    out, lse = parts
    for pair in pairs:
        out_part, lse_part = kernel.attention(
            queries.q[pair.query],
            keys.k[pair.key],
            keys.v[pair.key],
            _pair_mask(mask, pair, queries, keys),
        )
        lse_before, i = lse[pair.query], pair.query
        lse_both = jnp.logaddexp(lse_before, lse_part)
        share = lambda of: jnp.where(of == -jnp.inf, 0.0, jnp.exp(of - lse_both))[..., None]
        out_both = share(lse_before) * out[i] + share(lse_part) * out_part
        out, lse = out.at[i].set(out_both), lse.at[i].set(lse_both)
    return out, lse


def _pull(kernel: Kernel, mask, queries: _Queries, stats, keys: _Keys, pairs, dq):
    """(dq with these keys' part, (dk, dv) of the keys), float32."""
    dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (keys.k, keys.v))
    for pair in pairs:
        i, j = pair.query, pair.key
        seen = _pair_mask(mask, pair, queries, keys)
        lse_BTN, delta_BTN, dout_BTNH = (x[i] for x in stats)
        of_pair = kernel.gradients(
            queries.q[i], keys.k[j], keys.v[j], seen, lse_BTN, delta_BTN, dout_BTNH
        )
        dq, dk, dv = (x.at[k].add(d) for x, k, d in zip((dq, dk, dv), (i, j, j), of_pair))
    return dq, (dk, dv)
