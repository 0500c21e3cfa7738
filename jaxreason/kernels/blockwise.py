"""Attention in XLA by blocks of queries: any platform, log-sum-exp out, honours any mask.

A block of queries meets all the keys it can reach at once, so the largest array is
[B, N, block_q, S]: memory O(S * block_q). The blocks of a band run one after the other in a scan
over a common range of keys; which range is known when tracing (unless the queries have a traced
offset), so most of what is causally hidden or beyond the window is never computed. The backward
pass recomputes a block's scores from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691).

Queries are moved to [C, B, K, G, T, H] once (C blocks of T), not at every block's matmul.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.kernels.differentiable import differentiable
from jaxreason.kernels.manual_axes import vary, varying_axes
from jaxreason.types import AttentionMask

_HIDDEN = -1e30  # score of a key that may not be read
_FLOOR = -1e20  # least row maximum: exp(_HIDDEN - _FLOOR) is exactly 0, even if no key is visible
_MAX_BANDS = 8  # each is compiled; 8 compute 9/16 of a causal square, infinitely many 1/2

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    block_q: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention: (out_BTNH of q's dtype, lse_BTN float32), as `reference.attention`.

    Both outputs are differentiable in q, k and v. Matmul operands keep their dtype; scores, softmax
    and sums are float32. T need not be a multiple of block_q.
    """
    axes = varying_axes(q_BTNH, k_BSKH, v_BSKH, mask)
    qkv = (vary(x, axes) for x in (q_BTNH, k_BSKH, v_BSKH))
    block_q = min(block_q, q_BTNH.shape[1])
    of = functools.partial
    return differentiable(of(_forward, block_q), of(gradients, block_q=block_q))(*qkv, mask)


class _Band(NamedTuple):
    """Blocks [c0, c1) of queries against keys [s0, s1)."""

    c0: int
    c1: int
    s0: int
    s1: int


