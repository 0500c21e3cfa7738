"""The expert product: exact for any sizes, gradients too, and nothing of [groups, rows, *]."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.kernels.grouped import grouped_matmul


def dense(x_XI, w_EIO, sizes_E):
    """Every row times the matrix of its group, gathered: the truth in a line."""
    group_X = jnp.repeat(jnp.arange(len(sizes_E)), sizes_E, total_repeat_length=len(x_XI))
    return jnp.einsum("XI,XIO->XO", x_XI, w_EIO[group_X])


def operands(rows: int, groups: int, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(rows), 3)
    x_XI = jax.random.normal(keys[0], (rows, 24), dtype)
    w_EIO = jax.random.normal(keys[1], (groups, 24, 40), dtype)
    return x_XI, w_EIO, jax.random.normal(keys[2], (rows, 40), dtype)


# A block is 128 rows: groups of none, of one, of exactly a block, just over it, and all in one.
@pytest.mark.parametrize(
    "sizes", [(5, 0, 3), (0, 0, 7), (128, 129, 127), (1, 300, 0, 1), (0, 1), (256,)]
)
def test_product_and_gradients(sizes):
    x_XI, w_EIO, weights_XO = operands(sum(sizes), len(sizes))
    sizes_E = jnp.array(sizes, jnp.int32)

    def both(product):
        loss = lambda x, w: (weights_XO * product(x, w, sizes_E)).sum()
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(x_XI, w_EIO)

    got = jax.jit(grouped_matmul)(x_XI, w_EIO, sizes_E)
    np.testing.assert_allclose(got, dense(x_XI, w_EIO, sizes_E), atol=1e-5)
    for ours, want in zip(both(grouped_matmul), both(dense), strict=True):
        np.testing.assert_allclose(ours, want, atol=1e-4)  # sums over up to 300 rows


def test_dtypes_are_the_operands():
    x_XI, w_EIO, _ = operands(50, 4, jnp.bfloat16)
    sizes_E = jnp.array([10, 0, 39, 1], jnp.int32)
    loss = lambda x, w: grouped_matmul(x, w, sizes_E).astype(jnp.float32).sum()
    assert grouped_matmul(x_XI, w_EIO, sizes_E).dtype == jnp.bfloat16
    assert {g.dtype for g in jax.grad(loss, argnums=(0, 1))(x_XI, w_EIO)} == {jnp.bfloat16.dtype}


def test_nothing_is_held_of_every_row_and_group():
    """XLA's own lowering of a ragged product on CPU holds [groups, rows, in]: 25 MB here."""
    x_XI, w_EIO, _ = operands(2048, 128)
    sizes_E = jnp.full(128, 16, jnp.int32)
    loss = lambda x, w: (grouped_matmul(x, w, sizes_E) ** 2).sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x_XI, w_EIO).compile()
    own = x_XI.nbytes + w_EIO.nbytes + 2 * 2048 * 40 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * own  # about 3 MB
