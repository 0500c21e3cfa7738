"""Flash attention for Hopper: what `flash_sm90.py` gives as gradients.

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

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.flash_sm90_config import (
    COMPUTE,
    CONFIGS,
    ROWS,
    WGMMA,
    Config,
    Tiles,
    config_for,
)
from jaxreason.kernels.mask_blocks import Spec, filled_mask, over, ranges_of
from jaxreason.kernels.mosaic_gpu import (
    Operands,
    along,
    barriers,
    by_kernels,
    copy_into,
    full,
    launch,
    longest_first,
    matrix,
    pair,
    place_of,
    refuse,
    slot_of,
    vector,
    visible,
)
from jaxreason.types import AttentionMask


def gradients(
    q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, lse_BTN, delta_BTN, dout_BTNH,
    *, config: Config | None = None,
):  # fmt: skip
    """(dq_BTNH, dk_BSKH, dv_BSKH), as `reference.attention_gradients`.

    Raises NotImplementedError as `flash_sm90.attention` does.
    """
    refuse("flash_sm90", mask, q_BTNH, k_BSKH, v_BSKH, dout_BTNH)
    config = config or config_for(q_BTNH.shape[-1])
    operands = (q_BTNH, k_BSKH, v_BSKH, mask, lse_BTN, delta_BTN, dout_BTNH)
    return by_kernels(config, _of_keys, _of_queries, *operands)


def _starts(spec: Spec, shape, dim: int, less_lse, less_delta):
    """What the products of a block are added to, so that neither vector is held beside them."""
    start = full(shape, 0.0, WGMMA) if spec.soft_cap else along(less_lse, shape, dim, WGMMA)
    return plgpu.ACC.init(start), plgpu.ACC.init(along(less_delta, shape, dim, WGMMA))


# --- the gradients of keys and values, and of the queries by the way ------------------------------


def _of_keys(
    q_BTNH, k_BSKH, v_BSKH, mask, less_lse_BTN, less_delta_BTN, dout_BTNH,
    *, tiles: Tiles, add: bool,
):  # fmt: skip
    """(dk_BSKH, dv_BSKH), and with `add` the float32 sum over keys that dq_BTNH is the scale of."""
    spec, filled = Spec.of(mask, q_BTNH, k_BSKH, tiles), filled_mask(mask, q_BTNH, k_BSKH)
    ranges_BJ4 = ranges_of(spec, filled, tiles, of_keys=True)
    of_out = less_lse_BTN, less_delta_BTN, dout_BTNH
    operands = Operands.of(filled, tiles, q_BTNH, k_BSKH, v_BSKH, *of_out)
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
        warpgroups=COMPUTE + 1,
        programs=B * K * ranges_BJ4.shape[1],
    )(ranges_BJ4, longest_first(ranges_BJ4), *operands, *sums)
    return dk_BSKH, dv_BSKH, *(ref[...] for ref in sums)


def _of_keys_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, less_lse, less_delta, dout, *outputs,
    spec: Spec, add: bool, k_smem, v_smem, q_smem, dout_smem, q_segments_smem,
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
        k_segments_C = vector(k_segments.at[b, pl.ds(first_key, ROWS)], 0, WGMMA)
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

                starts = (vector(x.at[slot], 1, WGMMA) for x in (less_lse_smem, less_delta_smem))
                qk_CR, dp_CR = pl.run_state(products)(_starts(spec, shape, 1, *starts))
                see_CR = None
                if masked:
                    q_segments_R = vector(q_segments_smem.at[slot], 1, WGMMA)
                    sides = i * R + offset_B[b], first_key, q_segments_R, k_segments_C
                    see_CR = visible(spec, shape, 1, *sides, WGMMA)
                less_lse_CR = lambda: along(
                    vector(less_lse_smem.at[slot], 1, WGMMA), shape, 1, WGMMA
                )
                p_CR, ds_CR = pair(spec, qk_CR, dp_CR, see_CR, less_lse_CR)
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

            return over(found, body, state)

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
    spec, filled = Spec.of(mask, q_BTNH, k_BSKH, tiles), filled_mask(mask, q_BTNH, k_BSKH)
    ranges_BI4 = ranges_of(spec, filled, tiles)
    of_out = less_lse_BTN, less_delta_BTN, dout_BTNH
    operands = Operands.of(filled, tiles, q_BTNH, k_BSKH, v_BSKH, *of_out)
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
        warpgroups=COMPUTE + 1,
        programs=B * N * ranges_BI4.shape[1],
    )(ranges_BI4, longest_first(ranges_BI4), *operands)


def _of_queries_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, less_lse, less_delta, dout, dq,
    *, spec: Spec, q_smem, dout_smem, k_smem, v_smem, k_segments_smem,
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
        q_segments_R = vector(q_segments.at[b, rows], 0, WGMMA)
        less_lse_R, less_delta_R = (
            vector(x.at[b, n, rows], 0, WGMMA) for x in (less_lse, less_delta)
        )
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
                sides = q_segments_R, vector(k_segments_smem.at[slot], 1, WGMMA)
                first_query = first_row + offset_B[b]
                see_RC = visible(spec, shape, 0, first_query, j * tiles.keys, *sides, WGMMA)
            _, ds_RC = pair(spec, qk_RC, dp_RC, see_RC, lambda: along(less_lse_R, shape, 0, WGMMA))
            ds_RC = ds_RC.astype(k.dtype)
            dq_RH = pl.run_state(lambda ref: plgpu.wgmma(ref, ds_RC, k_smem.at[slot]))(
                plgpu.ACC.init(dq_RH)
            )
            plgpu.barrier_arrive(k_read.at[slot])
            return dq_RH

        dq_RH = over(found, body, full((ROWS, H), 0.0, WGMMA))
        q_smem.at[wg][...] = (spec.scale * dq_RH).astype(dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)
