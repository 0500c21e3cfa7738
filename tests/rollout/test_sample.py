"""One draw: what the filters keep, how often each token comes, and what is recorded of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_params

from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.rollout.sample import Features, RowSampling, choose, draw, keep, logprobs
from jaxreason.types import Sampling


def rows_of(samplings):
    """Their numbers as arrays."""
    column = lambda name, dtype: np.array([getattr(s, name) for s in samplings], dtype)
    return RowSampling(
        temperature_B=column("temperature", np.float32),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_penalty_B=column("repetition_penalty", np.float32),
    )


def kept_by(logp_BV, samplings):
    e_BV = jnp.exp(logp_BV - logp_BV.max(-1, keepdims=True))
    return np.asarray(keep(e_BV, rows_of(samplings), Features.of(samplings))) > 0


def kept_by_sorting(p_V, s):
    """The definition: keep top_k, of that the shortest prefix with mass >= top_p, then min_p."""
    order = np.argsort(-p_V, kind="stable")[: s.top_k or None]
    mass = np.cumsum(p_V[order] / p_V[order].sum())
    if s.top_p < 1:
        order = order[: np.searchsorted(mass, s.top_p * (1 - 1e-7)) + 1]
    return {i for i in order if p_V[i] >= s.min_p * p_V.max() * (1 - 1e-6)}


FILTERS = [
    dict(top_p=0.95), dict(top_p=0.3), dict(top_p=0.999), dict(top_k=20), dict(top_k=1), dict(),
    dict(top_k=50, top_p=0.8), dict(top_k=5000, top_p=0.5), dict(min_p=0.1), dict(min_p=1.0),
    dict(top_k=30, top_p=0.9, min_p=0.05),
]  # fmt: skip


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 50.0])  # flat to one peak
def test_filters_keep_what_sorting_keeps(spread):
    """Every row with its own, in one batch."""
    samplings = [Sampling(max_tokens=1, **options) for options in FILTERS for _ in range(4)]
    random = np.random.default_rng(0)
    shape = (len(samplings), 1000)
    logp_BV = jax.nn.log_softmax(spread * random.normal(size=shape).astype(np.float32))
    p_BV = np.exp(np.asarray(logp_BV, np.float64))
    for s, logp_V, p_V, kept_V in zip(samplings, logp_BV, p_BV, kept_by(logp_BV, samplings)):
        want, got = kept_by_sorting(p_V, s), set(np.flatnonzero(kept_V))
        got |= {i for i in want if logp_V[i] < logp_V.max() - 87}  # 0 in float32, never drawn
        # Where the mass of a prefix meets top_p to float32 rounding, either end is right.
        assert want ^ got <= {min(want | got, key=lambda i: logp_V[i])}, (s, len(want), len(got))


def test_nothing_is_sorted():
    """A full sort of 152k words takes longer than the model's step."""
    samplings = [Sampling(max_tokens=9, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.1)] * 2
    logits_BV, keys_B = jnp.zeros((2, 512)), jax.random.split(jax.random.key(0), 2)
    features, seen_BV = Features.of(samplings), jnp.zeros((2, 512), bool)
    program = lambda logits_BV: draw(logits_BV, keys_B, rows_of(samplings), features, seen_BV)
    names = re.findall(r"= (\w+)", str(jax.make_jaxpr(program)(logits_BV)))
    assert "exp" in names and not {"sort", "top_k", "approx_top_k"} & set(names)


def test_equal_probabilities_are_kept_together():
    logp_BV = jnp.log(jnp.array([[0.4, 0.2, 0.2, 0.1, 0.1]]))
    for options, want in (
        (dict(top_p=0.5), [1, 1, 1, 0, 0]),
        (dict(top_k=2), [1, 1, 1, 0, 0]),
        (dict(top_p=0.4), [1, 0, 0, 0, 0]),
        (dict(top_p=1e-9), [1, 0, 0, 0, 0]),
        (dict(min_p=0.49), [1, 1, 1, 0, 0]),
        (dict(min_p=0.51), [1, 0, 0, 0, 0]),
    ):
        np.testing.assert_array_equal(
            kept_by(logp_BV, [Sampling(max_tokens=1, **options)])[0], want
        )


