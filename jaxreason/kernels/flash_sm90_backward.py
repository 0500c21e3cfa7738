"""Flash attention for Hopper: what `flash_sm90.py` gives as gradients, and what both are built of.

One pass over the keys (five products a block, not seven). A program keeps 128 keys, 64 for each of
two warpgroups, and goes over the queries that read them, whose blocks the third warpgroup copies
to a ring of buffers. Scores are computed transposed, keys along rows, so that probabilities and
their gradients are operands of the products with `dout` and `q` from registers; the latter go to
shared memory too, where both warpgroups make one half each of the queries' gradient of them. The
copy engine adds that to float32 memory, in the order in which programs come to it: the last bits of
`dq` differ from run to run. `Config.ordered` has `dq` from a kernel of its own over blocks of
queries, and every run gives the same bits.

At head dim 256 gradients of 64 keys fill the registers of both warpgroups: both compute the scores
of the same keys, and each keeps half of the columns of `dk` and `dv`.
"""

import dataclasses
import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.flash import _HIDDEN, _LOG2_E, _filled, _over, _ranges, _Spec
from jaxreason.types import AttentionMask

ROWS = 64  # that a warpgroup's matrix instruction has
COMPUTE = 2  # warpgroups that compute; the one after them copies
WGMMA = plgpu.Layout.WGMMA


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Queries and keys that meet at once in a program, and buffers of what it reads in turn."""

    queries: int
    keys: int
    stages: int  # of keys; of queries, where keys stay
    value_stages: int  # of values; of gradients of the output, where keys stay

    def __post_init__(self):
        for name in ("queries", "keys"):
            if getattr(self, name) not in (64, 128):
                raise ValueError(f"Tiles.{name} is {getattr(self, name)}; it must be 64 or 128")
        for name in ("stages", "value_stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"Tiles.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the kernels, and how many programs share the forward pass: one for each core."""

    forward: Tiles
    of_keys: Tiles  # the gradients of keys and values, and of queries unless `ordered`
    of_queries: Tiles  # the gradient of the queries, if `ordered`
    ordered: bool = False  # the same bits in every run
    programs: int = 132  # H100 SXM, H200

    def __post_init__(self):
        for name in ("forward", "of_queries"):
            queries = getattr(self, name).queries
            if queries != COMPUTE * ROWS:
                raise ValueError(
                    f"Config.{name}.queries is {queries}; it must be {COMPUTE * ROWS}, {ROWS} for "
                    f"each of {COMPUTE} warpgroups"
                )
        if self.programs < 1:
            raise ValueError(f"Config.programs is {self.programs}; it must be at least 1")


# By the head dim in shared memory. What fits in registers and shared memory; not tuned on a chip.
CONFIGS = {
    64: Config(Tiles(128, 128, 4, 4), Tiles(128, 128, 2, 2), Tiles(128, 128, 2, 2)),
    128: Config(Tiles(128, 128, 2, 2), Tiles(64, 128, 2, 2), Tiles(128, 64, 3, 3)),
    256: Config(Tiles(128, 64, 2, 2), Tiles(64, 64, 2, 1), Tiles(128, 64, 2, 1)),
}


def config_for(head_dim: int) -> Config:
    """Raises NotImplementedError for a head dim that none is for."""
    for largest, config in CONFIGS.items():
        if head_dim <= largest:
            return config
    raise NotImplementedError(f"head_dim {head_dim} is above flash_sm90's {max(CONFIGS)}")


def refuse(mask: AttentionMask, *operands: jax.Array):
    """Raises NotImplementedError for what Hopper's matrix instruction, or we, cannot do."""
    dtypes = {x.dtype.name for x in operands}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        found = ", ".join(sorted(dtypes))
        raise NotImplementedError(f"flash_sm90 takes bfloat16 or float16, all alike: not {found}")
    if mask.scale is not None and mask.scale <= 0:
        raise NotImplementedError(f"flash_sm90 needs a positive scale, not {mask.scale}")


# --- what kernels read ----------------------------------------------------------------------------


