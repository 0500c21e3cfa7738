"""The engine draws what the model says, however requests are batched, cut, shared and split."""

import functools
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_params

from jaxreason.parallel.mesh import make_mesh
from jaxreason.rollout import generate as generate_lib
from jaxreason.rollout.engine import Engine, EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.types import Sampling

EOS, LENGTH = 63, 96
GREEDY = Sampling(max_tokens=40, temperature=0.0)
SMALL = EngineConfig(slots=8, group=4, steps=8, prefill_chunk=16)


def prompts_of_mixed_length(number=200, seed=0):
    """Of 1 to 60 tokens: half count on from somewhere, half are noise."""
    rng = np.random.default_rng(seed)
    counted = lambda n: (int(rng.integers(0, 20)) + np.arange(n)) % 60
    noise = lambda n: rng.integers(0, 60, n)
    lengths = rng.integers(1, 61, number)
    return [(counted if i % 2 else noise)(n).tolist() for i, n in enumerate(lengths)]


def ids(completions):
    return [[c.ids for c in group] for group in completions]


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens_BT):
    """logits_BTV of the training forward pass."""
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    h_BTD = model.hidden(params, tokens_BT, jnp.ones_like(tokens_BT), positions_BT)
    return jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))


def recomputed(model, params, prompts, completions):
    """For each first completion: (it, logits_TV that its tokens were drawn from)."""
    tokens_BT = np.zeros((len(prompts), LENGTH + 16), np.int32)
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        full = [*prompt, *group[0].ids]
        tokens_BT[row, : len(full)] = full
    logits_BTV = np.asarray(forward(model, params, tokens_BT))
    for row, (prompt, (first, *_)) in enumerate(zip(prompts, completions, strict=True)):
        start = len(prompt) - 1
        yield first, logits_BTV[row, start : start + first.num_tokens]


@pytest.fixture(scope="session")
def greedy(counting):
    """(prompts, completions) of 200 prompts, 2 samples each, in the default engine."""
    model, params = counting
    prompts = prompts_of_mixed_length()
    generate = build_generate(model, list, str, EOS)
    sampling = Sampling(max_tokens=40, temperature=0.0, num_samples=2)
    return prompts, generate(params, prompts, sampling, jax.random.key(0))


def test_greedy_is_the_full_recomputation(counting, greedy):
    prompts, completions = greedy
    assert {c.truncated for group in completions for c in group} == {True, False}
    margin = np.inf
    for (first, logits_TV), group in zip(
        recomputed(*counting, prompts, completions), completions, strict=True
    ):
        np.testing.assert_array_equal(first.ids, logits_TV.argmax(-1))
        assert all(c.ids == first.ids for c in group)
        best_T2 = np.sort(logits_TV, axis=-1)[:, -2:]
        margin = min(margin, (best_T2[:, 1] - best_T2[:, 0]).min())
    assert margin > 1e-4  # float32 logits of order 10 differ by 1e-5: no tie decides


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(slots=1),
        EngineConfig(slots=7, group=3, steps=5, prefill_chunk=16),
        EngineConfig(slots=64, group=64, streams=1, share_prefix=False),
        EngineConfig(slots=96, streams=3),
    ],
    ids=["one slot", "few slots, short steps and chunks", "one group, nothing shared", "3 streams"],
)
def test_slots_groups_chunks_and_sharing_change_nothing(counting, greedy, config):
    model, params = counting
    some = slice(0, 40 if config.slots == 1 else 200)
    sampling = Sampling(max_tokens=40, temperature=0.0, num_samples=1 if config.slots == 1 else 2)
    prompts, want = greedy
    generate = build_generate(model, list, str, EOS, config)
    got = generate(params, prompts[some], sampling, jax.random.key(0))
    assert ids(got) == [group[: sampling.num_samples] for group in ids(want[some])]


def test_the_order_of_arrival_changes_nothing(counting, greedy):
    """Another order of prompts, and each prompt with its own limit: other groups, other slots."""
    model, params = counting
    prompts, want = greedy
    order = list(range(len(prompts)))
    random.Random(0).shuffle(order)
    limits = np.random.default_rng(1).integers(1, 41, len(prompts)).tolist()
    samplings = [Sampling(max_tokens=limits[i], temperature=0.0) for i in order]
    generate = build_generate(model, list, str, EOS, EngineConfig(slots=64))
    got = generate(params, [prompts[i] for i in order], samplings, jax.random.key(0))
    for i, (c,) in zip(order, got, strict=True):
        assert c.ids == want[i][0].ids[: limits[i]]
        assert c.truncated == (len(want[i][0].ids) > limits[i] or want[i][0].truncated)


