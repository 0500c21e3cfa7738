"""The sampler's parameters are the trainer's: moved between meshes, copied where donated."""

import jax
import numpy as np
import pytest
from tiny_models import assert_trees_equal, tiny_model, tiny_params

from jaxreason.parallel.mesh import make_mesh
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.rollout.sync import place, snapshot
from jaxreason.types import Sampling


def test_parameters_move_between_meshes_and_stay_where_they_fit(monkeypatch):
    trainer = tiny_model(mesh=make_mesh({"data": 1, "fsdp": 8, "tensor": 1}), value_head=True)
    sampler = tiny_model(mesh=make_mesh({"data": 4, "fsdp": 1, "tensor": 2}))
    params = jax.device_put(trainer.with_value_head(tiny_params()), trainer.shardings())
    with monkeypatch.context() as patch:  # never through the host (no guard sees that on CPU)
        for module, name in ((jax, "device_get"), (np, "asarray"), (np, "array")):
            patch.setattr(module, name, lambda *_, **__: pytest.fail("through the host"))
        patch.setattr(
            jax.Array, "__array__", lambda *_: pytest.fail("through the host"), raising=False
        )
        moved = place(params, sampler)
    assert jax.tree.leaves(moved["layers"]["wq"])[0].sharding == sampler.shardings()["layers"]["wq"]
    assert_trees_equal({name: moved[name] for name in tiny_params()}, tiny_params())
    again = place(moved, sampler)
    for old, new in zip(jax.tree.leaves(moved), jax.tree.leaves(again), strict=True):
        pointers = [
            [s.data.unsafe_buffer_pointer() for s in x.addressable_shards] for x in (old, new)
        ]
        assert pointers[0] == pointers[1]


def test_another_mesh_samples_the_same():
    trainer = tiny_model(mesh=make_mesh({"data": 1, "fsdp": 8, "tensor": 1}))
    sampler = tiny_model(mesh=make_mesh({"data": 4, "fsdp": 1, "tensor": 2}))
    params = jax.device_put(tiny_params(), trainer.shardings())

    def sampled(model, params):
        config = EngineConfig(slots=8, steps=4)
        generate = build_generate(model, lambda text: [1, 2, len(text)], str, -1, config)
        rows = generate(
            params, ["a", "bcd"], Sampling(max_tokens=8, num_samples=2), jax.random.key(0)
        )
        return [[c.ids for c in row] for row in rows]

    assert sampled(sampler, params) == sampled(tiny_model(), tiny_params())


def test_a_snapshot_survives_the_donation_of_the_original():
    params = jax.tree.map(lambda x: x + 0, tiny_params())
    kept = snapshot(params)
    jax.block_until_ready(
        jax.jit(lambda p: jax.tree.map(lambda x: x * 0, p), donate_argnums=0)(params)
    )
    assert_trees_equal(kept, tiny_params())
    assert np.abs(kept["embedding"]).max() > 0