def chi_square(counts_V, p_V):
    """(statistic, its limit); cells of fewer than 5 expected are joined to one."""
    expected_V = p_V * counts_V.sum()
    small_V = expected_V < 5
    join = lambda x_V: np.append(x_V[~small_V], x_V[small_V].sum())
    counts, expected = join(counts_V), join(expected_V)
    used = expected > 0
    statistic = ((counts - expected)[used] ** 2 / expected[used]).sum()
    degrees = max(int(used.sum()) - 1, 1)
    # Wilson and Hilferty's approximation of the 99.9 % quantile.
    limit = degrees * (1 - 2 / (9 * degrees) + 3.09 * np.sqrt(2 / (9 * degrees))) ** 3
    return statistic, limit


@functools.cache
def sampled():
    """600 first tokens of each sampling, of one mixed batch through the engine."""
    generate = build_generate(tiny_model(), list, str, -1, EngineConfig(slots=512, group=64))
    samplings = [Sampling(max_tokens=1, num_samples=600, **options) for options in MIXED]
    found = generate(tiny_params(), [PROMPT] * len(MIXED), samplings, jax.random.key(0))
    return [np.bincount([c.ids[0] for c in group], minlength=64) for group in found]


PROMPT = [5, 9, 11]
MIXED = [
    dict(temperature=1.0), dict(temperature=0.5), dict(temperature=3.0), dict(top_k=7),
    dict(temperature=2.0, top_p=0.6), dict(min_p=0.2), dict(top_k=20, top_p=0.8, temperature=1.5),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(MIXED)), ids=[str(options) for options in MIXED])
def test_frequencies_are_the_models_distribution(number):
    model, params = tiny_model(), tiny_params()
    tokens_1T = np.array([PROMPT])
    h_1TD = model.hidden(params, tokens_1T, np.ones_like(tokens_1T), np.arange(3)[None])
    logits_V = np.asarray(h_1TD[0, -1] @ model.head_weight(params).T, np.float64)
    s = Sampling(max_tokens=1, **MIXED[number])
    p_V = np.exp(logits_V / s.temperature - (logits_V / s.temperature).max())
    keep_V = np.isin(np.arange(64), list(kept_by_sorting(p_V / p_V.sum(), s)))
    p_V = p_V * keep_V / (p_V * keep_V).sum()
    counts_V = sampled()[number]
    assert not counts_V[p_V == 0].any()
    statistic, limit = chi_square(counts_V, p_V)
    assert statistic < limit
    flat_V = keep_V / keep_V.sum()  # and the test can fail: the same counts are not of this one
    assert chi_square(counts_V, flat_V)[0] > chi_square(counts_V, flat_V)[1]


def test_the_draw_over_many_blocks():
    """200,000 draws of 1,000 unequal weights, some of them 0: chi-square, and no 0 is drawn."""
    random = np.random.default_rng(0)
    weight_V = random.exponential(size=1000).astype(np.float32) * (random.random(1000) < 0.7)
    n = 200_000

    @jax.jit
    def run(key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(n // 50))
        return choose(jnp.broadcast_to(weight_V, (n // 50, 1000)), keys)

    drawn = np.concatenate([run(jax.random.key(i)) for i in range(50)])
    counts_V = np.bincount(drawn, minlength=1000)
    assert not counts_V[weight_V == 0].any()
    statistic, limit = chi_square(counts_V, weight_V.astype(np.float64) / weight_V.sum(dtype=float))
    assert statistic < limit


def test_logprobs_are_of_the_unfiltered_distribution_at_the_temperature():
    samplings = [Sampling(max_tokens=1, temperature=t, top_k=2) for t in (0.8, 2.0, 0.0)]
    features = Features.of(samplings)
    logits_BV = jnp.array([[2.0, 1.0, 0.0, 0.5, -1.0, 1.5]] * 3)
    token_B = jnp.array([5, 0, 0])
    found_B = logprobs(logits_BV, token_B, rows_of(samplings), features)
    for b, t in enumerate((0.8, 2.0, 1.0)):
        want = jax.nn.log_softmax(logits_BV[b] / t)[token_B[b]]
        np.testing.assert_allclose(found_B[b], want, atol=1e-6)


def test_what_has_no_probability_is_never_drawn():
    """-inf marks the entries of the table that the tokenizer does not fill."""
    logits_BV = jnp.where(jnp.arange(64) < 3, 0.0, -jnp.inf) * jnp.ones((1024, 1))
    keys = jax.random.split(jax.random.key(0), 1024)
    for options in ({}, dict(top_k=10), dict(top_p=0.99), dict(temperature=0.0), dict(min_p=0.5)):
        samplings = [Sampling(max_tokens=1, **options)] * 1024
        token_B = draw(logits_BV, keys, rows_of(samplings), Features.of(samplings))
        assert token_B.max() < 3, options
