"""`generate`: prompts in, completions out, through the slots of the rollout engine."""

from collections.abc import Callable, Sequence

import jax

from jaxreason.model.decoder import LanguageModel
from jaxreason.rollout.engine import Engine, EngineConfig
from jaxreason.rollout.flight import Flight, Prompt, Request
from jaxreason.types import Completion, Params, Sampling

Generate = Callable[..., list[list[Completion]]]
OnTokens = Callable[[int, int, list[int]], None]  # prompt index, sample index, new ids
OnProgress = Callable[[int, int, int], None]  # requests done, requests in all, tokens so far


def build_generate(
    model: LanguageModel,
    encode: Callable[[str], list[int]],
    decode: Callable[[list[int]], str],
    eos_id: int,
    config: EngineConfig = EngineConfig(),
) -> Generate:
    """`generate(params, prompts, sampling, key)` -> completions[prompt][sample].

    `sampling` is one for all prompts or one a prompt. The callbacks `on_tokens` and `on_progress`
    are called between device calls, and may raise to stop.

    Args:
      encode: prompt text -> ids.
      decode: ids -> text.
      eos_id: ends a completion, and is kept as its last id.
    """
    engine = Engine(model, config)

    def generate(
        params: Params,
        prompts: Sequence[str],
        sampling: Sampling | Sequence[Sampling],
        key: jax.Array,
        *,
        on_tokens: OnTokens | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[list[Completion]]:
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"{len(samplings)} samplings for {len(prompts)} prompts: one for each")
        if not prompts:
            return []
        requests = _requests([encode(p) for p in prompts], samplings, config.share_prefix)
        found: dict[tuple[int, int], Completion] = {}
        weights, tokens = engine.weights(params), 0
        flight = Flight(engine, requests, eos_id, key)
        while flight.unfinished:
            flight.refill(weights)
            for group in list(flight.groups()):
                for request, new in flight.step(weights, group):
                    tokens += len(new)
                    if on_tokens is not None:
                        on_tokens(*request.place, new)
                    if request.ended:
                        found[request.place] = _completion(request, decode, eos_id)
                        flight.release(request)
            if on_progress is not None:
                on_progress(len(found), len(requests), tokens)
        return [[found[p, r] for r in range(s.num_samples)] for p, s in enumerate(samplings)]

    return generate


def _requests(
    prompts: Sequence[list[int]], samplings: Sequence[Sampling], share_prefix: bool
) -> list[Request]:
    """All requests, those with the highest limit first, those of a prompt together."""
    requests = []
    for p, (ids, sampling) in enumerate(zip(prompts, samplings, strict=True)):
        if not ids:
            raise ValueError(f"prompt {p} has no tokens; it needs at least one")
        prompt = Prompt(list(ids))
        for r in range(sampling.num_samples):
            prompt = prompt if share_prefix else Prompt(prompt.ids)
            prompt.waiting += 1
            requests.append(Request((p, r), len(requests), prompt, sampling))
    return sorted(requests, key=lambda request: -request.sampling.max_tokens)


def _completion(request: Request, decode, eos_id: int) -> Completion:
    ids, sampling = tuple(request.ids), request.sampling
    stopped = ids[-1] in sampling.stop_ids or (ids[-1] == eos_id and not sampling.ignore_eos)
    return Completion(
        text=decode(list(ids[:-1] if stopped else ids)),
        ids=ids,
        logprobs=tuple(request.logprobs),
        truncated=not stopped,
    )
