"""A model with clear winners: trained for seconds to count, each completion ending by itself."""

import jax
import numpy as np
import optax
import pytest
from tiny_models import mean_loss, tiny_model

from jaxreason.types import Batch

EOS = 63
LENGTH = 80


def count(first: int) -> list[int]:
    """What the model learns: from `first` on in steps of 1 to 4 while below 60, then the end."""
    return [*range(first, 60, 1 + first % 4), EOS]


def _batch() -> Batch:
    rows = [count(first) for first in range(60)]
    tokens, weights = np.zeros((60, LENGTH + 1), np.int32), np.zeros((60, LENGTH), np.float32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
        weights[row, : len(ids) - 1] = 1
    return Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        weights_BT=weights,
        segments_BT=np.ones((60, LENGTH), np.int32),
        positions_BT=np.tile(np.arange(LENGTH, dtype=np.int32), (60, 1)),
    )


@pytest.fixture(scope="session")
def counting():
    """(the model, its parameters after 150 updates)."""
    model, batch = tiny_model(), _batch()
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 150))

    @jax.jit
    def train(params):
        def update(carry, _):
            params, moments = carry
            loss, gradient = jax.value_and_grad(lambda p: mean_loss(model, p, batch))(params)
            change, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, change), moments), loss

        (params, _), loss_X = jax.lax.scan(update, (params, optimizer.init(params)), length=150)
        return params, loss_X

    params, loss_X = train(jax.jit(model.init)(jax.random.key(0)))
    assert loss_X[-1] < 0.05, loss_X[-1]
    return model, params
