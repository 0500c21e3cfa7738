"""The expert product: each row times the matrix of its own group, and its gradients.

Implementations:
  loop      the rows of a group, block by block: for any platform.
  megablox  JAX's own kernels for TPUs.
  pallas    kernels for GPUs (grouped_pallas.py). They compile for Hopper and Blackwell but have not
            run there, so nothing chooses them by itself.
  auto      megablox on TPU, else loop.

`jax.lax.ragged_dot` is not among them: XLA lowers it on CPU and GPU, and its gradient of the
matrices on TPU too, to a product of every row with every group behind a mask: with 128 groups 128
times the work (jax 0.10.2 to 0.12, libtpu 0.0.42; seen in the compiled programs).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxreason.kernels.check import held_against

IMPLEMENTATIONS = ("auto", "loop", "megablox", "pallas")
_PLATFORMS = {"megablox": ("tpu",), "pallas": ("gpu", "cuda")}  # the rest run on any

_BLOCK = 128  # rows of one product; of a group's last one some are another group's, and are dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    x_XI: jax.Array, w_EIO: jax.Array, sizes_E: jax.Array, implementation: str = "loop"
) -> jax.Array:
    """out_XO of x's dtype, sums in float32.

    Args:
      x_XI: rows sorted by group.
      sizes_E: rows of each group, int32. Together at most X: rows beyond them are multiplied by
        nothing, are zeros in the output and get no gradient.
      implementation: one that `choose` gives, or `interpret` and `interpret_megablox`: the kernels
        in their slow simulation, for tests.
    """
    return _ROWS_TIMES[implementation](x_XI, w_EIO, sizes_E)


def _forward(x_XI, w_EIO, sizes_E, implementation):
    return grouped_matmul(x_XI, w_EIO, sizes_E, implementation), (x_XI, w_EIO, sizes_E)


def _backward(implementation, residuals, dout_XO):
    x_XI, w_EIO, sizes_E = residuals
    dx_XI = _ROWS_TIMES[implementation](dout_XO, w_EIO, sizes_E, transposed=True)
    dw_EIO = _OUTER[implementation](x_XI, dout_XO, sizes_E, dtype=w_EIO.dtype)
    return dx_XI, dw_EIO, None


grouped_matmul.defvjp(_forward, _backward)


def choose(name: str, platform: str) -> str:
    """The implementation of `mesh.experts = name` on devices of that platform.

    Raises ValueError for an unknown name, or one that the devices cannot run.
    """
    if name not in IMPLEMENTATIONS:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"mesh.experts is {name!r}; it must be one of {known}")
    if name == "auto":
        return "megablox" if platform == "tpu" else "loop"
    if platform not in _PLATFORMS.get(name, (platform,)):
        kind = {"megablox": "TPUs", "pallas": "NVIDIA GPUs"}[name]
        raise ValueError(
            f"mesh.experts is {name!r}, kernels for {kind}, but the devices are {platform}; "
            f"auto runs on any"
        )
    return name


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
        return dict(zip(("output", "gradient of x", "gradient of w"), (out_XO, *pullback(dout_XO))))

    held_against(
        functools.partial(run, implementation, dtype),
        functools.partial(run, "loop", jnp.float32),
        setting=f"mesh.experts = {implementation}",
        instead="mesh.experts = loop",
    )


# --- x_XI times its group's matrix: out_XO. `transposed`: w is [E, O, I] --------------------------


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


def _megablox_rows(x_XI, w_EIO, sizes_E, *, transposed=False, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm  # TPU's API, likewise

    padded_XI, rows = _whole_tiles(x_XI)
    O = w_EIO.shape[1 if transposed else 2]
    tiling = (rows, *_tile_sides(x_XI.dtype, x_XI.shape[1], O))
    out_XO = gmm(
        padded_XI, w_EIO, sizes_E, x_XI.dtype, tiling, transpose_rhs=transposed, interpret=interpret
    )
    # What it gives beyond the groups is memory that nobody wrote.
    in_a_group_X1 = (jnp.arange(x_XI.shape[0]) < sizes_E.sum())[:, None]
    return jnp.where(in_a_group_X1, out_XO[: x_XI.shape[0]], 0)


# --- the sum over each group's rows of x y^T: [E, I, O] of `dtype` --------------------------------


def _looped_outer(x_XI, y_XO, sizes_E, *, dtype):
    (E,), I, O = sizes_E.shape, x_XI.shape[1], y_XO.shape[1]
    padded_XI, padded_XO = _padded(x_XI), _padded(y_XO)

    def block(e, start, end, sums_EIO):
        inside_R1 = (start + jnp.arange(_BLOCK) < end)[:, None]
        rows_RI = jax.lax.dynamic_slice_in_dim(padded_XI, start, _BLOCK)
        rows_RO = jax.lax.dynamic_slice_in_dim(padded_XO, start, _BLOCK)
        return sums_EIO.at[e].add(_dot("RI,RO->IO", jnp.where(inside_R1, rows_RI, 0), rows_RO))

    return _over_blocks(sizes_E, block, jnp.zeros((E, I, O), jnp.float32)).astype(dtype)


def _megablox_outer(x_XI, y_XO, sizes_E, *, dtype, interpret=False):
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (padded_XI, rows), (padded_XO, _) = _whole_tiles(x_XI), _whole_tiles(y_XO)
    tiling = (rows, *_tile_sides(x_XI.dtype, x_XI.shape[1], y_XO.shape[1]))
    return tgmm(padded_XI.T, padded_XO, sizes_E, dtype, tiling, interpret=interpret)


def _pallas_outer(x_XI, y_XO, sizes_E, *, dtype, interpret=False):
    from jaxreason.kernels import grouped_pallas

    return grouped_pallas.outer(x_XI, y_XO, sizes_E, dtype=dtype, interpret=interpret)


_ROWS_TIMES = {
    "loop": _looped_rows,
    "megablox": _megablox_rows,
    "pallas": _pallas_rows,
    "interpret": functools.partial(_pallas_rows, interpret=True),
    "interpret_megablox": functools.partial(_megablox_rows, interpret=True),
}
_OUTER = {
    "loop": _looped_outer,
    "megablox": _megablox_outer,
    "pallas": _pallas_outer,
    "interpret": functools.partial(_pallas_outer, interpret=True),
    "interpret_megablox": functools.partial(_megablox_outer, interpret=True),
}


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


def _whole_tiles(x_XI):
    """(x with rows up to a whole number of TPU tiles, the rows of a tile)."""
    rows = min(512, -(-x_XI.shape[0] // _BLOCK) * _BLOCK)
    return jnp.pad(x_XI, ((0, -x_XI.shape[0] % rows), (0, 0))), rows


def _tile_sides(dtype, *dims: int) -> tuple[int, ...]:
    """Of a TPU tile, so that what a kernel holds stays under the 16 MiB that the compiler grants
    (all of VMEM, which is more, is not for one kernel)."""
    largest = 1024 if jnp.dtype(dtype).itemsize == 2 else 512
    return tuple(min(largest, dim) for dim in dims)


def _padded(x_XI):
    """With rows for the last block to read past the end."""
    return jnp.pad(x_XI, ((0, _BLOCK), (0, 0)))


_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
