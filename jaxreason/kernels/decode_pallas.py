"""Decode attention on GPUs: Pallas kernels (Triton) of decode.py's function.

The queries of all rows that share keys meet them as one block, so that a prefix is read once for
its whole run of rows, and positions beyond what a row may read are never loaded. Where there are
too few rows to fill the chip, the positions of each are split over programs (Flash-Decoding); what
they give is merged by log-sum-exp, as are a row's own cache and its prefix.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxreason.kernels.decode import Prefix, repeat_rows
from jaxreason.kernels.flash import with_whole_heads

_HIDDEN = -1e30  # score of a key that may not be read
_FLOOR = -1e20  # least row maximum: exp2(_HIDDEN - _FLOOR) is exactly 0, even if no key is visible
_LOG2_E = math.log2(math.e)
_PROGRAMS = 256  # that fill a chip of 132 to 148 processors twice
_MOST_QUERIES = 64  # of one program


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Keys that a program reads at once; a power of two of at least 16."""

    keys: int = 64
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self):
        if self.keys < 16 or self.keys & (self.keys - 1):
            raise ValueError(f"Tiles.keys is {self.keys}; it must be a power of two from 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"Tiles.num_warps is {self.num_warps}; it must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"Tiles.num_stages is {self.num_stages}; it must be at least 1")


