"""THE train step: global denominators, skipped steps, clipping, donation, one compilation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import (
    assert_trees_close,
    assert_trees_equal,
    packed_batch,
    tiny_model,
    tiny_params,
)

from jaxreason.objectives.lm import LanguageModeling
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimizerConfig, make_optimizer
from jaxreason.train.step import make_train_step, split_microbatches
from jaxreason.types import Frozen, Loss, TrainState

# --- an objective of a few lines: the step's own arithmetic, without a network --------------------


class Quadratic:
    """Two terms with weights of their own: (w.x - y)^2 over all rows, 0.5 * (w.x)^2 over some."""

    def weights(self, batch):
        return {"square": batch["weight"].sum(), "small": batch["chosen"].sum()}

    def loss(self, model, params, frozen, batch):
        out_B = batch["x"] @ params["w"]
        anchor = frozen.get("w", 0.0)
        square = (batch["weight"] * (out_B - batch["y"] - anchor) ** 2).sum()
        small = (batch["chosen"] * out_B**2).sum()
        return Loss(
            terms={"square": (square, 1.0), "small": (small, 0.5)},
            metrics={"error": (batch["weight"] * jnp.abs(out_B - batch["y"])).sum()},
        )


NO_MESH = types.SimpleNamespace(
    mesh=None, has_experts=False, complete=lambda params, frozen, load: params
)


def rows(n=8, seed=0):
    random = np.random.default_rng(seed)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    return {
        "x": draw(n, 3), "y": draw(n), "weight": random.integers(0, 5, n).astype(np.float32),
        "chosen": random.integers(0, 2, n).astype(np.float32),
    }  # fmt: skip


def fresh(optimizer):
    params = {"w": jnp.array([1.0, -2.0, 3.0])}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt=optimizer.init(params),
        key=jax.random.key(0),
        nonfinite=jnp.zeros((), jnp.int32),
    )


def quadratic_step(optimizer=optax.sgd(1.0), rate=1.0, **options):
    return make_train_step(NO_MESH, Quadratic(), optimizer, lambda step: rate, **options)


def test_each_term_is_a_mean_over_its_own_global_weight():
    batch, w = rows(), np.array([1.0, -2.0, 3.0])
    state, metrics = quadratic_step()(fresh(optax.sgd(1.0)), batch, None)
    out, error = batch["x"] @ w, batch["x"] @ w - batch["y"]
    weight, chosen = batch["weight"], batch["chosen"]
    want = (weight * error**2).sum() / weight.sum() + 0.5 * (chosen * out**2).sum() / chosen.sum()
    gradient = (2 * weight * error) @ batch["x"] / weight.sum()
    gradient += (chosen * out) @ batch["x"] / chosen.sum()
    assert float(metrics["loss"]) == pytest.approx(want, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert float(metrics["error"]) == pytest.approx((weight * abs(error)).sum() / weight.sum())
    assert float(metrics["num_tokens"]) == weight.sum()
    np.testing.assert_allclose(state.params["w"], w - gradient, rtol=1e-5)


@pytest.mark.parametrize("microbatches, num_shards", [(2, 1), (4, 2), (8, 1)])
def test_microbatches_change_nothing(microbatches, num_shards):
    """Also where a microbatch has no weight at all in a term."""
    batch = rows()
    batch["weight"][:2] = batch["chosen"][3:] = 0
    want = quadratic_step()(fresh(optax.sgd(1.0)), batch, None)
    step = quadratic_step(microbatches=microbatches, num_shards=num_shards)
    got = step(fresh(optax.sgd(1.0)), batch, None)
    assert_trees_close((got[0].params, got[1]), (want[0].params, want[1]), 1e-6)


def test_microbatches_are_cut_inside_each_shards_block():
    pieces = split_microbatches(jnp.arange(8), microbatches=2, num_shards=2)
    np.testing.assert_array_equal(pieces, [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_a_batch_without_weight_is_no_step_into_nan():
    batch = {**rows(), "weight": np.zeros(8, np.float32), "chosen": np.zeros(8, np.float32)}
    state, metrics = quadratic_step()(fresh(optax.sgd(1.0)), batch, None)
    assert metrics["loss"] == 0 and metrics["nonfinite"] == 0
    np.testing.assert_array_equal(state.params["w"], [1.0, -2.0, 3.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_nonfinite_step_changes_nothing_but_the_counters(bad):
    optimizer = optax.adam(1.0)
    step = quadratic_step(optimizer, microbatches=4)
    before, _ = step(fresh(optimizer), rows(), None)
    kept = jax.tree.map(jnp.copy, before)
    broken = rows(seed=1)
    broken["x"][5, 1] = bad
    state, metrics = step(before, broken, None)
    assert not np.isfinite(metrics["grad_norm"])
    assert_trees_equal((state.params, state.opt, state.key), (kept.params, kept.opt, kept.key))
    assert (state.step, state.nonfinite, metrics["nonfinite"]) == (2, 1, 1)
    state, metrics = step(state, broken, None)
    assert (state.step, metrics["nonfinite"]) == (3, 2)
    state, metrics = step(state, rows(seed=2), None)
    assert (state.step, metrics["nonfinite"]) == (4, 0)
    assert (state.params["w"] != kept.params["w"]).any()


def test_clipping_scales_the_global_gradient():
    """The metric is the norm before clipping; a gradient below the limit stays as it is."""
    free = quadratic_step()(fresh(optax.sgd(1.0)), rows(), None)
    norm = float(free[1]["grad_norm"])
    moved = lambda state: np.linalg.norm(state.params["w"] - np.array([1.0, -2.0, 3.0]))
    state, metrics = quadratic_step(clip_norm=norm / 4)(fresh(optax.sgd(1.0)), rows(), None)
    assert float(metrics["grad_norm"]) == pytest.approx(norm)
    assert moved(state) == pytest.approx(norm / 4, rel=1e-5)
    state, _ = quadratic_step(clip_norm=norm * 4)(fresh(optax.sgd(1.0)), rows(), None)
    np.testing.assert_array_equal(state.params["w"], free[0].params["w"])


def test_the_schedule_multiplies_the_update_at_the_states_own_step():
    step = make_train_step(NO_MESH, Quadratic(), optax.sgd(1.0), lambda s: 0.1 * s)
    state, metrics = step(fresh(optax.sgd(1.0)), rows(), None)
    np.testing.assert_array_equal(state.params["w"], [1.0, -2.0, 3.0])
    assert metrics["learning_rate"] == 0
    _, metrics = step(state, rows(), None)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1)


def test_frozen_parameters_are_read_and_survive():
    """Never donated, never differentiated: the caller's arrays live on and do not change."""
    frozen = Frozen(read={"w": jnp.float32(2.0)})
    step = quadratic_step()
    state, with_frozen = step(fresh(optax.sgd(1.0)), rows(), frozen)
    step(state, rows(), frozen)
    assert not frozen.read["w"].is_deleted() and frozen.read["w"] == 2.0
    _, without = quadratic_step()(fresh(optax.sgd(1.0)), rows(), None)
    assert with_frozen["loss"] != without["loss"]


