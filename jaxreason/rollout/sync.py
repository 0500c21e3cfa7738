"""From the trainer's parameters to the sampler's, on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.types import Params


def place(params: Params, model: LanguageModel) -> Params:
    """The parameters where the sampler's model wants them, moved from device to device.

    Those that lie there already are taken as they are. The meshes may differ in shape, not in their
    devices; but of several processes each has a sampler on its own devices, where all of the
    parameters come together, and all call this at the same time. A parameter that the sampler has
    no use for (a critic's head) stays where it is. LoRA adapters, which are merged before the first
    token, go to every device whole.
    """
    if model.mesh is None:
        return params
    wanted = model.shardings()
    if "lora" in params:
        everywhere = NamedSharding(model.mesh, PartitionSpec())
        wanted = {**wanted, "lora": jax.tree.map(lambda _: everywhere, params["lora"])}
    chosen = {name: params[name] for name in wanted}
    if hosts.several():
        here = all(leaf.is_fully_addressable for leaf in jax.tree.leaves(chosen))
        return chosen if here else _gathered(chosen, wanted, model.mesh)
    return {**params, **jax.device_put(chosen, wanted)}


def _gathered(params: Params, wanted: Params, own: Mesh) -> Params:
    """Copies of all parameters on the devices of every process: laid out alike, each for itself."""
    mesh = _of_all_processes(own)
    whole = jax.tree.map(lambda sharding: NamedSharding(mesh, sharding.spec), wanted)
    moved = jax.device_put(params, whole)

    def local(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        parts = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)

    return jax.tree.map(local, moved, wanted)


def _of_all_processes(own: Mesh) -> Mesh:
    """The meshes of all processes, each as this one's, under one more axis."""
    place = {device.id: i for i, device in enumerate(jax.local_devices())}
    order = [place[device.id] for device in own.devices.flat]
    everyone = [jax.local_devices(process_index=i) for i in range(hosts.count())]
    grid = np.array([[devices[i] for i in order] for devices in everyone])
    axes = ("process", *own.axis_names)
    return Mesh(grid.reshape(-1, *own.devices.shape), axes, axis_types=(AxisType.Auto,) * len(axes))


@jax.jit
def snapshot(params: Params) -> Params:
    """A copy where the original lies: a train step may be given, and destroy, the original."""
    return jax.tree.map(jnp.copy, params)
