"""What the kernels in Pallas Mosaic GPU share: `flash_sm90.py` for Hopper, `flash_sm100.py` for
Blackwell.

Names that differ between jax 0.10 and 0.12 are handled here.
"""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.mask_blocks import HIDDEN, LOG2_E, Spec, Tiles
from jaxreason.types import AttentionMask

HEAD_DIMS = (64, 128, 256)  # that tiles of shared memory can have


def refuse(kernel: str, mask: AttentionMask, *operands: jax.Array):
    """Raises NotImplementedError for what the matrix instruction, or we, cannot do."""
    dtypes = {x.dtype.name for x in operands}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        found = ", ".join(sorted(dtypes))
        raise NotImplementedError(f"{kernel} takes bfloat16 or float16, all alike: not {found}")
    if mask.scale is not None and mask.scale <= 0:
        raise NotImplementedError(f"{kernel} needs a positive scale, not {mask.scale}")


def for_head_dim(kernel: str, configs: dict, head_dim: int):
    """The config of the next head dim that there is one for.

    Raises NotImplementedError where there is none.
    """
    for largest, config in configs.items():
        if head_dim <= largest:
            return config
    raise NotImplementedError(f"head_dim {head_dim} is above {kernel}'s {max(configs)}")


# --- what kernels read ----------------------------------------------------------------------------


def whole(x_BTNH: jax.Array, block: int) -> jax.Array:
    """With zeros up to the next head dim that tiles of shared memory can have, and up to eight rows
    at a time, one block at least: beyond those the copy engine reads zeros by itself."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    more_rows = max(T + -T % 8, block) - T
    more_dims = next(size for size in HEAD_DIMS if size >= H) - H
    return jnp.pad(x_BTNH, ((0, 0), (0, more_rows), (0, 0), (0, more_dims)))


def padded(x, size: int, fill=0):
    """Its last dim up to a multiple of `size`."""
    missing = -x.shape[-1] % size
    return jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),), constant_values=fill)


class Sides(NamedTuple):
    """Segments of whole blocks. A key is visible only where both are equal."""

    q_segments_BT: jax.Array  # 0 beyond the array's end
    k_segments_BS: jax.Array  # -1 there, and where no query may read
    offset_B: jax.Array

    @classmethod
    def of(cls, filled, tiles: Tiles) -> "Sides":
        k_segments_BS = jnp.where(filled.k_segments_BS == 0, -1, filled.k_segments_BS)
        return cls(
            padded(filled.q_segments_BT, tiles.queries),
            padded(k_segments_BS, tiles.keys, fill=-1),
            filled.offset_B,
        )


def longest_first(ranges_BI4) -> jax.Array:
    """int32 [B * I]: the blocks b * I + i, those that meet most others first."""
    lengths_BI = ranges_BI4[..., 3] - ranges_BI4[..., 0]
    return jnp.argsort(-lengths_BI.reshape(-1), stable=True).astype(jnp.int32)


class Operands(NamedTuple):
    """Of the backward kernels, after the ranges and the order of their blocks."""

    q_segments_BT: jax.Array
    k_segments_BS: jax.Array
    offset_B: jax.Array
    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    less_lse_BNT: jax.Array  # of scores in the unit of `capped`
    less_delta_BNT: jax.Array
    dout_BTNH: jax.Array

    @classmethod
    def of(cls, filled, tiles, q_BTNH, k_BSKH, v_BSKH, less_lse_BTN, less_delta_BTN, dout_BTNH):
        q_BTNH, dout_BTNH = (whole(x, tiles.queries) for x in (q_BTNH, dout_BTNH))
        k_BSKH, v_BSKH = (whole(x, tiles.keys) for x in (k_BSKH, v_BSKH))
        starts = (less_lse_BTN, less_delta_BTN)
        starts = (padded(jnp.swapaxes(x, 1, 2), tiles.queries) for x in starts)
        return cls(*Sides.of(filled, tiles), q_BTNH, k_BSKH, v_BSKH, *starts, dout_BTNH)


def by_kernels(
    config, of_keys, of_queries, q_BTNH, k_BSKH, v_BSKH, mask, lse_BTN, delta_BTN, dout_BTNH
):
    """(dq_BTNH, dk_BSKH, dv_BSKH), as `reference.attention_gradients`.

    Args:
      of_keys: with the last two vectors ready to be added to products, `tiles` and `add`, gives dk,
        dv, and with `add` the float32 sum over keys that dq is the scale of.
      of_queries: likewise with `tiles`, gives dq.
    """
    (T, H), S = (q_BTNH.shape[1], q_BTNH.shape[3]), k_BSKH.shape[1]
    factor = factor_of(Spec.of(mask, q_BTNH, k_BSKH, config.of_keys))
    dead_BTN = lse_BTN == -jnp.inf  # p is 0 there: keep inf and nan away from the products
    starts = (jnp.where(dead_BTN, 0.0, x) for x in (-LOG2_E / factor * lse_BTN, -delta_BTN))
    operands = (q_BTNH, k_BSKH, v_BSKH, mask, *starts, dout_BTNH)
    if not config.adds:
        dq_BTNH = of_queries(*operands, tiles=config.of_queries)
    dk_BSKH, dv_BSKH, *added = of_keys(*operands, tiles=config.of_keys, add=config.adds)
    if config.adds:
        (sum_BTNH,) = added
        scale = Spec.of(mask, q_BTNH, k_BSKH, config.of_keys).scale
        dq_BTNH = (scale * sum_BTNH).astype(q_BTNH.dtype)
    return dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKH[:, :S, :, :H]


# --- inside a kernel ------------------------------------------------------------------------------


def launch(kernel, name: str, *, out_type, scratch: dict, programs: int, warpgroups: int):
    """`kernel(*operands, *outputs, **scratch)` in that many programs of so many warpgroups.

    `plgpu.kernel` would do, did it take references, which gradients are added to. Lane
    semantics are asked for by name: jax 0.10 has them by default, jax 0.11 no longer. No memory is
    set aside for reductions across warps, which warpgroups would share: nothing here needs any.
    """

    def body(*refs):
        run = functools.partial(kernel, *refs)
        pl.run_scoped(run, collective_axes="warpgroup", **scratch)

    return pl.kernel(
        body,
        out_type=out_type,
        mesh=plgpu.Mesh(
            grid=(programs,),
            grid_names=("program",),
            num_threads=warpgroups,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,
        ),
        name=name,
    )


def matrix(*shape: int, dtype):
    """A buffer whose last two dims lie as the copy engine and the tensor cores want them."""
    swizzle = 128  # bytes
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def barriers(arrivals: int, number: int = 1):
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number)


def tensor_barriers(arrivals: int = 1, number: int = 1):
    """At which products arrive, and who hands them what they read or write in tensor memory."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=number, orders_tensor_core=True)


