"""The train state: how it is born, and where each of its arrays lives."""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason.model.decoder import LanguageModel
from jaxreason.types import Params, TrainState


def create(
    model: LanguageModel,
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    params: Params | None = None,
) -> TrainState:
    """A fresh state, every array born on its own devices. `params` None: random ones."""
    init_key, key = jax.random.split(key)

    def init(params):
        params = model.init(init_key) if params is None else params
        return TrainState(
            step=jnp.int32(0), params=params, opt=optimizer.init(params), key=key,
            nonfinite=jnp.int32(0),
        )  # fmt: skip

    return jax.jit(init, out_shardings=shardings(model, optimizer))(params)


def shardings(model: LanguageModel, optimizer: optax.GradientTransformation) -> TrainState | None:
    """A TrainState of shardings; None without a mesh. Optimizer state lies as its weight does."""
    if model.mesh is None:
        return None
    everywhere = NamedSharding(model.mesh, PartitionSpec())
    weights = model.shardings()
    keys = lambda path: tuple(str(getattr(key, "key", key)) for key in path)
    by_path = {keys(path): place for path, place in jax.tree_util.tree_leaves_with_path(weights)}

    def place(path, leaf) -> NamedSharding:
        """That of the weight whose path ends the leaf's, as every optimizer of Optax names them."""
        names = keys(path)
        ends = (names[i:] for i in range(len(names)))
        return next((by_path[end] for end in ends if end in by_path), everywhere)

    opt = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, model.shapes))
    return TrainState(
        step=everywhere, params=weights, opt=opt, key=everywhere, nonfinite=everywhere
    )


def abstract(model: LanguageModel, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a restore is told to fill."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=model.shapes,
        opt=jax.eval_shape(optimizer.init, model.shapes),
        key=key,
        nonfinite=jax.ShapeDtypeStruct((), jnp.int32),
    )
    places = shardings(model, optimizer)
    if places is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = jax.tree.map(lambda _: device, state)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state, places,
    )  # fmt: skip
