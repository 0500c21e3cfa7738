"""Thinking budgets: exact counts, every wording, waits, in one mixed batch."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_params

from jaxreason.rollout import budget
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text.chat import ThinkingIds, ThinkTags, thinking_ids
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.types import WORDINGS, Sampling, ThinkingBudget

EOS, CLOSE = 63, 62
ENDS = {"s1": (CLOSE, 50, 51), "qwen3": (40, 41, CLOSE, 42), "tag": (CLOSE,)}
IDS = ThinkingIds(close=(CLOSE,), ends=ENDS, wait=(30, 31))
LIMITS = (0, 5, 17)
BUDGETS = [ThinkingBudget(n, wording) for n in LIMITS for wording in WORDINGS]
WAITING = [ThinkingBudget(waits=2), ThinkingBudget(20, "s1", waits=2)]


@functools.cache
def completions():
    """40 of each budget and of none, one mixed batch: thinking ends at random, or never."""
    generate = build_generate(tiny_model(), list, str, EOS, EngineConfig(steps=7), IDS)
    sampling = Sampling(max_tokens=48, num_samples=40, temperature=2.0)
    samplings = [dataclasses.replace(sampling, thinking=b) for b in (None, *BUDGETS, *WAITING)]
    prompts = [[5, 6]] * len(samplings)
    found = generate(tiny_params(), prompts, samplings, jax.random.key(0))
    return dict(zip((None, *BUDGETS, *WAITING), found, strict=True))


def forced_runs(c):
    """[(start, ids)] of what the budget wrote."""
    flags = c.forced or (False,) * c.num_tokens
    groups = itertools.groupby(range(c.num_tokens), key=flags.__getitem__)
    runs = [list(run) for forced, run in groups if forced]
    return [(run[0], c.ids[run[0] : run[-1] + 1]) for run in runs]


@pytest.mark.parametrize("asked", BUDGETS, ids=str)
def test_thinking_ends_by_itself_or_exactly_at_the_limit(asked):
    forced = 0
    for c in completions()[asked]:
        runs = forced_runs(c)
        if runs:
            assert runs == [(asked.max_tokens, ENDS[asked.wording])]
            assert not {CLOSE, EOS} & set(c.ids[: asked.max_tokens])
            forced += 1
        else:
            thought = c.ids[: asked.max_tokens]
            assert CLOSE in thought or (c.ids[-1] == EOS and c.num_tokens <= asked.max_tokens)
        assert c.num_tokens <= 48 and len(c.logprobs) == c.num_tokens
    assert forced == 40 if asked.max_tokens == 0 else 0 < forced < 40


def test_without_a_budget_nothing_is_written():
    assert all(c.forced == () for c in completions()[None])


def test_waits_stand_where_thinking_would_have_ended():
    written = 0
    for c in completions()[WAITING[0]]:
        waits = [t for t in range(c.num_tokens) if c.forced and c.forced[t] and c.ids[t] == 30]
        written += len(waits)
        assert len(waits) <= 2
        assert CLOSE not in c.ids[: waits[-1] if len(waits) == 2 else None]
        assert all(ids == IDS.wait * (len(ids) // 2) for _, ids in forced_runs(c)[:-1])
    assert written > 20


def test_waits_count_as_thinking():
    """The limit of 20 holds, in the middle of a "Wait" too."""
    ended = 0
    for c in completions()[WAITING[1]]:
        if CLOSE in c.ids and c.forced and c.forced[c.ids.index(CLOSE)]:
            assert c.ids.index(CLOSE) == 20 and c.ids[20:23] == ENDS["s1"]
            ended += 1
        elif CLOSE in c.ids:
            assert c.ids.index(CLOSE) < 20
    assert ended > 5


def follow(thinking, asked, drawn):
    """(ids, forced) of one row that draws these tokens."""
    state, ids, flags = budget.start([asked], thinking), [], []
    step = jax.jit(lambda state, token: budget.control(state, token, thinking))
    for token in drawn:
        token_B, forced_B, removed_B, state = step(state, jnp.array([token]))
        for kept, new in ((ids, int(token_B[0])), (flags, bool(forced_B[0]))):
            kept[len(kept) - int(removed_B[0]) :] = [new]
    return ids, flags


def test_a_closing_tag_of_several_ids():
    """Its beginning goes too when "Wait" replaces it; an unfinished one is thinking."""
    thinking = ThinkingIds(
        close=(7, 8, 9), ends=dict.fromkeys(WORDINGS, (7, 8, 9, 5)), wait=(30, 31)
    )
    drawn = [1, 7, 8, 9, 0, 2, 7, 7, 8, 9, 3, 7, 8, 9]
    ids, forced = follow(thinking, ThinkingBudget(waits=1), drawn)
    assert ids == [1, 30, 31, 2, 7, 7, 8, 9, 3, 7, 8, 9]
    assert forced == [i in (1, 2) for i in range(12)]
    ids, forced = follow(thinking, ThinkingBudget(max_tokens=6, waits=1), drawn)
    assert ids == [1, 30, 31, 2, 7, 7, 7, 8, 9, 5, 8, 9][: len(ids)]
    assert forced[6:10] == [True] * 4 and not any(forced[10:])


def test_what_follows_a_replaced_tag_is_what_the_model_says(counting):
    """Keys and values of a tag that was taken back are forgotten, across device calls too."""
    model, params = counting
    thinking = ThinkingIds(close=(9, 11, 13), ends=dict.fromkeys(WORDINGS, (0,)), wait=(20, 21))
    for steps in (3, 4, 5, 32):
        generate = build_generate(model, list, str, EOS, EngineConfig(steps=steps), thinking)
        sampling = Sampling(max_tokens=20, temperature=0.0, thinking=ThinkingBudget(waits=1))
        ((c,),) = generate(params, [[1]], sampling, jax.random.key(0))
        assert c.ids[:5] == (3, 5, 7, 20, 21) and forced_runs(c) == [(3, (20, 21))]
        tokens_1T = np.array([[1, *c.ids]])
        positions_1T = np.arange(tokens_1T.shape[1])[None]
        h_1TD = model.hidden(params, tokens_1T, np.ones_like(tokens_1T), positions_1T)
        logits_TV = jnp.einsum("TD,VD->TV", h_1TD[0, :-1], model.head_weight(params))
        free_T = ~np.array(c.forced)
        np.testing.assert_array_equal(np.array(c.ids)[free_T], logits_TV.argmax(-1)[free_T])
        want_T = np.asarray(jax.nn.log_softmax(logits_TV))[np.arange(len(c.ids)), list(c.ids)]
        known_T = np.arange(c.num_tokens) != 3  # "Wait" was scored after the tag's beginning
        np.testing.assert_allclose(np.array(c.logprobs)[known_T], want_T[known_T], atol=1e-5)


def test_the_wordings():
    tokenizer, tags = ByteTokenizer(), ThinkTags("<t>", "</t>")
    ids = thinking_ids(tokenizer, tags)
    text = {wording: tokenizer.decode(end) for wording, end in ids.ends.items()}
    assert text["s1"] == "</t>\nFinal Answer:"
    assert text["qwen3"].startswith("Considering the limited time by the user, I have to give the")
    assert text["qwen3"].endswith(" now.\n</t>\n\n")
    assert text["tag"] == "</t>"
    assert tokenizer.decode(ids.wait) == "Wait" and tokenizer.decode(ids.close) == "</t>"
    assert len(thinking_ids(tokenizer).close) == 1


def test_a_budget_needs_to_know_the_tags():
    generate = build_generate(tiny_model(), list, str, EOS)
    sampling = Sampling(max_tokens=4, thinking=ThinkingBudget(max_tokens=2))
    with pytest.raises(ValueError, match=r"sampling\.thinking is set, but"):
        generate(tiny_params(), [[1]], sampling, jax.random.key(0))
