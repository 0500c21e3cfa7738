"""Flash attention for Hopper (sm_90a) in Pallas Mosaic GPU: the forward pass.

The maths of `flash.py`, which also says which blocks meet, on a schedule for Hopper's asynchronous
units, after FlashAttention-3 (arXiv 2407.08608). A program has three warpgroups. One only copies:
keys and values go round a ring of buffers in shared memory. Two compute, 64 queries each, and take
turns: while one multiplies on the tensor cores, the other takes exponentials. Probabilities never
leave registers: they are an operand of the product with the values as they stand.

Programs stay on their core and take one block of queries and one head after another, those that
read most first, in an order that is data too (`_order`): packed rows are balanced as causal ones.

Compiled for the chip without one (tests/test_hardware_free_sm90.py); never run on one.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.flash import _FLOOR, _HIDDEN, _LOG2_E, _filled, _over, _ranges, _Spec
from jaxreason.types import AttentionMask

COMPUTE_CAPABILITY = "9.0"  # the only one whose instructions these are

_ROWS = 64  # that a warpgroup's matrix instruction has
_COMPUTE = 2  # warpgroups that compute; the one after them copies
_SHARED = 227 * 1024  # bytes of shared memory that a program may have
_WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys that meet at once in a program, and buffers of what is read in turn."""

    queries: int
    keys: int
    stages: int

    def __post_init__(self):
        for name in ("queries", "keys"):
            size = getattr(self, name)
            if size < _ROWS or size % _ROWS or size > 256:
                raise ValueError(f"Tiles.{name} is {size}; it must be 64, 128, 192 or 256")
        if self.stages < 2:
            raise ValueError(f"Tiles.stages is {self.stages}; it must be at least 2")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the forward pass, and how many programs share the work: one for each core."""

    forward: Tiles
    programs: int = 132  # H100 SXM, H200

    def __post_init__(self):
        if self.forward.queries != _COMPUTE * _ROWS:
            raise ValueError(
                f"Config.forward.queries is {self.forward.queries}; it must be {_COMPUTE * _ROWS}, "
                f"{_ROWS} for each of {_COMPUTE} warpgroups"
            )
        if self.programs < 1:
            raise ValueError(f"Config.programs is {self.programs}; it must be at least 1")


# By the head dim in shared memory. What fits in registers and shared memory; not tuned on a chip.
CONFIGS = {
    64: Config(Tiles(128, 128, 4)),
    128: Config(Tiles(128, 128, 2)),
    256: Config(Tiles(128, 64, 2)),
}


def config_for(head_dim: int) -> Config:
    """Raises NotImplementedError for a head dim that none is for."""
    for largest, config in CONFIGS.items():
        if head_dim <= largest:
            return config
    raise NotImplementedError(f"head_dim {head_dim} is above flash_sm90's {max(CONFIGS)}")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH of q's dtype, lse_BTN float32), as `reference.attention`, differentiable.

    Raises NotImplementedError for a dtype that is not bfloat16 or float16, for a head dim above 256
    and for a scale that is not positive.
    """
    config = config or config_for(q_BTNH.shape[-1])
    return _forward(q_BTNH, k_BSKH, v_BSKH, mask, config=config)


def _refuse(mask: AttentionMask, *operands: jax.Array):
    """Raises NotImplementedError for what Hopper's matrix instruction, or we, cannot do."""
    dtypes = {x.dtype.name for x in operands}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        found = ", ".join(sorted(dtypes))
        raise NotImplementedError(f"flash_sm90 takes bfloat16 or float16, all alike: not {found}")
    if mask.scale is not None and mask.scale <= 0:
        raise NotImplementedError(f"flash_sm90 needs a positive scale, not {mask.scale}")


# --- what the kernels read ------------------------------------------------------------------------


def _padded_heads(x_BTNH: jax.Array) -> jax.Array:
    """With zeros up to the next head dim that tiles of shared memory can have."""
    head_dim = x_BTNH.shape[-1]
    padded = next(size for size in CONFIGS if size >= head_dim)
    return jnp.pad(x_BTNH, ((0, 0), (0, 0), (0, 0), (0, padded - head_dim)))


def _padded(x, size: int, fill=0):
    """Its last dim up to a multiple of `size`."""
    missing = -x.shape[-1] % size
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), constant_values=fill)


class _Sides(NamedTuple):
    """Segments of whole blocks. A key is visible only where both are equal."""

    q_segments_BT: jax.Array  # 0 beyond the array's end
    k_segments_BS: jax.Array  # -1 there, and where no query may read
    offset_B: jax.Array

    @classmethod
    def of(cls, filled, tiles: Tiles) -> "_Sides":
        k_segments_BS = jnp.where(filled.k_segments_BS == 0, -1, filled.k_segments_BS)
        return cls(
            _padded(filled.q_segments_BT, tiles.queries),
            _padded(k_segments_BS, tiles.keys, fill=-1),
            filled.offset_B,
        )


