"""Attention on TPU: JAX's own splash attention behind the interface of this shelf.

It has no log-sum-exp that gradients flow through, and its queries are those of the keys: T = S.
"""

import typing

import jax
import jax.numpy as jnp

from jaxreason.types import AttentionMask

if typing.TYPE_CHECKING:
    from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_BLOCK = 512  # queries and keys that meet at once, of long rows


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: AttentionMask,
    *,
    interpret: "bool | pltpu.InterpretParams" = False,
) -> tuple[jax.Array, None]:
    """(out_BTNH of q's dtype, None), as `reference.attention`. Any T and H; padded here.

    Args:
      interpret: simulates the kernels; with InterpretParams a TPU's memories too, more slowly.
    Raises NotImplementedError for an offset, which splash cannot take as data.
    """
    if mask.q_offset_B is not None or q_BTNH.shape[1] != k_BTKH.shape[1]:
        raise NotImplementedError("splash attends from a whole row to itself: no offset, T = S")
    (B, T, N, H), block = q_BTNH.shape, _block(q_BTNH.shape[1])
    scale = H**-0.5 if mask.scale is None else mask.scale
    kernel = _kernel(-(-T // block) * block, block, N, mask.causal, mask.window, mask.soft_cap,
                     interpret)  # fmt: skip
    by_head = lambda x_BTNH: jnp.swapaxes(_padded(x_BTNH, block), 1, 2)
    segments_BT = mask.q_segments_BT
    if segments_BT is None:
        segments_BT = jnp.ones((B, T), jnp.int32)
    ids_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % block)))  # padding is a segment of its own
    kv_ids_BT = ids_BT
    if mask.kv_segments_BS is not None:
        kv_ids_BT = jnp.pad(mask.kv_segments_BS, ((0, 0), (0, -T % block)))
    q_BTNH = (q_BTNH * scale).astype(q_BTNH.dtype)
    operands = by_head(q_BTNH), by_head(k_BTKH), by_head(v_BTKH)
    # A vmapped kernel has a dim of the grid that its semantics lack: InterpretParams refuse it.
    rows = jax.vmap if isinstance(interpret, bool) else _one_by_one
    out_BNTH = rows(kernel)(*operands, _segment_ids(ids_BT, kv_ids_BT))
    out_BTNH = jnp.swapaxes(out_BNTH, 1, 2)[:, :T, :, :H]
    return jnp.where((segments_BT != 0)[:, :, None, None], out_BTNH, 0).astype(q_BTNH.dtype), None


def _one_by_one(kernel):
    def run(*operands):
        row = lambda b: jax.tree.map(lambda x: x[b], operands)
        return jnp.stack([kernel(*row(b)) for b in range(operands[0].shape[0])])

    return run


def _block(length: int) -> int:
    return min(_BLOCK, -(-length // _LANES) * _LANES)


def _padded(x_BTNH, block: int):
    """With rows up to a whole number of blocks, and heads up to one of lanes."""
    _, T, _, H = x_BTNH.shape
    return jnp.pad(x_BTNH, ((0, 0), (0, -T % block), (0, 0), (0, -H % _LANES)))


def _segment_ids(q_BT, kv_BT):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    return splash.SegmentIds(q=q_BT, kv=kv_BT)


def _kernel(length, block, num_heads, causal, window, soft_cap, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if window is not None:
        one = splash.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    else:
        one = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,
    )  # fmt: skip
    return splash.make_splash_mha(
        splash.MultiHeadMask([one] * num_heads),
        block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
