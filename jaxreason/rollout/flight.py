"""The host's side of one `generate`: which request is in which slot, and who decodes with whom.

Nothing here changes what is drawn: a request's key depends on its place among the prompts, the key
of a draw on the number of draws before it.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.rollout import budget
from jaxreason.rollout.budget import Budget
from jaxreason.rollout.engine import Emitted, Engine, Reads, Rows
from jaxreason.rollout.sample import Features, RowSampling
from jaxreason.types import Sampling

_LEAST = 16  # positions: the smallest size that anything is compiled for
_PREFILL_ROWS = 16  # prompts a device call, at most
_FIXED = 128  # what a row costs beside attention, in positions read


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt that is in the pool, or will be."""

    ids: list[int]
    waiting: int = 0  # requests that still need it
    entry: int | None = None
    filled: int = 0  # tokens in the pool
    ready: bool = False

    @property
    def length(self) -> int:
        """Tokens to prefill: all but the last."""
        return len(self.ids) - 1


@dataclasses.dataclass(eq=False)
class Request:
    """One completion that is waited for."""

    place: tuple[int, int]  # prompt index, sample index
    number: int  # what its key is folded from
    prompt: Prompt
    sampling: Sampling
    slot: int | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    forced: list[bool] = dataclasses.field(default_factory=list)
    ended: bool = False
    text: str | None = None  # known where a stop text ended it
    searched: int = 0  # ids that were searched for a stop text
    sent: int = 0  # ids that were passed to on_tokens

    def extend(self, emitted: Emitted, row: int) -> None:
        """Takes in what a step drew in this row."""
        n = int(emitted.draws_B[row])
        columns = [x[row, :n].tolist() for x in emitted[:4]]
        lists = (self.ids, self.logprobs, self.forced)
        if not any(columns[3]):
            for mine, new in zip(lists, columns):
                mine += new
        else:
            for *new, removed in zip(*columns):
                for mine, value in zip(lists, new, strict=True):
                    del mine[len(mine) - removed :]
                    mine.append(value)
        self.ended = bool(emitted.done_B[row])