def each_warp(*bodies):
    """Of the warpgroup that calls this, the first warps run one of the bodies each."""

    @plgpu.warp_map
    def _run(warp):
        for index, body in enumerate(bodies):
            pl.when(warp == index)(body)


def place_of(item, order, ranges, heads: int):
    """(row, block, head, the blocks that it meets) of an item of work."""
    num_blocks, heads = jnp.int32(ranges.shape[1]), jnp.int32(heads)
    block, n = order[lax.div(item, heads)], lax.rem(item, heads)
    b, i = lax.div(block, num_blocks), lax.rem(block, num_blocks)
    return b, i, n, tuple(ranges[b, i, x] for x in range(4))


def slot_of(step, stages: int):
    return lax.rem(step, jnp.int32(stages))


def copy_into(step, read, ready, *copies):
    """Fills the slot of a ring, once its last content has been read: (source, buffers)..."""
    stages = copies[0][1].shape[0]
    slot = slot_of(step, stages)
    pl.when(step >= stages)(lambda: plgpu.barrier_wait(read.at[slot]))
    for source, buffers in copies:
        plgpu.copy_gmem_to_smem(source, buffers.at[slot], ready.at[slot])


def full(shape: tuple[int, ...], value: float, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


# jax 0.10 wants an index of `plgpu.load`, which jax 0.12 no longer has.
_ALL = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def vector(ref, dim: int, layout):
    """Read, to lie along that dim of a block; from any memory, hence not `optimized`."""
    return plgpu.load(ref, *_ALL, layout=layout.reduce(1 - dim), optimized=False)


def along(x, shape: tuple[int, int], dim: int, layout):
    """A vector along `dim`, repeated along the other."""
    return plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [dim]), layout)


def visible(spec: Spec, shape, q_dim: int, first_query, first_key, q_segments, k_segments, layout):
    """Which pairs of a block may meet; queries lie along `q_dim`, keys along the other."""
    index = lambda dim: plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=layout)
    q, k = index(q_dim) + first_query, index(1 - q_dim) + first_key
    see = along(q_segments, shape, q_dim, layout) == along(k_segments, shape, 1 - q_dim, layout)
    if spec.causal:
        see &= k <= q
    if spec.window is not None:
        see &= k > q - spec.window
    return see


def factor_of(spec: Spec) -> float:
    """What `capped` scores are multiplied with, to be scores in powers of two."""
    return LOG2_E * (spec.scale if spec.soft_cap is None else spec.soft_cap)


def capped(spec: Spec, qk):
    """Of products of queries and keys: themselves, or the tanh that caps them."""
    return qk if spec.soft_cap is None else jnp.tanh(qk * (spec.scale / spec.soft_cap))


def share(program, programs: int, work: int):
    """(how many items of work are a program's, `round -> item`). Every other round is dealt out
    backwards, so that who had the longest item then has the shortest."""
    rounds, left = divmod(work, programs)
    place = lambda r: jnp.where(r % 2 == 0, program, programs - 1 - program)
    mine = rounds + (place(jnp.int32(rounds)) < left).astype(jnp.int32)
    return mine, lambda r: r * programs + place(r)


def chances(spec: Spec, qk, see, less_lse):
    """(probabilities, slope) of a block, float32; the slope is that of the cap.

    `qk` has begun at `less_lse` unless scores are capped; `less_lse()` is what could not be added.
    """
    if spec.soft_cap is None:
        s, slope = qk, 1.0
    else:
        t = capped(spec, qk)
        s, slope = t + less_lse(), 1.0 - t * t
    if see is not None:
        s = jnp.where(see, s, HIDDEN)
    return jnp.exp2(s * factor_of(spec)), slope


def pair(spec: Spec, qk, dp, see, less_lse):
    """(probabilities, the gradient of the scores but for the scale) of a block, as `chances`.

    `dp` has begun at `less_delta`.
    """
    p, slope = chances(spec, qk, see, less_lse)
    return p, p * dp * slope