def _bands(mask: AttentionMask, num_blocks: int, block_q: int, kv_len: int) -> list[_Band]:
    """Cuts the blocks of queries where the range of keys within their reach changes enough."""
    if mask.q_offset_B is not None or not (mask.causal or mask.window):
        return [_Band(0, num_blocks, 0, kv_len)]
    step = -(-num_blocks // _MAX_BANDS)
    bands = []
    for c0 in range(0, num_blocks, step):
        c1 = min(c0 + step, num_blocks)
        s0 = 0 if mask.window is None else max(0, c0 * block_q - mask.window + 1)
        s1 = min(kv_len, c1 * block_q) if mask.causal else kv_len
        bands.append(_Band(c0, c1, min(s0, s1 - 1), s1))  # out of reach of all: one hidden key
    return bands


def _over_blocks(block: Callable[..., tuple[Any, Any]], band: _Band, rows, zeros):
    """Runs `part, out = block(slices of rows)` for each block of a band; sums part, stacks out."""
    if band.c1 - band.c0 == 1:
        part, out = block(jax.tree.map(lambda x: x[band.c0], rows))
        return part, jax.tree.map(lambda x: x[None], out)

    def body(total, slices):
        part, out = block(slices)
        return jax.tree.map(jnp.add, total, part), out

    return jax.lax.scan(body, zeros, jax.tree.map(lambda x: x[band.c0 : band.c1], rows))


def _split(x_BT, block_q: int):
    """[B, T, ...] -> [C, B, block_q, ...], padded with zeros."""
    B, T, *rest = x_BT.shape
    num_blocks = -(-T // block_q)
    pad = [(0, 0), (0, num_blocks * block_q - T)] + [(0, 0)] * len(rest)
    return jnp.moveaxis(jnp.pad(x_BT, pad).reshape(B, num_blocks, block_q, *rest), 1, 0)


def _split_heads(x_BTN, block_q: int, num_kv_heads: int):
    """[B, T, N, ...] -> [C, B, K, G, block_q, ...]."""
    x_CBTN = _split(x_BTN, block_q)
    C, B, T, N, *rest = x_CBTN.shape
    return jnp.moveaxis(x_CBTN.reshape(C, B, T, num_kv_heads, N // num_kv_heads, *rest), 2, 4)


def _join_heads(x_CBKGT, length: int):
    """[C, B, K, G, block_q, ...] -> [B, T, N, ...] without the padding."""
    x_BCTKG = jnp.moveaxis(x_CBKGT, (0, 4), (1, 2))
    B, C, T, K, G, *rest = x_BCTKG.shape
    return x_BCTKG.reshape(B, C * T, K * G, *rest)[:, :length]


class _Queries(NamedTuple):
    """Blocks of queries; inside a scan, one of them without the leading C."""

    q_CBKGTH: jax.Array
    index_CBT: jax.Array  # among the keys; B may be 1
    segments_CBT: jax.Array | None


def _queries(mask: AttentionMask, block_q, q_BTNH, num_kv_heads) -> _Queries:
    index_BT = jnp.arange(q_BTNH.shape[1])[None]
    if mask.q_offset_B is not None:
        index_BT = index_BT + mask.q_offset_B[:, None]
    segments_CBT = None if mask.q_segments_BT is None else _split(mask.q_segments_BT, block_q)
    q_CBKGTH = _split_heads(q_BTNH, block_q, num_kv_heads)
    return _Queries(q_CBKGTH, _split(index_BT, block_q), segments_CBT)


def _scores(mask: AttentionMask, band: _Band, queries: _Queries, k_BKSH):
    """float32 scores [B, K, G, T, S] of a block over a band's keys, and d score / d (q.k)."""
    q_BKGTH, index_BT, segments_BT = queries
    slope = q_BKGTH.shape[-1] ** -0.5 if mask.scale is None else mask.scale
    s_BKGTS = slope * _dot("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH)
    if mask.soft_cap is not None:
        tanh_BKGTS = jnp.tanh(s_BKGTS / mask.soft_cap)
        s_BKGTS, slope = mask.soft_cap * tanh_BKGTS, slope * (1 - tanh_BKGTS**2)
    q_BT1, k_11S = index_BT[:, :, None], jnp.arange(band.s0, band.s1)[None, None, :]
    conditions = []
    if mask.causal:
        conditions.append(k_11S <= q_BT1)
    if mask.window is not None:
        conditions.append(k_11S > q_BT1 - mask.window)
    if segments_BT is not None:
        kv_segments_B1S = mask.kv_segments_BS[:, None, band.s0 : band.s1]
        conditions += [segments_BT[:, :, None] == kv_segments_B1S, kv_segments_B1S != 0]
    if conditions:
        see_B11TS = functools.reduce(jnp.logical_and, conditions)[:, None, None]
        s_BKGTS = jnp.where(see_B11TS, s_BKGTS, _HIDDEN)
    return s_BKGTS, slope


def _forward(block_q, q_BTNH, k_BSKH, v_BSKH, mask):
    T, K = q_BTNH.shape[1], k_BSKH.shape[2]
    queries = _queries(mask, block_q, q_BTNH, K)
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    bands = _bands(mask, len(queries.q_CBKGTH), block_q, k_BSKH.shape[1])
    outputs = [_band_forward(mask, band, queries, k_BKSH, v_BKSH) for band in bands]
    out_CBKGTH, lse_CBKGT = (jnp.concatenate(parts) for parts in zip(*outputs))
    return _join_heads(out_CBKGTH, T), _join_heads(lse_CBKGT, T)


def _band_forward(mask, band: _Band, queries: _Queries, k_BKSH, v_BKSH):
    k_BKSH, v_BKSH = (x[:, :, band.s0 : band.s1] for x in (k_BKSH, v_BKSH))

    def block(queries):
        s_BKGTS, _ = _scores(mask, band, queries, k_BKSH)
        top_BKGT = jnp.maximum(s_BKGTS.max(-1), _FLOOR)
        e_BKGTS = jnp.exp(s_BKGTS - top_BKGT[..., None])
        total_BKGT = e_BKGTS.sum(-1)
        dead_BKGT = total_BKGT == 0
        total_BKGT = jnp.where(dead_BKGT, 1.0, total_BKGT)
        out_BKGTH = _dot("BKGTS,BKSH->BKGTH", e_BKGTS.astype(v_BKSH.dtype), v_BKSH)
        out_BKGTH = (out_BKGTH / total_BKGT[..., None]).astype(queries.q_CBKGTH.dtype)
        return None, (
            out_BKGTH,
            jnp.where(dead_BKGT, -jnp.inf, top_BKGT + jnp.log(total_BKGT)),
        )

    return _over_blocks(block, band, queries, None)[1]


def gradients(
    q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, lse_BTN, delta_BTN, dout_BTNH, *, block_q: int = 64
):
    """(dq_BTNH, dk_BSKH, dv_BSKH), as `reference.attention_gradients`."""
    T, K = q_BTNH.shape[1], k_BSKH.shape[2]
    block_q = min(block_q, T)
    dead_BTN = lse_BTN == -jnp.inf  # p is 0 there: keep inf and nan away from the products
    row_stats = (jnp.where(dead_BTN, 0.0, x) for x in (lse_BTN, delta_BTN))
    rows = (
        _queries(mask, block_q, q_BTNH, K),
        *(_split_heads(x, block_q, K) for x in (dout_BTNH, *row_stats)),
    )
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    dk_BKSH, dv_BKSH = (jnp.zeros_like(x, jnp.float32) for x in (k_BKSH, v_BKSH))
    dq = []
    for band in _bands(mask, len(rows[1]), block_q, k_BSKH.shape[1]):
        (dk_part, dv_part), dq_part = _band_backward(mask, band, rows, k_BKSH, v_BKSH)
        dq.append(dq_part)
        dk_BKSH = dk_BKSH.at[:, :, band.s0 : band.s1].add(dk_part)
        dv_BKSH = dv_BKSH.at[:, :, band.s0 : band.s1].add(dv_part)
    dq_BTNH = _join_heads(jnp.concatenate(dq), T)
    dk_BSKH, dv_BSKH = jnp.swapaxes(dk_BKSH, 1, 2), jnp.swapaxes(dv_BKSH, 1, 2)
    return dq_BTNH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def _band_backward(mask, band: _Band, rows, k_BKSH, v_BKSH):
    """((dk, dv) over the band's keys, float32; dq_CBKGTH of q's dtype)."""
    k_BKSH, v_BKSH = (x[:, :, band.s0 : band.s1] for x in (k_BKSH, v_BKSH))

    def block(rows):
        queries, dout_BKGTH, lse_BKGT, delta_BKGT = rows
        q_BKGTH = queries.q_CBKGTH
        s_BKGTS, slope = _scores(mask, band, queries, k_BKSH)
        p_BKGTS = jnp.exp(s_BKGTS - lse_BKGT[..., None])
        dp_BKGTS = _dot("BKGTH,BKSH->BKGTS", dout_BKGTH, v_BKSH)
        ds_BKGTS = slope * p_BKGTS * (dp_BKGTS - delta_BKGT[..., None])
        p_BKGTS, ds_BKGTS = p_BKGTS.astype(v_BKSH.dtype), ds_BKGTS.astype(k_BKSH.dtype)
        dq_BKGTH = _dot("BKGTS,BKSH->BKGTH", ds_BKGTS, k_BKSH).astype(q_BKGTH.dtype)
        dk_BKSH = _dot("BKGTS,BKGTH->BKSH", ds_BKGTS, q_BKGTH)
        return (dk_BKSH, _dot("BKGTS,BKGTH->BKSH", p_BKGTS, dout_BKGTH)), dq_BKGTH

    zeros = [vary(jnp.zeros_like(x, jnp.float32), varying_axes(x)) for x in (k_BKSH, v_BKSH)]
    return _over_blocks(block, band, rows, tuple(zeros))
