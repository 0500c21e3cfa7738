"""Parameters of another run, into a model with or without a value head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_params

from jaxreason.checkpoint.store import Store
from jaxreason.recipes import weights
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.train.state import TrainState


@pytest.mark.parametrize("saved", [False, True], ids=["from a policy", "from a policy and critic"])
@pytest.mark.parametrize("wanted", [False, True], ids=["to a policy", "to a policy and critic"])
def test_a_value_head_is_taken_along_where_the_model_has_one(tmp_path, saved, wanted):
    params = dict(tiny_params())
    if saved:
        shapes = tiny_model(value_head=True).shapes["value_head"]
        params["value_head"] = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
    zero = jnp.int32(0)
    state = TrainState(step=zero, params=params, opt=(), key=jax.random.key(0), nonfinite=zero)
    folder = tmp_path / "checkpoints" / "rl"
    (tmp_path / "config.json").write_text("{}")
    with Store(folder) as store:
        store.save(3, {"state": state, "data": {}, "host": {}}, wait=True)
    model = tiny_model(value_head=wanted)
    loaded = weights.load(Checkpoint("@rl", "run", None, "rl"), model, lambda _: folder)
    assert ("value_head" in loaded) == (saved and wanted)
    jax.tree.map(np.testing.assert_array_equal, loaded, {k: params[k] for k in loaded})
    assert jax.tree.structure(model.with_value_head(loaded)) == jax.tree.structure(model.shapes)
