"""Which blocks of queries and keys meet under a mask: what all flash kernels share.

It is data (`ranges_of`): packed documents, windows and causality skip whole blocks, and inside the
blocks that see each other entirely nothing is masked.
"""

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxreason.types import AttentionMask

HIDDEN = -1e30  # score of a key that may not be read
FLOOR = -1e20  # least row maximum: exp2(HIDDEN - FLOOR) is exactly 0, even if no key is visible
LOG2_E = math.log2(math.e)


class Tiles(Protocol):
    """Of any kernel: queries and keys that meet at once in a program."""

    queries: int
    keys: int


# --- which blocks meet ----------------------------------------------------------------------------


class Filled(NamedTuple):
    """The mask with nothing left out."""

    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    offset_B: jax.Array


def filled_mask(mask: AttentionMask, q_BTNH, k_BSKH) -> Filled:
    (B, T), S = q_BTNH.shape[:2], k_BSKH.shape[1]
    q_segments_BT, k_segments_BS = mask.q_segments_BT, mask.kv_segments_BS
    if q_segments_BT is None:
        q_segments_BT, k_segments_BS = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    offset_B = jnp.zeros(B, jnp.int32) if mask.q_offset_B is None else mask.q_offset_B
    return Filled(q_segments_BT, k_segments_BS, offset_B.astype(jnp.int32))


class _Blocks(NamedTuple):
    """Bounds of each block; its segments as those of all, and of those that are not padding."""

    first_BI: jax.Array
    last_BI: jax.Array
    least_BI: jax.Array
    most_BI: jax.Array
    least_real_BI: jax.Array


def _blocks(segments_BT, offset_B, size: int) -> _Blocks:
    B, T = segments_BT.shape
    num_blocks = -(-T // size)
    padded_BT = jnp.pad(segments_BT, ((0, 0), (0, num_blocks * size - T)))
    segments_BIR = padded_BT.reshape(B, num_blocks, size)
    first_BI = offset_B[:, None] + size * jnp.arange(num_blocks)
    real_BIR = jnp.where(segments_BIR == 0, jnp.iinfo(jnp.int32).max, segments_BIR)
    return _Blocks(
        first_BI,
        jnp.minimum(first_BI + size, offset_B[:, None] + T) - 1,
        segments_BIR.min(-1),
        segments_BIR.max(-1),
        real_BIR.min(-1),
    )


def ranges_of(spec: "Spec", mask: Filled, tiles: Tiles, of_keys: bool = False) -> jax.Array:
    """int32 [B, I, 4]: of each block of queries, the blocks of keys [0] <= j < [3] that it may
    read; those with [1] <= j < [2] entirely. `of_keys`: of each block of keys, blocks of queries.

    Blocks whose segments overlap count as meeting, so ids in any order are right; in packed rows,
    where ids rise, no block is visited in vain.
    """
    q = _blocks(mask.q_segments_BT, mask.offset_B, tiles.queries)
    k = _blocks(mask.k_segments_BS, jnp.zeros_like(mask.offset_B), tiles.keys)
    q, k = _Blocks(*(x[:, :, None] for x in q)), _Blocks(*(x[:, None, :] for x in k))
    some_BIJ = (q.least_real_BI <= k.most_BI) & (k.least_real_BI <= q.most_BI)
    some_BIJ &= (q.most_BI > 0) & (k.most_BI > 0)
    every_BIJ = (q.least_BI == k.most_BI) & (k.least_BI == q.most_BI) & (q.least_BI > 0)
    if spec.causal:
        some_BIJ &= k.first_BI <= q.last_BI
        every_BIJ &= k.last_BI <= q.first_BI
    if spec.window is not None:
        some_BIJ &= k.last_BI > q.first_BI - spec.window
        every_BIJ &= k.first_BI > q.last_BI - spec.window
    every_BIJ &= some_BIJ
    if of_keys:
        some_BIJ, every_BIJ = jnp.swapaxes(some_BIJ, 1, 2), jnp.swapaxes(every_BIJ, 1, 2)
    J = some_BIJ.shape[-1]
    j_J = jnp.arange(J, dtype=jnp.int32)
    first_BI = jnp.where(some_BIJ, j_J, J).min(-1)
    end_BI = jnp.where(some_BIJ, j_J + 1, 0).max(-1)
    first_BI = jnp.minimum(first_BI, end_BI)
    whole_BI = jnp.where(every_BIJ, j_J, J).min(-1)  # the first run of such blocks
    after_BIJ = (j_J > whole_BI[..., None]) & ~every_BIJ
    whole_end_BI = jnp.where(after_BIJ, j_J, J).min(-1)
    none_BI = whole_BI == J
    whole_BI = jnp.where(none_BI, first_BI, whole_BI)
    whole_end_BI = jnp.where(none_BI, first_BI, whole_end_BI)
    return jnp.stack([first_BI, whole_BI, whole_end_BI, end_BI], axis=-1)


# --- what a program knows when it is compiled -----------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Spec:
    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    group: int  # query heads of a key/value head
    tiles: Tiles

    @classmethod
    def of(cls, mask: AttentionMask, q_BTNH, k_BSKH, tiles: Tiles) -> "Spec":
        N, H = q_BTNH.shape[2:]
        scale = H**-0.5 if mask.scale is None else mask.scale
        group = N // k_BSKH.shape[2]
        return cls(mask.causal, mask.window, mask.soft_cap, scale, group, tiles)


def over(ranges, body, state):
    """`state = body(block, state, masked)` over the blocks; in the middle nothing is masked."""
    first, whole, whole_end, end = ranges
    state = jax.lax.fori_loop(first, whole, functools.partial(body, masked=True), state)
    state = jax.lax.fori_loop(whole, whole_end, functools.partial(body, masked=False), state)
    return jax.lax.fori_loop(whole_end, end, functools.partial(body, masked=True), state)