class Flight:
    """A state of the engine and the requests that move through it.

    Args:
      requests: in the order in which they get slots.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], eos_id: int, key: jax.Array):
        self.engine, self.config, self.eos_id, self.key = engine, engine.config, eos_id, key
        self.queue, self.unfinished = collections.deque(requests), len(requests)
        self.arriving: list[Request] = []  # with a slot, waiting for their prompt
        self.live: list[Request] = []
        self.features = Features.of(r.sampling for r in requests)
        self.num_stops = _power(max(1 + len(r.sampling.stop_ids) for r in requests), least=4)
        self._make_state({id(r.prompt): r.prompt for r in requests}.values())

    def _make_state(self, prompts) -> None:
        requests = self.queue
        slots = min(self.config.slots, _power(len(requests)))
        entries = min(slots, _power(len(prompts)))
        self.free_slots, self.free_entries = list(range(slots)), list(range(entries))
        self.group = self.engine.group_size(slots)
        self.widths = [4**i for i in range(6) if 4**i <= self.group]
        slot_size = _size(max(r.sampling.max_tokens for r in requests))
        prompt_size = max(map(self._room, prompts))
        self.slot_size, self.prompt_size = slot_size, prompt_size
        self.steps = min(self.config.steps, slot_size)
        self.spare_slot, self.spare_entry = slots, entries
        unused = self._rows([], slots + 1)
        self.state = self.engine.init(slots, slot_size, entries, prompt_size, unused)

    def _room(self, prompt: Prompt) -> int:
        """Positions of the pool that its prefill writes, padding included."""
        start = max(prompt.length - 1, 0) // self.config.prefill_chunk * self.config.prefill_chunk
        return max(_size(prompt.length), start + _power(prompt.length - start))

    # -- from the queue into slots -----------------------------------------------------------------

    def refill(self, weights) -> None:
        """Gives free slots to the queue, and the prompts that they need to the pool.

        While many rows are in flight that is one prefill call: they do not wait for long prompts.
        """
        while self.queue and self.free_slots:
            request = self.queue.popleft()
            request.slot = self.free_slots.pop()
            if request.prompt.entry is None:
                request.prompt.entry = self.free_entries.pop()
            self.arriving.append(request)
        while self.arriving:
            prompts = {id(r.prompt): r.prompt for r in self.arriving}.values()
            partial = [p for p in prompts if not p.ready]
            if partial:
                self._prefill(weights, partial)
            ready = [r for r in self.arriving if r.prompt.ready]
            if ready:
                self._insert(ready)
            if len(self.live) >= len(self.arriving):
                break

    def _prefill(self, weights, prompts: list[Prompt]) -> None:
        """The next chunk of some prompts: those of like size to that of the first."""
        chunk = self.config.prefill_chunk
        size = lambda p: _power(min(p.length - p.filled, chunk))
        T = size(prompts[0])
        rows = min(_PREFILL_ROWS, max(1, 4 * chunk // T))
        chosen = [p for p in prompts if size(p) == T][:rows]
        rows = _level(len(chosen), rows)
        tokens_IT = np.zeros((rows, T), np.int32)
        entries_I = np.full(rows, self.spare_entry, np.int32)
        starts_I, sizes_I = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for i, p in enumerate(chosen):
            new = p.ids[p.filled : min(p.filled + chunk, p.length)]
            tokens_IT[i, : len(new)] = new
            entries_I[i], starts_I[i], sizes_I[i] = p.entry, p.filled, len(new)
            p.filled += len(new)
            p.ready = p.filled == p.length
        read = min(_power(int(starts_I.max()) + T), self.prompt_size)
        self.state = self.engine.prefill(
            weights, self.state, entries_I, tokens_IT, starts_I, sizes_I, read=read
        )

    def _insert(self, ready: list[Request]) -> None:
        for start in range(0, len(ready), self.group):
            part = ready[start : start + self.group]
            slots_I = np.full(self.group, self.spare_slot, np.int32)
            slots_I[: len(part)] = [r.slot for r in part]
            self.state = self.engine.insert(self.state, slots_I, self._rows(part, self.group))
        self.live += ready
        self.arriving = [r for r in self.arriving if r not in set(ready)]

    def _rows(self, requests: Sequence[Request], size: int) -> Rows:
        """Engine rows of these requests; the rest of `size` are done, in the spare entry."""

        def column(value, default, dtype) -> np.ndarray:
            values = [value(r) for r in requests] + [default] * (size - len(requests))
            return np.array(values, dtype)

        def stops(r: Request) -> list[int]:
            ids = list(r.sampling.stop_ids) + ([] if r.sampling.ignore_eos else [self.eos_id])
            return ids + [-1] * (self.num_stops - len(ids))

        sampling = RowSampling(
            temperature_B=column(lambda r: r.sampling.temperature, 0.0, np.float32),
            top_k_B=column(lambda r: r.sampling.top_k, 0, np.int32),
            top_p_B=column(lambda r: r.sampling.top_p, 1.0, np.float32),
            min_p_B=column(lambda r: r.sampling.min_p, 0.0, np.float32),
            repetition_penalty_B=column(lambda r: r.sampling.repetition_penalty, 1.0, np.float32),
        )
        return Rows(
            prefix_B=column(lambda r: r.prompt.entry, self.spare_entry, np.int32),
            token_B=column(lambda r: r.prompt.ids[-1], 0, np.int32),
            key_B=_request_keys(self.key, column(lambda r: r.number, 0, np.int32)),
            draws_B=np.zeros(size, np.int32),
            count_B=np.zeros(size, np.int32),
            done_B=column(lambda r: False, True, bool),
            sampling=sampling,
            min_tokens_B=column(lambda r: r.sampling.min_tokens, 0, np.int32),
            max_tokens_B=column(lambda r: r.sampling.max_tokens, 1, np.int32),
            stop_BX=column(stops, [-1] * self.num_stops, np.int32),
            seen_BV=self._seen(requests, size) if self.features.repetition_penalty else None,
            budget=self._budget(requests, size) if self.features.thinking else None,
        )

    def _seen(self, requests: Sequence[Request], size: int) -> np.ndarray:
        seen_BV = np.zeros((size, self.engine.model.config.vocab_size), bool)
        for i, request in enumerate(requests):
            seen_BV[i, request.prompt.ids] = True
        return seen_BV

    def _budget(self, requests: Sequence[Request], size: int) -> Budget:
        budgets = [r.sampling.thinking for r in requests] + [None] * (size - len(requests))
        return budget.start(budgets, self.engine.thinking)

    # -- decoding ----------------------------------------------------------------------------------

    def groups(self) -> Iterator[list[list[Request]]]:
        """All live requests in groups of runs of requests with one prompt, like lengths together.

        The runs of a call have one width, at most so many requests: the one that costs least.
        """
        by_prompt: dict[int, list[Request]] = {}
        for request in sorted(self.live, key=lambda r: -len(r.ids)):
            by_prompt.setdefault(id(request.prompt), []).append(request)
        width = self._width(by_prompt.values())
        runs = [rs[i : i + width] for rs in by_prompt.values() for i in range(0, len(rs), width)]
        runs.sort(key=lambda run: -len(run[0].ids))
        per = self.group // width
        for i in range(0, len(runs), per):
            yield runs[i : i + per]

    def _width(self, prompts) -> int:
        """1, 4, 16, ... requests of a prompt that read its keys together."""

        def cost(width: int) -> float:
            """Rows that decode, fillers too, times what they read."""
            runs = [(rs, -(-len(rs) // width)) for rs in prompts]
            own = lambda rs: sum(len(r.ids) for r in rs) / len(rs)
            return sum(n * (width * (_FIXED + own(rs)) + rs[0].prompt.length) for rs, n in runs)

        return min(self.widths, key=cost)

    def step(self, weights, runs: list[list[Request]]) -> list[Request]:
        """Decodes a group; its requests, with their new tokens."""
        width = _level(max(map(len, runs)), self.widths[-1])
        slots_PW = np.full((_level(len(runs), self.group // width), width), self.spare_slot)
        for i, run in enumerate(runs):
            slots_PW[i, : len(run)] = [r.slot for r in run]
        requests = [r for run in runs for r in run]
        reads = Reads(
            prefix=min(_power(max(r.prompt.length for r in requests)), self.prompt_size),
            own=min(max(_size(max(map(self._need, requests))), self.steps), self.slot_size),
        )
        self.state, emitted = self.engine.step(
            weights, self.state, slots_PW.astype(np.int32),
            features=self.features, reads=reads, steps=self.steps,
        )  # fmt: skip
        emitted = self.engine.harvest(emitted)
        for i, run in enumerate(runs):
            for w, request in enumerate(run):
                request.extend(emitted, i * width + w)
        return requests

    def _need(self, request: Request) -> int:
        """Positions of its own that it has written after the next step."""
        return min(len(request.ids) + self.steps, request.sampling.max_tokens)

    def release(self, request: Request) -> None:
        """Frees the slot of a request that ended, and its prompt where it was the last."""
        self.live.remove(request)
        self.free_slots.append(request.slot)
        self.unfinished -= 1
        request.prompt.waiting -= 1
        if not request.prompt.waiting:
            self.free_entries.append(request.prompt.entry)


@jax.jit
def _request_keys(key: jax.Array, number_B) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(number_B))


def _power(n: int, least: int = _LEAST) -> int:
    """The smallest power of two >= n and >= least."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def _size(n: int) -> int:
    """The smallest power of two, or 1.5 times one, that is >= n and >= the least size."""
    power = _power(n)
    return power * 3 // 4 if _LEAST < power and n <= power * 3 // 4 else power


def _level(n: int, most: int) -> int:
    """The smallest of most, most / 4, most / 16, ... that is >= n: how many rows are compiled."""
    level = most
    while level >= 4 and n <= level // 4:
        level //= 4
    return level
