"""A mixture of experts in place of the MLP: the router, dropless dispatch, and its balance.

Source: Qwen3 (arXiv 2505.09388): top-k of a softmax over all experts, no shared expert; the balance
of the global batch (arXiv 2501.11873).
"""

import jax
import jax.numpy as jnp

from jaxreason.kernels.grouped import grouped_matmul
from jaxreason.types import pytree_dataclass


@pytree_dataclass()
class Routing:
    """Where one layer's tokens went: sums over tokens, so that parts of a batch add up."""

    counts_E: jax.Array  # float32, tokens that chose each expert; sums to k times the tokens
    probs_E: jax.Array  # float32, the router's probabilities


def route(
    h_XD: jax.Array, router_DE: jax.Array, num_chosen: int, normalised: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(probs_XE, the chosen experts' weights_XK and ids_XK), all but the ids in float32.

    The product too is in float32: rounded to bf16 it changes which experts are chosen.
    """
    logits_XE = jnp.einsum(
        "XD,DE->XE",
        h_XD.astype(jnp.float32),
        router_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    probs_XE = jax.nn.softmax(logits_XE, axis=-1)
    weights_XK, ids_XK = jax.lax.top_k(probs_XE, num_chosen)
    if normalised:
        weights_XK = weights_XK / weights_XK.sum(-1, keepdims=True)
    return probs_XE, weights_XK, ids_XK


def mixture(h_XD, weights_XK, ids_XK, w_gate_EDF, w_up_EDF, w_down_EFD, activation) -> jax.Array:
    """out_XD: the weighted sum of each token's experts; every token reaches every one it chose."""
    (X, K), E = ids_XK.shape, w_gate_EDF.shape[0]
    by_expert = jnp.argsort(ids_XK.reshape(-1), stable=True)
    sizes_E = jnp.bincount(ids_XK.reshape(-1), length=E)
    rows_RD = h_XD[by_expert // K]
    gate_RF = grouped_matmul(rows_RD, w_gate_EDF, sizes_E)
    up_RF = grouped_matmul(rows_RD, w_up_EDF, sizes_E)
    out_RD = grouped_matmul(activation(gate_RF) * up_RF, w_down_EFD, sizes_E)
    out_XKD = out_RD[jnp.argsort(by_expert)].reshape(X, K, -1)  # back in the order of tokens
    mixed_XD = jnp.einsum("XKD,XK->XD", out_XKD, weights_XK, preferred_element_type=jnp.float32)
    return mixed_XD.astype(h_XD.dtype)


def summarise(probs_XE, ids_XK, real_X) -> Routing:
    """Over the tokens that are real: the others, padding, load no expert that matters."""
    E = probs_XE.shape[-1]
    chosen_XE = jax.nn.one_hot(ids_XK, E, dtype=jnp.float32).sum(1)
    real_X = real_X.astype(jnp.float32)
    return Routing(
        counts_E=jnp.einsum("XE,X->E", chosen_XE, real_X),
        probs_E=jnp.einsum("XE,X->E", probs_XE, real_X),
    )


def balance(routing_L: Routing, load_LE: jax.Array) -> jax.Array:
    """The load-balancing loss, summed over the tokens of `routing_L`: E sum_e load_e prob_e.

    A mean over layers, as published; transformers pools the layers' counts, so that one layer's
    imbalance may hide another's. Perfect balance gives k a token.

    Args:
      routing_L: stacked over layers.
      load_LE: the share of the *global* batch's tokens that chose each expert; no gradient.
    """
    E = load_LE.shape[-1]
    per_layer_L = E * jnp.einsum("LE,LE->L", jax.lax.stop_gradient(load_LE), routing_L.probs_E)
    return per_layer_L.mean()


def load(counts_LE: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """The share of the tokens that chose each expert; zeros where there are no tokens."""
    return counts_LE / jnp.maximum(num_tokens, 1)
