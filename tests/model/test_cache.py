"""Cached decoding is the full forward pass, one position at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import VOCAB, tiny_model, tiny_params

from jaxreason.model.decoder import Execution

LENGTHS = np.array([3, 12, 7])
NEW = 8  # tokens decoded after each prompt
PROMPT = 12  # right-padded


def decode_greedily(model, params, tokens_BT):
    """(logits [NEW, B, V] of each new token, the tokens [NEW, B])."""
    logits_BV, cache = model.prefill(params, tokens_BT, jnp.asarray(LENGTHS), PROMPT + NEW)
    weights = model.decode_weights(params)

    def step(carry, _):
        logits_BV, cache = carry
        token_B = logits_BV.argmax(-1)
        return model.decode(weights, token_B, cache), (logits_BV, token_B)

    return jax.lax.scan(step, (logits_BV, cache), None, length=NEW)[1]


def test_decoding_equals_the_full_forward_pass():
    """Prompts of three lengths; the padding holds tokens that must not be read."""
    model, params = tiny_model(execution=Execution()), tiny_params()
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (3, PROMPT)).astype(np.int32)
    run = jax.jit(lambda p, tokens_BT: decode_greedily(model, p, tokens_BT))
    logits_TBV, new_TB = run(params, tokens_BT)

    rows = [np.concatenate([t[:n], new]) for t, n, new in zip(tokens_BT, LENGTHS, new_TB.T)]
    full_BT = np.stack([np.pad(row, (0, PROMPT + NEW - len(row))) for row in rows])
    positions_BT = np.broadcast_to(np.arange(PROMPT + NEW), full_BT.shape)

    @jax.jit
    def forward(p):
        h_BTD = model.hidden(p, full_BT, np.ones_like(full_BT), positions_BT)
        return jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(p))

    full_BTV = forward(params)
    for row, n in enumerate(LENGTHS):
        want_TV = full_BTV[row, n - 1 : n - 1 + NEW]
        # Logits of order 1, float32, other block sizes: 1e-6 each, with room.
        np.testing.assert_allclose(logits_TBV[:, row], want_TV, atol=2e-5)
        np.testing.assert_array_equal(new_TB[:, row], want_TV.argmax(-1))


def test_a_slot_does_not_read_its_neighbours():
    model, params = tiny_model(execution=Execution()), tiny_params()
    tokens_BT = np.random.default_rng(0).integers(0, VOCAB, (3, PROMPT)).astype(np.int32)
    run = jax.jit(lambda p, tokens_BT: decode_greedily(model, p, tokens_BT))
    before, _ = run(params, tokens_BT)
    changed_BT = tokens_BT.copy()
    changed_BT[0] = (changed_BT[0] + 1) % VOCAB
    changed_BT[2, LENGTHS[2] :] = 5  # padding
    after, _ = run(params, changed_BT)
    np.testing.assert_array_equal(after[:, 1:], before[:, 1:])
    assert (after[:, 0] != before[:, 0]).any()