@pytest.mark.parametrize(
    "shape",
    [
        {"fsdp": 2, "tensor": 2},
        pytest.param({"data": 4}, marks=pytest.mark.slow),
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_change_nothing(counting, greedy, shape):
    _, params = counting
    prompts, want = greedy
    devices = int(np.prod(list(shape.values())))
    model = tiny_model(make_mesh(shape, jax.devices()[:devices]))
    generate = build_generate(model, list, str, EOS, EngineConfig(slots=128))
    params = jax.device_put(params, model.shardings())
    got = generate(params, prompts[:100], GREEDY, jax.random.key(0))
    assert ids(got) == [group[:1] for group in ids(want[:100])]
    sampling = Sampling(max_tokens=40, temperature=0.0, num_samples=2)
    assert ids(generate(params, prompts[:1], sampling, jax.random.key(0))) == ids(want[:1])


def test_random_draws_depend_on_the_place_alone():
    """Not on the slots, nor on what else is drawn; other samples, prompts and keys differ."""
    model, params = tiny_model(), tiny_params()
    prompts = [[5, 6, 7], [5, 6, 7], [8] * 20]
    sampling = Sampling(max_tokens=30, num_samples=4)
    run = lambda config, key, n=3: ids(
        build_generate(model, list, str, EOS, config)(
            params, prompts[:n], sampling, jax.random.key(key)
        )
    )
    first = run(EngineConfig(), 0)
    assert run(SMALL, 0) == first
    assert run(SMALL, 0, n=2) == first[:2]
    assert len({sample for group in first for sample in group}) == 12
    again = run(SMALL, 1)
    assert all(a != b for old, new in zip(first, again) for a, b in zip(old, new))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_training_forwards(counting, temperature):
    """In float32, at the sampling temperature and before the filters.

    A log-prob is the difference of logits, which are rounded in another order on either side: 16
    ulps of the largest (8 were seen), so 1e-5 where that is 5 and 2.5e-5 where it is 13.
    """
    prompts = prompts_of_mixed_length(64)
    sampling = Sampling(max_tokens=40, temperature=temperature, top_p=0.9, top_k=20)
    for model, params in (counting, (tiny_model(), tiny_params())):
        generate = build_generate(model, list, str, EOS, EngineConfig(slots=32))
        found = generate(params, prompts, sampling, jax.random.key(0))
        for c, logits_TV in recomputed(model, params, prompts, found):
            logp_TV = jax.nn.log_softmax(logits_TV / temperature)
            want_T = np.take_along_axis(np.asarray(logp_TV), np.array(c.ids)[:, None], 1)[:, 0]
            limit = 16 * np.finfo(np.float32).eps * np.abs(logits_TV).max() / temperature
            np.testing.assert_allclose(c.logprobs, want_T, rtol=0, atol=limit)


def test_nothing_is_traced_after_the_warm_up():
    """Other lengths, orders and limits within the sizes of the first call run as compiled."""
    model, params = tiny_model(), tiny_params()
    generate = build_generate(model, list, str, EOS, SMALL)

    def run(lengths, samples, seed=0):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 60, n).tolist() for n in lengths]
        limits = (64, *rng.integers(1, 65, len(lengths) - 1).tolist())
        samplings = [Sampling(max_tokens=n, num_samples=samples) for n in limits]
        return generate(params, prompts, samplings, jax.random.key(seed))

    for length in (60, 10):
        for number in (12, 1):
            for samples in (1, 4):
                run([length] * number, samples)
    model.decode = chex.assert_max_traces(model.decode, n=0)
    model.prefill = chex.assert_max_traces(model.prefill, n=0)
    for seed, samples in ((1, 1), (2, 3), (3, 4), (4, 5)):
        run(np.random.default_rng(seed).integers(1, 61, 18), samples, seed)
    with pytest.raises(AssertionError, match="traced"):  # the guard sees what it should
        generate(params, [[1] * 70], GREEDY, jax.random.key(0))


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch):
    """However many streams there are; without sharing, once a sample."""
    model, params = tiny_model(), tiny_params()
    prompts, read = [[1] * 20, [2] * 30, [3] * 25], []

    class Counting(Engine):
        def __init__(self, *args):
            super().__init__(*args)
            prefill = self.prefill

            def counted(*args, **static):
                read.append(int(args[-1].sum()))  # tokens of each prompt, in this call
                return prefill(*args, **static)

            self.prefill = counted

    monkeypatch.setattr(generate_lib, "Engine", Counting)
    for config, times in (
        (EngineConfig(slots=16, group=4, streams=1), 1),
        (EngineConfig(slots=16, group=4, streams=4), 1),
        (EngineConfig(slots=16, group=4, streams=1, share_prefix=False), 4),
    ):
        read.clear()
        generate = build_generate(model, list, str, EOS, config)
        generate(params, prompts, Sampling(max_tokens=3, num_samples=4), jax.random.key(0))
        assert sum(read) == times * sum(len(p) - 1 for p in prompts), config


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match=r"engine\.steps is 0; it must be at least 1"):
        EngineConfig(steps=0)
