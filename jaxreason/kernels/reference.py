"""Plain truth for every kernel of this shelf: float32 inside, whole score and logit arrays.

Slow and large on purpose. Kernels are checked against these functions, values and gradients.
"""

import jax
import jax.numpy as jnp

from jaxreason.types import AttentionMask


def visible(mask: AttentionMask, q_len: int, kv_len: int) -> jax.Array:
    """Which keys each query may read, bool [B or 1, T, S]."""
    q_1T1, k_11S = jnp.arange(q_len)[None, :, None], jnp.arange(kv_len)[None, None, :]
    if mask.q_offset_B is not None:
        q_1T1 = q_1T1 + mask.q_offset_B[:, None, None]
    see_BTS = jnp.ones((1, q_len, kv_len), bool)
    if mask.causal:
        see_BTS &= k_11S <= q_1T1
    if mask.window is not None:
        see_BTS &= k_11S > q_1T1 - mask.window
    if mask.q_segments_BT is not None:
        q_BT1, k_B1S = mask.q_segments_BT[:, :, None], mask.kv_segments_BS[:, None, :]
        see_BTS &= (q_BT1 == k_B1S) & (q_BT1 != 0)
    return see_BTS


def _scores(q_BTNH, k_BSKH, mask: AttentionMask):
    """(float32 scores [B, K, G, T, S], d score / d (scaled q.k), which may be read)."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32))
    s_BKGTS *= _scale(mask, H)
    slope = jnp.ones(())
    if mask.soft_cap is not None:
        tanh_BKGTS = jnp.tanh(s_BKGTS / mask.soft_cap)
        s_BKGTS, slope = mask.soft_cap * tanh_BKGTS, 1 - tanh_BKGTS**2
    return s_BKGTS, slope, visible(mask, T, S)[:, None, None]


def _scale(mask: AttentionMask, head_dim: int) -> float:
    return head_dim**-0.5 if mask.scale is None else mask.scale


def attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: AttentionMask
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention: (out_BTNH of q's dtype, lse_BTN float32 of the scaled, capped scores).

    Query heads k*G, ..., k*G + G-1 read key/value head k. A query that may read nothing gives
    zeros, lse -inf and zero gradients.
    """
    B, T, N, H = q_BTNH.shape
    s_BKGTS, _, see_B11TS = _scores(q_BTNH, k_BSKH, mask)
    any_B11T = see_B11TS.any(-1)
    # A row that reads nothing becomes a softmax over finite numbers, dropped below: no NaN in its
    # value, hence none in its gradient.
    s_BKGTS = jnp.where(see_B11TS, s_BKGTS, jnp.where(any_B11T[..., None], -jnp.inf, 0.0))
    lse_BKGT = jax.nn.logsumexp(s_BKGTS, axis=-1)
    p_BKGTS = jnp.where(see_B11TS, jnp.exp(s_BKGTS - lse_BKGT[..., None]), 0.0)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH.astype(jnp.float32))
    lse_BKGT = jnp.where(any_B11T, lse_BKGT, -jnp.inf)
    lse_BTN = jnp.moveaxis(lse_BKGT, -1, 1).reshape(B, T, N)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTN


def attention_gradients(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: AttentionMask,
    lse_BTN: jax.Array,
    delta_BTN: jax.Array,
    dout_BTNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) through keys that may be some of those that a query reads.

    Args:
      lse_BTN: over all its keys; so the parts' gradients add up.
      delta_BTN: the sum over H of dout * out, less the cotangent of lse; of all its keys too.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    by_head = lambda x: jnp.moveaxis(x.reshape(B, T, K, N // K), 1, -1)[..., None]
    s_BKGTS, slope, see_B11TS = _scores(q_BTNH, k_BSKH, mask)
    lse_BKGT1, delta_BKGT1 = by_head(lse_BTN), by_head(delta_BTN)
    p_BKGTS = jnp.where(see_B11TS, jnp.exp(s_BKGTS - jnp.where(see_B11TS, lse_BKGT1, 0.0)), 0.0)
    dout_BTKGH = dout_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    dp_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", dout_BTKGH, v_BSKH.astype(jnp.float32))
    slope = slope * _scale(mask, H)
    ds_BKGTS = jnp.where(see_B11TS, slope * p_BKGTS * (dp_BKGTS - delta_BKGT1), 0.0)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    dq_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", ds_BKGTS, k_BSKH.astype(jnp.float32))
    dk_BSKH = jnp.einsum("BKGTS,BTKGH->BSKH", ds_BKGTS, q_BTKGH)
    dv_BSKH = jnp.einsum("BKGTS,BTKGH->BSKH", p_BKGTS, dout_BTKGH)
    dq_BTNH = dq_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)
    return dq_BTNH, dk_BSKH.astype(k_BSKH.dtype), dv_BSKH.astype(v_BSKH.dtype)


def decode_attention(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lengths_B: jax.Array,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """`attention` of one query at position lengths_B - 1 over a [B, K, S, H] cache: out_BNH."""
    mask = AttentionMask(
        q_offset_B=lengths_B - 1, causal=True, window=window, soft_cap=soft_cap, scale=scale
    )
    k_BSKH, v_BSKH = jnp.swapaxes(k_BKSH, 1, 2), jnp.swapaxes(v_BKSH, 1, 2)
    return attention(q_BNH[:, None], k_BSKH, v_BSKH, mask)[0][:, 0]


def log_probs(h_TD, w_VD, temperature: float, valid_vocab: int | None):
    """(log-probs [T, valid_vocab or V], lse [T]) of a linear head."""
    z_TV = h_TD.astype(jnp.float32) @ w_VD[:valid_vocab].astype(jnp.float32).T / temperature
    lse_T = jax.nn.logsumexp(z_TV, axis=-1)
    return z_TV - lse_T[:, None], lse_T


def linear_logprobs(
    h_TD: jax.Array,
    w_VD: jax.Array,
    targets_T: jax.Array,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log-prob of the target, entropy, lse), each float32 [T]."""
    logp_TV, lse_T = log_probs(h_TD, w_VD, temperature, valid_vocab)
    logp_T = jnp.take_along_axis(logp_TV, targets_T[:, None], 1)[:, 0]
    return logp_T, -_expect(logp_TV, logp_TV), lse_T


def linear_xent(
    h_TD: jax.Array,
    w_VD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    valid_vocab: int | None = None,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """sum_t weights_t * (nll_t + z_loss * lse_t**2); weighted sums of nll, lse**2, entropy, hit."""
    logp_TV, lse_T = log_probs(h_TD, w_VD, temperature, valid_vocab)
    nll_T = -jnp.take_along_axis(logp_TV, targets_T[:, None], 1)[:, 0]
    correct_T = logp_TV.argmax(-1) == targets_T
    rows = (nll_T, lse_T**2, -_expect(logp_TV, logp_TV), correct_T)
    sums = tuple(jnp.sum(weights_T * x_T) for x_T in rows)
    return sums[0] + z_loss * sums[1], sums


def _expect(logp_TV, x_TV):
    return jnp.sum(jnp.exp(logp_TV) * x_TV, -1)
