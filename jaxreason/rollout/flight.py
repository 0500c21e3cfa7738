"""The host's side of one `generate`: which request is in which slot, and who decodes with whom.

Nothing here changes what is drawn: a request's key depends on its place among the prompts, the key
of a draw on the number of draws before it.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.rollout import budget
from jaxreason.rollout.engine import Emitted, Engine, Reads, Rows
from jaxreason.rollout.sample import Features, RowSampling
from jaxreason.types import Sampling

# Sizes are rounded up so that few programs are compiled, whatever arrives.
_LEAST = 16  # positions of a prompt, slots, stop ids
_LEAST_OWN = 64  # positions of a slot; fewer take about as long
_LEAST_ROWS = 4  # rows of a step; fewer take about as long
_PREFILL_ROWS = 16  # prompts a prefill call, at most
_FIXED = 128  # what a row of a step costs beside attention, in positions read


@dataclasses.dataclass(eq=False)
class Prompt:
    """A prompt that is in a lane's part of the pool, or will be."""

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
        *columns, removed = [x_BT[row, :n].tolist() for x_BT in emitted[:4]]
        lists = (self.ids, self.logprobs, self.forced)
        if any(removed):
            for back, *new in zip(removed, *columns, strict=True):
                for mine, value in zip(lists, new, strict=True):
                    mine[len(mine) - back :] = [value]
        else:
            for mine, new in zip(lists, columns, strict=True):
                mine += new
        self.ended = bool(emitted.done_B[row])


class Lane:
    """The slots and pool entries of one part of the mesh, and the requests that go through them."""

    def __init__(self, requests: Iterable[Request], slots: int, entries: int):
        self.queue = collections.deque(requests)
        self.slots, self.entries = list(range(slots)), list(range(entries))  # free ones
        self.arriving: list[Request] = []  # in a slot, their prompt not yet in the pool
        self.live: list[Request] = []

    def admit(self) -> None:
        """Gives free slots to the queue, and pool entries to the prompts of these requests."""
        while self.queue and self.slots:
            request = self.queue.popleft()
            request.slot = self.slots.pop()
            if request.prompt.entry is None:
                request.prompt.entry = self.entries.pop()
            self.arriving.append(request)

    def partial(self) -> list[Prompt]:
        """The prompts that are waited for."""
        return [p for p in unique(r.prompt for r in self.arriving) if not p.ready]

    def pop_ready(self, most: int) -> list[Request]:
        """At most so many requests whose prompt is in the pool; they are live from now on."""
        ready = [r for r in self.arriving if r.prompt.ready][:most]
        self.arriving = [r for r in self.arriving if r not in ready]
        self.live += ready
        return ready

    def release(self, request: Request) -> None:
        """Frees the slot of a request that ended, and its prompt where no other needs it."""
        self.live.remove(request)
        self.slots.append(request.slot)
        request.prompt.waiting -= 1
        if not request.prompt.waiting:
            self.entries.append(request.prompt.entry)

    def runs(self, width: int) -> list[list[Request]]:
        """The live requests in runs of at most `width` of one prompt, the longest first."""
        by_prompt = collections.defaultdict(list)
        for request in sorted(self.live, key=lambda r: -len(r.ids)):
            by_prompt[id(request.prompt)].append(request)
        cut = lambda rs: [rs[i : i + width] for i in range(0, len(rs), width)]
        runs = [run for requests in by_prompt.values() for run in cut(requests)]
        return sorted(runs, key=lambda run: -len(run[0].ids))


StopIds = Callable[[Sampling], tuple[int, ...]]


