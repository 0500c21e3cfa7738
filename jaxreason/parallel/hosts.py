"""Rows of this process -> one global array over the mesh."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxreason.parallel import rules


def to_global(mesh: Mesh, tree):
    """Numpy rows held by this process ([rows, ...] leaves) as global arrays split over the batch.

    Every process passes its own block of rows; with one process that is the whole batch.
    """
    sharding = NamedSharding(mesh, rules.spec(("batch",)))
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(sharding, np.asarray(rows)), tree
    )


def check_rows(mesh: Mesh | None, rows: int, microbatches: int, num_shards: int) -> None:
    """Raises ValueError, naming the keys and numbers, when a batch cannot be cut evenly."""
    if rows % (num_shards * microbatches):
        raise ValueError(
            f"data.rows = {rows} is not a multiple of data.num_shards * mesh.microbatches "
            f"= {num_shards} * {microbatches}"
        )
    ways = rules.axis_size(mesh, "batch") if mesh is not None else 1
    if (rows // microbatches) % ways:
        raise ValueError(
            f"data.rows / mesh.microbatches = {rows // microbatches} is not a multiple of "
            f"mesh axes {' x '.join(rules.BATCH_AXES)} = {ways}"
        )
