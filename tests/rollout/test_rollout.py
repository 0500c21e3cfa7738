"""What ends a completion, what is kept of it, and what is told on the way."""

import functools
import itertools

import jax
import numpy as np
import pytest
from tiny_models import tiny_model, tiny_params

from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.types import Sampling

EOS = 3
PROMPTS = ("5 9 11", "7", "1 2 4 8 16 32 60 5 9 13 21 22 2 7 9 9 10 31")


def encode(text):
    return [int(word) for word in text.split()]


def decode(ids):
    return "".join(f"{i} " for i in ids)


@functools.cache
def generator():
    return build_generate(tiny_model(), encode, decode, EOS, EngineConfig(slots=32, steps=6))


def samples(sampling=None, prompts=PROMPTS, seed=0, **options):
    """8 completions of each prompt, in 32 slots."""
    sampling = sampling or Sampling(**{**dict(max_tokens=16, num_samples=8), **options})
    return generator()(tiny_params(), prompts, sampling, jax.random.key(seed))


def flat(completions):
    return [completion for group in completions for completion in group]


def test_the_end_of_sequence_is_kept_and_counted():
    """Among 24 completions some end by themselves and some are cut."""
    found = flat(samples(max_tokens=40))
    assert len(found) == 24 and {c.truncated for c in found} == {True, False}
    for c in found:
        assert len(c.ids) == len(c.logprobs) == c.num_tokens <= 40
        assert (c.ids[-1] == EOS) is not c.truncated
        assert EOS not in c.ids[:-1]
        assert c.num_tokens == 40 or not c.truncated
        assert c.text == decode(c.ids if c.truncated else c.ids[:-1])
        assert c.forced == ()


def test_the_same_key_repeats_and_another_does_not():
    first, again, other = samples(), samples(), samples(seed=1)
    assert first == again
    assert all(a.ids != b.ids for a, b in zip(flat(first), flat(other)) if a.num_tokens > 3)


def test_parts_of_the_prompts_are_drawn_as_the_whole_is():
    key, sampling = jax.random.key(0), Sampling(max_tokens=16, num_samples=8)
    wholes = flat(samples())  # first: the parts then run the same programs
    parts = [
        generator()(tiny_params(), PROMPTS[begin : begin + 1], sampling, key, first=begin * 8)
        for begin in range(3)
    ]
    for c, whole in zip(flat(group for part in parts for group in part), wholes):
        assert (c.ids, c.text, c.truncated) == (whole.ids, whole.text, whole.truncated)
        # Other rows beside it: the same sums in another order, 1e-5 in a log-probability.
        np.testing.assert_allclose(c.logprobs, whole.logprobs, atol=1e-4)


def test_stop_ids_end_a_completion_and_stay_in_its_ids():
    stops = (10, 11, 12, 13, 14, 15)
    plain, stopped = flat(samples(ignore_eos=True)), flat(samples(ignore_eos=True, stop_ids=stops))
    assert all(c.num_tokens == 16 and c.truncated for c in plain)
    assert {c.truncated for c in stopped} == {True, False}
    for whole, c in zip(plain, stopped, strict=True):
        ends = [t for t, token in enumerate(whole.ids) if token in stops]
        assert c.ids == (whole.ids[: ends[0] + 1] if ends else whole.ids)
        assert c.truncated is not bool(ends)
        assert c.text == decode(c.ids[:-1] if ends else c.ids)


def test_stop_texts_end_a_completion_where_they_are_complete():
    """The stop is not in the text; the ids end with the token that completed it."""
    plain, stopped = flat(samples(max_tokens=30)), flat(samples(max_tokens=30, stop=("1 2", "0 ")))
    cut = 0
    for whole, c in zip(plain, stopped, strict=True):
        texts = [decode(whole.ids[:n]) for n in range(1, whole.num_tokens + 1)]
        ends = [n for n, text in enumerate(texts, 1) if "1 2" in text or "0 " in text]
        assert c.ids == (whole.ids[: ends[0]] if ends else whole.ids)
        if ends:
            text = texts[ends[0] - 1]
            assert c.text == text[: min(text.find(s) for s in ("1 2", "0 ") if s in text)]
            assert not c.truncated
            cut += 1
        else:
            assert (c.text, c.truncated) == (whole.text, whole.truncated)
    assert 0 < cut < 24


