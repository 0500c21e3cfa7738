"""The expert product: exact for any sizes, gradients too, and nothing of [groups, rows, *]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.kernels import grouped, grouped_pallas
from jaxreason.kernels.grouped import grouped_matmul

X, I, O = 300, 136, 72  # no multiple of a block or a tile (128, 64)
# Traced, so one program does all. Groups of none, of one, of exactly a block, just over it, all in
# one; together every row, some, none.
SIZES = [
    (128, 129, 0, 43), (0, 0, 0, 300), (1, 298, 0, 1), (5, 0, 3, 0), (100, 60, 80, 50), (0, 0, 0, 0)
]  # fmt: skip
RUN_HERE = ("loop", "interpret", "interpret_megablox")
KEYS = jax.random.split(jax.random.key(0), 3)
OPERANDS = tuple(
    jax.random.normal(key, shape) for key, shape in zip(KEYS, [(X, I), (4, I, O), (X, O)])
)


def product_and_gradients(implementation, sizes_E, x_XI, w_EIO, dout_XO):
    product = lambda x, w: grouped_matmul(x, w, sizes_E, implementation)
    out_XO, pullback = jax.vjp(product, x_XI, w_EIO)
    return out_XO, *pullback(dout_XO)


def by_hand(sizes):
    """The same three arrays, a row at a time in float64."""
    x_XI, w_EIO, dout_XO = (np.asarray(operand, np.float64) for operand in OPERANDS)
    out_XO, dx_XI, dw_EIO = np.zeros((X, O)), np.zeros((X, I)), np.zeros((4, I, O))
    for row, e in enumerate(np.repeat(np.arange(4), sizes)):  # the rows beyond stay zeros
        out_XO[row], dx_XI[row] = x_XI[row] @ w_EIO[e], w_EIO[e] @ dout_XO[row]
        dw_EIO[e] += np.outer(x_XI[row], dout_XO[row])
    return out_XO, dx_XI, dw_EIO


@pytest.mark.parametrize("implementation", RUN_HERE)
def test_product_and_gradients(implementation):
    run = jax.jit(functools.partial(product_and_gradients, implementation))
    for sizes in SIZES:
        for got, want in zip(run(jnp.array(sizes, jnp.int32), *OPERANDS), by_hand(sizes)):
            # sums of up to 300 products of size 1, in float32
            np.testing.assert_allclose(got, want, atol=2e-4, err_msg=str(sizes))


def test_smaller_tiles():
    """Several tiles a side, and edges within one."""
    tiles = grouped_pallas.Tiles(rows=32, columns=16, inner=16)
    x_XI, w_EIO, dout_XO = OPERANDS
    sizes_E = jnp.array([33, 0, 100, 31], jnp.int32)
    want_XO, _, want_EIO = by_hand((33, 0, 100, 31))
    got_XO = grouped_pallas.rows_times(x_XI, w_EIO, sizes_E, tiles=tiles, interpret=True)
    np.testing.assert_allclose(got_XO, want_XO, atol=2e-4)
    got_EIO = grouped_pallas.outer(x_XI, dout_XO, sizes_E, tiles=tiles, interpret=True)
    np.testing.assert_allclose(got_EIO, want_EIO, atol=2e-4)


def test_dtypes_are_the_operands():
    operands = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in OPERANDS]
    sizes_E = jax.ShapeDtypeStruct((4,), jnp.int32)
    for implementation in RUN_HERE:
        run = functools.partial(product_and_gradients, implementation)
        assert {x.dtype for x in jax.eval_shape(run, sizes_E, *operands)} == {jnp.dtype("bfloat16")}


def test_nothing_is_held_of_every_row_and_group():
    """XLA's own lowering of a ragged product on CPU holds [groups, rows, in]: 25 MB here."""
    x_XI, w_EIO = jnp.ones((2048, 24)), jnp.ones((128, 24, 40))
    sizes_E = jnp.full(128, 16, jnp.int32)
    loss = lambda x, w: (grouped_matmul(x, w, sizes_E) ** 2).sum()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x_XI, w_EIO).compile()
    own = x_XI.nbytes + w_EIO.nbytes + 2 * 2048 * 40 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * own  # about 3 MB


def test_a_kernel_that_is_wrong_is_refused_with_both_numbers(monkeypatch):
    grouped.check("interpret", jnp.bfloat16)
    outer = grouped_pallas.outer

    def wrong(x_XI, y_XO, sizes_E, **options):
        return outer(x_XI, y_XO, sizes_E, **options).at[0, 5, 7].add(99)

    monkeypatch.setattr(grouped_pallas, "outer", wrong)
    message = r"mesh.experts = interpret: gradient of w at \(0, 5, 7\) is \d+.*, but it should be "
    with pytest.raises(ValueError, match=message):
        grouped.check("interpret", jnp.bfloat16)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the kernel may run")
def test_a_kernel_that_does_not_run_here_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mesh.experts = pallas does not run here \(.*interpret"):
        grouped.check("pallas")


def test_tiles_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"Tiles.inner is 24; it must be a power of two of at lea"):
        grouped_pallas.Tiles(inner=24)
    with pytest.raises(ValueError, match=r"Tiles.num_warps is 3; it must be 1, 2, 4, 8 or 16"):
        grouped_pallas.Tiles(num_warps=3)
    with pytest.raises(ValueError, match=r"Tiles.num_stages is 0; it must be at least 1"):
        grouped_pallas.Tiles(num_stages=0)
