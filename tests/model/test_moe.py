"""A mixture of experts: nothing dropped, a router in float32, the balance of the global batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import assert_trees_close, packed_batch, tiny_model

from jaxreason.model import moe
from jaxreason.model.config import PRESETS, DecoderConfig
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step

EXPERTS = dict(family="qwen3_moe", num_experts=6, experts_per_token=2)
BATCH = packed_batch([[20, 12], [30], [9, 9, 9], [32]], length=32)


@functools.cache
def model_and_params(**changes):
    model = tiny_model(**{**EXPERTS, **changes})
    return model, jax.jit(model.init)(jax.random.key(0))


def test_every_token_reaches_every_expert_it_chose():
    """However unequal the choices are: here all choose the first two."""
    keys = jax.random.split(jax.random.key(0), 4)
    h_XD = jax.random.normal(keys[0], (300, 16))
    gate_EDF, up_EDF = jax.random.normal(keys[1], (2, 6, 16, 20))
    down_EFD = jax.random.normal(keys[2], (6, 20, 16))
    weights_XK = jax.random.uniform(keys[3], (300, 2))
    for ids_XK in (
        jnp.tile(jnp.array([[0, 1]]), (300, 1)),
        jax.random.randint(keys[3], (300, 2), 0, 6),
    ):
        got = moe.mixture(h_XD, weights_XK, ids_XK, (gate_EDF, up_EDF, down_EFD), jax.nn.silu)
        of_all = jnp.einsum("XD,EDF->XEF", h_XD, gate_EDF)
        hidden = jax.nn.silu(of_all) * jnp.einsum("XD,EDF->XEF", h_XD, up_EDF)
        out_XED = jnp.einsum("XEF,EFD->XED", hidden, down_EFD)
        chosen_XKD = jnp.take_along_axis(out_XED, ids_XK[..., None], axis=1)
        want = jnp.einsum("XKD,XK->XD", chosen_XKD, weights_XK)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)  # of size 100


@pytest.mark.parametrize("normalised", [True, False])
def test_router(normalised):
    """The k likeliest of all; normalised, their weights sum to 1."""
    keys = jax.random.split(jax.random.key(1), 2)
    h_XD, router_DE = jax.random.normal(keys[0], (50, 16)), jax.random.normal(keys[1], (16, 6))
    probs_XE, weights_XK, ids_XK = moe.route(h_XD, router_DE, 2, normalised)
    want = np.sort(jax.nn.softmax(h_XD @ router_DE, axis=-1), axis=-1)[:, :-3:-1]
    if normalised:
        want = want / want.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights_XK, want, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.take_along_axis(probs_XE, ids_XK, axis=1), np.sort(probs_XE)[:, :-3:-1], rtol=1e-6
    )


def test_the_router_runs_in_float32():
    """In bf16 two logits that differ by a rounding would choose another expert."""
    h_XD = jnp.ones((1, 2), jnp.bfloat16)
    router_DE = jnp.array([[256.0, 256.0], [0.0, 0.5]])  # 256.5 is 256 in bf16
    _, _, ids_XK = moe.route(h_XD, router_DE, 1, True)
    assert ids_XK[0, 0] == 1
    model, params = model_and_params()
    assert model.decode_weights(params).layers[0].router.dtype == jnp.float32


def test_the_balance_loss_is_its_definition():
    """By hand over real tokens; of one layer also transformers' function."""
    model, params = model_and_params(num_layers=1)
    args = (BATCH.tokens_BT, BATCH.segments_BT, BATCH.positions_BT)
    _, balance = jax.jit(model.hidden_and_balance)(params, *args)
    routing = jax.jit(model.routing)(params, *args)
    real = int((BATCH.segments_BT != 0).sum())
    assert real < BATCH.segments_BT.size and float(routing.counts_E.sum()) == 2 * real
    load_E, prob_E = np.asarray(routing.counts_E[0]) / real, np.asarray(routing.probs_E[0]) / real
    assert float(balance) / real == pytest.approx(6 * (load_E * prob_E).sum(), rel=1e-5)
    assert prob_E.sum() == pytest.approx(1, rel=1e-5)


def test_the_balance_loss_is_transformers():
    torch = pytest.importorskip("torch", reason="transformers parity needs torch: Python 3.11")
    theirs = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    keys = jax.random.split(jax.random.key(2), 2)
    h_XD, router_DE = jax.random.normal(keys[0], (60, 16)), jax.random.normal(keys[1], (16, 6))
    real_X = jnp.arange(60) % 20 < 15
    probs_XE, _, ids_XK = moe.route(h_XD, router_DE, 2, True)
    routing = jax.tree.map(lambda x: x[None], moe.summarise(probs_XE, ids_XK, real_X))
    ours = moe.balance(routing, moe.load(routing.counts_E, real_X.sum())) / real_X.sum()
    logits = (torch.tensor(np.array(h_XD @ router_DE)),)
    mask = torch.tensor(np.array(real_X)).reshape(3, 20).int()
    want = theirs.load_balancing_loss_func(logits, 6, 2, attention_mask=mask)
    assert float(ours) == pytest.approx(float(want), rel=1e-5)


def one_step(model, params, microbatches: int):
    optimizer = optax.sgd(1.0)
    step = make_train_step(
        model, LanguageModeling(), optimizer, lambda s: 1.0, microbatches=microbatches
    )
    state = state_lib.create(model, optimizer, jax.random.key(0), params)
    state, metrics = step(state, jax.tree.map(jnp.asarray, BATCH), None)
    return state.params, metrics


def test_microbatches_balance_the_global_batch():
    """The same step whole and in parts, though each part's own load is another one."""
    model, params = model_and_params(router_aux_coef=1.0)
    whole = one_step(model, params, 1)
    assert float(whole[1]["aux_loss"]) > 2.05  # 2 is perfect balance
    assert_trees_close(one_step(model, params, 4), whole, 2e-5)

    @jax.jit
    def balance(row):
        return model.hidden_and_balance(params, row.tokens_BT, row.segments_BT, row.positions_BT)[1]

    parts = [balance(jax.tree.map(lambda x: x[i : i + 1], BATCH)) for i in range(4)]
    own = float(sum(parts)) / float((BATCH.segments_BT != 0).sum())
    assert own > 1.01 * float(whole[1]["aux_loss"])  # what a mean of the parts' would be


def test_the_balance_loss_balances():
    model, params = model_and_params(router_aux_coef=1.0)
    optimizer = optax.adam(3e-3)
    step = make_train_step(model, LanguageModeling(), optimizer, lambda s: 1.0)
    state, losses = state_lib.create(model, optimizer, jax.random.key(0), params), []
    for _ in range(20):
        state, metrics = step(state, jax.tree.map(jnp.asarray, BATCH), None)
        losses.append(float(metrics["aux_loss"]))
    assert losses[-1] - 2 < 0.3 * (losses[0] - 2)


def test_mistakes_are_named():
    fields = {
        f.name: getattr(PRESETS["qwen3-tiny"], f.name) for f in dataclasses.fields(DecoderConfig)
    }
    with pytest.raises(ValueError, match=r"experts_per_token is 9, more than .* = 4"):
        DecoderConfig(**{**fields, **EXPERTS, "experts_per_token": 9, "num_experts": 4})
    with pytest.raises(ValueError, match=r"num_experts is 4, but model.family = qwen3 has no"):
        DecoderConfig(**{**fields, "num_experts": 4})
    with pytest.raises(ValueError, match=r"num_experts is 0; it must be at least 1"):
        DecoderConfig(**{**fields, "family": "qwen3_moe"})
