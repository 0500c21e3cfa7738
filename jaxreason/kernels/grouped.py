"""The expert product: each row times the matrix of its own group, and its gradients.

Implementations:
  ragged   `jax.lax.ragged_dot`, which TPUs have. On CPU and GPU XLA lowers it to a product of every
           row with every group behind a mask (32 times the work and a [groups, rows, in] array for
           32 groups, jax 0.10.2 to 0.12).
  loop     the rows of a group, block by block: for any platform.
  pallas   kernels for GPUs (grouped_pallas.py). They compile for Hopper and Blackwell but have not
           run there, so nothing chooses them by itself.
  auto     ragged on TPU, else loop.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

PLAIN = ("auto", "loop", "ragged")  # XLA's own operations
IMPLEMENTATIONS = (*PLAIN, "pallas")

_BLOCK = 128  # rows of one product; of a group's last one some are another group's, and are dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x_XI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, implementation: str = "auto"
) -> jax.Array:
    """out_XO of x's dtype, sums in float32.

    Args:
      x_XI: rows sorted by group.
      sizes_E: rows of each group, int32. Together at most X: rows beyond them are multiplied by
        nothing, are zeros in the output and get no gradient.
      implementation: one of `IMPLEMENTATIONS`, or `interpret`: pallas in its slow simulation, for
        tests.
    """
    return _run(_ROWS_TIMES, implementation, x_XI, w_EIO, sizes_E)


def _forward(x_XI, w_EIO, sizes_E, implementation):
    return grouped_matmul(x_XI, w_EIO, sizes_E, implementation), (x_XI, w_EIO, sizes_E)


def _backward(implementation, residuals, dout_XO):
    x_XI, w_EIO, sizes_E = residuals
    dx_XI = _run(_ROWS_TIMES, implementation, dout_XO, w_EIO, sizes_E, transposed=True)
    dw_EIO = _run(_OUTER, implementation, x_XI, dout_XO, sizes_E, dtype=w_EIO.dtype)
    return dx_XI, dw_EIO, None


grouped_matmul.defvjp(_forward, _backward)


def check(implementation: str, dtype: jnp.dtype = jnp.bfloat16) -> None:
    """Runs an implementation on this machine's devices, gradients too, beside float32 sums.

    Raises ValueError with both numbers where they differ by more than `dtype` rounds, and with the
    compiler's words where it cannot run here.
    """
    sizes_E = jnp.array([130, 0, 70, 1], jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((256, 96), (4, 96, 160), (256, 160))
    operands = [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes)]

    def run(implementation, dtype):
        x_XI, w_EIO, dout_XO = (operand.astype(dtype) for operand in operands)
        product = lambda x, w: grouped_matmul(x, w, sizes_E, implementation)
        out_XO, pullback = jax.vjp(product, x_XI, w_EIO)
        return out_XO, *pullback(dout_XO)

    try:
        got = jax.block_until_ready(jax.jit(functools.partial(run, implementation, dtype))())
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"mesh.experts = {implementation} does not run here ({why}); choose mesh.experts = loop"
        ) from error
    with jax.default_matmul_precision("highest"):
        want = jax.jit(functools.partial(run, "loop", jnp.float32))()
    for name, ours, true in zip(("output", "gradient of x", "gradient of w"), got, want):
        ours, true = np.asarray(ours, np.float32), np.asarray(true)
        at = np.unravel_index(np.abs(ours - true).argmax(), true.shape)
        # Products of 10 bits of mantissa at least (bfloat16 has 8, TF32 10), sums in float32.
        if not np.abs(ours - true).max() <= 2e-2 * np.abs(true).max():
            raise ValueError(
                f"mesh.experts = {implementation}: {name} at {tuple(map(int, at))} is {ours[at]}, "
                f"but it should be {true[at]}; choose mesh.experts = loop"
            )


# --- x_XI times its group's matrix: out_XO. `transposed`: w is [E, O, I] --------------------------


def _ragged_rows(x_XI, w_EIO, sizes_E, *, transposed=False):
    w_EIO = jnp.swapaxes(w_EIO, 1, 2) if transposed else w_EIO
    out_XO = jax.lax.ragged_dot(x_XI, w_EIO, sizes_E, preferred_element_type=jnp.float32)
    # What it gives beyond the groups is not specified.
    in_a_group_X1 = (jnp.arange(x_XI.shape[0]) < sizes_E.sum())[:, None]
    return jnp.where(in_a_group_X1, out_XO, 0).astype(x_XI.dtype)


def _looped_rows(x_XI, w_EIO, sizes_E, *, transposed=False):
    X, O = x_XI.shape[0], w_EIO.shape[1 if transposed else 2]
    padded_XI = _padded(x_XI)

    def block(e, start, end, out_XO):
        inside_R1 = (start + jnp.arange(_BLOCK) < end)[:, None]
        rows_RI = jax.lax.dynamic_slice_in_dim(padded_XI, start, _BLOCK)
        product_RO = _dot("RI,OI->RO" if transposed else "RI,IO->RO", rows_RI, w_EIO[e])
        # The block of the next group's rows comes later.
        product_RO = jnp.where(inside_R1, product_RO, 0).astype(out_XO.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out_XO, product_RO, start, 0)

    return _over_blocks(sizes_E, block, jnp.zeros((X + _BLOCK, O), x_XI.dtype))[:X]


def _pallas_rows(x_XI, w_EIO, sizes_E, *, transposed=False, interpret=False):
    from jaxreason.kernels import grouped_pallas  # Triton's API: only for those who chose it

    return grouped_pallas.rows_times(
        x_XI, w_EIO, sizes_E, transposed=transposed, interpret=interpret
    )


# --- the sum over each group's rows of x y^T: [E, I, O] of `dtype` --------------------------------


def _ragged_outer(x_XI, y_XO, sizes_E, *, dtype):
    dims = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(),
    )
    sums_EIO = jax.lax.ragged_dot_general(
        x_XI, y_XO, sizes_E, dims, preferred_element_type=jnp.float32
    )
    return sums_EIO.astype(dtype)


def _looped_outer(x_XI, y_XO, sizes_E, *, dtype):
    (E,), I, O = sizes_E.shape, x_XI.shape[1], y_XO.shape[1]
    padded_XI, padded_XO = _padded(x_XI), _padded(y_XO)

    def block(e, start, end, sums_EIO):
        inside_R1 = (start + jnp.arange(_BLOCK) < end)[:, None]
        rows_RI = jax.lax.dynamic_slice_in_dim(padded_XI, start, _BLOCK)
        rows_RO = jax.lax.dynamic_slice_in_dim(padded_XO, start, _BLOCK)
        return sums_EIO.at[e].add(_dot("RI,RO->IO", jnp.where(inside_R1, rows_RI, 0), rows_RO))

    return _over_blocks(sizes_E, block, jnp.zeros((E, I, O), jnp.float32)).astype(dtype)


def _pallas_outer(x_XI, y_XO, sizes_E, *, dtype, interpret=False):
    from jaxreason.kernels import grouped_pallas

    return grouped_pallas.outer(x_XI, y_XO, sizes_E, dtype=dtype, interpret=interpret)


_ROWS_TIMES = {
    "loop": _looped_rows,
    "ragged": _ragged_rows,
    "pallas": _pallas_rows,
    "interpret": functools.partial(_pallas_rows, interpret=True),
}
_OUTER = {
    "loop": _looped_outer,
    "ragged": _ragged_outer,
    "pallas": _pallas_outer,
    "interpret": functools.partial(_pallas_outer, interpret=True),
}


def _run(kernels: dict[str, Callable], implementation: str, *operands, **options):
    if implementation != "auto":
        return kernels[implementation](*operands, **options)
    on = lambda name: functools.partial(kernels[name], **options)
    return jax.lax.platform_dependent(*operands, tpu=on("ragged"), default=on("loop"))


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
