"""Next-token prediction equals its definition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import packed_batch, tiny_model, tiny_params

from jaxreason.objectives.lm import LanguageModeling, StepByStep
from jaxreason.types import TaskBatch


def test_loss_and_metrics_equal_the_definition():
    model, batch = tiny_model(), packed_batch([[9, 14], [20]], length=24, loss_share=0.6)
    objective = LanguageModeling(z_loss=0.01)

    @jax.jit
    def run(params, batch):
        h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))
        return logits_BTV, objective.loss(model, params, None, batch)

    logits_BTV, loss = run(tiny_params(), batch)
    weights_BT = batch.weights_BT
    lse_BT = jax.nn.logsumexp(logits_BTV, -1)
    logp_BTV = logits_BTV - lse_BT[..., None]
    nll_BT = -np.take_along_axis(np.asarray(logp_BTV), batch.targets_BT[..., None], -1)[..., 0]
    total, coefficient = loss.terms["nll"]
    assert objective.weights(batch)["nll"] == weights_BT.sum() and coefficient == 1.0
    assert set(loss.terms) == {"nll"}  # no experts: nothing to balance
    want = float((weights_BT * (nll_BT + 0.01 * lse_BT**2)).sum())
    assert float(total) == pytest.approx(want, rel=1e-5)
    sums = {
        "nll": nll_BT,
        "entropy": -(jnp.exp(logp_BTV) * logp_BTV).sum(-1),
        "mean_token_accuracy": logits_BTV.argmax(-1) == batch.targets_BT,
    }
    assert set(loss.metrics) == set(sums)
    for name, value_BT in sums.items():
        got = float(loss.metrics[name])
        assert got == pytest.approx(float((weights_BT * value_BT).sum()), rel=1e-5), name


def task_batch(rows, tasks):
    """Packed rows whose documents have these tasks."""
    batch = packed_batch(rows, length=24, loss_share=0.6)
    tasks_BT = np.zeros_like(batch.segments_BT)
    for row, own in enumerate(tasks):
        for segment, task in enumerate(own, start=1):
            tasks_BT[row, batch.segments_BT[row] == segment] = task
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return TaskBatch(**fields, tasks_BT=tasks_BT)


def test_step_by_step_is_the_mix_of_two_means():
    """However long the rationales are: 0.3 and 0.7 are the shares of two means."""
    model, batch = tiny_model(), task_batch([[9, 14], [20]], [[1, 2], [2]])
    objective = StepByStep(alpha=0.3, z_loss=0.01)

    @jax.jit
    def run(params, batch):
        h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))
        return logits_BTV, objective.loss(model, params, None, batch)

    logits_BTV, loss = run(tiny_params(), batch)
    lse_BT = np.asarray(jax.nn.logsumexp(logits_BTV, -1))
    at_BT = np.take_along_axis(np.asarray(logits_BTV), batch.targets_BT[..., None], -1)[..., 0]
    loss_BT = lse_BT - at_BT + 0.01 * lse_BT**2
    weights = objective.weights(batch)
    assert next(iter(weights)) == "tokens" and weights["tokens"] == batch.weights_BT.sum()
    for task, number, coefficient in (("label", 1, 0.3), ("rationale", 2, 0.7)):
        own_BT = batch.weights_BT * (batch.tasks_BT == number)
        assert float(weights[task]) == own_BT.sum() > 0
        total, got = loss.terms[task]
        assert float(total) == pytest.approx(float((own_BT * loss_BT).sum()), rel=1e-5)
        assert got == pytest.approx(coefficient)
    assert float(loss.metrics["nll"]) == pytest.approx(
        float((batch.weights_BT * (lse_BT - at_BT)).sum()), rel=1e-5
    )
    with pytest.raises(ValueError, match=r"train.alpha is 1.5"):
        StepByStep(alpha=1.5)
