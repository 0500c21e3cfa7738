"""The slot cache: one pair of keys and values a layer, and how much of each row is filled."""

import jax
import jax.numpy as jnp

from jaxreason.model.config import DecoderConfig
from jaxreason.types import pytree_dataclass


@pytree_dataclass()
class Cache:
    """Keys and values of B slots, S positions each.

    A tuple over layers rather than one stacked array: each layer's update then aliases in place
    (stacked and scanned it was 2 to 5 times slower on CPU, see docs/benchmarks.md).
    """

    k: tuple[jax.Array, ...]  # a layer each: [B, K, S, H]
    v: tuple[jax.Array, ...]
    lengths_B: jax.Array  # int32, filled positions of each slot


def write_token(cache_BKSH: jax.Array, new_BKH: jax.Array, index_B: jax.Array) -> jax.Array:
    """Each slot's new key or value at its own position."""
    write = lambda slot, new, i: jax.lax.dynamic_update_slice(slot, new[:, None], (0, i, 0))
    return jax.vmap(write)(cache_BKSH, new_BKH, index_B)


def from_prefill(
    config: DecoderConfig, k_LBTKH: jax.Array, v_LBTKH: jax.Array, lengths_B: jax.Array, size: int
) -> Cache:
    """A cache of `size` positions that begins with the prompts' keys and values."""
    pad = size - k_LBTKH.shape[2]
    lay = lambda x: jnp.pad(jnp.einsum("BTKH->BKTH", x), ((0, 0), (0, 0), (0, pad), (0, 0)))
    return Cache(
        k=tuple(lay(k_LBTKH[i]) for i in range(config.num_layers)),
        v=tuple(lay(v_LBTKH[i]) for i in range(config.num_layers)),
        lengths_B=lengths_B,
    )
