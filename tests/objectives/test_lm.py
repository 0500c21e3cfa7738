"""Next-token prediction equals its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import packed_batch, tiny_model, tiny_params

from jaxreason.objectives.lm import LanguageModeling


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
