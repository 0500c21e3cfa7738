"""Flash attention for Blackwell: what `flash_sm100.py` gives as gradients.

One pass over the keys (five products a block, not seven). A program keeps 128 keys and goes over
the blocks of queries that read them. Scores are multiplied transposed, keys along rows, into tensor
memory: two warpgroups, with half of the queries each, make probabilities of them, which take their
place and are an operand of the product with `dout` as they stand. The gradients of the scores go to
shared memory, an operand of two products: for `dk`, and turned round, for `dq`. The latter takes
the place of the gradients of the probabilities; a third warpgroup brings it from there to float32
memory, where the copy engine adds it, in the order in which programs come to it: the last bits of
`dq` differ from run to run. A fourth warpgroup copies and starts products.

`Config.ordered` has `dq` from a kernel of its own over blocks of queries, and every run gives the
same bits. So it is at head dim 256, ordered or not: tensor memory has room for half of the columns
of `dk` and `dv`, a program each, and shared memory for 64 queries at a time.

A pair of cores could share products here too, and halve what they read of shared memory, which is
what bounds them (arXiv 2603.05451); they would have to hand each other halves of the gradients of
the scores. Not before it can be tried on a chip.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.flash_sm100_config import (
    NATIVE,
    ROWS,
    TCGEN05,
    Config,
    Tiles,
    check_columns,
    config_for,
)
from jaxreason.kernels.mask_blocks import Spec, filled_mask, over, ranges_of
from jaxreason.kernels.mosaic_gpu import (
    Operands,
    along,
    barriers,
    by_kernels,
    chances,
    copy_into,
    each_warp,
    full,
    launch,
    longest_first,
    matrix,
    place_of,
    refuse,
    slot_of,
    tensor_barriers,
    vector,
    visible,
)
from jaxreason.types import AttentionMask

OWN = 64  # queries of a warpgroup that computes, over blocks of keys
WIDTH = 128  # most columns of the gradients of keys and values that a program has


def gradients(
    q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, lse_BTN, delta_BTN, dout_BTNH,
    *, config: Config | None = None,
):  # fmt: skip
    """(dq_BTNH, dk_BSKH, dv_BSKH), as `reference.attention_gradients`.

    Raises NotImplementedError as `flash_sm100.attention` does.
    """
    refuse("flash_sm100", mask, q_BTNH, k_BSKH, v_BSKH, dout_BTNH)
    config = config or config_for(q_BTNH.shape[-1])
    operands = (q_BTNH, k_BSKH, v_BSKH, mask, lse_BTN, delta_BTN, dout_BTNH)
    return by_kernels(config, _of_keys, _of_queries, *operands)


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
    R, C = tiles.queries, tiles.keys
    compute, width = R // OWN, min(H, WIDTH)
    if add and H > width:
        raise ValueError(f"Config.of_keys.queries is {R}; it must be 64 at head_dim {H}")
    check_columns("of_keys", tiles, 2 * R + 2 * width, H)
    scratch = dict(
        # Keys and values; then, in the same place, their gradients.
        keys_smem=plgpu.RefUnion(matrix(C, H, dtype=dtype), matrix(C, width, dtype=dtype)),
        values_smem=plgpu.RefUnion(matrix(C, H, dtype=dtype), matrix(C, width, dtype=dtype)),
        q_smem=matrix(tiles.stages, R, H, dtype=dtype),
        dout_smem=matrix(tiles.value_stages, R, H, dtype=dtype),
        # Of each warpgroup's scores, the first half is the place of their probabilities, too;
        scores_tmem=plgpu.RefUnion(
            plgpu.TMEM((C, R), jnp.float32), plgpu.TMEM((C, 2 * R), dtype, packed=True)
        ),
        # of its gradients of these, that of those of the scores. Or those of queries have it all.
        slopes_tmem=plgpu.RefUnion(
            plgpu.TMEM((C, R), jnp.float32),
            plgpu.TMEM((R, width), jnp.float32)
            if add
            else plgpu.TMEM((C, 2 * R), dtype, packed=True),
        ),
        dk_tmem=plgpu.TMEM((C, width), jnp.float32),
        dv_tmem=plgpu.TMEM((C, width), jnp.float32),
        k_ready=barriers(2),
        q_ready=barriers(1, tiles.stages),
        q_read=tensor_barriers(1, tiles.stages),
        dout_ready=barriers(1, tiles.value_stages),
        dout_read=tensor_barriers(1, tiles.value_stages),
        s_ready=tensor_barriers(),
        p_ready=tensor_barriers(compute),
        p_read=tensor_barriers(),
        dp_ready=tensor_barriers(),
        ds_ready=tensor_barriers(compute),
        dp_free=tensor_barriers(),
        all_done=tensor_barriers(),
    )
    if add:
        scratch |= dict(
            ds_smem=matrix(C, R, dtype=dtype),
            dq_smem=matrix(2, R, 32, dtype=jnp.float32),
            dq_ready=tensor_barriers(),
        )
    sums = [jax.new_ref(jnp.zeros(operands.q_BTNH.shape, jnp.float32))] if add else []
    dk_BSKH, dv_BSKH = launch(
        functools.partial(_of_keys_kernel, spec=spec, add=add),
        "flash_sm100_of_keys",
        out_type=(jax.ShapeDtypeStruct(operands.k_BSKH.shape, dtype),) * 2,
        scratch=scratch,
        warpgroups=compute + (2 if add else 1),
        programs=B * K * ranges_BJ4.shape[1] * (H // width),
    )(ranges_BJ4, longest_first(ranges_BJ4), *operands, *sums)
    return dk_BSKH, dv_BSKH, *(ref[...] for ref in sums)


def _of_keys_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, less_lse, less_delta, dout, *outputs,
    spec: Spec, add: bool, keys_smem, values_smem, q_smem, dout_smem,
    scores_tmem, slopes_tmem, dk_tmem, dv_tmem, k_ready, q_ready, q_read, dout_ready, dout_read,
    s_ready, p_ready, p_read, dp_ready, ds_ready, dp_free, all_done,
    ds_smem=None, dq_smem=None, dq_ready=None,
):  # fmt: skip
    *sums, dk, dv = outputs
    tiles, (_, _, K, H) = spec.tiles, k.shape
    R, C = tiles.queries, tiles.keys
    compute, width = R // OWN, min(H, WIDTH)
    parts = H // width
    wg, program = lax.axis_index("warpgroup"), lax.axis_index("program")
    b, j, h, found = place_of(lax.div(program, jnp.int32(parts)), order, ranges, K)
    first_column = lax.rem(program, jnp.int32(parts)) * width
    first, end = found[0], found[3]
    keys = pl.ds(j * C, C)
    num_steps = spec.group * (end - first)
    step_of = lambda g, i: g * (end - first) + i - first
    (k_smem, dk_smem), (v_smem, dv_smem) = keys_smem, values_smem
    s_tmem, p_tmem = scores_tmem
    dp_tmem, other_tmem = slopes_tmem  # of dq if `add`, of ds if not
    # Of a matrix in shared memory, the columns that this program has the gradients of.
    of_part = lambda ref: ref if parts == 1 else ref.at[:, pl.ds(first_column, width)]

    def copy():
        plgpu.copy_gmem_to_smem(k.at[b, keys, h], k_smem, k_ready)
        plgpu.copy_gmem_to_smem(v.at[b, keys, h], v_smem, k_ready)

        def of_head(g, _):
            n = h * spec.group + g

            def of_block(i, _):
                step, rows = step_of(g, i), pl.ds(i * R, R)
                copy_into(step, q_read, q_ready, (q.at[b, rows, n], q_smem))
                copy_into(step, dout_read, dout_ready, (dout.at[b, rows, n], dout_smem))

            lax.fori_loop(first, end, of_block, None)

        lax.fori_loop(0, spec.group, of_head, None)

    def multiply():
        def score(step):
            slot = slot_of(step, tiles.stages)
            plgpu.barrier_wait(q_ready.at[slot])
            queries = q_smem.at[slot].transpose((1, 0))
            plgpu.tcgen05_mma(s_tmem, k_smem, queries, s_ready, accumulate=False)

        def slope(step):
            late = slot_of(step, tiles.value_stages)
            plgpu.barrier_wait(dout_ready.at[late])
            douts = dout_smem.at[late].transpose((1, 0))
            plgpu.tcgen05_mma(dp_tmem, v_smem, douts, dp_ready, accumulate=False)

        def accumulate(sum_tmem, a_tmem, smem, step):
            """Over the queries of one warpgroup after another."""
            for who in range(compute):
                a = a_tmem.at[:, pl.ds(who * 2 * OWN, OWN)]
                rows = of_part(smem.at[pl.ds(who * OWN, OWN)])
                plgpu.tcgen05_mma(sum_tmem, a, rows, accumulate=True if who else step > 0)

        def of_step(step, _):
            slot, late = slot_of(step, tiles.stages), slot_of(step, tiles.value_stages)
            more = step + 1 < num_steps
            plgpu.barrier_wait(p_ready)
            accumulate(dv_tmem, p_tmem, dout_smem.at[late], step)
            plgpu.tcgen05_commit_arrive(dout_read.at[late])
            plgpu.tcgen05_commit_arrive(p_read)

            @pl.when(more)
            def _next_scores():
                plgpu.barrier_wait(p_read)  # whose place theirs is
                score(step + 1)

            plgpu.barrier_wait(ds_ready)
            if add:
                queries = of_part(q_smem.at[slot])
                plgpu.tcgen05_mma(dk_tmem, ds_smem, queries, accumulate=step > 0)
                turned = ds_smem.transpose((1, 0))
                plgpu.tcgen05_mma(other_tmem, turned, k_smem, dq_ready, accumulate=False)
            else:
                accumulate(dk_tmem, other_tmem, q_smem.at[slot], step)
                plgpu.tcgen05_commit_arrive(dp_free)
            plgpu.tcgen05_commit_arrive(q_read.at[slot])

            @pl.when(more)
            def _next_slopes():
                plgpu.barrier_wait(dp_free)
                slope(step + 1)

        @pl.when(num_steps > 0)
        def _multiply():
            plgpu.barrier_wait(k_ready)
            score(0)
            slope(0)
            lax.fori_loop(0, num_steps, of_step, None)
            plgpu.tcgen05_commit_arrive(all_done)

    @pl.when(wg == compute)
    def _help():
        if compute == 2:
            plgpu.set_max_registers(56 if add else 72, action="decrease")
        pl.when(num_steps > 0)(lambda: each_warp(copy, multiply))

    if add:

        @pl.when(wg == compute + 1)
        def _add():
            plgpu.set_max_registers(88, action="decrease")

            def of_head(g, _):
                n = h * spec.group + g

                def of_block(i, _):
                    plgpu.barrier_wait(dq_ready)
                    for part in range(H // 32):
                        there = pl.ds(part * 32, 32)
                        dq_RH = plgpu.async_load_tmem(other_tmem.at[:, there], layout=TCGEN05)
                        if part == H // 32 - 1:
                            plgpu.wait_load_tmem()
                            plgpu.barrier_arrive(dp_free)
                        # Of two buffers, the last but one has left.
                        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                        dq_smem.at[part % 2][...] = dq_RH
                        plgpu.commit_smem()
                        to = sums[0].at[b, pl.ds(i * R, R), n, there]
                        plgpu.copy_smem_to_gmem(dq_smem.at[part % 2], to, reduction_op="add")

                lax.fori_loop(first, end, of_block, None)

            lax.fori_loop(0, spec.group, of_head, None)
            plgpu.wait_smem_to_gmem(0)

    @pl.when(wg < compute)
    def _compute():
        if compute == 2:
            plgpu.set_max_registers(184 if add else 216, action="increase")
        shape = (C, OWN)
        columns, place = pl.ds(wg * OWN, OWN), pl.ds(wg * 2 * OWN, OWN)
        k_segments_C = vector(k_segments.at[b, keys], 0, TCGEN05)

        def of_head(g, _):
            n = h * spec.group + g

            def body(i, _, masked):
                first_row = i * R + wg * OWN
                rows = pl.ds(first_row, OWN)
                starts = (vector(x.at[b, n, rows], 1, TCGEN05) for x in (less_lse, less_delta))
                less_lse_CR, less_delta_CR = (along(x, shape, 1, TCGEN05) for x in starts)
                plgpu.barrier_wait(s_ready)
                qk_CR = plgpu.async_load_tmem(s_tmem.at[:, columns], layout=TCGEN05)
                plgpu.wait_load_tmem()  # probabilities come to the same place
                if spec.soft_cap is None:
                    qk_CR += less_lse_CR
                see_CR = None
                if masked:
                    q_segments_R = vector(q_segments.at[b, rows], 1, TCGEN05)
                    sides = first_row + offset_B[b], j * C, q_segments_R, k_segments_C
                    see_CR = visible(spec, shape, 1, *sides, TCGEN05)
                p_CR, slope_CR = chances(spec, qk_CR, see_CR, lambda: less_lse_CR)
                plgpu.async_store_tmem(p_tmem.at[:, place], p_CR.astype(q.dtype))
                plgpu.commit_tmem()
                plgpu.barrier_arrive(p_ready)

                plgpu.barrier_wait(dp_ready)
                dp_CR = plgpu.async_load_tmem(dp_tmem.at[:, columns], layout=TCGEN05)
                plgpu.wait_load_tmem()  # other gradients come to the same place
                ds_CR = (p_CR * (dp_CR + less_delta_CR) * slope_CR).astype(q.dtype)
                if add:
                    # Whose products with the last ones were made before these `dp` began.
                    ds_smem.at[:, columns][...] = ds_CR
                    plgpu.commit_smem()
                else:
                    plgpu.async_store_tmem(other_tmem.at[:, place], ds_CR)
                    plgpu.commit_tmem()
                plgpu.barrier_arrive(ds_ready)

            over(found, body, None)

        lax.fori_loop(0, spec.group, of_head, None)

        def leave(sum_tmem, smem, to, scale):
            """Keys and values have been read: their gradients leave from their place."""

            @pl.when(num_steps > 0)
            def _sums():
                for start in range(0, width, 64):
                    there = pl.ds(start, 64)
                    x_CH = plgpu.async_load_tmem(sum_tmem.at[:, there], layout=TCGEN05)
                    smem.at[:, there][...] = (scale * x_CH).astype(smem.dtype)
                plgpu.wait_load_tmem()

            @pl.when(num_steps == 0)
            def _nothing():
                for start in range(0, width, 64):
                    zeros_CH = full((C, 64), 0.0, TCGEN05).astype(smem.dtype)
                    smem.at[:, pl.ds(start, 64)][...] = zeros_CH

            plgpu.commit_smem()
            there = pl.ds(first_column, width)
            plgpu.copy_smem_to_gmem(smem, to.at[b, keys, h, there])

        pl.when(num_steps > 0)(lambda: plgpu.barrier_wait(all_done))
        pl.when(wg == 0)(lambda: leave(dk_tmem, dk_smem, dk, spec.scale))
        pl.when(wg == compute - 1)(lambda: leave(dv_tmem, dv_smem, dv, 1.0))
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
    C, compute = tiles.keys, tiles.queries // ROWS
    check_columns("of_queries", tiles, compute * (2 * C + H), H)
    return launch(
        functools.partial(_of_queries_kernel, spec=spec),
        "flash_sm100_of_queries",
        out_type=jax.ShapeDtypeStruct(operands.q_BTNH.shape, dtype),
        scratch=dict(
            q_smem=matrix(compute, ROWS, H, dtype=dtype),  # then its gradient
            dout_smem=matrix(compute, ROWS, H, dtype=dtype),
            k_smem=matrix(tiles.stages, C, H, dtype=dtype),
            v_smem=matrix(tiles.value_stages, C, H, dtype=dtype),
            s_tmem=plgpu.TMEM((ROWS, compute * C), jnp.float32),
            # The gradients of the probabilities; in the first half of each, then, of the scores.
            slopes_tmem=plgpu.RefUnion(
                plgpu.TMEM((ROWS, compute * C), jnp.float32),
                plgpu.TMEM((ROWS, compute * 2 * C), dtype, packed=True),
            ),
            dq_tmem=plgpu.TMEM((ROWS, compute * H), jnp.float32),
            q_ready=barriers(2, compute),
            k_ready=barriers(1, tiles.stages),
            k_read=tensor_barriers(1, tiles.stages),
            v_ready=barriers(1, tiles.value_stages),
            v_read=tensor_barriers(1, tiles.value_stages),
            s_ready=tensor_barriers(1, compute),
            dp_ready=tensor_barriers(1, compute),
            ds_ready=tensor_barriers(1, compute),
            ds_read=tensor_barriers(1, compute),
            all_done=tensor_barriers(1, compute),
        ),
        warpgroups=compute + 1,
        programs=B * N * ranges_BI4.shape[1],
    )(ranges_BI4, longest_first(ranges_BI4), *operands)


def _of_queries_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, less_lse, less_delta, dout, dq,
    *, spec: Spec, q_smem, dout_smem, k_smem, v_smem, s_tmem, slopes_tmem, dq_tmem,
    q_ready, k_ready, k_read, v_ready, v_read, s_ready, dp_ready, ds_ready, ds_read, all_done,
):  # fmt: skip
    tiles, (_, _, N, H) = spec.tiles, q.shape
    C, compute = tiles.keys, tiles.queries // ROWS
    wg = lax.axis_index("warpgroup")
    b, i, n, found = place_of(lax.axis_index("program"), order, ranges, N)
    first, end = found[0], found[3]
    rows_of = lambda who: pl.ds(i * tiles.queries + who * ROWS, ROWS)
    dp_tmem, ds_tmem = slopes_tmem
    of_block = lambda ref, who: ref.at[:, pl.ds(who * C, C)]
    of_slopes = lambda who: ds_tmem.at[:, pl.ds(who * 2 * C, C)]
    sum_of = lambda who, start, size: dq_tmem.at[:, pl.ds(who * H + start, size)]

    def copy():
        for who in range(compute):
            for x, smem in ((q, q_smem), (dout, dout_smem)):
                plgpu.copy_gmem_to_smem(x.at[b, rows_of(who), n], smem.at[who], q_ready.at[who])
        h = lax.div(n, jnp.int32(spec.group))

        def copy_block(j, _):
            rows = pl.ds(j * C, C)
            copy_into(j - first, k_read, k_ready, (k.at[b, rows, h], k_smem))
            copy_into(j - first, v_read, v_ready, (v.at[b, rows, h], v_smem))

        lax.fori_loop(first, end, copy_block, None)

    def multiply():
        def score(who, step):
            slot = slot_of(step, tiles.stages)
            if who == 0:
                plgpu.barrier_wait(k_ready.at[slot])
            keys = k_smem.at[slot].transpose((1, 0))
            plgpu.tcgen05_mma(
                of_block(s_tmem, who), q_smem.at[who], keys, s_ready.at[who], accumulate=False
            )

        def slope(who, step):
            late = slot_of(step, tiles.value_stages)
            if who == 0:
                plgpu.barrier_wait(v_ready.at[late])
            values = v_smem.at[late].transpose((1, 0))
            plgpu.tcgen05_mma(
                of_block(dp_tmem, who), dout_smem.at[who], values, dp_ready.at[who],
                accumulate=False,
            )  # fmt: skip
            if who == compute - 1:
                plgpu.tcgen05_commit_arrive(v_read.at[late])

        def of_step(step, _):
            slot, more = slot_of(step, tiles.stages), step + 1 < end - first
            for who in range(compute):
                plgpu.barrier_wait(ds_ready.at[who])
                pl.when(more)(lambda: score(who, step + 1))
                plgpu.tcgen05_mma(
                    sum_of(who, 0, H), of_slopes(who), k_smem.at[slot], ds_read.at[who],
                    accumulate=step > 0,
                )  # fmt: skip
                if who == compute - 1:
                    plgpu.tcgen05_commit_arrive(k_read.at[slot])

                @pl.when(more)
                def _next_slopes():
                    plgpu.barrier_wait(ds_read.at[who])  # whose place theirs is
                    slope(who, step + 1)

        for who in range(compute):
            plgpu.barrier_wait(q_ready.at[who])
            score(who, 0)
            slope(who, 0)
        lax.fori_loop(0, end - first, of_step, None)
        for who in range(compute):
            plgpu.tcgen05_commit_arrive(all_done.at[who])

    @pl.when(wg == compute)
    def _help():
        if compute == 2:
            plgpu.set_max_registers(40, action="decrease")
        pl.when(first < end)(lambda: each_warp(copy, multiply))

    @pl.when(wg < compute)
    def _compute():
        if compute == 2:
            plgpu.set_max_registers(232, action="increase")
        rows, first_row = rows_of(wg), i * tiles.queries + wg * ROWS
        shape = (ROWS, C)
        q_segments_R = vector(q_segments.at[b, rows], 0, NATIVE)
        starts = (vector(x.at[b, n, rows], 0, NATIVE) for x in (less_lse, less_delta))
        less_lse_RC, less_delta_RC = (along(x, shape, 0, NATIVE) for x in starts)

        def body(j, _, masked):
            plgpu.barrier_wait(s_ready.at[wg])
            qk_RC = plgpu.async_load_tmem(of_block(s_tmem, wg), layout=NATIVE)
            if spec.soft_cap is None:
                qk_RC += less_lse_RC
            see_RC = None
            if masked:
                k_segments_C = vector(k_segments.at[b, pl.ds(j * C, C)], 1, NATIVE)
                sides = first_row + offset_B[b], j * C, q_segments_R, k_segments_C
                see_RC = visible(spec, shape, 0, *sides, NATIVE)
            p_RC, slope_RC = chances(spec, qk_RC, see_RC, lambda: less_lse_RC)
            plgpu.barrier_wait(dp_ready.at[wg])
            dp_RC = plgpu.async_load_tmem(of_block(dp_tmem, wg), layout=NATIVE)
            plgpu.wait_load_tmem()  # other gradients come to the same place
            ds_RC = p_RC * (dp_RC + less_delta_RC) * slope_RC
            plgpu.async_store_tmem(of_slopes(wg), ds_RC.astype(k.dtype))
            plgpu.commit_tmem()
            plgpu.barrier_arrive(ds_ready.at[wg])

        over(found, body, None)

        @pl.when(first < end)
        def _sums():
            plgpu.barrier_wait(all_done.at[wg])
            for start in range(0, H, 64):
                dq_RH = plgpu.async_load_tmem(sum_of(wg, start, 64), layout=TCGEN05)
                there = q_smem.at[wg, :, pl.ds(start, 64)]
                there[...] = (spec.scale * dq_RH).astype(dq.dtype)
            plgpu.wait_load_tmem()

        @pl.when(first == end)
        def _nothing():
            for start in range(0, H, 64):
                zeros_RH = full((ROWS, 64), 0.0, TCGEN05).astype(dq.dtype)
                q_smem.at[wg, :, pl.ds(start, 64)][...] = zeros_RH

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_smem.at[wg], dq.at[b, rows, n])
        plgpu.wait_smem_to_gmem(0)
