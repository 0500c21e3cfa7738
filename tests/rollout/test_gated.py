"""Samples of a teacher that a student gates: whose tokens they are, and by which probability."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import VOCAB, tiny_model, tiny_params

from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.gated import Pair, build_gated
from jaxreason.rollout.generate import build_generate
from jaxreason.types import Sampling, ThinkingBudget

EOS = 3
PROMPTS = ("5 9 11", "7", " ".join(str(i % 60) for i in range(70)))
SAMPLING = Sampling(max_tokens=12, temperature=0.9, top_p=0.95, num_samples=4)
STOPS = (EOS, 10, 11)  # of 64 tokens that are about as likely: some completions end early


def encode(text):
    return [int(word) for word in text.split()]


def decode(ids):
    return "".join(f"{i} " for i in ids)


@functools.cache
def pair() -> tuple[Pair, Pair]:
    """Two models of one vocabulary, the student's table longer; and their parameters."""
    student = tiny_model(num_layers=1, vocab_size=VOCAB + 16, valid_vocab=VOCAB)
    made = jax.jit(student.init)(jax.random.key(1))
    return Pair(tiny_model(), student), Pair(tiny_params(), made)


@functools.cache
def generator(rows: int):
    return build_gated(pair()[0], encode, decode, STOPS, rows)


def gated(threshold: float, prompts=PROMPTS, sampling=SAMPLING, seed=0, rows=8, **options):
    key, params = jax.random.key(seed), pair()[1]
    return generator(rows)(params, prompts, sampling, key, threshold=threshold, **options)


def plain(which: int, key) -> list:
    """What rollout/generate.py draws of one of the two."""
    models, params = pair()
    engine = EngineConfig(slots=16)
    generate = build_generate(models[which], encode, decode, EOS, engine, stop_ids=STOPS[1:])
    return generate(params[which], PROMPTS, SAMPLING, key)


def said(groups):
    return [[(c.ids, c.text, c.truncated) for c in group] for group in groups]


def test_a_gate_that_is_open_gives_the_teachers_samples():
    found = gated(0.0)
    assert said(found) == said(plain(0, jax.random.key(0)))
    ends = {c.truncated for group in found for c in group}
    assert ends == {True, False}  # both kinds of end were compared
    assert all(all(c.accepted) for group in found for c in group)


def test_a_gate_that_is_shut_gives_the_students_samples():
    found = gated(1.01)
    assert said(found) == said(plain(1, jax.random.fold_in(jax.random.key(0), 1)))
    assert not any(any(c.accepted) for group in found for c in group)


@jax.jit
def _logprobs(tokens_BT):
    model, params = pair()[0].student, pair()[1].student
    ones, positions = jnp.ones_like(tokens_BT), jnp.arange(tokens_BT.shape[1])[None]
    h_BTD = model.hidden(params, tokens_BT, ones, positions)
    logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))[..., :VOCAB]
    return jax.nn.log_softmax(logits_BTV[0], axis=-1)


def student_logprobs(prompt: str, ids=()) -> np.ndarray:
    """[T, V] of what follows the prompt and each id, by one pass at temperature 1."""
    before = encode(prompt)
    tokens_BT = np.zeros((1, 96), np.int32)  # a length for all; what follows is not read
    tokens_BT[0, : len(before) + len(ids)] = [*before, *ids]
    return np.asarray(_logprobs(tokens_BT))[len(before) - 1 : len(before) + len(ids)]


def test_what_is_taken_of_the_teacher_is_likely_to_the_student():
    """At 0.02 of 64 tokens about half of the proposals pass: both cases are many."""
    threshold, found = 0.02, gated(0.02)
    assert 0.2 < np.mean([flag for group in found for c in group for flag in c.accepted]) < 0.8
    for prompt, group in zip(PROMPTS, found, strict=True):
        for c in group[:2]:
            logprobs = student_logprobs(prompt, c.ids)[np.arange(len(c.ids)), c.ids]
            # Another order of the same sums: 1e-4 in a logit of order 1.
            np.testing.assert_allclose(c.logprobs, logprobs, atol=1e-4)
            accepted = np.array(c.accepted)
            assert (np.exp(logprobs[accepted]) >= threshold * (1 - 1e-4)).all()
            assert len(accepted) == len(c.ids)


def test_the_students_own_draws_take_no_notice_of_the_proposal():
    """Where a proposal falls, the student's token is as in its own distribution: over 2,000 first
    tokens, those that it drew have frequencies within 4 standard errors of it.
    """
    one = Sampling(max_tokens=1, num_samples=2_000)
    (group,) = gated(0.02, ["5 9 11"], one, seed=2)
    drawn = np.array([c.ids[0] for c in group if not c.accepted[0]])
    assert len(drawn) > 500
    share_V = np.exp(student_logprobs("5 9 11")[0])
    found_V = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    error_V = np.sqrt(share_V * (1 - share_V) / len(drawn))
    assert (np.abs(found_V - share_V) < 4 * error_V + 1e-3).all()


def test_rows_and_parts_change_nothing():
    whole = said(gated(0.02))
    assert said(gated(0.02, rows=1)) == whole
    told = []
    tail = gated(0.02, PROMPTS[1:], first=4, on_progress=lambda *n: told.append(n))
    assert said(tail) == whole[1:]
    assert told == [(8, 8, sum(len(ids) for group in whole[1:] for ids, *_ in group))]
    assert said(gated(0.02, seed=1)) != whole


@pytest.mark.parametrize(
    "name, value",
    [
        ("thinking", ThinkingBudget(max_tokens=3)),
        ("stop", ("1 2",)),
        ("min_tokens", 2),
        ("repetition_penalty", 1.2),
        ("ignore_eos", True),
    ],
)
def test_what_the_loop_does_not_know_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"sampling\.{name} is .* know none"):
        gated(0.02, sampling=Sampling(max_tokens=8, **{name: value}))
