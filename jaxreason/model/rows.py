"""Rows of tokens on a mesh that splits their length: padded, and in the order of stripes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason.kernels.ring import stripes
from jaxreason.parallel import rules


@dataclasses.dataclass(frozen=True)
class Rows:
    """Between positions as a batch has them and positions as the layers do.

    Padding has segment 0 and weight 0, so nothing comes of it.
    """

    mesh: Mesh | None

    def arranged(self, x_BT: jax.Array) -> jax.Array:
        """x_BT (or x_BTK) for the layers: T padded with zeros to what divides, then in stripes."""
        if self.mesh is None:
            return x_BT
        context, length = rules.axis_size(self.mesh, "length"), x_BT.shape[1]
        padded = self._padded(length)
        if padded != length:
            x_BT = jnp.pad(x_BT, [(0, 0), (0, padded - length)] + [(0, 0)] * (x_BT.ndim - 2))
        return x_BT if context == 1 else x_BT[:, stripes(padded, context)]

    def restored(self, x_BT: jax.Array, length: int) -> jax.Array:
        """The first `length` positions as the batch had them."""
        if self.mesh is None:
            return x_BT
        context, padded = rules.axis_size(self.mesh, "length"), x_BT.shape[1]
        if context == 1:
            return x_BT[:, :length]
        return x_BT[:, np.argsort(stripes(padded, context))[:length]]

    def _padded(self, length: int) -> int:
        context = rules.axis_size(self.mesh, "length")
        pieces = rules.axis_size(self.mesh, "residual")
        unit = pieces if context == 1 else math.lcm(2 * context, pieces)
        return -(-length // unit) * unit
