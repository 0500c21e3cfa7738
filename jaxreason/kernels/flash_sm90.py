"""Flash attention for Hopper (sm_90a) in Pallas Mosaic GPU, forward and backward.

The maths of `flash.py`, which also says which blocks meet, on a schedule for Hopper's asynchronous
units, after FlashAttention-3 (arXiv 2407.08608). A program has three warpgroups. One only copies:
keys and values go round a ring of buffers in shared memory. Two compute, 64 queries each, and take
turns: while one multiplies on the tensor cores, the other takes exponentials. Probabilities never
leave registers: they are an operand of the product with the values as they stand.

Programs stay on their core and take one block of queries of one head after another, those that
read most first, in an order that is data too: packed rows are balanced as causal ones are.

The backward pass is in `flash_sm90_backward.py`. Both are compiled for the chip without one, and
their schedule is simulated (tests/test_hardware_free_sm90.py); neither has run on one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels.differentiable import differentiable
from jaxreason.kernels.flash_sm90_backward import gradients
from jaxreason.kernels.flash_sm90_config import (
    COMPUTE,
    COMPUTE_CAPABILITY,
    CONFIGS,
    ROWS,
    WGMMA,
    Config,
    Tiles,
    config_for,
)
from jaxreason.kernels.mask_blocks import FLOOR, HIDDEN, LOG2_E, Spec, filled_mask, over, ranges_of
from jaxreason.kernels.mosaic_gpu import (
    Sides,
    along,
    barriers,
    capped,
    copy_into,
    factor_of,
    full,
    launch,
    longest_first,
    matrix,
    place_of,
    refuse,
    share,
    slot_of,
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
    refuse("flash_sm90", mask, q_BTNH, k_BSKH, v_BSKH)
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
    out_BTNH, lse_BNT = launch(
        functools.partial(_forward_kernel, spec=spec),
        "flash_sm90_forward",
        out_type=(
            jax.ShapeDtypeStruct(q_BTNH.shape, dtype),
            jax.ShapeDtypeStruct((B, N, sides.q_segments_BT.shape[1]), jnp.float32),
        ),
        scratch=dict(
            q_smem=matrix(COMPUTE, ROWS, padded_H, dtype=dtype),  # then the output
            k_smem=matrix(tiles.stages, tiles.keys, padded_H, dtype=dtype),
            v_smem=matrix(tiles.value_stages, tiles.keys, padded_H, dtype=dtype),
            k_segments_smem=plgpu.SMEM((tiles.stages, tiles.keys), jnp.int32),
            lse_smem=plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
            q_ready=barriers(1, COMPUTE),
            k_ready=barriers(2, tiles.stages),
            k_read=barriers(COMPUTE, tiles.stages),
            v_ready=barriers(1, tiles.value_stages),
            v_read=barriers(COMPUTE, tiles.value_stages),
            turn=barriers(COMPUTE),
        ),
        warpgroups=COMPUTE + 1,
        programs=min(config.programs, B * N * ranges_BI4.shape[1]),
    )(ranges_BI4, longest_first(ranges_BI4), *sides, q_BTNH, k_BSKH, v_BSKH)
    return out_BTNH[:, :T, :, :H], jnp.swapaxes(lse_BNT[..., :T], 1, 2)


def _forward_kernel(
    ranges, order, q_segments, k_segments, offset_B, q, k, v, out, lse, *, spec: Spec,
    q_smem, k_smem, v_smem, k_segments_smem, lse_smem,
    q_ready, k_ready, k_read, v_ready, v_read, turn,
):  # fmt: skip
    tiles, (_, _, N, H) = spec.tiles, q.shape
    wg = lax.axis_index("warpgroup")
    work = ranges.shape[0] * ranges.shape[1] * N
    num_items, item_of = share(lax.axis_index("program"), lax.axis_size("program"), work)
    place = lambda r: place_of(item_of(r), order, ranges, N)

    # Steps count the blocks of keys of all items: so buffers and barriers go on from one to the
    # next, whose keys are copied while this one's output leaves.
    @pl.when(wg == COMPUTE)
    def _copy():
        plgpu.set_max_registers(40, action="decrease")

        def of_item(r, step):
            b, _, n, (first, _, _, end) = place(r)
            h = lax.div(n, jnp.int32(spec.group))

            def of_block(j, step):
                rows = pl.ds(j * tiles.keys, tiles.keys)
                copy_into(
                    step, k_read, k_ready, (k.at[b, rows, h], k_smem),
                    (k_segments.at[b, rows], k_segments_smem),
                )  # fmt: skip
                copy_into(step, v_read, v_ready, (v.at[b, rows, h], v_smem))
                return step + 1

            return lax.fori_loop(first, end, of_block, step)

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))

    def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def wait_for_keys(step):
        plgpu.barrier_wait(k_ready.at[slot_of(step, tiles.stages)])

    @pl.when(wg < COMPUTE)
    def _compute():
        plgpu.set_max_registers(232, action="increase")
        factor, shape = factor_of(spec), (ROWS, tiles.keys)

        def of_item(r, step):
            b, i, n, found = place(r)
            first, end = found[0], found[3]
            first_row = i * tiles.queries + wg * ROWS
            rows, first_query = pl.ds(first_row, ROWS), first_row + offset_B[b]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last item's output has left
            plgpu.copy_gmem_to_smem(q.at[b, rows, n], q_smem.at[wg], q_ready.at[wg])
            q_segments_R = vector(q_segments.at[b, rows], 0, WGMMA)
            plgpu.barrier_wait(q_ready.at[wg])
            pl.when(first < end)(lambda: wait_for_keys(step))
            pl.when(wg == 1)(take_turns)  # half a block behind

            def body(j, state, masked):
                out_RH, top_R, total_R = state
                now = step + j - first
                slot, late = slot_of(now, tiles.stages), slot_of(now, tiles.value_stages)

                def product(qk_ref):
                    plgpu.wgmma(qk_ref, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                    take_turns()
                    return qk_ref[...]

                s_RC = capped(spec, pl.run_scoped(product, plgpu.ACC(shape, jnp.float32)))
                if masked:
                    sides = q_segments_R, vector(k_segments_smem.at[slot], 1, WGMMA)
                    see_RC = visible(spec, shape, 0, first_query, j * tiles.keys, *sides, WGMMA)
                    s_RC = jnp.where(see_RC, s_RC, HIDDEN)
                plgpu.barrier_arrive(k_read.at[slot])

                # Tops are in powers of two, so that the exponent is one multiply-add.
                new_R = jnp.maximum(top_R, s_RC.max(axis=1) * factor)
                e_RC = jnp.exp2(s_RC * factor - along(new_R, shape, 0, WGMMA))
                shrink_R = jnp.exp2(top_R - new_R)
                out_RH *= along(shrink_R, out_RH.shape, 0, WGMMA)
                total_R = total_R * shrink_R + e_RC.sum(axis=1)
                p_RC = e_RC.astype(q.dtype)
                # None of the above may move behind the other warpgroup's turn.
                out_RH, total_R, new_R, p_RC = lax.optimization_barrier(
                    (out_RH, total_R, new_R, p_RC)
                )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_ready.at[late])
                plgpu.barrier_wait(turn)

                def weighted(out_ref):
                    plgpu.wgmma(out_ref, p_RC, v_smem.at[late])
                    pl.when(j + 1 < end)(lambda: wait_for_keys(now + 1))

                out_RH = pl.run_state(weighted)(plgpu.ACC.init(out_RH))
                plgpu.barrier_arrive(v_read.at[late])
                return out_RH, new_R, total_R

            out_RH, top_R, total_R = over(
                found,
                body,
                (
                    full((ROWS, H), 0.0, WGMMA),
                    full((ROWS,), FLOOR, WGMMA.reduce(1)),
                    full((ROWS,), 0.0, WGMMA.reduce(1)),
                ),
            )
            pl.when(wg == 0)(take_turns)
            dead_R = total_R == 0.0
            total_R = jnp.where(dead_R, 1.0, total_R)
            q_smem.at[wg][...] = (out_RH * along(1.0 / total_R, out_RH.shape, 0, WGMMA)).astype(
                q.dtype
            )
            lse_R = (top_R + jnp.log2(total_R)) / LOG2_E
            lse_smem.at[wg][...] = jnp.where(dead_R, -jnp.inf, lse_R)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[wg], out.at[b, rows, n])
            plgpu.copy_smem_to_gmem(lse_smem.at[wg], lse.at[b, n, rows])
            return step + end - first

        lax.fori_loop(0, num_items, of_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
