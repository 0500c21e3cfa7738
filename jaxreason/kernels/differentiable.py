"""Attention with gradients, of a forward pass and of gradients that need its log-sum-exp alone."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


def differentiable(forward: Callable, gradients: Callable) -> Callable:
    """`attention(q_BTNH, k_BSKH, v_BSKH, mask) -> (out_BTNH, lse_BTN)`, differentiable in q, k, v
    through both outputs, which are named "attention" for remat.

    Args:
      forward: the same, without gradients.
      gradients: `(q, k, v, mask, lse_BTN, delta_BTN, dout_BTNH) -> (dq, dk, dv)`, as
        `reference.attention_gradients`.
    """

    @jax.custom_vjp
    def attention(q_BTNH, k_BSKH, v_BSKH, mask):
        return forward(q_BTNH, k_BSKH, v_BSKH, mask)

    def with_residuals(q_BTNH, k_BSKH, v_BSKH, mask):
        outputs = attention(q_BTNH, k_BSKH, v_BSKH, mask)
        out_BTNH, lse_BTN = (checkpoint_name(x, "attention") for x in outputs)
        return (out_BTNH, lse_BTN), (q_BTNH, k_BSKH, v_BSKH, mask, out_BTNH, lse_BTN)

    def backward(residuals, cotangents):
        *inputs, out_BTNH, lse_BTN = residuals
        dout_BTNH, dlse_BTN = cotangents
        delta_BTN = (dout_BTNH.astype(jnp.float32) * out_BTNH).sum(-1) - dlse_BTN
        return *gradients(*inputs, lse_BTN, delta_BTN, dout_BTNH), None

    attention.defvjp(with_residuals, backward)
    return attention