def test_no_stop_before_the_least_number_of_tokens():
    """The end of sequence cannot be drawn before; its share goes to the others."""
    stops = tuple(range(20, 40))
    for c in flat(samples(max_tokens=24, min_tokens=12, stop_ids=stops)):
        assert 12 < c.num_tokens <= 24 and not {EOS, *stops} & set(c.ids[:12])
    early = flat(samples(max_tokens=24, stop_ids=stops))
    assert min(c.num_tokens for c in early) < 5


def test_a_repetition_penalty_covers_prompt_and_completion():
    """Large: no token twice, none of the prompt. Small: as defined, step by step."""
    prompt = "5 9 11 30 31"
    ((c,),) = samples(Sampling(max_tokens=24, temperature=0.0, repetition_penalty=50.0), (prompt,))
    assert len({*encode(prompt), *c.ids}) == 5 + c.num_tokens
    sampling = Sampling(max_tokens=24, temperature=0.0, repetition_penalty=1.3, ignore_eos=True)
    ((c,),) = samples(sampling, (prompt,))
    model, params = tiny_model(), tiny_params()
    full = np.array([[*encode(prompt), *c.ids]])
    h_1TD = model.hidden(params, full, np.ones_like(full), np.arange(full.shape[1])[None])
    logits_TV = np.asarray(h_1TD[0] @ model.head_weight(params).T)
    for t in range(5, full.shape[1]):
        z_V, seen = logits_TV[t - 1].copy(), np.unique(full[0, :t])
        z_V[seen] = np.where(z_V[seen] > 0, z_V[seen] / 1.3, z_V[seen] * 1.3)
        assert z_V.argmax() == full[0, t]
        want = jax.nn.log_softmax(logits_TV[t - 1])[full[0, t]]  # before the penalty
        np.testing.assert_allclose(c.logprobs[t - 5], want, atol=1e-5)


def test_each_prompt_may_have_its_own_sampling():
    greedy, drawn = Sampling(max_tokens=9, temperature=0.0), Sampling(max_tokens=5, num_samples=3)
    first, second, third = samples([greedy, drawn, greedy])
    assert [len(g) for g in (first, second, third)] == [1, 3, 1]
    assert first[0].ids == samples(greedy, PROMPTS[:1])[0][0].ids
    with pytest.raises(ValueError, match="1 samplings for 3 prompts"):
        samples([greedy])


def test_tokens_are_told_as_they_come():
    told, progress = {}, []

    def on_tokens(prompt, sample, ids):
        told.setdefault((prompt, sample), []).append(ids)

    sampling = Sampling(max_tokens=40, num_samples=8)
    found = generator()(
        tiny_params(), PROMPTS, sampling, jax.random.key(0),
        on_tokens=on_tokens, on_progress=lambda *numbers: progress.append(numbers),
    )  # fmt: skip
    for p, group in enumerate(found):
        for r, c in enumerate(group):
            assert tuple(itertools.chain(*told[p, r])) == c.ids
            assert max(map(len, told[p, r])) <= 6
    assert progress[-1] == (24, 24, sum(c.num_tokens for c in flat(found)))
    assert progress == sorted(progress) and len(progress) > 3


def test_a_callback_may_stop_it():
    def on_progress(done, total, tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generator()(
            tiny_params(), PROMPTS, Sampling(max_tokens=4), jax.random.key(0),
            on_progress=on_progress,
        )  # fmt: skip
    assert flat(samples())  # the generator is as good as new


def test_prompts_that_are_none():
    assert samples(prompts=()) == []
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        samples(prompts=("1 2", ""))
