"""Flash attention for Blackwell (sm_100a) in Pallas Mosaic GPU, forward and backward.

The maths of `flash.py`; `mask_blocks.py` says which blocks meet. The schedule is for Blackwell's
asynchronous units, after FlashAttention-4 (arXiv 2603.05451): products go from shared memory to
tensor memory, and are made while nobody waits for them. A program has two warpgroups that take
exponentials, of 128 queries each, and a third whose warps only copy or start products. While one
warpgroup is at its exponentials, the tensor cores multiply for the other. Probabilities take the
place of the scores that they are of, in tensor memory, where they are an operand as they stand.
At head dim 256 there is no room for the outputs of 256 queries: one warpgroup has 128, and the next
scores are multiplied ahead of time into a second buffer.

A pair of cores could share each product (`collective_axis`), and read half as many keys and values
each. It does not: 256 queries already read them once, and barriers across a cluster are one more
thing that cannot be tried without the chip.

Programs stay on their core and take one block of queries of one head after another, those that
read most first, in an order that is data too: packed rows are balanced as causal ones are.

The backward pass is in `flash_sm100_backward.py`. Both are compiled for the chip without one, and
their schedule is simulated (tests/test_hardware_free_sm100.py); neither has run on one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.differentiable import differentiable
from jaxreason.kernels.flash_sm100_backward import gradients
from jaxreason.kernels.flash_sm100_config import (
    COMPUTE_CAPABILITY,
    CONFIGS,
    NATIVE,
    ROWS,
    TCGEN05,
    Config,
    Tiles,
    check_columns,
    config_for,
)
from jaxreason.kernels.mask_blocks import FLOOR, HIDDEN, LOG2_E, Spec, filled_mask, over, ranges_of
from jaxreason.kernels.mosaic_gpu import (
    Sides,
    along,
    barriers,
    capped,
    copy_into,
    each_warp,
    factor_of,
    full,
    launch,
    longest_first,
    matrix,
    place_of,
    refuse,
    share,
    slot_of,
    tensor_barriers,
    vector,
    visible,
    whole,
)
from jaxreason.types import AttentionMask

__all__ = [
    "COMPUTE_CAPABILITY",
    "CONFIGS",
    "Config",
    "Tiles",
    "attention",
    "config_for",
    "gradients",
]


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    *,
    config: Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(out_BTNH of q's dtype, lse_BTN float32), as `reference.attention`, differentiable.

    All of the mask is honoured. Not under `vmap`: jax has no rule for such kernels.

    Raises NotImplementedError for dtypes other than bfloat16 or float16, for a head dim above 256
    and for a scale that is not positive.
    """
    refuse("flash_sm100", mask, q_BTNH, k_BSKH, v_BSKH)
    config = config or config_for(q_BTNH.shape[-1])
    of = functools.partial
    run = differentiable(of(_forward, config=config), of(gradients, config=config))
    return run(q_BTNH, k_BSKH, v_BSKH, mask)


