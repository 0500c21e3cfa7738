"""Cached decoding is the full forward pass, one position at a time."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_models import VOCAB, tiny_model, tiny_params

from jaxreason.model import cache as cache_lib
from jaxreason.model.execution import Execution

LENGTHS = np.array([3, 12, 7])
NEW = 8  # tokens decoded after each prompt
PROMPT = 12  # right-padded


def decode_greedily(model, params, tokens_BT):
    """(logits [NEW, B, V] of each new token, the tokens [NEW, B]).

    The prompts but for their last tokens are read in two chunks, of 4 positions and the rest.
    """
    weights = model.decode_weights(params)
    cache = cache_lib.empty(model.config, 3, PROMPT + NEW, model.dtype)
    sizes_B = jnp.asarray(LENGTHS) - 1
    cache = model.prefill(weights, tokens_BT[:, :4], jnp.minimum(sizes_B, 4), cache)
    cache = model.prefill(weights, tokens_BT[:, 4:], sizes_B - cache.lengths_B, cache)
    last_B = jnp.take_along_axis(tokens_BT, sizes_B[:, None], axis=1)[:, 0]

    def step(carry, _):
        token_B, cache = carry
        logits_BV, cache = model.decode(weights, token_B, cache)
        token_B = logits_BV.argmax(-1)
        return (token_B, cache), (logits_BV, token_B)

    return jax.lax.scan(step, (last_B, cache), None, length=NEW)[1]


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


def test_rows_of_a_prefix_decode_as_with_their_own():
    """Two prompts, three rows each: prefix and cache beside it, or one cache with both."""
    model, params, size = tiny_model(), tiny_params(), 16
    weights = model.decode_weights(params)
    random = np.random.default_rng(0)
    prompt_PT = random.integers(0, VOCAB, (2, 7)).astype(np.int32)
    prefix = model.prefill(
        weights, prompt_PT, jnp.array([7, 4]), cache_lib.empty(model.config, 2, 7, model.dtype)
    )
    joined = model.prefill(
        weights, prompt_PT.repeat(3, 0), jnp.array([7, 4]).repeat(3),
        cache_lib.empty(model.config, 6, size, model.dtype),
    )  # fmt: skip
    own = cache_lib.empty(model.config, 6, size - 7, model.dtype)
    for _ in range(5):
        token_B = random.integers(0, VOCAB, 6)
        logits_BV, own = model.decode(weights, token_B, own, prefix)
        want_BV, joined = model.decode(weights, token_B, joined)
        np.testing.assert_allclose(logits_BV, want_BV, atol=2e-5)


def test_rows_are_copied_and_put_back():
    """Only the positions from `start` on, and the lengths."""
    config = tiny_model().config
    fill = lambda rows, value: jax.tree.map(
        lambda x: jnp.full_like(x, value), cache_lib.empty(config, rows, 8, jnp.float32)
    )
    whole, rows = fill(5, 1), jnp.array([3, 0])
    part = cache_lib.take_rows(whole, rows, 6)
    assert part.k[0].shape == (2, config.num_kv_heads, 6, config.head_dim)
    part = jax.tree.map(lambda x: x + 1, part)
    back = cache_lib.put_rows(whole, rows, part, jnp.array([2, 5]), 3)
    for x_BKSH in (*back.k, *back.v):
        changed_BS = (x_BKSH == 2).all((1, 3))
        np.testing.assert_array_equal(np.flatnonzero(changed_BS[3]), [2, 3, 4])
        np.testing.assert_array_equal(np.flatnonzero(changed_BS[0]), [3, 4, 5])  # within 6
        assert (x_BKSH[jnp.array([1, 2, 4])] == 1).all()
    np.testing.assert_array_equal(back.lengths_B, [2, 1, 1, 2, 1])


def test_what_float8_cannot_hold_becomes_its_largest():
    """A plain cast makes nan of all beyond 464. What it can hold is rounded to nearest, even."""
    new_H = jnp.array([448.0, 450, 465, 1e9, -jnp.inf, jnp.inf, 17, 19, 2.0**-11, -0.3])
    whole = jnp.ones((1, 1, 3, 10), jnp.float8_e4m3fn)
    for dtype in (jnp.float32, jnp.bfloat16):
        new = new_H.reshape(1, 1, 1, 10).astype(dtype)
        written = cache_lib.write(whole, new, jnp.array([1])).astype(jnp.float32)[0, 0]
        largest = [448, 448, 448, 448, -448, 448]
        np.testing.assert_array_equal(written[1], [*largest, 16, 20, 0, -0.3125])
        np.testing.assert_array_equal(written[jnp.array([0, 2])], 1)
    assert jnp.isnan(new_H.astype(jnp.float8_e4m3fn)[2:6]).all()
