"""The rollout engine: slots that decode, in groups, many tokens a device call.

One donated State holds a pool of prompts' keys and values and B slots. A slot points at its prompt
in the pool and has keys and values of its own only for what is generated, so the samples of one
prompt share its prefill, its memory and its reads. Four calls move it:

  prefill   chunks of prompts into the pool
  insert    requests into free slots
  step      up to `steps` more tokens for a group of slots
  harvest   what a step drew, on the host

A prompt's last token is not prefilled: it is the first that its slots decode, so that the draw of
the first token is the draw of any other. The last row of the pool and of the slots is never used:
what fills up a batch points at it.
"""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxreason.model import cache as cache_lib
from jaxreason.model.cache import Cache
from jaxreason.model.decoder import DecodeWeights, LanguageModel
from jaxreason.parallel import rules
from jaxreason.rollout import budget, sample
from jaxreason.rollout.budget import Budget
from jaxreason.rollout.sample import Features, RowSampling
from jaxreason.text.chat import ThinkingIds
from jaxreason.types import pytree_dataclass


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How the engine works; none of it changes what is drawn, up to rounding.

    On CPU a step of 16 rows costs no more a row than one of 256, and XLA keeps little more than one
    core busy with it: there is a stream a core, each in a thread of its own. An accelerator streams
    the weights once a group: there a group is all slots.
    """

    slots: int = 256  # requests in flight
    group: int | None = None  # slots that decode together; None: 16 on CPU, else all
    streams: int | None = None  # groups that decode at a time; None: one a core on CPU, else 1
    steps: int = 32  # tokens a device call, at most
    prefill_chunk: int = 256  # tokens of one prompt a device call, at most
    share_prefix: bool = True  # the samples of a prompt share one prefill and its keys and values

    def __post_init__(self):
        for name in ("slots", "group", "streams", "steps", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"engine.{name} is {value}; it must be at least 1")
        if self.streams is not None and self.streams > self.slots:
            raise ValueError(f"engine.streams is {self.streams}; there are {self.slots} slots")


@pytree_dataclass()
class Rows:
    """What a slot is besides its keys and values."""

    prefix_B: jax.Array  # int32, its prompt in the pool
    token_B: jax.Array  # int32, the next token to read
    key_B: jax.Array  # the PRNG key of the request
    draws_B: jax.Array  # int32, tokens drawn so far: the index of the next draw's key
    count_B: jax.Array  # int32, tokens of the completion so far
    done_B: jax.Array  # bool
    sampling: RowSampling
    min_tokens_B: jax.Array  # int32, no stop before so many
    max_tokens_B: jax.Array  # int32
    stop_BX: jax.Array  # int32, ids that end the completion; -1 fills up
    seen_BV: jax.Array | None = None  # bool; None where no request has a repetition penalty
    budget: Budget | None = None  # None where no request has a thinking budget


class State(NamedTuple):
    """All that the engine's calls read and write; donated to each."""

    pool: Cache  # prompts without their last token
    slots: Cache  # from a prompt's last token on
    rows: Rows


class Emitted(NamedTuple):
    """What a step drew: column t of row i counts where t < draws_B[i]."""

    tokens_BT: jax.Array
    logprobs_BT: jax.Array
    forced_BT: jax.Array  # bool, put there by the thinking budget
    removed_BT: jax.Array  # int32, ids to take back before this one
    draws_B: jax.Array
    done_B: jax.Array


class Reads(NamedTuple):
    """How many positions of the pool and of the slots a step may read. Static."""

    prefix: int
    own: int


