"""Flash attention in Pallas for NVIDIA GPUs of any generation (Triton), forward and backward.

FlashAttention-2 (arXiv 2307.08691): a program keeps a block of queries and goes over the blocks of
keys that any of them may read, so that no score reaches memory; the backward pass computes scores
again, once for the gradient of the queries and once for those of keys and values. Query heads read
their key/value head as it lies, and arrays are read as [B, T, N, H], without a transpose.

Which blocks meet is data: see `mask_blocks.py`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxreason.kernels.differentiable import differentiable
from jaxreason.kernels.mask_blocks import (
    FLOOR,
    HIDDEN,
    LOG2_E,
    Spec,
    filled_mask,
    over,
    ranges_of,
)
from jaxreason.types import AttentionMask


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys that meet at once in a program; powers of two, at least 16."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int  # of the loop's loads, in flight

    def __post_init__(self):
        for name in ("queries", "keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"Tiles.{name} is {size}; it must be a power of two from 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"Tiles.num_warps is {self.num_warps}; it must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"Tiles.num_stages is {self.num_stages}; it must be at least 1")

    @property
    def options(self) -> plt.CompilerParams:
        """Given explicitly: without them jax 0.10 takes another backend than jax 0.11."""
        return plt.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the three kernels; `interpret` simulates them, slowly, on any platform."""

    forward: Tiles
    of_queries: Tiles  # the gradient of the queries
    of_keys: Tiles  # the gradients of keys and values
    interpret: bool = False


# By the largest head dim that they are for. What fits in registers and shared memory of Hopper and
# Blackwell; not yet tuned on a chip.
CONFIGS = {
    64: Config(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    128: Config(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 8, 2)),
    256: Config(Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 2), Tiles(32, 32, 8, 2)),
}


def config_for(head_dim: int) -> Config:
    """Raises NotImplementedError for a head dim that none is for."""
    for largest, config in CONFIGS.items():
        if head_dim <= largest:
            return config
    raise NotImplementedError(f"head_dim {head_dim} is above flash's {max(CONFIGS)}")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH of q's dtype, lse_BTN float32), as `reference.attention`, differentiable."""
    H = q_BTNH.shape[-1]
    config, of = config or config_for(H), functools.partial
    run = differentiable(of(_forward, config=config), of(gradients, config=config))
    mask = dataclasses.replace(mask, scale=H**-0.5 if mask.scale is None else mask.scale)
    out_BTNH, lse_BTN = run(*map(with_whole_heads, (q_BTNH, k_BSKH, v_BSKH)), mask)
    return out_BTNH[..., :H], lse_BTN


def with_whole_heads(x_BTNH: jax.Array) -> jax.Array:
    """With zeros up to a head dim that Triton's blocks can have: a power of two from 16."""
    H = x_BTNH.shape[-1]
    missing = max(16, pl.next_power_of_2(H)) - H
    return jnp.pad(x_BTNH, ((0, 0),) * (x_BTNH.ndim - 1) + ((0, missing),)) if missing else x_BTNH


# --- blocks in a program --------------------------------------------------------------------------


def _scores(spec: Spec, q_RH, k_CH):
    """(float32 scores, d score / d (q.k))."""
    s_RC = spec.scale * jnp.dot(q_RH, k_CH.T, preferred_element_type=jnp.float32)
    if spec.soft_cap is None:
        return s_RC, spec.scale
    tanh_RC = jnp.tanh(s_RC / spec.soft_cap)
    return spec.soft_cap * tanh_RC, spec.scale * (1 - tanh_RC**2)


def _visible(spec: Spec, queries: "_Side", keys: "_Side"):
    q_R1, k_1C = queries.index[:, None], keys.index[None]
    see_RC = (queries.segments[:, None] == keys.segments[None]) & (keys.segments != 0)[None]
    if spec.causal:
        see_RC &= k_1C <= q_R1
    if spec.window is not None:
        see_RC &= k_1C > q_R1 - spec.window
    return see_RC


class _Side(NamedTuple):
    """A block of queries or keys: where it is, and its segments (0 beyond the array's end)."""

    rows: pl.Slice
    inside: jax.Array
    index: jax.Array  # among the keys
    segments: jax.Array


def _side(block, size: int, offset, segments_ref, b) -> _Side:
    rows = pl.ds(block * size, size)
    row = block * size + jnp.arange(size)
    inside = row < segments_ref.shape[1]
    segments = plt.load(segments_ref.at[b, rows], mask=inside, other=0)
    return _Side(rows, inside, row + offset, segments)


