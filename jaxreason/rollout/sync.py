"""From the trainer's parameters to the sampler's, on the devices."""

import jax
import jax.numpy as jnp

from jaxreason.types import Params


@jax.jit
def snapshot(params: Params) -> Params:
    """A copy where the original lies: a train step may be given, and destroy, the original."""
    return jax.tree.map(jnp.copy, params)