def whole(x_BTNH: jax.Array, block: int) -> jax.Array:
    """With zeros up to the next head dim that tiles of shared memory can have, and up to eight rows
    at a time, one block at least: beyond those the copy engine reads zeros by itself."""
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    more_rows = max(T + -T % 8, block) - T
    more_dims = next(size for size in CONFIGS if size >= H) - H
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


# --- inside a kernel ------------------------------------------------------------------------------


def launch(kernel, name: str, *, out_type, scratch: dict, programs: int):
    """`kernel(*operands, *outputs, **scratch)` in that many programs of three warpgroups.

    `plgpu.kernel` would do, did it take references, which `_of_keys` adds to. Lane semantics are
    asked for by name: jax 0.10 has them by default, jax 0.11 no longer.
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
            num_threads=COMPUTE + 1,
            thread_name="warpgroup",
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
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


def vector(ref, dim: int):
    """Read, to lie along that dim of a block; from any memory, hence not `optimized`."""
    return plgpu.load(ref, *_ALL, layout=WGMMA.reduce(1 - dim), optimized=False)


def along(x, shape: tuple[int, int], dim: int):
    """A vector along `dim`, repeated along the other."""
    return lax.broadcast_in_dim(x, shape, [dim])


def visible(spec: _Spec, shape, q_dim: int, first_query, first_key, q_segments, k_segments):
    """Which pairs of a block may meet; queries lie along `q_dim`, keys along the other."""
    index = lambda dim: plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=WGMMA)
    q, k = index(q_dim) + first_query, index(1 - q_dim) + first_key
    see = along(q_segments, shape, q_dim) == along(k_segments, shape, 1 - q_dim)
    if spec.causal:
        see &= k <= q
    if spec.window is not None:
        see &= k > q - spec.window
    return see


def factor_of(spec: _Spec) -> float:
    """What `capped` scores are multiplied with, to be scores in powers of two."""
    return _LOG2_E * (spec.scale if spec.soft_cap is None else spec.soft_cap)


def capped(spec: _Spec, qk):
    """Of products of queries and keys: themselves, or the tanh that caps them."""
    return qk if spec.soft_cap is None else jnp.tanh(qk * (spec.scale / spec.soft_cap))


# --- gradients ------------------------------------------------------------------------------------


def gradients(
    q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, lse_BTN, delta_BTN, dout_BTNH,
    *, config: Config | None = None,
):  # fmt: skip
    """(dq_BTNH, dk_BSKH, dv_BSKH), as `reference.attention_gradients`.

    Raises NotImplementedError as `flash_sm90.attention` does.
    """
    refuse(mask, q_BTNH, k_BSKH, v_BSKH, dout_BTNH)
    config = config or config_for(q_BTNH.shape[-1])
    (T, H), S = (q_BTNH.shape[1], q_BTNH.shape[3]), k_BSKH.shape[1]
    factor = factor_of(_Spec.of(mask, q_BTNH, k_BSKH, config.of_keys))
    dead_BTN = lse_BTN == -jnp.inf  # p is 0 there: keep inf and nan away from the products
    starts = (jnp.where(dead_BTN, 0.0, x) for x in (-_LOG2_E / factor * lse_BTN, -delta_BTN))
    operands = (q_BTNH, k_BSKH, v_BSKH, mask, *starts, dout_BTNH)
    if config.ordered:
        dq_BTNH = _of_queries(*operands, tiles=config.of_queries)
    dk_BSKH, dv_BSKH, *added = _of_keys(*operands, tiles=config.of_keys, add=not config.ordered)
    if not config.ordered:
        (sum_BTNH,) = added
        scale = _Spec.of(mask, q_BTNH, k_BSKH, config.of_keys).scale
        dq_BTNH = (scale * sum_BTNH).astype(q_BTNH.dtype)
    return dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKH[:, :S, :, :H]


class _Operands(NamedTuple):
    """Of both kernels, after the ranges and the order of their blocks."""

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


def _starts(spec: _Spec, shape, dim: int, less_lse, less_delta):
    """What the products of a block are added to, so that neither vector is held beside them."""
    start = full(shape, 0.0, WGMMA) if spec.soft_cap else along(less_lse, shape, dim)
    return plgpu.ACC.init(start), plgpu.ACC.init(along(less_delta, shape, dim))


def _pair(spec: _Spec, qk, dp, see, less_lse):
    """(p, the gradient of the scores but for the scale) of a block, float32.

    `qk` and `dp` have begun at `_starts`; `less_lse()` is what could not be added there.
    """
    if spec.soft_cap is None:
        s, slope = qk, 1.0
    else:
        t = capped(spec, qk)
        s, slope = t + less_lse(), 1.0 - t * t
    if see is not None:
        s = jnp.where(see, s, _HIDDEN)
    p = jnp.exp2(s * factor_of(spec))
    return p, p * dp * slope


# --- the gradients of keys and values, and of the queries by the way ------------------------------


def _of_keys(
    q_BTNH, k_BSKH, v_BSKH, mask, less_lse_BTN, less_delta_BTN, dout_BTNH,
    *, tiles: Tiles, add: bool,
):  # fmt: skip
    """(dk_BSKH, dv_BSKH), and with `add` the float32 sum over keys that dq_BTNH is the scale of."""
    spec, filled = _Spec.of(mask, q_BTNH, k_BSKH, tiles), _filled(mask, q_BTNH, k_BSKH)
    ranges_BJ4 = _ranges(spec, filled, tiles, of_keys=True)
    of_out = less_lse_BTN, less_delta_BTN, dout_BTNH
    operands = _Operands.of(filled, tiles, q_BTNH, k_BSKH, v_BSKH, *of_out)
    (B, _, K, H), dtype = operands.k_BSKH.shape, k_BSKH.dtype
    if (tiles.queries, tiles.keys) not in {64: [(128, 128)], 256: [(64, 64)]}.get(H, [(64, 128)]):
        raise ValueError(
            f"Config.of_keys is {tiles}, which head_dim {q_BTNH.shape[3]} cannot have; "
            f"{CONFIGS[H].of_keys} would be right"
        )
    R, C = tiles.queries, tiles.keys
    scratch = dict(
        k_smem=matrix(C, H, dtype=dtype),  # then its gradient
        v_smem=matrix(C, H, dtype=dtype),  # likewise
        q_smem=matrix(tiles.stages, R, H, dtype=dtype),
        dout_smem=matrix(tiles.value_stages, R, H, dtype=dtype),
        q_segments_smem=plgpu.SMEM((tiles.stages, R), jnp.int32),
        less_lse_smem=plgpu.SMEM((tiles.stages, R), jnp.float32),
        less_delta_smem=plgpu.SMEM((tiles.stages, R), jnp.float32),
        k_ready=barriers(2),
        q_ready=barriers(4, tiles.stages),
        q_read=barriers(COMPUTE, tiles.stages),
        dout_ready=barriers(1, tiles.value_stages),
        dout_read=barriers(COMPUTE, tiles.value_stages),
        both=barriers(COMPUTE),
    )
    if add:
        scratch |= dict(
            # Of both warpgroups, in turn one of two; where they have the same keys, each its own.
            ds_smem=matrix(2, C, R, dtype=dtype),
            dq_smem=matrix(COMPUTE, ROWS, 64, dtype=jnp.float32),
        )
    sums = [jax.new_ref(jnp.zeros(operands.q_BTNH.shape, jnp.float32))] if add else []
    dk_BSKH, dv_BSKH = launch(
        functools.partial(_of_keys_kernel, spec=spec, add=add),
        "flash_sm90_of_keys",
        out_type=(jax.ShapeDtypeStruct(operands.k_BSKH.shape, dtype),) * 2,
        scratch=scratch,
        programs=B * K * ranges_BJ4.shape[1],
    )(ranges_BJ4, longest_first(ranges_BJ4), *operands, *sums)
    return dk_BSKH, dv_BSKH, *(ref[...] for ref in sums)


def _of_keys_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, less_lse, less_delta, dout, *outputs,
    spec: _Spec, add: bool, k_smem, v_smem, q_smem, dout_smem, q_segments_smem,
    less_lse_smem, less_delta_smem, k_ready, q_ready, q_read, dout_ready, dout_read, both,
    ds_smem=None, dq_smem=None,
):  # fmt: skip
    *sums, dk, dv = outputs
    tiles, (_, _, K, H) = spec.tiles, k.shape
    R, C = tiles.queries, tiles.keys
    wg = lax.axis_index("warpgroup")
    b, j, h, found = place_of(lax.axis_index("program"), order, ranges, K)
    first, end = found[0], found[3]
    keys = pl.ds(j * C, C)
    step_of = lambda g, i: g * (end - first) + i - first

    @pl.when(wg == COMPUTE)
    def _copy():
        plgpu.set_max_registers(24, action="decrease")
        plgpu.copy_gmem_to_smem(k.at[b, keys, h], k_smem, k_ready)
        plgpu.copy_gmem_to_smem(v.at[b, keys, h], v_smem, k_ready)

        def of_head(g, _):
            n = h * spec.group + g

            def of_block(i, _):
                step, rows = step_of(g, i), pl.ds(i * R, R)
                copy_into(
                    step, q_read, q_ready, (q.at[b, rows, n], q_smem),
                    (less_lse.at[b, n, rows], less_lse_smem),
                    (less_delta.at[b, n, rows], less_delta_smem),
                    (q_segments.at[b, rows], q_segments_smem),
                )  # fmt: skip
                copy_into(step, dout_read, dout_ready, (dout.at[b, rows, n], dout_smem))

            lax.fori_loop(first, end, of_block, None)

        lax.fori_loop(0, spec.group, of_head, None)

    @pl.when(wg < COMPUTE)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        # Of the program's keys, and of the columns of their gradients, those of this warpgroup.
        shared = C == ROWS
        own = pl.ds(0, ROWS) if shared else pl.ds(wg * ROWS, ROWS)
        width = H // COMPUTE if shared else H
        columns = pl.ds(wg * width, width) if shared else pl.ds(0, width)
        # Of the gradient of the queries: rows or columns, 64 x 64 at a time.
        parts = (
            [(0, wg * (H // COMPUTE) + x) for x in range(0, H // COMPUTE, 64)]
            if R == ROWS
            else [(wg * ROWS, x) for x in range(0, H, 64)]
        )
        shape = (ROWS, R)
        first_key = j * C + (0 if shared else wg * ROWS)
        k_segments_C = vector(k_segments.at[b, pl.ds(first_key, ROWS)], 0)
        plgpu.barrier_wait(k_ready)

        def meet():
            plgpu.barrier_arrive(both)
            plgpu.barrier_wait(both)

        def of_head(g, state):
            n = h * spec.group + g

            def body(i, state, masked):
                step = step_of(g, i)
                slot, late = slot_of(step, tiles.stages), slot_of(step, tiles.value_stages)
                plgpu.barrier_wait(q_ready.at[slot])

                def products(refs):
                    qk_ref, dp_ref = refs
                    plgpu.wgmma(qk_ref, k_smem.at[own], q_smem.at[slot].transpose((1, 0)))
                    plgpu.barrier_wait(dout_ready.at[late])
                    plgpu.wgmma(dp_ref, v_smem.at[own], dout_smem.at[late].transpose((1, 0)))

                starts = (vector(x.at[slot], 1) for x in (less_lse_smem, less_delta_smem))
                qk_CR, dp_CR = pl.run_state(products)(_starts(spec, shape, 1, *starts))
                see_CR = None
                if masked:
                    q_segments_R = vector(q_segments_smem.at[slot], 1)
                    sides = i * R + offset_B[b], first_key, q_segments_R, k_segments_C
                    see_CR = visible(spec, shape, 1, *sides)
                less_lse_CR = lambda: along(vector(less_lse_smem.at[slot], 1), shape, 1)
                p_CR, ds_CR = _pair(spec, qk_CR, dp_CR, see_CR, less_lse_CR)
                p_CR, ds_CR = p_CR.astype(q.dtype), ds_CR.astype(q.dtype)
                if add:
                    mine = wg if shared else slot_of(step, 2)
                    ds_smem.at[mine, own][...] = ds_CR
                    plgpu.commit_smem()
                    if not shared:
                        plgpu.barrier_arrive(both)

                def accumulate(refs):
                    dk_ref, dv_ref = refs
                    plgpu.wgmma(dv_ref, p_CR, dout_smem.at[late, :, columns])
                    plgpu.wgmma(dk_ref, ds_CR, q_smem.at[slot, :, columns])
                    if add and not shared:
                        plgpu.barrier_wait(both)
                    if add:
                        for row, column in parts:
                            part(row, column)
                    else:
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_read.at[slot])
                    plgpu.barrier_arrive(dout_read.at[late])

                def part(row, column):
                    rows = pl.ds(row, ROWS) if R > ROWS else pl.ds(0, ROWS)
                    there = pl.ds(column, 64)

                    def product(dq_ref):
                        ds_RC = ds_smem.at[mine, :, rows].transpose((1, 0))
                        plgpu.wgmma(dq_ref, ds_RC, k_smem.at[:, there])
                        return dq_ref[...]

                    dq_RH = pl.run_scoped(product, plgpu.ACC((ROWS, 64), jnp.float32))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    dq_smem.at[wg][...] = dq_RH
                    plgpu.commit_smem()
                    to = sums[0].at[b, pl.ds(i * R + row, ROWS), n, there]
                    plgpu.copy_smem_to_gmem(dq_smem.at[wg], to, reduction_op="add")

                return pl.run_state(accumulate)(jax.tree.map(plgpu.ACC.init, state))

            return _over(found, body, state)

        zeros = full((ROWS, width), 0.0, WGMMA)
        dk_CH, dv_CH = lax.fori_loop(0, spec.group, of_head, (zeros, zeros))
        meet()  # the other one, too, has read all keys and values
        k_smem.at[own, columns][...] = (spec.scale * dk_CH).astype(k.dtype)
        v_smem.at[own, columns][...] = dv_CH.astype(v.dtype)
        plgpu.commit_smem()
        meet()  # a copy takes whole buffers

        @pl.when(wg == 0)
        def _dk_leaves():
            plgpu.copy_smem_to_gmem(k_smem, dk.at[b, keys, h])

        @pl.when(wg == 1)
        def _dv_leaves():
            plgpu.copy_smem_to_gmem(v_smem, dv.at[b, keys, h])

        plgpu.wait_smem_to_gmem(0)


# --- the gradient of the queries, alone -----------------------------------------------------------


def _of_queries(
    q_BTNH, k_BSKH, v_BSKH, mask, less_lse_BTN, less_delta_BTN, dout_BTNH, *, tiles: Tiles
):  # fmt: skip
    """dq_BTNH."""
    spec, filled = _Spec.of(mask, q_BTNH, k_BSKH, tiles), _filled(mask, q_BTNH, k_BSKH)
    ranges_BI4 = _ranges(spec, filled, tiles)
    of_out = less_lse_BTN, less_delta_BTN, dout_BTNH
    operands = _Operands.of(filled, tiles, q_BTNH, k_BSKH, v_BSKH, *of_out)
    (B, _, N, H), dtype = operands.q_BTNH.shape, q_BTNH.dtype
    return launch(
        functools.partial(_of_queries_kernel, spec=spec),
        "flash_sm90_of_queries",
        out_type=jax.ShapeDtypeStruct(operands.q_BTNH.shape, dtype),
        scratch=dict(
            q_smem=matrix(COMPUTE, ROWS, H, dtype=dtype),  # then its gradient
            dout_smem=matrix(COMPUTE, ROWS, H, dtype=dtype),
            k_smem=matrix(tiles.stages, tiles.keys, H, dtype=dtype),
            v_smem=matrix(tiles.value_stages, tiles.keys, H, dtype=dtype),
            k_segments_smem=plgpu.SMEM((tiles.stages, tiles.keys), jnp.int32),
            q_ready=barriers(2, COMPUTE),
            k_ready=barriers(2, tiles.stages),
            k_read=barriers(COMPUTE, tiles.stages),
            v_ready=barriers(1, tiles.value_stages),
            v_read=barriers(COMPUTE, tiles.value_stages),
        ),
        programs=B * N * ranges_BI4.shape[1],
    )(ranges_BI4, longest_first(ranges_BI4), *operands)


def _of_queries_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, less_lse, less_delta, dout, dq,
    *, spec: _Spec, q_smem, dout_smem, k_smem, v_smem, k_segments_smem,
    q_ready, k_ready, k_read, v_ready, v_read,
):  # fmt: skip
    tiles, (_, _, N, H) = spec.tiles, q.shape
    wg = lax.axis_index("warpgroup")
    b, i, n, found = place_of(lax.axis_index("program"), order, ranges, N)
    first, end = found[0], found[3]

    @pl.when(wg == COMPUTE)
    def _copy():
        plgpu.set_max_registers(24, action="decrease")
        h = lax.div(n, jnp.int32(spec.group))

        def of_block(j, _):
            rows = pl.ds(j * tiles.keys, tiles.keys)
            copy_into(
                j - first, k_read, k_ready, (k.at[b, rows, h], k_smem),
                (k_segments.at[b, rows], k_segments_smem),
            )  # fmt: skip
            copy_into(j - first, v_read, v_ready, (v.at[b, rows, h], v_smem))

        lax.fori_loop(first, end, of_block, None)

    @pl.when(wg < COMPUTE)
    def _compute():
        plgpu.set_max_registers(240, action="increase")
        first_row = i * tiles.queries + wg * ROWS
        rows = pl.ds(first_row, ROWS)
        plgpu.copy_gmem_to_smem(q.at[b, rows, n], q_smem.at[wg], q_ready.at[wg])
        plgpu.copy_gmem_to_smem(dout.at[b, rows, n], dout_smem.at[wg], q_ready.at[wg])
        q_segments_R = vector(q_segments.at[b, rows], 0)
        less_lse_R, less_delta_R = (vector(x.at[b, n, rows], 0) for x in (less_lse, less_delta))
        plgpu.barrier_wait(q_ready.at[wg])
        shape = (ROWS, tiles.keys)

        def body(j, dq_RH, masked):
            slot = slot_of(j - first, tiles.stages)
            late = slot_of(j - first, tiles.value_stages)
            plgpu.barrier_wait(k_ready.at[slot])

            def products(refs):
                qk_ref, dp_ref = refs
                plgpu.wgmma(qk_ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                plgpu.barrier_wait(v_ready.at[late])
                plgpu.wgmma(dp_ref, dout_smem.at[wg], v_smem.at[late].transpose((1, 0)))

            starts = _starts(spec, shape, 0, less_lse_R, less_delta_R)
            qk_RC, dp_RC = pl.run_state(products)(starts)
            plgpu.barrier_arrive(v_read.at[late])
            see_RC = None
            if masked:
                sides = q_segments_R, vector(k_segments_smem.at[slot], 1)
                first_query = first_row + offset_B[b]
                see_RC = visible(spec, shape, 0, first_query, j * tiles.keys, *sides)
            _, ds_RC = _pair(spec, qk_RC, dp_RC, see_RC, lambda: along(less_lse_R, shape, 0))
            ds_RC = ds_RC.astype(k.dtype)
            dq_RH = pl.run_state(lambda ref: plgpu.wgmma(ref, ds_RC, k_smem.at[slot]))(
                plgpu.ACC.init(dq_RH)
            )
            plgpu.barrier_arrive(k_read.at[slot])
            return dq_RH

        dq_RH = _over(found, body, full((ROWS, H), 0.0, WGMMA))
        q_smem.at[wg][...] = (spec.scale * dq_RH).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)