def decode_attention(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lengths_B: jax.Array,
    *,
    prefix: Prefix | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> jax.Array:
    """out_BNH of q's dtype, as `decode.decode_attention`. Caches may be float8_e4m3fn, too."""
    B, _, H = q_BNH.shape
    run = functools.partial(
        _part, with_whole_heads(q_BNH), scale=H**-0.5 if scale is None else scale,
        soft_cap=soft_cap, tiles=tiles, interpret=interpret,
    )  # fmt: skip
    before_B = jnp.zeros_like(lengths_B) if prefix is None else repeat_rows(prefix[2], B)
    first_B = jnp.zeros_like(lengths_B)
    if window is not None:
        first_B = jnp.maximum(before_B + lengths_B - window, 0)
    parts = [run(k_BKSH, v_BKSH, jnp.maximum(first_B - before_B, 0), lengths_B)]
    if prefix is not None:
        parts.append(run(prefix[0], prefix[1], first_B, before_B))
    out_XBNH, lse_XBN = (jnp.concatenate(x) for x in zip(*parts))
    share_XBN = jnp.exp(lse_XBN - jnp.maximum(lse_XBN.max(0), _FLOOR))
    total_BN = share_XBN.sum(0)
    out_BNH = (share_XBN[..., None] * out_XBNH[..., :H]).sum(0)
    return (out_BNH / jnp.where(total_BN == 0, 1.0, total_BN)[..., None]).astype(q_BNH.dtype)


def _part(q_BNH, k_PKSH, v_PKSH, first_B, end_B, *, scale, soft_cap, tiles, interpret):
    """(out_XBNH, lse_XBN), float32, of positions first <= s < end of each row, in X splits."""
    (B, N, H), (P, K, S, _) = q_BNH.shape, k_PKSH.shape
    k_PKSH, v_PKSH = with_whole_heads(k_PKSH), with_whole_heads(v_PKSH)
    R, G = B // P, N // K
    q_PKQH = jnp.swapaxes(q_BNH.reshape(P, R, K, G, H), 1, 2).reshape(P, K, R * G, H)
    of_rows = lambda x_B: jnp.repeat(x_B.reshape(P, R), G, axis=1).astype(jnp.int32)
    queries = min(_MOST_QUERIES, max(16, pl.next_power_of_2(R * G)))
    blocks = pl.cdiv(R * G, queries)
    splits = max(1, min(pl.cdiv(_PROGRAMS, P * K * blocks), pl.cdiv(S, 4 * tiles.keys)))
    shape = lambda *dims: jax.ShapeDtypeStruct((splits, P, K, *dims), jnp.float32)
    out_XPKQH, lse_XPKQ = pl.pallas_call(
        functools.partial(
            _kernel, scale=scale, soft_cap=soft_cap, queries=queries, keys=tiles.keys, splits=splits
        ),
        out_shape=(shape(R * G, H), shape(R * G)),
        grid=(blocks * splits, K, P),
        compiler_params=plt.CompilerParams(num_warps=tiles.num_warps, num_stages=tiles.num_stages),
        interpret=interpret,
        name="decode_attention",
    )(of_rows(first_B), of_rows(end_B), q_PKQH, k_PKSH, v_PKSH)
    out_XPRKGH = jnp.moveaxis(out_XPKQH.reshape(splits, P, K, R, G, H), 3, 2)
    lse_XPRKG = jnp.moveaxis(lse_XPKQ.reshape(splits, P, K, R, G), 3, 2)
    return out_XPRKGH.reshape(splits, B, N, H), lse_XPRKG.reshape(splits, B, N)


def _kernel(
    first_PQ, end_PQ, q_PKQH, k_PKSH, v_PKSH, out_XPKQH, lse_XPKQ,
    *, scale, soft_cap, queries, keys, splits,
):  # fmt: skip
    block, x = pl.program_id(0) // splits, pl.program_id(0) % splits
    h, p = pl.program_id(1), pl.program_id(2)
    Q, H, S = q_PKQH.shape[2], q_PKQH.shape[3], k_PKSH.shape[2]
    rows = pl.ds(block * queries, queries)
    real_Q = block * queries + jnp.arange(queries) < Q
    # Rows that are not there read nothing: they begin where nothing is left.
    first_Q = plt.load(first_PQ.at[p, rows], mask=real_Q, other=S)
    end_Q = plt.load(end_PQ.at[p, rows], mask=real_Q, other=0)
    first, end = jnp.min(first_Q) // keys, pl.cdiv(jnp.max(end_Q), keys)
    here = pl.cdiv(jnp.maximum(end - first, 0), splits)
    first, end = first + x * here, jnp.minimum(first + (x + 1) * here, end)
    real_QH = jnp.broadcast_to(real_Q[:, None], (queries, H))
    q_QH = plt.load(q_PKQH.at[p, h, rows, :], mask=real_QH, other=0)

    def body(j, state):
        out_QH, top_Q, total_Q = state
        at_S = j * keys + jnp.arange(keys)
        some_SH = jnp.broadcast_to((at_S < jnp.max(end_Q))[:, None], (keys, H))
        where = (p, h, pl.ds(j * keys, keys), slice(None))
        k_SH = plt.load(k_PKSH.at[where], mask=some_SH, other=0.0).astype(q_QH.dtype)
        v_SH = plt.load(v_PKSH.at[where], mask=some_SH, other=0.0).astype(q_QH.dtype)
        s_QS = scale * jnp.dot(q_QH, k_SH.T, preferred_element_type=jnp.float32)
        if soft_cap is not None:
            s_QS = soft_cap * jnp.tanh(s_QS / soft_cap)
        see_QS = (at_S[None] >= first_Q[:, None]) & (at_S[None] < end_Q[:, None])
        s_QS = jnp.where(see_QS, s_QS, _HIDDEN)
        new_Q = jnp.maximum(top_Q, s_QS.max(1))
        e_QS = jnp.exp2(_LOG2_E * (s_QS - new_Q[:, None]))
        shrink_Q = jnp.exp2(_LOG2_E * (top_Q - new_Q))
        out_QH = out_QH * shrink_Q[:, None]
        out_QH += jnp.dot(e_QS.astype(v_SH.dtype), v_SH, preferred_element_type=jnp.float32)
        return out_QH, new_Q, total_Q * shrink_Q + e_QS.sum(1)

    start = (
        jnp.zeros(q_QH.shape, jnp.float32),
        jnp.full(queries, _FLOOR, jnp.float32),
        jnp.zeros(queries, jnp.float32),
    )
    out_QH, top_Q, total_Q = jax.lax.fori_loop(first, end, body, start)
    dead_Q = total_Q == 0
    total_Q = jnp.where(dead_Q, 1.0, total_Q)
    plt.store(out_XPKQH.at[x, p, h, rows, :], out_QH / total_Q[:, None], mask=real_QH)
    lse_Q = jnp.where(dead_Q, -jnp.inf, top_Q + jnp.log(total_Q))
    plt.store(lse_XPKQ.at[x, p, h, rows], lse_Q, mask=real_Q)
