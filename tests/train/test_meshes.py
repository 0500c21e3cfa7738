"""The train step on every kind of mesh: the losses, gradients and states of one device."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from tiny_models import moved_by_an_ulp, packed_batch, tiny_model

from jaxreason.model.execution import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimizerConfig, make_optimizer
from jaxreason.train.step import make_train_step

STEPS, ROWS, LENGTH = 20, 8, 48
OPTIMIZER = OptimizerConfig(learning_rate=3e-3)  # the loss falls by a third in these steps
DENSE = dict(num_layers=2)
# The balance loss is of the whole batch, which microbatches see in parts: without it they agree.
EXPERTS = dict(num_layers=2, family="qwen3_moe", num_experts=8, experts_per_token=2,
               router_aux_coef=0.0)  # fmt: skip
SCANNED = Execution(scan_layers=True)


@functools.cache
def batches():
    random = np.random.default_rng(0)
    cut = lambda: np.diff(np.sort(random.choice(np.arange(1, LENGTH), 3, False)), prepend=0)
    return [
        packed_batch([cut().tolist() for _ in range(ROWS)], LENGTH, seed=step, loss_share=0.8)
        for step in range(STEPS)
    ]


def run(shape, mesh, execution, microbatches, params, steps=STEPS):
    """(losses, gradients of the first step, the last state)."""
    model = tiny_model(mesh, execution=execution, **shape)
    optimizer = make_optimizer(OPTIMIZER, model.axes)
    step = _step(model, optimizer, microbatches)
    state = state_lib.create(model, optimizer, jax.random.key(0), jax.tree.map(np.copy, params))
    losses, gradients = [], None
    for batch in batches()[:steps]:
        batch = batch if mesh is None else hosts.to_global(mesh, batch)
        state, metrics = step(state, batch, None)
        losses.append(float(metrics["loss"]))
        if gradients is None:  # the first moment after one step is a tenth of the gradient
            gradients = jax.device_get(state.opt[0].mu)
    return np.array(losses), gradients, state


def _step(model, optimizer, microbatches):
    return make_train_step(
        model, LanguageModeling(), optimizer, lambda step: OPTIMIZER.learning_rate,
        microbatches=microbatches,
    )  # fmt: skip


@functools.cache
def one_device(experts: bool):
    """(its parameters, losses, gradients, how far a random ulp in every weight moves a loss)."""
    shape = EXPERTS if experts else DENSE
    model = tiny_model(execution=SCANNED, **shape)
    params = jax.device_get(jax.jit(model.init)(jax.random.key(0)))
    optimizer = make_optimizer(OPTIMIZER, model.axes)
    step = _step(model, optimizer, 1)

    def losses_of(params):
        state = state_lib.create(model, optimizer, jax.random.key(0), params)
        losses, gradients = [], None
        for batch in batches():
            state, metrics = step(state, batch, None)
            losses.append(float(metrics["loss"]))
            gradients = jax.device_get(state.opt[0].mu) if gradients is None else gradients
        return np.array(losses), gradients

    losses, gradients = losses_of(params)
    assert losses[-1] < losses[0] - 0.5
    spread = 0.0
    for seed in range(8):
        moved = moved_by_an_ulp(params, seed)
        spread = max(spread, np.abs(losses_of(moved)[0] - losses).max())
    return params, losses, gradients, spread


def relative_errors(got, want) -> dict[str, float]:
    """||g - h|| / ||h|| of every tensor."""
    flat = jax.tree_util.tree_leaves_with_path
    return {
        jax.tree_util.keystr(path): np.linalg.norm(a - b) / np.linalg.norm(b)
        for (path, a), (_, b) in zip(flat(got), flat(want), strict=True)
    }


def named(**changes) -> Execution:
    return dataclasses.replace(SCANNED, **changes)


# (mesh, how it runs, microbatches); a mesh of a size that the eight devices exceed takes the first.
CASES = [
    ({"data": 1}, SCANNED, 2),
    ({"data": 8}, SCANNED, 1),
    ({"data": 2, "fsdp": 2}, named(scan_layers=False), 2),
    ({"fsdp": 8}, named(remat="full"), 1),
    ({"fsdp": 2}, named(remat="save_attention"), 4),
    ({"fsdp": 4, "tensor": 2}, named(remat="save_projections"), 1),
    ({"fsdp": 4, "tensor": 2}, named(scan_layers=False, remat="full"), 2),
    ({"tensor": 2}, named(remat="qkv+gate_up"), 4),
    ({"data": 2, "context": 4}, SCANNED, 1),
    ({"data": 2, "context": 4}, named(context="gather", remat="save_attention"), 2),
    ({"context": 2, "tensor": 2, "data": 2}, named(remat="full", scan_layers=False), 4),
]
EXPERT_CASES = [
    ({"fsdp": 2, "expert": 4}, SCANNED, 1),
    ({"expert": 2, "tensor": 2}, named(remat="full"), 2),
    ({"expert": 2, "context": 2, "fsdp": 2}, named(scan_layers=False, remat="save_attention"), 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts, mesh, execution, microbatches",
    [(False, *case) for case in CASES] + [(True, *case) for case in EXPERT_CASES],
    ids=str,
)
def test_twenty_steps_are_those_of_one_device(experts, mesh, execution, microbatches):
    """Within three times what one ulp in the weights does, or 1e-5; gradients within 1e-5."""
    params, losses, gradients, spread = one_device(experts)
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    shape = EXPERTS if experts else DENSE
    got, first, state = run(shape, make_mesh(mesh, devices), execution, microbatches, params)
    np.testing.assert_allclose(got[0], losses[0], rtol=1e-5)
    errors = relative_errors(first, gradients)
    assert max(errors.values()) <= 1e-5, errors
    difference = np.abs(got - losses)
    assert (difference <= np.maximum(3 * spread, 1e-5 * losses)).all(), (difference.max(), spread)
    assert_split_as_declared(state, tiny_model(make_mesh(mesh, devices), **shape))


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 4, "tensor": 2}, {"context": 2, "fsdp": 2, "data": 2}], ids=str
)
def test_gradients_are_split_as_their_weights(mesh):
    """As the optimizer is handed them by the compiled step, after the sum over microbatches."""
    found = {}

    def look(path, gradient):
        keep = functools.partial(found.__setitem__, jax.tree_util.keystr(path))
        jax.debug.inspect_array_sharding(gradient, callback=keep)

    def update(gradients, state, params=None):
        jax.tree_util.tree_map_with_path(look, gradients)
        return gradients, state

    looking = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    model = tiny_model(make_mesh(mesh), execution=SCANNED, num_layers=1)
    optimizer = optax.chain(looking, make_optimizer(OPTIMIZER, model.axes))
    batch = hosts.to_global(model.mesh, batches()[0])
    step = _step(model, optimizer, microbatches=2)
    step.lower(state_lib.abstract(model, optimizer), batch, None).compile()

    flat = jax.tree_util.tree_leaves_with_path
    for (path, place), shape in zip(flat(model.shardings()), jax.tree.leaves(model.shapes)):
        name = jax.tree_util.keystr(path)
        assert found.pop(name).is_equivalent_to(place, shape.ndim), name
    assert not found


def assert_split_as_declared(state, model):
    """Weights and both moments where the table says; of a mesh that splits, no device holds all."""
    want = model.shardings()
    moments = state.opt[0]
    for tree in (state.params, moments.mu, moments.nu):
        jax.tree.map(lambda x, place: _assert_same_place(x, place), tree, want)
    ways = model.mesh.shape["fsdp"] * model.mesh.shape["expert"] * model.mesh.shape["context"]
    wq = state.params["layers"]["wq"]
    held = wq.addressable_shards[0].data.size
    assert held * ways * model.mesh.shape["tensor"] == wq.size


def _assert_same_place(x, place):
    assert x.sharding.is_equivalent_to(place, x.ndim), (x.sharding, place)