class Engine:
    """The device's side: jitted functions of one model, each compiled once per static argument."""

    def __init__(
        self, model: LanguageModel, config: EngineConfig, thinking: ThinkingIds | None = None
    ):
        self.model, self.config, self.thinking = model, config, thinking
        self.mesh = None if model.mesh is None or model.mesh.size == 1 else model.mesh
        self.lanes = 1 if self.mesh is None else rules.axis_size(self.mesh, "lane")
        on_cpu = jax.default_backend() == "cpu"
        self.group = config.group or (16 if on_cpu else config.slots)
        # Two programs at a time on one mesh could wait for each other's exchanges for ever.
        cores = _cores() if on_cpu and self.mesh is None else 1
        self.streams = config.streams or min(cores, -(-config.slots // self.group))
        self._sizes: dict[str, int] = {}
        self.weights = jax.jit(model.decode_weights)
        self.init = jax.jit(self._init, static_argnames=("slots", "prompts"))
        prefill = jax.jit(self._prefill, donate_argnums=1, static_argnames="read")
        step = jax.jit(self._step, donate_argnums=1, static_argnames=("features", "reads", "steps"))
        self.prefill, self.step = self._compiled_once(prefill), self._compiled_once(step)
        self.insert = self._compiled_once(jax.jit(self._insert, donate_argnums=0))

    def grown(self, **sizes: int) -> dict[str, int]:
        """The largest of each size that was asked for so far.

        A state is as large as the largest before it, so that a smaller call, such as a rollout's
        second draw, runs the programs of the first.
        """
        self._sizes = {name: max(n, self._sizes.get(name, 0)) for name, n in sizes.items()}
        return self._sizes

    def _compiled_once(self, jitted: Callable) -> Callable:
        """The same, but that two streams do not compile one program at the same time."""
        known, lock = set(), threading.Lock()

        def call(*args, **static):
            leaves, tree = jax.tree.flatten(args)
            key = (tree, *map(jnp.shape, leaves), *sorted(static.items()))
            if key in known:
                return jitted(*args, **static)
            with lock:
                out = jitted(*args, **static)
                known.add(key)
                return out

        return call

    @staticmethod
    def harvest(emitted: Emitted) -> Emitted:
        """The same on the host; waits for the step."""
        return jax.device_get(emitted)

    def _init(self, unused: Rows, *, slots: tuple[int, int], prompts: tuple[int, int]) -> State:
        """An empty state.

        Args:
          unused: rows of one lane's slots and its spare, all done.
          slots: their number a lane, and their positions.
          prompts: of the pool, likewise.
        """
        c, dtype = self.model.config, self.model.cache_dtype
        caches = [
            cache_lib.empty(c, self.lanes * (number + 1), size, dtype)
            for number, size in (prompts, slots)
        ]
        rows = jax.tree.map(lambda x: jnp.concatenate([x] * self.lanes), unused)
        return self._pin(State(*caches, rows))

    def _prefill(
        self, weights: DecodeWeights, state: State, entries_I, tokens_IT, starts_I, sizes_I, *, read
    ) -> State:
        """Tokens [starts, starts + sizes) of prompts into pool entries that hold those before."""

        def lane(weights, state: State, entries_I, tokens_IT, starts_I, sizes_I) -> State:
            part = cache_lib.take_rows(state.pool, entries_I, read)
            part = dataclasses.replace(part, lengths_B=starts_I)
            part = self.model.prefill(weights, tokens_IT, sizes_I, part)
            pool = cache_lib.put_rows(state.pool, entries_I, part, starts_I, tokens_IT.shape[1])
            return state._replace(pool=pool)

        prompts = (entries_I, tokens_IT, starts_I, sizes_I)
        return self._pin(self._over_lanes(lane, weights, state, *prompts))

    def _insert(self, state: State, slots_I, rows: Rows) -> State:
        """Requests into slots; a slot's old keys and values are forgotten."""

        def lane(state: State, slots_I, rows: Rows) -> State:
            put = lambda old, new: old.at[slots_I].set(new)
            empty = dataclasses.replace(state.slots, lengths_B=put(state.slots.lengths_B, 0))
            return State(state.pool, empty, jax.tree.map(put, state.rows, rows))

        return self._pin(self._over_lanes(lane, state, slots_I, rows))

    def _step(
        self, weights: DecodeWeights, state: State, slots_PW, *, features: Features, reads: Reads,
        steps: int,
    ) -> tuple[State, Emitted]:  # fmt: skip
        """Up to `steps` tokens for these slots; those of a row share the prompt of its first."""
        lane = functools.partial(self._step_lane, features=features, reads=reads, steps=steps)
        state, emitted = self._over_lanes(lane, weights, state, slots_PW)
        return self._pin(state), self._whole(emitted)

    def _step_lane(self, weights, state: State, slots_PW, *, features, reads: Reads, steps: int):
        slots_B = slots_PW.reshape(-1)
        rows = jax.tree.map(lambda x: x[slots_B], state.rows)
        own = cache_lib.take_rows(state.slots, slots_B, reads.own)
        prefix = cache_lib.take_rows(state.pool, rows.prefix_B[:: slots_PW.shape[1]], reads.prefix)

        def body(carry):
            _, t, rows, own, columns = carry
            logits_BV, after = self.model.decode(weights, rows.token_B, own, prefix)
            new, column = self._next(logits_BV, rows, features)
            removed_B = column[-1]
            # A row that is done stays where it is; its slot is overwritten by what comes next.
            length_B = jnp.where(rows.done_B, own.lengths_B, after.lengths_B - removed_B)
            columns = [x_BT.at[:, t].set(x_B) for x_BT, x_B in zip(columns, column, strict=True)]
            own = dataclasses.replace(after, lengths_B=length_B)
            return self._any_lane(~new.done_B), t + 1, new, own, columns

        more = lambda carry: carry[0] & (carry[1] < steps)
        shape, dtypes = (len(slots_B), steps), (jnp.int32, jnp.float32, bool, jnp.int32)
        columns = [jnp.zeros(shape, dtype) for dtype in dtypes]
        start = (self._any_lane(~rows.done_B), jnp.int32(0), rows, own, columns)
        *_, new, after, columns = jax.lax.while_loop(more, body, start)
        emitted = Emitted(*columns, new.draws_B - rows.draws_B, new.done_B)
        # "Wait" in place of a closing tag of several ids takes back positions before these steps.
        back = len(self.thinking.close) - 1 if features.thinking else 0
        first_B, count = jnp.maximum(own.lengths_B - back, 0), min(steps + back, reads.own)
        slots = cache_lib.put_rows(state.slots, slots_B, after, first_B, count)
        put = lambda old, new: old.at[slots_B].set(new)
        return State(state.pool, slots, jax.tree.map(put, state.rows, new)), emitted

    def _over_lanes(self, lane: Callable, *args):
        """Runs `lane` for each part of the mesh on its rows; other dims stay as they lie."""
        if self.mesh is None:
            return lane(*args)
        rows = PartitionSpec(rules.LANE_AXES)
        specs = tuple(PartitionSpec() if isinstance(x, DecodeWeights) else rows for x in args)
        return jax.shard_map(
            lane, mesh=self.mesh, in_specs=specs, out_specs=rows,
            axis_names=set(rules.LANE_AXES), check_vma=False,
        )(*args)  # fmt: skip

    def _any_lane(self, live_B: jax.Array) -> jax.Array:
        """Whether a loop goes on: while a row of the lane is live, or of any lane where heads are
        split, because the compiler's exchanges between heads may involve all devices.
        """
        if self.mesh is None or rules.axis_size(self.mesh, "heads") == 1:
            return live_B.any()
        return jax.lax.pmax(live_B.any().astype(jnp.int32), rules.LANE_AXES) > 0

    def _whole(self, emitted: Emitted) -> Emitted:
        """On every device, so that every host can read it."""
        whole = lambda x: rules.constrain(x, self.mesh, *["whole"] * x.ndim)
        return jax.tree.map(whole, emitted)

    def _pin(self, state: State) -> State:
        """Each array where it always is: else the next call would be compiled for another place."""
        heads = lambda x: rules.constrain(x, self.mesh, "lane", "kv_heads", "whole", "head_dim")
        rest = lambda x: rules.constrain(x, self.mesh, "lane", *["whole"] * (x.ndim - 1))
        return jax.tree.map(lambda x: heads(x) if x.ndim == 4 else rest(x), state)

    def _next(self, logits_BV: jax.Array, rows: Rows, features: Features):
        """(rows with one more token each, (token_B, logprob_B, forced_B, removed_B))."""
        live_B, banned_BV, control = ~rows.done_B, None, rows.budget
        if features.min_tokens:
            stops_BV = (rows.stop_BX[:, :, None] == jnp.arange(logits_BV.shape[1])).any(1)
            banned_BV = stops_BV & (rows.count_B < rows.min_tokens_B)[:, None]
        keys_B = jax.vmap(jax.random.fold_in)(rows.key_B, rows.draws_B)
        token_B = sample.draw(logits_BV, keys_B, rows.sampling, features, rows.seen_BV, banned_BV)
        forced_B, removed_B = jnp.zeros_like(live_B), jnp.zeros_like(token_B)
        if features.thinking:
            token_B, forced_B, removed_B, control = budget.control(control, token_B, self.thinking)
        logprob_B = sample.logprobs(logits_BV, token_B, rows.sampling, features)
        count_B = rows.count_B + live_B - jnp.where(live_B, removed_B, 0)
        stopped_B = (rows.stop_BX == token_B[:, None]).any(1) & ~forced_B
        seen_BV = rows.seen_BV
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
        rows = dataclasses.replace(
            rows,
            token_B=token_B,
            draws_B=rows.draws_B + live_B,
            count_B=count_B,
            done_B=rows.done_B | stopped_B | (count_B >= rows.max_tokens_B),
            seen_BV=seen_BV,
            budget=control,
        )
        return rows, (token_B, logprob_B, forced_B, removed_B)


def _cores() -> int:
    """How many this process may use, where the system can say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
