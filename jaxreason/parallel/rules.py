"""THE table: which mesh axis each logical axis of a weight or an activation is split over."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": "context",
    "residual": ("context", "tensor"),  # length of the stream between layers, and of its norms
    "lane": ("data", "fsdp", "expert", "context"),  # rows that are sampled, one token at a time
    "model": None,  # activations' own width
    "whole": None,
    # weights
    "layer": None,
    "vocab": "tensor",
    "embed": ("fsdp", "expert", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "bias": "tensor",  # of the heads, split as they are
    "expert": "expert",
    "expert_embed": ("fsdp", "context"),  # of the experts' own matrices
    "router": None,  # its outputs
    "rank": None,  # of LoRA adapters
    "norm": None,  # scales are too small to be worth a gather
}

BATCH_AXES: tuple[str, ...] = RULES["batch"]
LANE_AXES: tuple[str, ...] = RULES["lane"]


def axis_size(mesh: Mesh, logical: str) -> int:
    """How many ways a logical axis is split on this mesh."""
    return math.prod(mesh.shape[name] for name in mesh_axes(logical))


def mesh_axes(logical: str) -> tuple[str, ...]:
    axes = RULES[logical]
    return axes if isinstance(axes, tuple) else (axes,) if axes else ()


def spec(logical_axes: Sequence[str]) -> PartitionSpec:
    return PartitionSpec(*(RULES[axis] for axis in logical_axes))


def sharding(
    mesh: Mesh, name: str, shape: Sequence[int], logical_axes: Sequence[str]
) -> NamedSharding:
    """The sharding of one weight.

    Raises ValueError naming the weight, the dim, the mesh axis, both numbers and those that would
    do where a dim does not divide.
    """
    for dim, (size, logical) in enumerate(zip(shape, logical_axes, strict=True)):
        split = [axis for axis in mesh_axes(logical) if mesh.shape[axis] > 1]
        ways = axis_size(mesh, logical)
        if size % ways:
            near = ", ".join(str(n) for n in range(1, 2 * ways) if size % n == 0)
            raise ValueError(
                f"weight {name}: dim {dim} ({logical}) = {size} is not a multiple of "
                f"mesh axis {' x '.join(split)} = {ways}; near that, it can be {near}"
            )
    return NamedSharding(mesh, spec(logical_axes))


def constrain(x: jax.Array, mesh: Mesh | None, *logical_axes: str) -> jax.Array:
    """Pin an activation's sharding; without a mesh, `x` itself."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(logical_axes)))
