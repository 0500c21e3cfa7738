"""A layer's products with its weights and their adapters, laid over the mesh.

What fsdp splits is gathered by hand, in the type of the activations; its gradient is added up and
split again in float32. Left to the partitioner, XLA:GPU transposes the float32 weights and
gradients of all layers for those that are split along an inner dim (wo, w_down): four copies more.

Between layers the residual stream lies split along T over the tensor axis too. A column-parallel
product gathers it and has outputs that are split (heads, the MLP's width); a row-parallel one takes
those and leaves sums that are split along T again. Forward and backward each move the stream once a
product, in its own type. Sources: arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from jaxreason.parallel import rules
from jaxreason.types import Params

GATHERED = "gathered"  # weights, which no layer keeps for its backward pass
_TENSOR = rules.RULES["mlp"]
_STREAM = rules.spec(("batch", "residual"))
_SPLIT = rules.spec(("batch", "length", "mlp"))
_COLUMNS = ("embed", "mlp")  # of heads as of the MLP's width


def column_parallel(
    x_BTD: jax.Array,
    weights: Sequence[jax.Array],
    adapters: Sequence[Params | None],
    mesh: Mesh | None = None,
) -> tuple[jax.Array, ...]:
    """x_BTD times each weight [D, *out] -> [B, T, *out] each, split over the first of `out`.

    Args:
      adapters: of each weight; {"a": [D, R], "b": [R, *out]} or None.
    """
    if not splits_weights(mesh):
        pairs = zip(weights, adapters)
        return tuple(_adapted(x_BTD, w, adapter, mesh=mesh) for w, adapter in pairs)

    def local(x_BTD, weights, adapters):
        if mesh.shape[_TENSOR] > 1:
            x_BTD = jax.lax.all_gather(x_BTD, _TENSOR, axis=1, tiled=True)
        found = [whole(w, _COLUMNS, mesh, x_BTD.dtype) for w in weights]
        return tuple(_adapted(x_BTD, w, a, mesh=mesh) for w, a in zip(found, adapters))

    places = tuple(a and {"a": PartitionSpec(), "b": rules.spec(("rank", "mlp"))} for a in adapters)
    run = _each_device(local, mesh, (_STREAM, rules.spec(_COLUMNS), places), _SPLIT)
    return run(x_BTD, tuple(weights), tuple(adapters))


def row_parallel(
    x: jax.Array, weight: jax.Array, adapter: Params | None, mesh: Mesh | None = None
) -> jax.Array:
    """x [B, T, *in], split over the first of `in`, times a weight [*in, D] -> [B, T, D].

    Args:
      adapter: {"a": [*in, R], "b": [R, D]} or None.
    """
    num_in = weight.ndim - 1
    if not splits_weights(mesh):
        out_BTD = _adapted(x, weight, adapter, num_in, mesh)
        return rules.constrain(out_BTD, mesh, "batch", "residual", "model")

    names = ("mlp", *["head_dim"] * (num_in - 1), "embed")

    def local(x, weight, adapter):
        out_BTD = _adapted(x, whole(weight, names, mesh, x.dtype), adapter, num_in, mesh)
        if mesh.shape[_TENSOR] == 1:
            return out_BTD
        return jax.lax.psum_scatter(out_BTD, _TENSOR, scatter_dimension=1, tiled=True)

    place = adapter and {"a": rules.spec(("mlp",)), "b": PartitionSpec()}
    run = _each_device(local, mesh, (_SPLIT, rules.spec(names), place), _STREAM)
    return run(x, weight, adapter)


def whole(
    weight: jax.Array,
    logical_axes: Sequence[str],
    mesh: Mesh,
    dtype: jnp.dtype | None = None,
    dim: str = "embed",
):
    """Under shard_map, a device's part of a weight, gathered over the axes that split `dim`.

    Its gradient is added up over them in float32, and then of the weight's own type.

    Args:
      dtype: that it is cast to first; None: its own.
    """
    axes = tuple(axis for axis in rules.mesh_axes(dim) if mesh.shape[axis] > 1)
    part = _Part(axes, list(logical_axes).index(dim), weight.dtype, dtype or weight.dtype)
    found = _gathered(weight, part) if axes else weight.astype(part.travels)
    return checkpoint_name(found, GATHERED)


class _Part(NamedTuple):
    axes: tuple[str, ...]  # that split it
    dim: int  # which they split
    dtype: jnp.dtype
    travels: jnp.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(weight, part: _Part):
    # Gathered in front and then moved: along an inner dim XLA:GPU would want the weights of all
    # layers transposed first, a second float32 copy of them.
    parts = jax.lax.all_gather(weight.astype(part.travels), part.axes)
    before, after = weight.shape[: part.dim], weight.shape[part.dim + 1 :]
    return jnp.moveaxis(parts, 0, part.dim).reshape(*before, -1, *after)


def _gathered_forward(weight, part: _Part):
    return _gathered(weight, part), None


def _gathered_backward(part: _Part, _, gradient):
    before, after = gradient.shape[: part.dim], gradient.shape[part.dim + 1 :]
    ways = jax.lax.axis_size(part.axes)
    parts = gradient.astype(jnp.float32).reshape(*before, ways, -1, *after)
    parts = jnp.moveaxis(parts, part.dim, 0)  # scattered from in front, for the same reason
    return (jax.lax.psum_scatter(parts, part.axes, scatter_dimension=0).astype(part.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def project(x, w, num_in: int = 1, mesh: Mesh | None = None):
    """x [B, T, *in] times w [*in, *out] over its first `num_in` dims -> [B, T, *out].

    Without a mesh one product of two matrices: the gradient of w of the same einsum over
    [B, T, ...] costs 2.5 times as much on CPU, where XLA then transposes the larger operand. On a
    mesh B and T stay apart: joined they cannot both be split. Sums are in float32.
    """
    rows, into, out = x.shape[:2], w.shape[:num_in], w.shape[num_in:]
    x_XI, w_IO = x.reshape(*rows, math.prod(into)), w.reshape(math.prod(into), -1)
    if mesh is None:
        x_XI = x_XI.reshape(-1, math.prod(into))
    product = _product if x.dtype == jnp.float32 else _narrow_product
    return product(x_XI, w_IO).reshape(*rows, *out)


def _product(x_XI, w_IO):
    out_XO = jnp.einsum("...I,IO->...O", x_XI, w_IO, preferred_element_type=jnp.float32)
    return out_XO.astype(x_XI.dtype)


@jax.custom_vjp
def _narrow_product(x_XI, w_IO):
    """Of bfloat16, whose gradients multiply bfloat16 too.

    JAX's own multiply float32 by float32, for the cast of the sums comes first on the way back, and
    XLA keeps those: at half the speed at best (an H200's peak is 495 TFLOP/s in TF32, 990 in
    bfloat16). The terms are the same: bfloat16 numbers and their products are exact in float32.
    """
    return _product(x_XI, w_IO)


def _narrow_forward(x_XI, w_IO):
    return _product(x_XI, w_IO), (x_XI, w_IO)


def _narrow_backward(operands, dout_XO):
    x_XI, w_IO = operands
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dx_XI = dot("...O,IO->...I", dout_XO, w_IO).astype(x_XI.dtype)
    return dx_XI, dot("...I,...O->IO", x_XI, dout_XO).astype(w_IO.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def _adapted(x, weight, adapter: Params | None, num_in: int = 1, mesh: Mesh | None = None):
    out = project(x, weight.astype(x.dtype), num_in, mesh)
    if adapter is None:
        return out
    return out + project(project(x, adapter["a"], num_in, mesh), adapter["b"], mesh=mesh)


def splits_weights(mesh: Mesh | None) -> bool:
    """Whether a layer's matrices are in parts; of whole copies the partitioner adds gradients."""
    axes = {*rules.mesh_axes("embed"), _TENSOR}
    return mesh is not None and any(mesh.shape[axis] > 1 for axis in axes)


def _each_device(local: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
