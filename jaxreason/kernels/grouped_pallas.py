"""The expert product on GPUs: Pallas kernels (Triton) of grouped.py's two functions.

A program multiplies one tile. Row tiles start where their group starts, so a tile holds rows of one
group and one matrix; how many tiles there are is only known on the device, so the grid is as large
as any sizes can need and programs without rows end at once.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of what one program multiplies; powers of two, at least 16 as tensor cores want."""

    rows: int = 128  # of the output; of the weights' gradient its first dim
    columns: int = 128  # of the output
    inner: int = 64  # of the sum, a step
    num_warps: int = 8
    num_stages: int = 3  # steps of the sum in flight

    def __post_init__(self):
        for name in ("rows", "columns", "inner"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(
                    f"Tiles.{name} is {size}; it must be a power of two of at least 16"
                )
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"Tiles.num_warps is {self.num_warps}; it must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"Tiles.num_stages is {self.num_stages}; it must be at least 1")

    @property
    def options(self) -> plt.CompilerParams:
        """Given explicitly: without them jax 0.10 takes another backend than jax 0.11."""
        return plt.CompilerParams(num_warps=self.num_warps, num_stages=self.num_stages)


def rows_times(
    x_XI: jax.Array,
    w_EIO: jax.Array,
    sizes_E: jax.Array,
    *,
    transposed: bool = False,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> jax.Array:
    """out_XO of x's dtype: x times its group's matrix, sums in float32; zeros beyond the groups.

    Args:
      transposed: `w_EIO` is given as [E, O, I]; it is read as it lies.
    """
    X, O = x_XI.shape[0], w_EIO.shape[1 if transposed else 2]
    schedule = _row_tiles(sizes_E, X, tiles.rows)
    return pl.pallas_call(
        functools.partial(_product_kernel, transposed=transposed, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((X, O), x_XI.dtype),
        grid=(len(schedule[0]), pl.cdiv(O, tiles.columns)),
        compiler_params=tiles.options,
        interpret=interpret,
        name="grouped_rows_times",
    )(*schedule, x_XI, w_EIO)


def outer(
    x_XI: jax.Array,
    y_XO: jax.Array,
    sizes_E: jax.Array,
    *,
    dtype: jnp.dtype = jnp.float32,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> jax.Array:
    """[E, I, O] of `dtype`: the sum over each group's rows of x y^T, in float32."""
    (E,), I, O = sizes_E.shape, x_XI.shape[1], y_XO.shape[1]
    ends_E = jnp.cumsum(sizes_E)
    return pl.pallas_call(
        functools.partial(_outer_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((E, I, O), dtype),
        grid=(E, pl.cdiv(I, tiles.rows), pl.cdiv(O, tiles.columns)),
        compiler_params=tiles.options,
        interpret=interpret,
        name="grouped_outer",
    )(ends_E - sizes_E, ends_E, x_XI, y_XO)


def _row_tiles(sizes_E, num_rows: int, tile: int):
    """(group, first row, end of the group's rows) of every row tile, int32.

    The rows beyond the groups are a group after the last, so that they are written too. A group has
    at most one tile that is not full; tiles that are left over end where they start.
    """
    (E,) = sizes_E.shape
    sizes_G = jnp.append(sizes_E, num_rows - sizes_E.sum()).astype(jnp.int32)
    tiles_G = -(-sizes_G // tile)
    ends_G, last_tile_G = jnp.cumsum(sizes_G), jnp.cumsum(tiles_G)  # exclusive
    j_J = jnp.arange(num_rows // tile + E + 1, dtype=jnp.int32)
    group_J = jnp.minimum(jnp.searchsorted(last_tile_G, j_J, side="right"), E)
    start_J = (ends_G - sizes_G)[group_J] + (j_J - (last_tile_G - tiles_G)[group_J]) * tile
    return group_J, jnp.minimum(start_J, ends_G[group_J]), ends_G[group_J]


def _product_kernel(group_J, start_J, end_J, x_XI, w_EIO, out_XO, *, transposed, tiles):
    j, first_column = pl.program_id(0), pl.program_id(1) * tiles.columns
    e, start, end = group_J[j], start_J[j], end_J[j]
    (E, *_), I, O = w_EIO.shape, x_XI.shape[1], out_XO.shape[1]
    rows, columns = pl.ds(start, tiles.rows), pl.ds(first_column, tiles.columns)
    row_R, column_C = start + jnp.arange(tiles.rows), first_column + jnp.arange(tiles.columns)

    def add(step, sums_RC):
        inner = pl.ds(step * tiles.inner, tiles.inner)
        inside_I = step * tiles.inner + jnp.arange(tiles.inner) < I
        x_RI = _load(x_XI.at[rows, inner], row_R < end, inside_I)
        if transposed:
            w_IC = _load(w_EIO.at[e, columns, inner], column_C < O, inside_I).T
        else:
            w_IC = _load(w_EIO.at[e, inner, columns], inside_I, column_C < O)
        return sums_RC + jnp.dot(x_RI, w_IC, preferred_element_type=jnp.float32)

    zeros_RC = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    has_product = (e < E) & (start < end)  # rows beyond the groups are zeros
    steps = has_product.astype(jnp.int32) * pl.cdiv(I, tiles.inner)
    sums_RC = jax.lax.fori_loop(0, steps, add, zeros_RC)
    inside_RC = (row_R < end)[:, None] & (column_C < O)[None]
    plt.store(out_XO.at[rows, columns], sums_RC.astype(out_XO.dtype), mask=inside_RC)


def _outer_kernel(start_E, end_E, x_XI, y_XO, out_EIO, *, tiles):
    e = pl.program_id(0)
    first_row, first_column = pl.program_id(1) * tiles.rows, pl.program_id(2) * tiles.columns
    start, end = start_E[e], end_E[e]
    I, O = x_XI.shape[1], y_XO.shape[1]
    rows, columns = pl.ds(first_row, tiles.rows), pl.ds(first_column, tiles.columns)
    row_R, column_C = first_row + jnp.arange(tiles.rows), first_column + jnp.arange(tiles.columns)

    def add(step, sums_RC):
        first = start + step * tiles.inner
        inside_X = first + jnp.arange(tiles.inner) < end
        x_XR = _load(x_XI.at[pl.ds(first, tiles.inner), rows], inside_X, row_R < I)
        y_XC = _load(y_XO.at[pl.ds(first, tiles.inner), columns], inside_X, column_C < O)
        return sums_RC + jnp.dot(x_XR.T, y_XC, preferred_element_type=jnp.float32)

    zeros_RC = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    sums_RC = jax.lax.fori_loop(0, pl.cdiv(end - start, tiles.inner), add, zeros_RC)
    inside_RC = (row_R < I)[:, None] & (column_C < O)[None]
    plt.store(out_EIO.at[e, rows, columns], sums_RC.astype(out_EIO.dtype), mask=inside_RC)


def _load(ref, inside_A, inside_B):
    """A tile of `ref`, zeros outside."""
    return plt.load(ref, mask=inside_A[:, None] & inside_B[None], other=0)
