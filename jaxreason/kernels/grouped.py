"""The expert product: each row times the matrix of its own group, and its gradients.

TPUs have `jax.lax.ragged_dot`. On CPU and GPU XLA lowers that to a product of every row with every
group behind a mask (32 times the work and a [groups, rows, in] array for 32 groups, jax 0.10.2 to
0.12), so there the rows of a group are multiplied block by block in a loop.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

_BLOCK = 128  # rows of one product; of a group's last one some are another group's, and are dropped


@jax.custom_vjp
def grouped_matmul(x_XI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """out_XO of x's dtype, sums in float32.

    Args:
      x_XI: rows sorted by group.
      sizes_E: rows of each group, int32; together X.
    """
    return _rows_times(x_XI, w_EIO, sizes_E)


def _forward(x_XI, w_EIO, sizes_E):
    return _rows_times(x_XI, w_EIO, sizes_E), (x_XI, w_EIO, sizes_E)


def _backward(residuals, dout_XO):
    x_XI, w_EIO, sizes_E = residuals
    dx_XI = _rows_times(dout_XO, jnp.swapaxes(w_EIO, 1, 2), sizes_E)
    return dx_XI, _outer(x_XI, dout_XO, sizes_E).astype(w_EIO.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _rows_times(x_XI, w_EIO, sizes_E):
    """x_XI times its group's matrix."""
    X, O = x_XI.shape[0], w_EIO.shape[2]

    def ragged(x_XI, w_EIO, sizes_E):
        out_XO = jax.lax.ragged_dot(x_XI, w_EIO, sizes_E, preferred_element_type=jnp.float32)
        return out_XO.astype(x_XI.dtype)

    def looped(x_XI, w_EIO, sizes_E):
        def block(e, start, _, out_XO):
            rows_RI = jax.lax.dynamic_slice_in_dim(padded_XI, start, _BLOCK)
            product_RO = _dot("RI,IO->RO", rows_RI, w_EIO[e]).astype(out_XO.dtype)
            # Rows beyond the group are another one's, and its block comes later.
            return jax.lax.dynamic_update_slice_in_dim(out_XO, product_RO, start, 0)

        padded_XI = _padded(x_XI)
        zeros_XO = jnp.zeros((X + _BLOCK, O), x_XI.dtype)
        return _over_blocks(sizes_E, block, zeros_XO)[:X]

    return jax.lax.platform_dependent(x_XI, w_EIO, sizes_E, tpu=ragged, default=looped)


def _outer(x_XI, y_XO, sizes_E):
    """float32 [E, I, O]: the sum over each group's rows of x y^T."""
    (E,), I, O = sizes_E.shape, x_XI.shape[1], y_XO.shape[1]

    def ragged(x_XI, y_XO, sizes_E):
        dims = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())),
            lhs_ragged_dimensions=(0,),
            rhs_group_dimensions=(),
        )
        return jax.lax.ragged_dot_general(
            x_XI, y_XO, sizes_E, dims, preferred_element_type=jnp.float32
        )

    def looped(x_XI, y_XO, sizes_E):
        def block(e, start, end, sums_EIO):
            inside_R1 = (start + jnp.arange(_BLOCK) < end)[:, None]
            rows_RI = jax.lax.dynamic_slice_in_dim(padded_XI, start, _BLOCK)
            rows_RO = jax.lax.dynamic_slice_in_dim(padded_XO, start, _BLOCK)
            return sums_EIO.at[e].add(_dot("RI,RO->IO", jnp.where(inside_R1, rows_RI, 0), rows_RO))

        padded_XI, padded_XO = _padded(x_XI), _padded(y_XO)
        return _over_blocks(sizes_E, block, jnp.zeros((E, I, O), jnp.float32))

    return jax.lax.platform_dependent(x_XI, y_XO, sizes_E, tpu=ragged, default=looped)


def _over_blocks(sizes_E, block: Callable, carry):
    """`carry = block(group, first row, end of the group's rows, carry)`, in the order of rows."""
    ends_E = jnp.cumsum(sizes_E)
    last_block_E = jnp.cumsum(-(-sizes_E // _BLOCK))  # of each group, exclusive

    def body(j, carry):
        e = jnp.searchsorted(last_block_E, j, side="right")
        blocks_before = jnp.where(e > 0, last_block_E[e - 1], 0)
        start = ends_E[e] - sizes_E[e] + (j - blocks_before) * _BLOCK
        return block(e, start, ends_E[e], carry)

    return jax.lax.fori_loop(0, last_block_E[-1], body, carry)


def _padded(x_XI):
    """With rows for the last block to read past the end."""
    return jnp.pad(x_XI, ((0, _BLOCK), (0, 0)))


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
