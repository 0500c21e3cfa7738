"""Keys and values computed before: of slots that decode, and of the prompts that they share."""

import jax
import jax.numpy as jnp

from jaxreason.model.config import DecoderConfig
from jaxreason.types import pytree_dataclass


@pytree_dataclass()
class Cache:
    """Keys and values of B rows, S positions each.

    A tuple over layers rather than one stacked array: each layer's update then aliases in place
    (stacked and scanned it was 2 to 5 times slower on CPU, see docs/benchmarks.md).

    In float8_e4m3fn they are kept as they are, with no scale, as vLLM does for a checkpoint that
    brings none: 3 bits of mantissa, from 2**-9 to 448.
    """

    k: tuple[jax.Array, ...]  # a layer each: [B, K, S, H]
    v: tuple[jax.Array, ...]
    lengths_B: jax.Array  # int32, filled positions of each row


def empty(config: DecoderConfig, rows: int, size: int, dtype: jnp.dtype) -> Cache:
    """A cache of `rows` rows of `size` positions; zeros, since what is masked must be finite."""
    layer = lambda: jnp.zeros((rows, config.num_kv_heads, size, config.head_dim), dtype)
    return Cache(
        k=tuple(layer() for _ in range(config.num_layers)),
        v=tuple(layer() for _ in range(config.num_layers)),
        lengths_B=jnp.zeros(rows, jnp.int32),
    )


def write(cache_BKSH: jax.Array, new_BKTH: jax.Array, index_B: jax.Array) -> jax.Array:
    """Each row's new keys or values, from its own position on."""
    put = lambda row, new, i: jax.lax.dynamic_update_slice(row, new, (0, i, 0))
    return jax.vmap(put)(cache_BKSH, stored(new_BKTH, cache_BKSH.dtype), index_B)


def stored(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x as a cache of that dtype keeps it. What is too large becomes the largest number: float8
    has no infinity, and a plain cast would make it nan.
    """
    if x.dtype == dtype:
        return x
    most = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -most, most).astype(dtype)


def take_rows(cache: Cache, rows_X: jax.Array, size: int) -> Cache:
    """A copy of the first `size` positions of these rows."""
    take = lambda x_BKSH: x_BKSH[:, :, :size][rows_X]
    return Cache(
        k=tuple(map(take, cache.k)), v=tuple(map(take, cache.v)), lengths_B=cache.lengths_B[rows_X]
    )


def put_rows(cache: Cache, rows_X: jax.Array, part: Cache, start_X: jax.Array, count: int) -> Cache:
    """Copies `count` positions of each row of `part`, from start_X on, to where they came from.

    The lengths of these rows become `part`'s.
    """
    start_X = jnp.minimum(start_X, part.k[0].shape[2] - count)  # a slice must lie inside

    def put(x_BKSH: jax.Array, part_XKSH: jax.Array) -> jax.Array:
        K, H = x_BKSH.shape[1], x_BKSH.shape[3]
        cut = lambda row, i: jax.lax.dynamic_slice(row, (0, i, 0), (K, count, H))
        dims = jax.lax.ScatterDimensionNumbers(
            update_window_dims=(1, 2, 3),
            inserted_window_dims=(0,),
            scatter_dims_to_operand_dims=(0, 2),
        )
        where_X2 = jnp.stack([rows_X, start_X], axis=1)
        return jax.lax.scatter(x_BKSH, where_X2, jax.vmap(cut)(part_XKSH, start_X), dims)

    both = lambda old, new: tuple(map(put, old, new))
    return Cache(
        k=both(cache.k, part.k),
        v=both(cache.v, part.v),
        lengths_B=cache.lengths_B.at[rows_X].set(part.lengths_B),
    )
