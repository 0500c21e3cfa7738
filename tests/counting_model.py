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
    """All sixty, packed into rows as they fit."""
    rows: list[list[list[int]]] = []
    for ids in sorted(map(count, range(60)), key=len, reverse=True):
        fits = (row for row in rows if sum(map(len, row)) + len(ids) <= LENGTH)
        row = next(fits, None)
        if row is None:
            rows.append(row := [])
        row.append(ids)
    tokens, targets, segments, positions = np.zeros((4, len(rows), LENGTH), np.int32)
    weights = np.zeros((len(rows), LENGTH), np.float32)
    for at, row in enumerate(rows):
        start = 0
        for number, ids in enumerate(row, 1):
            here = slice(start, start + len(ids))
            tokens[at, here], targets[at, here] = ids, [*ids[1:], 0]
            weights[at, here] = [1] * (len(ids) - 1) + [0]
            segments[at, here], positions[at, here] = number, range(len(ids))
            start = here.stop
    return Batch(
        tokens_BT=tokens,
        targets_BT=targets,
        weights_BT=weights,
        segments_BT=segments,
        positions_BT=positions,
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