def _order(ranges_BI4) -> jax.Array:
    """int32 [B * I]: the blocks b * I + i, those that meet most others first."""
    lengths_BI = ranges_BI4[..., 3] - ranges_BI4[..., 0]
    return jnp.argsort(-lengths_BI.reshape(-1), stable=True).astype(jnp.int32)


def _share(program, programs: int, work: int):
    """(how many items of work are a program's, `round -> item`). Every other round is dealt out
    backwards, so that who had the longest item then has the shortest."""
    rounds, left = divmod(work, programs)
    place = lambda r: jnp.where(r % 2 == 0, program, programs - 1 - program)
    mine = rounds + (place(jnp.int32(rounds)) < left).astype(jnp.int32)
    return mine, lambda r: r * programs + place(r)


# --- inside a kernel ------------------------------------------------------------------------------


def _params() -> plgpu.CompilerParams:
    """Lane semantics by name: jax 0.10 has them by default, jax 0.11 no longer."""
    return plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def _matrix(stages: int, rows: int, head_dim: int, dtype) -> plgpu.SMEM:
    """Buffers [stages, rows, head_dim] as the copy engine and the tensor cores want them."""
    swizzle = 128  # bytes
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM((stages, rows, head_dim), dtype, transforms=transforms)


def _full(shape: tuple[int, ...], value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _vector(ref, dim: int):
    """Read, to lie along that dim of a block. (Of `plgpu.load` the arguments differ by version.)"""
    return plgpu.layout_cast(ref[...], _WGMMA.reduce(1 - dim))


def _along(x, shape: tuple[int, int], dim: int):
    """A vector along `dim`, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, [dim])


def _visible(spec: _Spec, shape, q_dim: int, first_query, first_key, q_segments, k_segments):
    """Which pairs of a block may meet; queries lie along `q_dim`, keys along the other."""
    index = lambda dim: plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=_WGMMA)
    q, k = index(q_dim) + first_query, index(1 - q_dim) + first_key
    see = _along(q_segments, shape, q_dim) == _along(k_segments, shape, 1 - q_dim)
    if spec.causal:
        see &= k <= q
    if spec.window is not None:
        see &= k > q - spec.window
    return see


# --- forward --------------------------------------------------------------------------------------


def _forward(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, *, config: Config):
    _refuse(mask, q_BTNH, k_BSKH, v_BSKH)
    B, T, N, H = q_BTNH.shape
    tiles = config.forward
    spec = _Spec.of(mask, q_BTNH, k_BSKH, tiles)
    filled = _filled(mask, q_BTNH, k_BSKH)
    sides, ranges_BI4 = _Sides.of(filled, tiles), _ranges(spec, filled, tiles)
    q_BTNH, k_BSKH, v_BSKH = map(_padded_heads, (q_BTNH, k_BSKH, v_BSKH))
    head_dim, dtype = q_BTNH.shape[-1], q_BTNH.dtype
    whole_T = sides.q_segments_BT.shape[1]
    work = B * N * ranges_BI4.shape[1]
    out_BTNH, lse_BNT = plgpu.kernel(
        functools.partial(_forward_kernel, spec=spec),
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
            jax.ShapeDtypeStruct((B, N, whole_T), jnp.float32),
        ),
        scratch_types=dict(
            q_smem=_matrix(_COMPUTE, _ROWS, head_dim, dtype),  # then the output
            k_smem=_matrix(tiles.stages, tiles.keys, head_dim, dtype),
            v_smem=_matrix(tiles.stages, tiles.keys, head_dim, dtype),
            q_segments_smem=plgpu.SMEM((_COMPUTE, _ROWS), jnp.int32),
            k_segments_smem=plgpu.SMEM((tiles.stages, tiles.keys), jnp.int32),
            lse_smem=plgpu.SMEM((_COMPUTE, _ROWS), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=2, num_barriers=_COMPUTE),
            k_ready=plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            v_ready=plgpu.Barrier(num_barriers=tiles.stages),
            k_read=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=tiles.stages),
            v_read=plgpu.Barrier(num_arrivals=_COMPUTE, num_barriers=tiles.stages),
            turn=plgpu.Barrier(num_arrivals=_COMPUTE),
        ),
        grid=(min(config.programs, work),),
        grid_names=("program",),
        num_threads=_COMPUTE + 1,
        thread_name="warpgroup",
        compiler_params=_params(),
        kernel_name="flash_sm90_forward",
    )(ranges_BI4, _order(ranges_BI4), *sides, q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH[..., :H], jnp.swapaxes(lse_BNT[..., :T], 1, 2)


def _forward_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, out, lse, *, spec: _Spec,
    q_smem, k_smem, v_smem, q_segments_smem, k_segments_smem, lse_smem,
    q_ready, k_ready, v_ready, k_read, v_read, turn,
):  # fmt: skip
    tiles, (_, _, N, H) = spec.tiles, q.shape
    programs, num_blocks = lax.axis_size("program"), ranges.shape[1]
    wg = lax.axis_index("warpgroup")
    num_items, item_of = _share(
        lax.axis_index("program"), programs, ranges.shape[0] * num_blocks * N
    )

    def item(r):
        """(row, block of queries, head, blocks of keys) of a round."""
        at = item_of(r)
        block, n = order[lax.div(at, N)], lax.rem(at, N)
        b, i = lax.div(block, num_blocks), lax.rem(block, num_blocks)
        return b, i, n, tuple(ranges[b, i, x] for x in range(4))

    def slot_of(step):
        return lax.rem(step, jnp.int32(tiles.stages))

    @pl.when(wg == _COMPUTE)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def of_item(r, step):
            b, _, n, (first, _, _, end) = item(r)
            head = lax.div(n, jnp.int32(spec.group))

            def of_block(j, step):
                slot = slot_of(step)
                used = step >= tiles.stages
                rows = pl.ds(j * tiles.keys, tiles.keys)
                pl.when(used)(lambda: plgpu.barrier_wait(k_read.at[slot]))
                plgpu.copy_gmem_to_smem(k.at[b, rows, head], k_smem.at[slot], k_ready.at[slot])
                plgpu.copy_gmem_to_smem(
                    k_segments.at[b, rows], k_segments_smem.at[slot], k_ready.at[slot]
                )
                pl.when(used)(lambda: plgpu.barrier_wait(v_read.at[slot]))
                plgpu.copy_gmem_to_smem(v.at[b, rows, head], v_smem.at[slot], v_ready.at[slot])
                return step + 1

            return lax.fori_loop(first, end, of_block, step)

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    @pl.when(wg < _COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        factor = _LOG2_E * (spec.scale if spec.soft_cap is None else spec.soft_cap)

        def of_item(r, step):
            b, i, n, found = item(r)
            first, end = found[0], found[3]
            first_row = i * tiles.queries + wg * _ROWS
            rows = pl.ds(first_row, _ROWS)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's output has left
            plgpu.copy_gmem_to_smem(q.at[b, rows, n], q_smem.at[wg], q_ready.at[wg])
            plgpu.copy_gmem_to_smem(q_segments.at[b, rows], q_segments_smem.at[wg], q_ready.at[wg])
            first_query = first_row + offset_B[b]
            plgpu.barrier_wait(q_ready.at[wg])
            pl.when(first < end)(lambda: plgpu.barrier_wait(k_ready.at[slot_of(step)]))
            pl.when(wg == 1)(take_turns)  # half a block behind

            def body(j, state, masked):
                out_RH, top_R, total_R = state
                slot = slot_of(step + j - first)

                def scores(s_ref):
                    plgpu.wgmma(s_ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                    take_turns()
                    return s_ref[...]

                shape = (_ROWS, tiles.keys)
                s_RC = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
                if spec.soft_cap is not None:
                    s_RC = jnp.tanh(s_RC * (spec.scale / spec.soft_cap))
                if masked:
                    segments = (
                        _vector(q_segments_smem.at[wg], 0),
                        _vector(k_segments_smem.at[slot], 1),
                    )
                    see_RC = _visible(spec, shape, 0, first_query, j * tiles.keys, *segments)
                    s_RC = jnp.where(see_RC, s_RC, _HIDDEN)
                plgpu.barrier_arrive(k_read.at[slot])

                # Tops are in powers of two, so that the exponent is one multiply-add.
                new_R = jnp.maximum(top_R, s_RC.max(axis=1) * factor)
                e_RC = jnp.exp2(s_RC * factor - _along(new_R, shape, 0))
                shrink_R = jnp.exp2(top_R - new_R)
                out_RH *= _along(shrink_R, out_RH.shape, 0)
                total_R = total_R * shrink_R + e_RC.sum(axis=1)
                p_RC = e_RC.astype(q.dtype)
                # None of the above may move behind the other warpgroup's turn.
                out_RH, total_R, new_R, p_RC = lax.optimization_barrier(
                    (out_RH, total_R, new_R, p_RC)
                )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.barrier_wait(turn)

                def weighted(out_ref):
                    plgpu.wgmma(out_ref, p_RC, v_smem.at[slot])
                    later = slot_of(step + j - first + 1)
                    pl.when(j + 1 < end)(lambda: plgpu.barrier_wait(k_ready.at[later]))

                out_RH = pl.run_state(weighted)(plgpu.ACC.init(out_RH))
                plgpu.barrier_arrive(v_read.at[slot])
                return out_RH, new_R, total_R

            out_RH, top_R, total_R = _over(
                found,
                body,
                (
                    _full((_ROWS, H), 0.0, _WGMMA),
                    _full((_ROWS,), _FLOOR, _WGMMA.reduce(1)),
                    _full((_ROWS,), 0.0, _WGMMA.reduce(1)),
                ),
            )
            pl.when(wg == 0)(take_turns)
            dead_R = total_R == 0.0
            total_R = jnp.where(dead_R, 1.0, total_R)
            q_smem.at[wg][...] = (out_RH * _along(1.0 / total_R, out_RH.shape, 0)).astype(q.dtype)
            lse_R = (top_R + jnp.log2(total_R)) / _LOG2_E
            lse_smem.at[wg][...] = jnp.where(dead_R, -jnp.inf, lse_R)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out.at[b, rows, n])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[b, n, rows])
            return step + end - first

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
