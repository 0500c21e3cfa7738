"""Types inside jax.shard_map: over which mesh axes does an array vary?

A custom_vjp must return cotangents of its arguments' types, and a scan a carry of its start's type.
Both want all arrays to vary over the same axes. Outside shard_map the set is empty and `vary` does
nothing.
"""

import jax


def varying_axes(*arrays) -> frozenset[str]:
    """The mesh axes over which any of the arrays (or trees of arrays) vary."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays))
    )


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """x, typed as varying over `axes` too. Its transpose sums the cotangent over the added ones."""
    return jax.lax.pcast(x, tuple(sorted(axes - varying_axes(x))), to="varying")