def _forward(q_BTNH, k_BSKH, v_BSKH, mask: AttentionMask, *, config: Config):
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    tiles = config.forward
    spec, filled = Spec.of(mask, q_BTNH, k_BSKH, tiles), filled_mask(mask, q_BTNH, k_BSKH)
    sides, ranges_BI4 = Sides.of(filled, tiles), ranges_of(spec, filled, tiles)
    q_BTNH = whole(q_BTNH, tiles.queries)
    k_BSKH, v_BSKH = (whole(x, tiles.keys) for x in (k_BSKH, v_BSKH))
    (B, _, N, padded_H), dtype = q_BTNH.shape, q_BTNH.dtype
    compute = tiles.queries // ROWS
    scores = 2  # buffers of scores, in all
    check_columns("forward", tiles, scores * tiles.keys + compute * padded_H, H)
    out_BTNH, lse_BNT = launch(
        functools.partial(_forward_kernel, spec=spec),
        "flash_sm100_forward",
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
            jax.ShapeDtypeStruct((B, N, sides.q_segments_BT.shape[1]), jnp.float32),
        ),
        scratch=dict(
            q_smem=matrix(compute, ROWS, padded_H, dtype=dtype),
            k_smem=matrix(tiles.stages, tiles.keys, padded_H, dtype=dtype),
            v_smem=matrix(tiles.value_stages, tiles.keys, padded_H, dtype=dtype),
            out_smem=matrix(compute, ROWS, 64, dtype=dtype),
            inverse_smem=plgpu.SMEM((compute, ROWS), jnp.float32),
            # Of each buffer of scores, the first half is that of their probabilities, too.
            scores_tmem=plgpu.RefUnion(
                plgpu.TMEM((ROWS, scores * tiles.keys), jnp.float32),
                plgpu.TMEM((ROWS, 2 * scores * tiles.keys), dtype, packed=True),
            ),
            out_tmem=plgpu.TMEM((ROWS, compute * padded_H), jnp.float32),
            q_ready=barriers(1, compute),
            q_read=tensor_barriers(1, compute),
            k_ready=barriers(1, tiles.stages),
            k_read=tensor_barriers(1, tiles.stages),
            v_ready=barriers(1, tiles.value_stages),
            v_read=tensor_barriers(1, tiles.value_stages),
            s_ready=tensor_barriers(1, scores),
            p_ready=tensor_barriers(1, compute),
            out_ready=tensor_barriers(1, compute),
        ),
        warpgroups=compute + 1,
        programs=min(config.programs, B * N * ranges_BI4.shape[1]),
    )(ranges_BI4, longest_first(ranges_BI4), *sides, q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH[:, :T, :, :H], jnp.swapaxes(lse_BNT[..., :T], 1, 2)


def _forward_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, out, lse, *, spec: Spec,
    q_smem, k_smem, v_smem, out_smem, inverse_smem, scores_tmem, out_tmem,
    q_ready, q_read, k_ready, k_read, v_ready, v_read, s_ready, p_ready, out_ready,
):  # fmt: skip
    tiles, (_, _, N, H) = spec.tiles, q.shape
    C, compute = tiles.keys, tiles.queries // ROWS
    ahead = compute == 1  # scores of the next block are multiplied before this one's output
    wg = lax.axis_index("warpgroup")
    work = ranges.shape[0] * ranges.shape[1] * N
    num_items, item_of = share(lax.axis_index("program"), lax.axis_size("program"), work)
    place = lambda r: place_of(item_of(r), order, ranges, N)
    s_tmem, p_tmem = scores_tmem

    # Steps count the blocks of keys of all items, turns those items that have any: so buffers and
    # barriers go on from one item to the next.
    buffer_of = lambda who, step: slot_of(step, 2) if ahead else who
    scores = lambda buffer: s_tmem.at[:, pl.ds(buffer * C, C)]
    chances = lambda buffer: p_tmem.at[:, pl.ds(buffer * 2 * C, C)]
    output = lambda who, start, size: out_tmem.at[:, pl.ds(who * H + start, size)]

    def copy_queries():
        def of_item(r, turn):
            b, i, n, (first, _, _, end) = place(r)

            @pl.when(first < end)
            def _copy():
                for who in range(compute):
                    pl.when(turn > 0)(lambda: plgpu.barrier_wait(q_read.at[who]))
                    rows = pl.ds(i * tiles.queries + who * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q.at[b, rows, n], q_smem.at[who], q_ready.at[who])

            return turn + (first < end).astype(jnp.int32)

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))

    def copy_keys():
        def of_item(r, step):
            b, _, n, (first, _, _, end) = place(r)
            h = lax.div(n, jnp.int32(spec.group))

            def of_block(j, step):
                rows = pl.ds(j * C, C)
                copy_into(step, k_read, k_ready, (k.at[b, rows, h], k_smem))
                copy_into(step, v_read, v_ready, (v.at[b, rows, h], v_smem))
                return step + 1

            return lax.fori_loop(first, end, of_block, step)

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))

    def multiply():
        def score(who, step, last):
            """`last`: of the item."""
            slot, buffer = slot_of(step, tiles.stages), buffer_of(who, step)
            if who == 0:
                plgpu.barrier_wait(k_ready.at[slot])
            keys = k_smem.at[slot].transpose((1, 0))
            plgpu.tcgen05_mma(
                scores(buffer), q_smem.at[who], keys, s_ready.at[buffer], accumulate=False
            )
            if who == compute - 1:
                plgpu.tcgen05_commit_arrive(k_read.at[slot])
            pl.when(last)(lambda: plgpu.tcgen05_commit_arrive(q_read.at[who]))

        def weigh(who, step, first):
            late = slot_of(step, tiles.value_stages)
            if who == 0:
                plgpu.barrier_wait(v_ready.at[late])
            plgpu.barrier_wait(p_ready.at[who])
            plgpu.tcgen05_mma(
                output(who, 0, H), chances(buffer_of(who, step)), v_smem.at[late],
                out_ready.at[who], accumulate=jnp.logical_not(first),
            )  # fmt: skip
            if who == compute - 1:
                plgpu.tcgen05_commit_arrive(v_read.at[late])

        def of_item(r, step):
            _, _, _, (first, _, _, end) = place(r)
            before = lambda who: plgpu.barrier_wait(out_ready.at[who])  # the last one's, if any

            @pl.when(first < end)
            def _begin():
                for who in range(compute):
                    plgpu.barrier_wait(q_ready.at[who])
                    # Whose probabilities were where its scores will be.
                    pl.when(step > 0)(functools.partial(before, who))
                    score(who, step, end - first == 1)

            def of_block(j, step):
                more, last = j + 1 < end, j + 2 == end
                if ahead:
                    pl.when(j > first)(lambda: before(0))
                    pl.when(more)(lambda: score(0, step + 1, last))
                    weigh(0, step, j == first)
                    return step + 1
                for who in range(compute):
                    weigh(who, step, j == first)

                    @pl.when(more)
                    def _next():
                        before(who)
                        score(who, step + 1, last)

                return step + 1

            return lax.fori_loop(first, end, of_block, step)

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))

    @pl.when(wg == compute)
    def _help():
        if compute == 2:
            plgpu.set_max_registers(40, action="decrease")
        each_warp(copy_queries, copy_keys, multiply)

    @pl.when(wg < compute)
    def _compute():
        if compute == 2:
            plgpu.set_max_registers(232, action="increase")
        factor, shape = factor_of(spec), (ROWS, C)

        def rescale(shrink_R):
            plgpu.barrier_wait(out_ready.at[wg])
            for start in range(0, H, 64):
                part = output(wg, start, 64)
                out_RH = plgpu.async_load_tmem(part, layout=NATIVE)
                plgpu.wait_load_tmem()
                plgpu.async_store_tmem(part, out_RH * along(shrink_R, out_RH.shape, 0, NATIVE))

        def of_item(r, step):
            b, i, n, found = place(r)
            first, end = found[0], found[3]
            first_row = i * tiles.queries + wg * ROWS
            rows, first_query = pl.ds(first_row, ROWS), first_row + offset_B[b]
            q_segments_R = vector(q_segments.at[b, rows], 0, NATIVE)

            def body(j, state, masked):
                top_R, total_R = state
                buffer = buffer_of(wg, step + j - first)
                plgpu.barrier_wait(s_ready.at[buffer])
                s_RC = plgpu.async_load_tmem(scores(buffer), layout=NATIVE)
                plgpu.wait_load_tmem()  # probabilities come to the same place
                s_RC = capped(spec, s_RC)
                if masked:
                    k_segments_C = vector(k_segments.at[b, pl.ds(j * C, C)], 1, NATIVE)
                    sides = first_query, j * C, q_segments_R, k_segments_C
                    s_RC = jnp.where(visible(spec, shape, 0, *sides, NATIVE), s_RC, HIDDEN)
                # Tops are in powers of two, so that the exponent is one multiply-add.
                new_R = jnp.maximum(top_R, s_RC.max(axis=1) * factor)
                e_RC = jnp.exp2(s_RC * factor - along(new_R, shape, 0, NATIVE))
                shrink_R = jnp.exp2(top_R - new_R)
                total_R = total_R * shrink_R + e_RC.sum(axis=1)
                plgpu.async_store_tmem(chances(buffer), e_RC.astype(q.dtype))
                pl.when(j > first)(lambda: rescale(shrink_R))
                plgpu.commit_tmem()
                plgpu.barrier_arrive(p_ready.at[wg])
                return new_R, total_R

            start = (full((ROWS,), value, NATIVE.reduce(1)) for value in (FLOOR, 0.0))
            top_R, total_R = over(found, body, tuple(start))
            dead_R = total_R == 0.0
            total_R = jnp.where(dead_R, 1.0, total_R)
            lse_R = (top_R + jnp.log2(total_R)) / LOG2_E
            lse.at[b, n, rows][...] = jnp.where(dead_R, -jnp.inf, lse_R)
            inverse_smem.at[wg][...] = 1.0 / total_R  # from one layout to another

            def leave(start, out_RH):
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_smem.at[wg][...] = out_RH.astype(q.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out_smem.at[wg], out.at[b, rows, n, pl.ds(start, 64)])

            @pl.when(first < end)
            def _output():
                inverse_R = vector(inverse_smem.at[wg], 0, TCGEN05)
                plgpu.barrier_wait(out_ready.at[wg])
                for start in range(0, H, 64):
                    out_RH = plgpu.async_load_tmem(output(wg, start, 64), layout=TCGEN05)
                    leave(start, out_RH * along(inverse_R, out_RH.shape, 0, TCGEN05))
                plgpu.wait_load_tmem()  # the next item's output comes to the same place

            @pl.when(first == end)
            def _nothing():
                for start in range(0, H, 64):
                    leave(start, full((ROWS, 64), 0.0, TCGEN05))

            return step + end - first

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
