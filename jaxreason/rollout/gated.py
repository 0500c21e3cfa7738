"""Student-gated samples: the teacher proposes each token, the student accepts it or draws its own.

A proposal is taken where the student gives it at least `threshold` of its probability; else the
student's own draw is. So a trace holds no token that is wholly strange to the one that is to learn
it. The rule of reverse speculative decoding (RSD, arXiv 2509.22230), with 1 % as reported there.

Both models read what is taken, each with its own cache, in one loop on one device; prompts whose
samples fill the rows go through it together. No thinking budgets, stop texts or penalties.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.model import cache as cache_lib
from jaxreason.model.cache import Cache
from jaxreason.model.decoder import DecodeWeights, LanguageModel
from jaxreason.rollout import sample
from jaxreason.rollout.sample import Features, RowSampling
from jaxreason.types import Completion, Sampling

_LEAST = 64  # positions of a prompt and of a completion; sizes are multiples, so few are compiled
_STUDENT = 1  # what the key of the student's draws is folded from


@dataclasses.dataclass(frozen=True)
class Gated(Completion):
    """A completion whose log-probabilities are the student's, at temperature 1, as the gate reads
    them.
    """

    accepted: tuple[bool, ...] = ()  # which ids the teacher proposed; the student drew the others


class Pair(NamedTuple):
    """The same of the teacher and of the student: models, parameters, caches."""

    teacher: object
    student: object


class _Loop(NamedTuple):
    """What the loop carries; column t of the arrays BT is the t-th token of a completion."""

    t: jax.Array
    token_B: jax.Array  # the next to be read
    done_B: jax.Array
    count_B: jax.Array
    own: Pair  # caches of what follows the prompts
    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    accepted_BT: jax.Array


def build_gated(
    models: Pair,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    ends: Sequence[int],
    rows: int = 256,
) -> Callable[..., list[list[Gated]]]:
    """`generate(params, prompts, sampling, key, threshold=0.01)`; `params` are a Pair.

    Otherwise as rollout/generate.py's. With threshold 0 the samples are the teacher's, as that file
    draws them with `key`; with one above 1 the student's, as it draws them with fold_in(key, 1).

    Args:
      models: of one tokenizer, without a mesh.
      ends: the ids that end a completion; the first one drawn is kept as its last id.
      rows: completions at a time, or as many as a prompt has samples where those are more.
    Raises ValueError for a sampling that the loop does not know.
    """

    @jax.jit
    def prepare(params: Pair) -> Pair:
        return Pair(*(model.decode_weights(p) for model, p in zip(models, params, strict=True)))

    run = jax.jit(
        functools.partial(_run, models),
        static_argnames=("max_tokens", "size", "features"),
    )

    def generate(
        params: Pair,
        prompts: Sequence[str],
        sampling: Sampling,
        key: jax.Array,
        *,
        threshold: float = 0.01,
        on_progress: Callable[[int, int, int], None] | None = None,
        first: int = 0,
    ) -> list[list[Gated]]:
        check_sampling(sampling)
        weights, R = prepare(params), sampling.num_samples
        P = max(1, min(rows // R, len(prompts)))
        prompt_ids = [list(encode(prompt)) for prompt in prompts]
        room = _rounded(max((len(ids) for ids in prompt_ids), default=1) - 1)
        stops_X = np.array([*ends, *sampling.stop_ids], np.int32)
        limits = {"max_tokens": sampling.max_tokens, "size": _rounded(sampling.max_tokens)}
        found, tokens = [], 0
        for begin in range(0, len(prompts), P):
            part = prompt_ids[begin : begin + P]
            batch = _batch(part, P, R, room)
            numbers_B = np.arange(P * R, dtype=np.int32) + first + begin * R
            out = run(
                weights, *batch, numbers_B, key, threshold, _row_sampling(sampling, P * R), stops_X,
                features=Features.of([sampling]), **limits,
            )  # fmt: skip
            out = jax.device_get(out)
            made = [_completion(out, row, stops_X, decode) for row in range(len(part) * R)]
            found += [made[i : i + R] for i in range(0, len(made), R)]
            tokens += sum(c.num_tokens for c in made)
            if on_progress is not None:
                on_progress(len(found) * R, len(prompts) * R, tokens)
        return found

    return generate


def check_sampling(sampling: Sampling) -> None:
    """Raises ValueError naming what a gated loop does not know."""
    plain = Sampling(max_tokens=sampling.max_tokens)
    for name in ("thinking", "stop", "min_tokens", "repetition_penalty", "ignore_eos"):
        if getattr(sampling, name) != getattr(plain, name):
            raise ValueError(
                f"sampling.{name} is {getattr(sampling, name)!r}; samples that a student gates "
                "know none"
            )


def _run(
    models: Pair, weights: Pair, tokens_PT, sizes_P, last_P, live_B, numbers_B, key, threshold,
    rows: RowSampling, stops_X, *, max_tokens: int, size: int, features: Features,
) -> _Loop:  # fmt: skip
    """Completions of P prompts, B / P of each."""
    P, B = tokens_PT.shape[0], numbers_B.shape[0]
    keys_of = lambda key: jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers_B)
    keys = Pair(keys_of(key), keys_of(jax.random.fold_in(key, _STUDENT)))
    prefixes = Pair(*(_read_prompts(m, w, tokens_PT, sizes_P) for m, w in zip(models, weights)))
    own = Pair(*(cache_lib.empty(m.config, B, size, m.cache_dtype) for m in models))

    def body(loop: _Loop) -> _Loop:
        logits, after, drawn = [], [], []
        for model, w, cache, prefix, key_B in zip(models, weights, loop.own, prefixes, keys):
            logits_BV, new = model.decode(w, loop.token_B, cache, prefix)
            keys_B = jax.vmap(lambda k: jax.random.fold_in(k, loop.t))(key_B)
            logits.append(logits_BV)
            after.append(new)
            drawn.append(sample.draw(logits_BV, keys_B, rows, features))
        of_student = lambda token_B: sample.logprobs(logits[1], token_B, rows, Features())
        accepted_B = jnp.exp(of_student(drawn[0])) >= threshold
        token_B = jnp.where(accepted_B, *drawn)
        live_B = ~loop.done_B
        put = lambda x_BT, x_B: x_BT.at[:, loop.t].set(x_B)
        count_B = loop.count_B + live_B
        return _Loop(
            t=loop.t + 1,
            token_B=token_B,
            done_B=loop.done_B | (token_B[:, None] == stops_X).any(1) | (count_B >= max_tokens),
            count_B=count_B,
            own=Pair(*after),
            tokens_BT=put(loop.tokens_BT, token_B),
            logprobs_BT=put(loop.logprobs_BT, of_student(token_B)),
            accepted_BT=put(loop.accepted_BT, accepted_B),
        )

    columns = [jnp.zeros((B, max_tokens), dtype) for dtype in (jnp.int32, jnp.float32, bool)]
    token_B = jnp.repeat(last_P, B // P)
    start = _Loop(jnp.int32(0), token_B, ~live_B, jnp.zeros(B, jnp.int32), own, *columns)
    more = lambda loop: ~loop.done_B.all() & (loop.t < max_tokens)
    return jax.lax.while_loop(more, body, start)._replace(own=None)


def _read_prompts(model: LanguageModel, weights: DecodeWeights, tokens_PT, sizes_P) -> Cache:
    """The prompts without their last token, which is the first that is decoded."""
    P, T = tokens_PT.shape
    cache = cache_lib.empty(model.config, P, T, model.cache_dtype)
    return model.prefill(weights, tokens_PT, sizes_P, cache)


def _batch(part: Sequence[Sequence[int]], P: int, R: int, room: int):
    """(tokens_PT, sizes_P, last_P, live_B) of at most P prompts; what fills up is never live."""
    for number, ids in enumerate(part):
        if not ids:
            raise ValueError(f"prompt {number} of a batch has no tokens; it needs at least one")
    tokens_PT = np.zeros((P, room), np.int32)
    sizes_P, last_P = np.zeros(P, np.int32), np.zeros(P, np.int32)
    for p, ids in enumerate(part):
        tokens_PT[p, : len(ids) - 1] = ids[:-1]
        sizes_P[p], last_P[p] = len(ids) - 1, ids[-1]
    return tokens_PT, sizes_P, last_P, np.arange(P * R) < len(part) * R


def _row_sampling(sampling: Sampling, B: int) -> RowSampling:
    all_of = lambda value, dtype: np.full(B, value, dtype)
    return RowSampling(
        temperature_B=all_of(sampling.temperature, np.float32),
        top_k_B=all_of(sampling.top_k, np.int32),
        top_p_B=all_of(sampling.top_p, np.float32),
        min_p_B=all_of(sampling.min_p, np.float32),
        repetition_penalty_B=all_of(1.0, np.float32),
    )


def _completion(out: _Loop, row: int, stops_X: np.ndarray, decode) -> Gated:
    columns = (out.tokens_BT, out.logprobs_BT, out.accepted_BT)
    ids, logprobs, accepted = (x_BT[row, : out.count_B[row]].tolist() for x_BT in columns)
    stopped = ids[-1] in stops_X
    text = decode(ids[:-1] if stopped else ids)
    return Gated(text, tuple(ids), tuple(logprobs), not stopped, accepted=tuple(accepted))


def _rounded(size: int) -> int:
    return max(1, -(-size // _LEAST)) * _LEAST
