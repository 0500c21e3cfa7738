"""Attention in XLA by blocks: any platform, memory O(T * block), log-sum-exp out, honours any mask.

A block of queries meets its keys a block at a time; partial softmaxes are merged (Rabe & Staats,
arXiv 2112.05682). Which keys a block of queries can reach is known when tracing (unless the queries
have a traced offset), so what is causally hidden or beyond the window is never computed: with short
blocks a causal row costs little over half of the full square, on CPU too. The backward pass
recomputes the scores of each block from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691).

Arrays are moved to [B, K, G, T, H] once, not at every block's matmul.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.types import AttentionMask

_HIDDEN = -1e30  # score of a key that may not be read
_FLOOR = -1e20  # least row maximum: exp(_HIDDEN - _FLOOR) is exactly 0, even if no key is visible

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    block_q: int | None = None,
    block_k: int = 2048,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention: (out_BTNH of q's dtype, lse_BTN float32), as `reference.attention`.

    Both outputs are differentiable in q, k and v. Matmul operands keep their dtype; scores, softmax
    and sums are float32. T and S need not be multiples of the blocks.

    `block_q` None: T / 16 within 64 and 1024. 64 rows are fastest on CPU (64 to 128 at T = 2048), and
    the traced program grows with T / block_q * S / block_k.
    """
    if block_q is None:
        block_q = min(max(64, -(-q_BTNH.shape[1] // 16)), 1024)
    return _attention(block_q, block_k, q_BTNH, k_BSKH, v_BSKH, mask)


class _Tile(NamedTuple):
    """Queries [t0, t1) against keys [s0, s1)."""

    t0: int
    t1: int
    s0: int
    s1: int


def _tiles(mask: AttentionMask, q_len, kv_len, block_q, block_k) -> list[list[_Tile]]:
    """For each block of queries, the tiles that hold a key it may reach; at least one."""
    rows = []
    for t0 in range(0, q_len, block_q):
        t1 = min(t0 + block_q, q_len)
        first, end = 0, kv_len
        if mask.q_offset_B is None:
            if mask.window is not None:
                first = max(0, t0 - mask.window + 1)
            if mask.causal:
                end = min(kv_len, t1)
        first = min(first, end - 1)  # all keys out of reach: one hidden key says so
        starts = range(first, end, block_k)
        rows.append([_Tile(t0, t1, s0, min(s0 + block_k, end)) for s0 in starts])
    return rows


def _visible(mask: AttentionMask, tile: _Tile):
    """bool [B or 1, 1, 1, t, s], or None where every query of the tile reads every key."""
    t0, t1, s0, s1 = tile
    q_1T1, k_11S = jnp.arange(t0, t1)[None, :, None], jnp.arange(s0, s1)[None, None, :]
    if mask.q_offset_B is not None:
        q_1T1 = q_1T1 + mask.q_offset_B[:, None, None]
    conditions = []
    if mask.causal:
        conditions.append(k_11S <= q_1T1)
    if mask.window is not None:
        conditions.append(k_11S > q_1T1 - mask.window)
    if mask.q_segments_BT is not None:
        q_BT1, k_B1S = mask.q_segments_BT[:, t0:t1, None], mask.kv_segments_BS[:, None, s0:s1]
        conditions += [q_BT1 == k_B1S, q_BT1 != 0]
    if not conditions:
        return None
    return functools.reduce(jnp.logical_and, conditions)[:, None, None]


def _scores(mask: AttentionMask, tile: _Tile, q_BKGTH, k_BKSH):
    """Scaled, capped, masked float32 scores of a tile [B, K, G, t, s], and d score / d (q.k)."""
    t0, t1, s0, s1 = tile
    slope = _scale(mask, q_BKGTH)
    s_BKGTS = slope * _dot("BKGTH,BKSH->BKGTS", q_BKGTH[:, :, :, t0:t1], k_BKSH[:, :, s0:s1])
    if mask.soft_cap is not None:
        tanh_BKGTS = jnp.tanh(s_BKGTS / mask.soft_cap)
        s_BKGTS, slope = mask.soft_cap * tanh_BKGTS, slope * (1 - tanh_BKGTS**2)
    see_B11TS = _visible(mask, tile)
    if see_B11TS is not None:
        s_BKGTS = jnp.where(see_B11TS, s_BKGTS, _HIDDEN)
    return s_BKGTS, slope


def _scale(mask: AttentionMask, q) -> float:
    return q.shape[-1] ** -0.5 if mask.scale is None else mask.scale


def _heads_first(x_BTNH, num_kv_heads):
    """[B, T, N, H] -> [B, K, G, T, H]."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, num_kv_heads, N // num_kv_heads, H).transpose(0, 2, 3, 1, 4)


def _heads_last(x_BKGTH):
    """[B, K, G, T, ...] -> [B, T, N, ...]."""
    x_BTKGH = jnp.moveaxis(x_BKGTH, 3, 1)
    B, T, K, G, *rest = x_BTKGH.shape
    return x_BTKGH.reshape(B, T, K * G, *rest)


class _Partial(NamedTuple):
    """Softmax over some of a row's keys: sum of exp(score - top) * v, that of exp, and top."""

    acc_BKGTH: jax.Array
    total_BKGT: jax.Array
    top_BKGT: jax.Array


def _partial(mask, tile, q_BKGTH, k_BKSH, v_BKSH) -> _Partial:
    s_BKGTS, _ = _scores(mask, tile, q_BKGTH, k_BKSH)
    top_BKGT = jnp.maximum(s_BKGTS.max(-1), _FLOOR)
    e_BKGTS = jnp.exp(s_BKGTS - top_BKGT[..., None])
    v_BKSH = v_BKSH[:, :, tile.s0 : tile.s1]
    acc_BKGTH = _dot("BKGTS,BKSH->BKGTH", e_BKGTS.astype(v_BKSH.dtype), v_BKSH)
    return _Partial(acc_BKGTH, e_BKGTS.sum(-1), top_BKGT)


def _merge(a: _Partial, b: _Partial) -> _Partial:
    top = jnp.maximum(a.top_BKGT, b.top_BKGT)
    scale_a, scale_b = jnp.exp(a.top_BKGT - top), jnp.exp(b.top_BKGT - top)
    return _Partial(
        scale_a[..., None] * a.acc_BKGTH + scale_b[..., None] * b.acc_BKGTH,
        scale_a * a.total_BKGT + scale_b * b.total_BKGT,
        top,
    )


def _finish(part: _Partial):
    """(out, lse) of a block of queries; zeros and -inf where no key was visible."""
    dead = part.total_BKGT == 0
    total = jnp.where(dead, 1.0, part.total_BKGT)
    lse = jnp.where(dead, -jnp.inf, part.top_BKGT + jnp.log(total))
    return part.acc_BKGTH / total[..., None], lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(block_q, block_k, q_BTNH, k_BSKH, v_BSKH, mask):
    q_BKGTH = _heads_first(q_BTNH, k_BSKH.shape[2])
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    blocks = []
    for tiles in _tiles(mask, q_BTNH.shape[1], k_BSKH.shape[1], block_q, block_k):
        row = None
        for tile in tiles:
            part = _partial(mask, tile, q_BKGTH, k_BKSH, v_BKSH)
            row = part if row is None else _merge(row, part)
            # Without an order XLA keeps many tiles' scores alive at once.
            row, q_BKGTH = jax.lax.optimization_barrier((row, q_BKGTH))
        blocks.append(_finish(row))
    out_BKGTH, lse_BKGT = (jnp.concatenate(parts, axis=3) for parts in zip(*blocks))
    return _heads_last(out_BKGTH).astype(q_BTNH.dtype), _heads_last(lse_BKGT)


def _attention_fwd(block_q, block_k, q_BTNH, k_BSKH, v_BSKH, mask):
    out_BTNH, lse_BTN = _attention(block_q, block_k, q_BTNH, k_BSKH, v_BSKH, mask)
    return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BTN)


def _attention_bwd(block_q, block_k, residuals, cotangents):
    q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BTN = residuals
    dout_BTNH, dlse_BTN = cotangents
    K = k_BSKH.shape[2]
    dead_BTN = lse_BTN == -jnp.inf  # p is 0 there; keep inf and nan away from the products
    delta_BTN = (dout_BTNH.astype(jnp.float32) * out_BTNH).sum(-1) - dlse_BTN
    rows_BTN2 = jnp.stack([lse_BTN, delta_BTN], axis=-1)
    rows_BKGT2 = _heads_first(jnp.where(dead_BTN[..., None], 0.0, rows_BTN2), K)
    q_BKGTH, dout_BKGTH = _heads_first(q_BTNH, K), _heads_first(dout_BTNH, K)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)

    dq, dk_BKSH, dv_BKSH = [], *(jnp.zeros_like(x, jnp.float32) for x in (k_BKSH, v_BKSH))
    for tiles in _tiles(mask, q_BTNH.shape[1], k_BSKH.shape[1], block_q, block_k):
        parts = []
        for tile in tiles:
            t, s = slice(tile.t0, tile.t1), slice(tile.s0, tile.s1)
            s_BKGTS, slope = _scores(mask, tile, q_BKGTH, k_BKSH)
            p_BKGTS = jnp.exp(s_BKGTS - rows_BKGT2[:, :, :, t, :1])
            do_BKGTH = dout_BKGTH[:, :, :, t]
            dp_BKGTS = _dot("BKGTH,BKSH->BKGTS", do_BKGTH, v_BKSH[:, :, s])
            ds_BKGTS = slope * p_BKGTS * (dp_BKGTS - rows_BKGT2[:, :, :, t, 1:])
            p_BKGTS, ds_BKGTS = p_BKGTS.astype(v_BKSH.dtype), ds_BKGTS.astype(k_BKSH.dtype)
            parts.append(_dot("BKGTS,BKSH->BKGTH", ds_BKGTS, k_BKSH[:, :, s]))
            dk_part = _dot("BKGTS,BKGTH->BKSH", ds_BKGTS, q_BKGTH[:, :, :, t])
            dk_BKSH = dk_BKSH.at[:, :, s].add(dk_part)
            dv_BKSH = dv_BKSH.at[:, :, s].add(_dot("BKGTS,BKGTH->BKSH", p_BKGTS, do_BKGTH))
            order = (dk_BKSH, dv_BKSH, parts, q_BKGTH, dout_BKGTH)
            dk_BKSH, dv_BKSH, parts, q_BKGTH, dout_BKGTH = jax.lax.optimization_barrier(order)
        dq.append(sum(parts))
    dq_BTNH = _heads_last(jnp.concatenate(dq, axis=3)).astype(q_BTNH.dtype)
    dk_BSKH, dv_BSKH = jnp.swapaxes(dk_BKSH, 1, 2), jnp.swapaxes(dv_BKSH, 1, 2)
    return dq_BTNH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)
