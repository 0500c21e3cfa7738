"""`generate`: prompts in, completions out, through the slots of the rollout engine."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures

import jax

from jaxreason.model.decoder import DecodeWeights, LanguageModel
from jaxreason.parallel import hosts
from jaxreason.rollout import parts
from jaxreason.rollout.engine import Engine, EngineConfig
from jaxreason.rollout.flight import Flight, Lane, Prompt, Request, take_off
from jaxreason.rollout.sync import place
from jaxreason.text.chat import ThinkingIds
from jaxreason.types import Completion, Params, Sampling

Generate = Callable[..., list[list[Completion]]]
OnTokens = Callable[[int, int, list[int]], None]  # prompt index, sample index, new ids
OnProgress = Callable[[int, int, int], None]  # requests done, requests in all, tokens so far

_generators = itertools.count()  # each has a channel of its own between processes


def build_generate(
    model: LanguageModel,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    eos_id: int,
    config: EngineConfig = EngineConfig(),
    thinking: ThinkingIds | None = None,
    stop_ids: Sequence[int] = (),
) -> Generate:
    """`generate(params, prompts, sampling, key)` -> completions[prompt][sample].

    `sampling` is one for all prompts or one a prompt. The callbacks `on_tokens` and `on_progress`
    are called between device calls, and may raise Interrupted to stop. `first` completions were
    drawn before with this key: parts of a list of prompts are then drawn as the whole would be.

    Several processes call it together. Each draws a part of the prompts on its own devices, those
    of `model`, its callbacks hear of that part, and all return everything; what is drawn does not
    depend on how many there are. One that is stopped stops all.

    Args:
      encode: prompt text -> ids.
      decode: ids -> text.
      eos_id: ends a completion, and is kept as its last id.
      thinking: how a reasoning ends, for requests with a thinking budget.
      stop_ids: end a completion as eos_id does, as a published model's other end tokens.
    """
    engine, channel = Engine(model, config, thinking), f"rollout{next(_generators)}"

    def generate(
        params: Params,
        prompts: Sequence[str],
        sampling: Sampling | Sequence[Sampling],
        key: jax.Array,
        *,
        on_tokens: OnTokens | None = None,
        on_progress: OnProgress | None = None,
        first: int = 0,
    ) -> list[list[Completion]]:
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(samplings)} samplings for {len(prompts)} prompts: one for each")
        if thinking is None and any(s.thinking for s in samplings):
            raise ValueError("sampling.thinking is set, but the generator knows no thinking ids")
        mine = hosts.share(len(prompts))
        before = first + sum(s.num_samples for s in samplings[: mine.start])
        return parts.whole(
            channel,
            lambda: draw(
                params, prompts[mine], samplings[mine], key, before, on_tokens, on_progress
            ),
        )

    def draw(
        params, prompts, samplings, key, before: int, on_tokens, on_progress
    ) -> list[list[Completion]]:
        if not prompts:
            return []
        prompt_ids = [list(encode(prompt)) for prompt in prompts]
        requests = _requests(prompt_ids, samplings, engine, before)
        found: dict[tuple[int, int], Completion] = {}
        weights = engine.weights(place(params, model))
        ends_of = lambda s: s.stop_ids if s.ignore_eos else (*s.stop_ids, eos_id, *stop_ids)
        flights = take_off(engine, requests, key, ends_of)
        for stepped in _advance(flights, weights):
            for lane, request in stepped:
                finish_stop_text(request, decode)
                if on_tokens is not None:
                    _stream(request, on_tokens, thinking)
                if request.ended:
                    ends = ends_of(request.sampling)
                    found[request.place] = _completion(request, decode, ends)
                    lane.release(request)
            if on_progress is not None:
                on_progress(len(found), len(requests), sum(len(r.ids) for r in requests))
        return [[found[p, r] for r in range(s.num_samples)] for p, s in enumerate(samplings)]

    return generate


def _advance(
    flights: Sequence[Flight], weights: DecodeWeights
) -> Iterator[list[tuple[Lane, Request]]]:
    """What each step of any flight brought, one at a time; the flights run in threads."""
    if len(flights) == 1:
        while flights[0].unfinished:
            yield flights[0].advance(weights)
        return
    with futures.ThreadPoolExecutor(len(flights)) as pool:
        running = {pool.submit(flight.advance, weights): flight for flight in flights}
        while running:
            done, _ = futures.wait(running, return_when=futures.FIRST_COMPLETED)
            for future in done:
                flight = running.pop(future)
                yield future.result()
                if flight.unfinished:
                    running[pool.submit(flight.advance, weights)] = flight


def _stream(request: Request, on_tokens: OnTokens, thinking: ThinkingIds | None) -> None:
    """Passes on the ids that are final: a tag that begins may yet give way to "Wait"."""
    held = 0
    if request.sampling.thinking is not None and not request.ended:
        held = len(thinking.close) - 1
    final = max(request.sent, len(request.ids) - held)
    if final > request.sent:
        on_tokens(*request.place, request.ids[request.sent : final])
        request.sent = final


def finish_stop_text(request: Request, decode: Callable[[list[int]], str]) -> None:
    """Ends a request at the first token after which a stop text is complete.

    The text is cut before the stop; the ids keep the token that completed it.
    """
    stop = request.sampling.stop
    if not stop:
        return
    whole = decode(request.ids)
    first = request.searched if any(text in whole for text in stop) else len(request.ids)
    request.searched = len(request.ids)
    for n in range(max(first, request.sampling.min_tokens - 1), len(request.ids)):
        text = decode(request.ids[: n + 1])
        found = [text.find(end) for end in stop if end in text]
        if found:
            for values in (request.ids, request.logprobs, request.forced):
                del values[n + 1 :]
            request.text, request.ended = text[: min(found)], True
            return


def _requests(
    prompts: Sequence[list[int]], samplings: Sequence[Sampling], engine: Engine, before: int
) -> list[Request]:
    """All requests, those with the highest limit first, those of a prompt together.

    Samples share their prompt. Where there are fewer prompts than lanes, each lane has its own, and
    each stream too whose group the samples fill. `before` requests came earlier, or are those of
    other processes.
    """
    requests = []
    most = copies = max(s.num_samples for s in samplings)
    if engine.config.share_prefix:
        streams = min(engine.streams, -(-most // (engine.lanes * engine.group)))
        copies = -(-engine.lanes * streams // len(prompts))
    for p, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        if not ids:
            raise ValueError(f"prompt {p} has no tokens; it needs at least one")
        shared = [Prompt(ids) for _ in range(copies)]
        for r in range(sampling.num_samples):
            prompt = shared[r * copies // sampling.num_samples]
            prompt.waiting += 1
            requests.append(Request((p, r), before + len(requests), prompt, sampling))
    return sorted(requests, key=lambda request: -request.sampling.max_tokens)


def _completion(request: Request, decode, stop_ids: Sequence[int]) -> Completion:
    ids, text = tuple(request.ids), request.text
    stopped = ids[-1] in stop_ids and not request.forced[-1]
    if text is None:
        text = decode(list(ids[:-1] if stopped else ids))
    return Completion(
        text=text,
        ids=ids,
        logprobs=tuple(request.logprobs),
        truncated=not stopped and request.text is None,
        forced=tuple(request.forced) if any(request.forced) else (),
    )
