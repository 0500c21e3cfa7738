"""The value head: off, nothing changes; on, a zero scalar a token that any checkpoint can gain."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import QUICK, assert_trees_equal, packed_batch, tiny_model, tiny_params

from jaxreason.checkpoint import hf
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimizerConfig, make_optimizer

BATCH = packed_batch([[9, 14], [20]], length=24)


def valued_model(mesh=None) -> LanguageModel:
    return LanguageModel(tiny_model().config, QUICK, mesh, value_head=True)


def hidden(model, params):
    return model.hidden(params, BATCH.tokens_BT, BATCH.segments_BT, BATCH.positions_BT)


def test_the_tree_gains_a_zero_head_and_nothing_else():
    model, key = valued_model(), jax.random.key(0)
    assert "value_head" not in tiny_model().shapes and "value_head" not in tiny_params()
    params = jax.jit(model.init)(key)
    head = params.pop("value_head")
    assert head["weight"].shape == (model.config.embed_dim,) and head["bias"].shape == (1,)
    assert not any(leaf.any() for leaf in jax.tree.leaves(head))
    assert_trees_equal(params, tiny_params())  # the same random numbers
    assert model.num_params == tiny_model().num_params + model.config.embed_dim + 1


def test_a_warm_start_gains_a_zero_head_and_keeps_a_learnt_one():
    model = valued_model()
    params = model.with_value_head(tiny_params())
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, model.shapes)
    learnt = params | {"value_head": jax.tree.map(jnp.ones_like, params["value_head"])}
    assert_trees_equal(model.with_value_head(learnt), learnt)
    assert tiny_model().with_value_head(tiny_params()) is tiny_params()  # a model without one


def test_values_are_float32_products_of_the_hidden_state():
    model = valued_model()
    params = model.with_value_head(tiny_params())
    h_BTD = hidden(model, params)
    assert not model.values(params, h_BTD, h_BTD.shape[1]).any()
    weight_D = np.random.default_rng(0).normal(size=32).astype(np.float32)
    params["value_head"] = {"weight": weight_D, "bias": np.float32([0.25])}
    got = model.values(params, h_BTD.astype(jnp.bfloat16), h_BTD.shape[1])
    want = np.asarray(h_BTD.astype(jnp.bfloat16), np.float64) @ weight_D + 0.25
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_the_network_runs_with_and_without_a_head_in_its_parameters():
    """A reference model has none, and a sampler need not know of one."""
    model, plain = valued_model(), tiny_model()
    want = hidden(plain, tiny_params())
    params = model.with_value_head(tiny_params())
    for run, tree in ((model, params), (model, tiny_params()), (plain, params)):
        np.testing.assert_array_equal(hidden(run, tree), want)
    assert_trees_equal(model.decode_weights(params), plain.decode_weights(tiny_params()))


def test_it_is_split_and_optimised_like_any_weight():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = valued_model(mesh)
    optimizer = make_optimizer(OptimizerConfig(), model.axes)
    params = model.with_value_head(tiny_params())
    state = state_lib.create(model, optimizer, jax.random.key(0), params)
    for tree in (state.params, state.opt[0].mu):
        weight = tree["value_head"]["weight"]
        assert weight.sharding.shard_shape(weight.shape) == (8,)
    make_optimizer(OptimizerConfig(name="muon"), model.axes).init(state.params)


def test_a_hugging_face_export_leaves_it_out(tmp_path):
    model = valued_model()
    params = model.with_value_head(tiny_params())
    hf.export_hf(tmp_path / "hf", model.config, params, generation={})
    _, back = hf.import_hf(tmp_path / "hf")
    assert_trees_equal(back, tiny_params())