def _load(ref, b, side: _Side, head):
    """[rows, H], zeros beyond the array."""
    return plt.load(ref.at[b, side.rows, head, :], mask=_inside(side, ref.shape[-1]), other=0)


def _store(ref, b, side: _Side, head, value):
    mask = _inside(side, ref.shape[-1])
    plt.store(ref.at[b, side.rows, head, :], value.astype(ref.dtype), mask=mask)


def _inside(side: _Side, head_dim: int):
    return jnp.broadcast_to(side.inside[:, None], (*side.inside.shape, head_dim))


def _stat(ref, b, head, side: _Side):
    return plt.load(ref.at[b, head, side.rows], mask=side.inside, other=0)


def _read_ranges(ranges_BI4, b, i):
    return tuple(ranges_BI4[b, i, n] for n in range(4))


# --- forward --------------------------------------------------------------------------------------


def _forward(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, *, config: Config):
    B, T, N, _ = q_BTNH.shape
    spec = Spec.of(mask, q_BTNH, k_BSKH, config.forward)
    filled = filled_mask(mask, q_BTNH, k_BSKH)
    out_BTNH, lse_BNT = pl.pallas_call(
        functools.partial(_forward_kernel, spec=spec),
        out_shape=(
            jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype),
            jax.ShapeDtypeStruct((B, N, T), jnp.float32),
        ),
        grid=(pl.cdiv(T, spec.tiles.queries), N, B),
        compiler_params=spec.tiles.options,
        interpret=config.interpret,
        name="flash_forward",
    )(ranges_of(spec, filled, spec.tiles), *filled, q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH, jnp.swapaxes(lse_BNT, 1, 2)


def _forward_kernel(ranges, q_segments, k_segments, offset_B, q, k, v, out, lse, *, spec: Spec):
    # The last blocks, which read most where attention is causal, begin first.
    i, n, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries = _side(i, spec.tiles.queries, offset_B[b], q_segments, b)
    q_RH = _load(q, b, queries, n)

    def body(j, state, masked):
        out_RH, top_R, total_R = state
        keys = _side(j, spec.tiles.keys, 0, k_segments, b)
        s_RC, _ = _scores(spec, q_RH, _load(k, b, keys, n // spec.group))
        if masked:
            s_RC = jnp.where(_visible(spec, queries, keys), s_RC, HIDDEN)
        new_R = jnp.maximum(top_R, s_RC.max(1))
        e_RC = jnp.exp2(LOG2_E * (s_RC - new_R[:, None]))
        shrink_R = jnp.exp2(LOG2_E * (top_R - new_R))
        v_CH = _load(v, b, keys, n // spec.group)
        out_RH = out_RH * shrink_R[:, None]
        out_RH += jnp.dot(e_RC.astype(v_CH.dtype), v_CH, preferred_element_type=jnp.float32)
        return out_RH, new_R, total_R * shrink_R + e_RC.sum(1)

    rows = spec.tiles.queries
    start = (
        jnp.zeros(q_RH.shape, jnp.float32),
        jnp.full(rows, FLOOR, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )
    out_RH, top_R, total_R = over(_read_ranges(ranges, b, i), body, start)
    dead_R = total_R == 0
    total_R = jnp.where(dead_R, 1.0, total_R)
    _store(out, b, queries, n, out_RH / total_R[:, None])
    lse_R = jnp.where(dead_R, -jnp.inf, top_R + jnp.log(total_R))
    plt.store(lse.at[b, n, queries.rows], lse_R, mask=queries.inside)


# --- backward -------------------------------------------------------------------------------------


def gradients(
    q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, lse_BTN, delta_BTN, dout_BTNH,
    *, config: Config | None = None,
):  # fmt: skip
    """(dq_BTNH, dk_BSKH, dv_BSKH), as `reference.attention_gradients`."""
    B, T, N, H = q_BTNH.shape
    config = config or config_for(H)
    mask = dataclasses.replace(mask, scale=H**-0.5 if mask.scale is None else mask.scale)
    q_BTNH, k_BSKH, v_BSKH, dout_BTNH = map(with_whole_heads, (q_BTNH, k_BSKH, v_BSKH, dout_BTNH))
    (S, K), filled = k_BSKH.shape[1:3], filled_mask(mask, q_BTNH, k_BSKH)
    dead_BTN = lse_BTN == -jnp.inf  # p is 0 there: keep inf and nan away from the products
    stats = [jnp.swapaxes(jnp.where(dead_BTN, 0.0, x), 1, 2) for x in (lse_BTN, delta_BTN)]
    operands = (*filled, q_BTNH, k_BSKH, v_BSKH, *stats, dout_BTNH)
    shape_of = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)

    spec = Spec.of(mask, q_BTNH, k_BSKH, config.of_queries)
    dq_BTNH = pl.pallas_call(
        functools.partial(_of_queries_kernel, spec=spec),
        out_shape=shape_of(q_BTNH),
        grid=(pl.cdiv(T, spec.tiles.queries), N, B),
        compiler_params=spec.tiles.options,
        interpret=config.interpret,
        name="flash_of_queries",
    )(ranges_of(spec, filled, spec.tiles), *operands)

    spec = Spec.of(mask, q_BTNH, k_BSKH, config.of_keys)
    dk_BSKH, dv_BSKH = pl.pallas_call(
        functools.partial(_of_keys_kernel, spec=spec),
        out_shape=(shape_of(k_BSKH), shape_of(v_BSKH)),
        grid=(pl.cdiv(S, spec.tiles.keys), K, B),
        compiler_params=spec.tiles.options,
        interpret=config.interpret,
        name="flash_of_keys",
    )(ranges_of(spec, filled, spec.tiles, of_keys=True), *operands)
    return dq_BTNH[..., :H], dk_BSKH[..., :H], dv_BSKH[..., :H]


def _pair(spec: Spec, queries, keys, q_RH, k_CH, v_CH, dout_RH, lse_R, delta_R, masked: bool):
    """(p_RC, ds_RC) of two blocks, of the operands' dtype."""
    s_RC, slope = _scores(spec, q_RH, k_CH)
    if masked:
        s_RC = jnp.where(_visible(spec, queries, keys), s_RC, HIDDEN)
    p_RC = jnp.exp2(LOG2_E * (s_RC - lse_R[:, None]))
    dp_RC = jnp.dot(dout_RH, v_CH.T, preferred_element_type=jnp.float32)
    ds_RC = slope * p_RC * (dp_RC - delta_R[:, None])
    return p_RC.astype(v_CH.dtype), ds_RC.astype(k_CH.dtype)


def _of_queries_kernel(
    ranges, q_segments, k_segments, offset_B, q, k, v, lse, delta, dout, dq, *, spec: Spec
):
    i, n, b = pl.num_programs(0) - 1 - pl.program_id(0), pl.program_id(1), pl.program_id(2)
    queries = _side(i, spec.tiles.queries, offset_B[b], q_segments, b)
    q_RH, dout_RH = _load(q, b, queries, n), _load(dout, b, queries, n)
    lse_R, delta_R = _stat(lse, b, n, queries), _stat(delta, b, n, queries)

    def body(j, dq_RH, masked):
        keys = _side(j, spec.tiles.keys, 0, k_segments, b)
        k_CH, v_CH = (_load(x, b, keys, n // spec.group) for x in (k, v))
        operands = (queries, keys, q_RH, k_CH, v_CH, dout_RH, lse_R, delta_R)
        _, ds_RC = _pair(spec, *operands, masked)
        return dq_RH + jnp.dot(ds_RC, k_CH, preferred_element_type=jnp.float32)

    zeros_RH = jnp.zeros(q_RH.shape, jnp.float32)
    _store(dq, b, queries, n, over(_read_ranges(ranges, b, i), body, zeros_RH))


def _of_keys_kernel(
    ranges, q_segments, k_segments, offset_B, q, k, v, lse, delta, dout, dk, dv, *, spec: Spec
):
    j, h, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    keys = _side(j, spec.tiles.keys, 0, k_segments, b)
    k_CH, v_CH = _load(k, b, keys, h), _load(v, b, keys, h)
    found = _read_ranges(ranges, b, j)

    def of_head(g, sums):
        n = h * spec.group + g

        def body(i, sums, masked):
            dk_CH, dv_CH = sums
            queries = _side(i, spec.tiles.queries, offset_B[b], q_segments, b)
            q_RH, dout_RH = _load(q, b, queries, n), _load(dout, b, queries, n)
            stats = _stat(lse, b, n, queries), _stat(delta, b, n, queries)
            p_RC, ds_RC = _pair(spec, queries, keys, q_RH, k_CH, v_CH, dout_RH, *stats, masked)
            dv_CH += jnp.dot(p_RC.T, dout_RH, preferred_element_type=jnp.float32)
            return dk_CH + jnp.dot(ds_RC.T, q_RH, preferred_element_type=jnp.float32), dv_CH

        return over(found, body, sums)

    zeros_CH = jnp.zeros(k_CH.shape, jnp.float32)
    dk_CH, dv_CH = jax.lax.fori_loop(0, spec.group, of_head, (zeros_CH, zeros_CH))
    _store(dk, b, keys, h, dk_CH)
    _store(dv, b, keys, h, dv_CH)