def take_off(
    engine: Engine, requests: Sequence[Request], key: jax.Array, stop_ids: StopIds
) -> list["Flight"]:
    """The requests, in the order in which they get slots, spread over the engine's streams.

    Args:
      requests: those of a prompt are neighbours.
      stop_ids: what ends a request's completion.
    """
    parts = [part for part in _share_out(requests, engine.streams) if part]
    lanes = [_share_out(part, engine.lanes) for part in parts]
    slots = -(-engine.config.slots // (engine.streams * engine.lanes))
    slots = min(slots, _power(max(len(lane) for part in lanes for lane in part)))
    prompts = max(len(unique(r.prompt for r in lane)) for part in lanes for lane in part)
    sizes = engine.grown(
        stops=_power(max(len(stop_ids(r.sampling)) for r in requests)),
        slots=slots,
        entries=min(slots, _power(prompts)),
        slot_size=_own(max(r.sampling.max_tokens for r in requests)),
        prompt_size=max(_room(r.prompt.length, engine.config.prefill_chunk) for r in requests),
    )
    features = Features.of(r.sampling for r in requests)
    return [Flight(engine, part, features, sizes, key, stop_ids) for part in lanes]


class Flight:
    """A state of the engine, and the lanes of requests that move through it.

    Args:
      lanes: the requests of each.
      sizes: of the state, as in `take_off`.
    """

    def __init__(
        self,
        engine: Engine,
        lanes: Sequence[Sequence[Request]],
        features: Features,
        sizes: dict[str, int],
        key: jax.Array,
        stop_ids: StopIds,
    ):
        self.engine, self.config, self.features = engine, engine.config, features
        self.key, self.stop_ids, self.num_stops = key, stop_ids, sizes["stops"]
        # Per lane. One more of each is the spare that fills up a batch.
        self.spare_slot, self.spare_entry = slots, entries = sizes["slots"], sizes["entries"]
        self.lanes = [Lane(part, slots, entries) for part in lanes]
        self.group = min(slots, engine.group)
        self.widths = [4**i for i in range(8) if 4**i <= self.group]
        self.slot_size, self.prompt_size = sizes["slot_size"], sizes["prompt_size"]
        self.steps = min(self.config.steps, self.slot_size)
        self.round: Iterator[list[list[list[Request]]]] = iter(())
        unused, prompts = self._rows([[]], slots + 1), (entries, self.prompt_size)
        self.state = engine.init(unused, slots=(slots, self.slot_size), prompts=prompts)

    @property
    def unfinished(self) -> bool:
        return any(lane.queue or lane.arriving or lane.live for lane in self.lanes)

    def advance(self, weights) -> list[tuple[Lane, Request]]:
        """Decodes the next group of the round; its requests, with their new tokens.

        Whoever asks releases those that ended. A new round begins with a refill.
        """
        group = next(self.round, None)
        if group is None:
            self._refill(weights)
            self.round = iter(list(self._groups()))
            group = next(self.round)
        return self._step(weights, group)

    # -- from the queue into slots -----------------------------------------------------------------

    def _refill(self, weights) -> None:
        """Fills free slots from the queue.

        While many rows are in flight that is one prefill call: they do not wait for long prompts.
        """
        for lane in self.lanes:
            lane.admit()
        while arriving := sum(len(lane.arriving) for lane in self.lanes):
            self._prefill(weights)
            while any(ready := [lane.pop_ready(self.group) for lane in self.lanes]):
                slots = [self._fill([r.slot for r in part], self.group) for part in ready]
                self.state = self.engine.insert(
                    self.state, np.concatenate(slots), self._rows(ready, self.group)
                )
            if sum(len(lane.live) for lane in self.lanes) >= arriving:
                break

    def _fill(self, slots: list[int], size: int) -> np.ndarray:
        return np.array(slots + [self.spare_slot] * (size - len(slots)), np.int32)

    def _prefill(self, weights) -> None:
        """The next chunk of some prompts, all of like size."""
        waiting = [lane.partial() for lane in self.lanes]
        if not any(waiting):
            return
        chunk = self.config.prefill_chunk
        size = lambda p: _chunk(p.length - p.filled, chunk)
        T = size(next(prompts[0] for prompts in waiting if prompts))
        most = min(_PREFILL_ROWS, max(1, 4 * chunk // T))
        chosen = [[p for p in prompts if size(p) == T][:most] for prompts in waiting]
        most = 1 if max(map(len, chosen)) == 1 else most
        rows = most * len(self.lanes)
        entries_I, tokens_IT = (
            np.full(rows, self.spare_entry, np.int32),
            np.zeros((rows, T), np.int32),
        )
        starts_I, sizes_I = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        for lane, prompts in enumerate(chosen):
            for i, p in enumerate(prompts, start=lane * most):
                new = p.ids[p.filled : min(p.filled + chunk, p.length)]
                tokens_IT[i, : len(new)] = new
                entries_I[i], starts_I[i], sizes_I[i] = p.entry, p.filled, len(new)
                p.filled += len(new)
                p.ready = p.filled == p.length
        read = min(_power(int(starts_I.max()) + T, 4), self.prompt_size)
        self.state = self.engine.prefill(
            weights, self.state, entries_I, tokens_IT, starts_I, sizes_I, read=read
        )

    def _rows(self, lanes: Sequence[Sequence[Request]], size: int) -> Rows:
        """Engine rows of these requests, `size` a lane; what fills up is done, in the spare entry.

        One lane stands for all where there is only one.
        """

        def column(value: Callable[[Request], object], default, dtype) -> np.ndarray:
            fill = lambda part: [value(r) for r in part] + [default] * (size - len(part))
            return np.array([x for part in lanes for x in fill(part)], dtype)

        def stops(request: Request) -> list[int]:
            ids = list(self.stop_ids(request.sampling))
            return ids + [-1] * (self.num_stops - len(ids))

        def seen(request: Request) -> np.ndarray:
            return np.bincount(request.prompt.ids, minlength=vocab) > 0

        number, vocab = np.int32, self.engine.model.config.vocab_size
        asked = lambda name: lambda r: getattr(r.sampling, name)
        sampling = RowSampling(
            temperature_B=column(asked("temperature"), 0.0, np.float32),
            top_k_B=column(asked("top_k"), 0, number),
            top_p_B=column(asked("top_p"), 1.0, np.float32),
            min_p_B=column(asked("min_p"), 0.0, np.float32),
            repetition_penalty_B=column(asked("repetition_penalty"), 1.0, np.float32),
        )
        budgets = column(asked("thinking"), None, object).tolist()
        keys_B = _request_keys(self.key, column(lambda r: r.number, 0, number))
        return Rows(
            prefix_B=column(lambda r: r.prompt.entry, self.spare_entry, number),
            token_B=column(lambda r: r.prompt.ids[-1], 0, number),
            key_B=keys_B,
            draws_B=column(lambda r: 0, 0, number),
            count_B=column(lambda r: 0, 0, number),
            done_B=column(lambda r: False, True, bool),
            sampling=sampling,
            min_tokens_B=column(asked("min_tokens"), 0, number),
            max_tokens_B=column(asked("max_tokens"), 1, number),
            stop_BX=column(stops, [-1] * self.num_stops, number),
            seen_BV=column(seen, np.zeros(vocab, bool), bool)
            if self.features.repetition_penalty
            else None,
            budget=budget.start(budgets, self.engine.thinking) if self.features.thinking else None,
        )

    # -- decoding ----------------------------------------------------------------------------------

    def _groups(self) -> Iterator[list[list[list[Request]]]]:
        """[lane][run][request]: all live requests once, those of like length together.

        The runs of a round have one width, at most so many requests: the one that costs least.
        """
        width = min(self.widths, key=self._cost)
        runs, per = [lane.runs(width) for lane in self.lanes], self.group // width
        for i in range(0, max(map(len, runs)), per):
            yield [lane_runs[i : i + per] for lane_runs in runs]

    def _cost(self, width: int) -> int:
        """Of a step of all runs of this width: rows, fillers too, by the positions they read."""
        runs = [run for lane in self.lanes for run in lane.runs(width)]
        own = sum(width * (_FIXED + len(run[0].ids)) for run in runs)
        return own + sum(run[0].prompt.length for run in runs)

    def _step(self, weights, group: list[list[list[Request]]]) -> list[tuple[Lane, Request]]:
        """Decodes a group of each lane; its requests, with their new tokens."""
        width = _level(max(len(run) for runs in group for run in runs), self.widths[-1])
        height = _level(max(map(len, group)), self.group // width, _LEAST_ROWS / width)
        slots_XW = np.full((len(self.lanes) * height, width), self.spare_slot, np.int32)
        rows = {}
        for lane, runs in enumerate(group):
            for i, run in enumerate(runs, start=lane * height):
                slots_XW[i, : len(run)] = [r.slot for r in run]
                rows |= {i * width + w: (self.lanes[lane], r) for w, r in enumerate(run)}
        prefix = max(r.prompt.length for _, r in rows.values())
        own = max(min(len(r.ids) + self.steps, r.sampling.max_tokens) for _, r in rows.values())
        reads = Reads(
            prefix=min(_power(prefix, 4), self.prompt_size),
            own=min(_own(own), self.slot_size),
        )
        self.state, emitted = self.engine.step(
            weights, self.state, slots_XW, features=self.features, reads=reads, steps=self.steps
        )
        emitted = self.engine.harvest(emitted)
        for row, (_, request) in rows.items():
            request.extend(emitted, row)
        return list(rows.values())


def unique(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Each once, in order."""
    return list({id(prompt): prompt for prompt in prompts}.values())


def _share_out(requests: Sequence[Request], lanes: int) -> list[list[Request]]:
    """Requests to lanes, in order, each prompt's together: to the lane with the least to do."""
    parts, load = [[] for _ in range(lanes)], [0] * lanes
    by_prompt = collections.defaultdict(list)
    for request in requests:
        by_prompt[id(request.prompt)].append(request)
    for together in by_prompt.values():
        lane = load.index(min(load))
        parts[lane] += together
        load[lane] += sum(r.sampling.max_tokens for r in together)
    return parts


@jax.jit
def _request_keys(key: jax.Array, number_B) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(number_B))


def _power(n: int, base: int = 2) -> int:
    """The smallest power of two >= n and >= the least size; with base 4 every second of them."""
    size = _LEAST
    while size < n:
        size *= base
    return size


def _own(n: int) -> int:
    """Positions of a slot: a multiple of 64, from 512 on a power of two or 1.5 times one."""
    if n <= 512:
        return -(-n // _LEAST_OWN) * _LEAST_OWN
    power = _power(n)
    return power * 3 // 4 if n <= power * 3 // 4 else power


def _chunk(left: int, most: int) -> int:
    """Positions of a prefill call for the next of so many tokens."""
    return min(_power(left, 4), most)


def _room(length: int, chunk: int) -> int:
    """Positions of the pool that the prefill of a prompt writes, padding included."""
    start = max(length - 1, 0) // chunk * chunk
    return -(-(start + _chunk(length - start, chunk)) // _LEAST) * _LEAST


def _level(n: int, most: int, least: float = 1) -> int:
    """The smallest of most, most / 4, most / 16, ... that is >= n and >= least."""
    level = most
    while level // 4 >= max(n, least):
        level //= 4
    return level