# --- the real model -------------------------------------------------------------------------------

DOCUMENTS = [[20, 12], [32], [5, 6, 7], [30], [3, 3], [16, 16], [9], [31]]
BATCH = packed_batch(DOCUMENTS, length=32, loss_share=0.6)


def language_model_step(model, **options):
    """An AdamW step that moves, and a maker of its first state (`params` None: random ones)."""
    optimizer = make_optimizer(OptimizerConfig(), model.axes)
    step = make_train_step(
        model, LanguageModeling(z_loss=1e-3), optimizer, lambda s: 1e-2, clip_norm=1.0, **options
    )
    create = lambda params: state_lib.create(model, optimizer, jax.random.key(0), params)
    return step, create


@pytest.fixture
def compilations():
    """The programs compiled so far, counted by what JAX itself reports."""
    counted = []
    count = lambda event, *_, **__: counted.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(count)
    yield counted
    jax.monitoring.unregister_event_duration_listener(count)


def three_losses(step, state, batch, compilations):
    """The losses of three steps, of which the first alone may compile."""
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, None)
        losses.append(metrics["loss"])
        if len(losses) == 1:
            before = len(compilations)
            assert before > 0
    assert len(compilations) == before
    return [float(loss) for loss in losses]


def test_the_state_is_donated_and_the_step_compiled_once(compilations):
    step, first = language_model_step(tiny_model())
    state = first(tiny_params())
    compiled = step.lower(state, BATCH, None).compile()
    held = sum(x.nbytes for x in jax.tree.leaves((state.params, state.opt)))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    losses = three_losses(step, state, BATCH, compilations)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert losses[2] < losses[1] < losses[0]


def test_on_a_mesh_the_steps_are_the_same(compilations):
    """Eight devices, two microbatches of a row each: born sharded, compiled once, donated."""
    step, first = language_model_step(tiny_model())
    want = three_losses(step, first(None), BATCH, compilations)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    step, first = language_model_step(tiny_model(mesh), microbatches=2, num_shards=4)
    state = first(None)
    embedding = state.params["embedding"]
    moment = state.opt[0].mu["embedding"]
    assert embedding.sharding == moment.sharding == tiny_model(mesh).shardings()["embedding"]
    got = three_losses(step, state, hosts.to_global(mesh, BATCH), compilations)
    assert embedding.is_deleted() and moment.is_deleted()
    # float32 sums in another order, three steps: DESIGN promises 1e-5.
    np.testing.assert_allclose(got, want, rtol=1e-5)
