"""From the trainer's parameters to the sampler's, on the devices."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason.model.decoder import LanguageModel
from jaxreason.types import Params


def place(params: Params, model: LanguageModel) -> Params:
    """The parameters where the sampler's model wants them, moved from device to device.

    Those that lie there already are taken as they are. The meshes may differ in shape, not in their
    devices. A parameter that the sampler has no use for (a critic's head) stays where it is.
    LoRA adapters, which are merged before the first token, go to every device whole.
    """
    if model.mesh is None:
        return params
    wanted = model.shardings()
    if "lora" in params:
        everywhere = NamedSharding(model.mesh, PartitionSpec())
        wanted = {**wanted, "lora": jax.tree.map(lambda _: everywhere, params["lora"])}
    moved = jax.device_put({name: params[name] for name in wanted}, wanted)
    return {**params, **moved}


@jax.jit
def snapshot(params: Params) -> Params:
    """A copy where the original lies: a train step may be given, and destroy, the original."""
    return jax.tree.map(jnp.copy, params)
