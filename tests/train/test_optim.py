"""Schedules at golden points, and what each optimizer does to which weight."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_params

from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimizerConfig, make_optimizer, make_schedule

PEAK = 1e-3
NORMS = {"attention_norm", "q_norm", "k_norm", "mlp_norm", "final_norm"}
# Each layer's matrix as (rows, columns) = (what it sums over, what it makes).
MATRICES = {
    "wq": (32, 32), "wk": (32, 16), "wv": (32, 16), "wo": (32, 32),
    "w_gate": (32, 48), "w_up": (32, 48), "w_down": (48, 32),
}  # fmt: skip


@pytest.mark.parametrize(
    "changes, steps, golden",
    [
        (
            dict(schedule="cosine", warmup_steps=10),
            110,
            {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 85: 0.1 + 0.45 * (1 - 0.5**0.5)},
        ),
        (dict(schedule="cosine", final_scale=0.0), 100, {0: 1.0, 50: 0.5, 75: 0.5 - 0.5**1.5}),
        (
            dict(schedule="wsd", warmup_steps=10, decay_steps=20),
            100,
            {0: 0.1, 9: 1.0, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 99: 0.145},
        ),
        (dict(schedule="wsd", decay_steps=4, final_scale=0.0), 4, {0: 1.0, 1: 0.75, 3: 0.25}),
        (dict(schedule="constant", warmup_steps=2), 10, {0: 0.5, 1: 1.0, 9: 1.0}),
    ],
)
def test_schedules(changes, steps, golden):
    schedule = make_schedule(OptimizerConfig(learning_rate=PEAK, **changes), steps)
    for step, share in golden.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(share * PEAK, rel=1e-5), step


def test_a_longer_wsd_run_is_the_same_until_its_decay():
    """`train.steps` may change when a run resumes: the steps already taken keep their rate."""
    config = OptimizerConfig(schedule="wsd", warmup_steps=5, decay_steps=10)
    short, long = (jax.vmap(make_schedule(config, steps))(jnp.arange(40)) for steps in (50, 500))
    np.testing.assert_array_equal(short, long)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"warmup_steps \+ decay_steps = 60 \+ 50 exceed .* = 100"):
        make_schedule(OptimizerConfig(schedule="wsd", warmup_steps=60, decay_steps=50), 100)
    for key, value in (("name", "sgd"), ("schedule", "linear"), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=rf"train.optimizer.{key} is {value!r}"):
            OptimizerConfig(**{key: value})


@functools.cache
def first_update(name: str, zero_gradient: bool, weight_decay: float):
    """The first update of a model with random or zero gradients, by the name of each weight."""
    model, params = tiny_model(), tiny_params()
    optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=weight_decay), model.axes)
    leaves, treedef = jax.tree.flatten(model.shapes)
    random = np.random.default_rng(0)
    made = [0 * leaf if zero_gradient else leaf for leaf in
            (random.normal(size=s.shape).astype(np.float32) for s in leaves)]  # fmt: skip
    gradients = jax.tree.unflatten(treedef, made)

    @jax.jit
    def update(gradients, params):
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    flat = lambda tree: {**tree["layers"], **{k: v for k, v in tree.items() if k != "layers"}}
    return flat(update(gradients, params)), flat(params)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_weight_decay_is_of_matrices_and_never_of_norms(name):
    """With zero gradients the update at rate 1 is -decay * weight, or nothing."""
    updates, params = first_update(name, zero_gradient=True, weight_decay=0.25)
    assert set(updates) == NORMS | set(MATRICES) | {"embedding"}
    for weight, update in updates.items():
        want = 0 * params[weight] if weight in NORMS else -0.25 * params[weight]
        np.testing.assert_allclose(update, want, rtol=1e-6, atol=1e-9, err_msg=weight)


def test_muon_orthogonalises_each_layers_matrix():
    """Singular values of each layer's update: near 1 times 0.2 sqrt(max(rows, columns)).

    Five Newton-Schulz steps with Muon's coefficients map [0.01, 1] into about [0.7, 1.2]; a random
    square matrix has a few values below that.
    """
    updates, _ = first_update("muon", zero_gradient=False, weight_decay=0.0)
    for weight, (rows, columns) in MATRICES.items():
        for layer in np.asarray(updates[weight]):
            values = np.linalg.svd(layer.reshape(rows, columns), compute_uv=False)
            values /= 0.2 * math.sqrt(max(rows, columns))
            assert len(values) == min(rows, columns)
            assert np.quantile(values, 0.1) > 0.6 and values.max() < 1.3, (weight, values)


def test_muon_leaves_norms_and_the_embedding_to_adam():
    """Adam's first update has one size for all entries; Muon's own default would take just these.

    The size: with Nesterov momentum b1 (1 - b1) / (1 - b1^2) + 1, at b1 = 0.9.
    """
    updates, _ = first_update("muon", zero_gradient=False, weight_decay=0.0)
    size = 0.9 * 0.1 / (1 - 0.9**2) + 1
    for weight in NORMS | {"embedding"}:
        np.testing.assert_allclose(np.abs(updates[weight]), size, rtol=1e-3, err_msg=weight)


def test_muon_updates_are_of_adams_size():
    """Root mean square near 0.2, so that one learning rate serves both (arXiv 2502.16982)."""
    updates, _ = first_update("muon", zero_gradient=False, weight_decay=0.0)
    for weight in MATRICES:
        assert 0.1 < np.sqrt(np.mean(np.square(updates[weight]))) < 0.3, weight


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_on_a_mesh_every_moment_lies_as_its_weight(name):
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    model = tiny_model(mesh)
    optimizer = make_optimizer(OptimizerConfig(name=name), model.axes)
    places = state_lib.shardings(model, optimizer)
    shapes = jax.eval_shape(optimizer.init, model.shapes)
    found = {
        jax.tree_util.keystr(path[-2:]): (leaf.shape, place.spec)
        for (path, leaf), (_, place) in zip(
            jax.tree_util.tree_leaves_with_path(shapes),
            jax.tree_util.tree_leaves_with_path(places.opt),
            strict=True,
        )
        if leaf.ndim > 1
    }
    want = model.shardings()
    assert found["['layers']['wq']"] == ((2, 32, 4, 8), want["layers"]["wq"].spec)
    assert {shape for shape, spec in found.values() if not any(spec)} <= {(2, 32), (2, 8)}  # norms
