"""Collecting a rollout: prompts, completions, rewards, and which groups are worth learning from."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxreason.data.prompts import PromptStream
from jaxreason.parallel import hosts
from jaxreason.rollout.generate import Generate
from jaxreason.rollout.parts import Interrupted
from jaxreason.train.groups import Group
from jaxreason.types import Completion, Params, Prompt, Sampling

_LMBDA = 0x6C6D  # keeps the choice of a step apart from the loop's own draws of (seed, step)

Reward = Callable[[Sequence[Completion], Sequence[str]], tuple[list[float], dict[str, list[float]]]]


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """Keys of `rollout`: what a step learns from."""

    num_prompts: int  # groups a step
    lmbda: float = 1.0  # share of the steps that sample (GKD); the rest take the data's answers
    filter_zero_std: bool = True  # drop groups whose rewards all agree, and draw others (DAPO)
    max_gen_batches: int = 10  # draws a step; with too few groups after them the step is skipped

    def __post_init__(self):
        for name in ("num_prompts", "max_gen_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"rollout.{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass
class Rollout:
    """The groups of one step, perhaps not all of them yet. Everything but the times is kept."""

    step: int
    on_policy: bool = True  # False: the completions are the data set's own, without rewards
    groups: list[Group] = dataclasses.field(default_factory=list)
    gen_batches: int = 0
    generated: int = 0  # groups, with those that were dropped
    earned: float = 0.0  # the sum of their mean rewards
    agreed: int = 0  # of them, those whose rewards were all the same
    prompts: dict[str, float] = dataclasses.field(default_factory=dict)  # the stream's stats after
    began: float = 0.0  # seconds of time.perf_counter
    ended: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "on_policy": self.on_policy,
            "groups": [group.to_json() for group in self.groups],
            "gen_batches": self.gen_batches,
            "generated": self.generated,
            "earned": self.earned,
            "agreed": self.agreed,
            "prompts": self.prompts,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Rollout":
        groups = [Group.from_json(group) for group in content["groups"]]
        names = ("step", "on_policy", "gen_batches", "generated", "earned", "agreed", "prompts")
        return cls(groups=groups, **{name: content[name] for name in names})


@dataclasses.dataclass(frozen=True)
class Collector:
    """Fills rollouts. A step's draws depend on the key, the step and the parameters alone.

    Only one thread at a time may collect: the prompt stream and its table of difficulty go along.
    """

    config: CollectConfig
    sampling: Sampling  # its num_samples is the size R of a group
    prompts: PromptStream
    encode: Callable[[str], list[int]]
    generate: Generate
    reward: Reward
    solved_by: str  # the reward function whose mean is a prompt's solve rate
    key: jax.Array
    # Of a prompt with the data set's own answer: (its ids, the answer's); for lmbda below 1.
    encode_answer: Callable[[Prompt], tuple[list[int], list[int]]] | None = None
    seed: int = 0  # of which steps sample

    def complete(self, rollout: Rollout) -> bool:
        enough = len(rollout.groups) >= self.config.num_prompts
        return enough or rollout.gen_batches >= self.config.max_gen_batches

    def collect(
        self, rollout: Rollout, params: Params, stop: Callable[[], bool] = lambda: False
    ) -> Rollout:
        """Draws until the rollout is complete; a rollout that was begun goes on where it was.

        Raises Interrupted soon after `stop()` is true in any process: what was complete is in the
        rollout, and the prompt stream back where the last complete draw left it.
        """
        rollout.began = time.perf_counter()
        # Of seed and step alone, so that a resumed run chooses as the uninterrupted one.
        random = np.random.default_rng((self.seed, rollout.step, _LMBDA)).random()
        if random >= self.config.lmbda:
            return self._answers(rollout)
        step_key = jax.random.fold_in(self.key, rollout.step)

        def on_progress(*_):
            if stop():
                raise Interrupted

        while not self.complete(rollout):
            before = self.prompts.get_state()
            key = jax.random.fold_in(step_key, rollout.gen_batches)
            try:
                drawn = self._draw(self._ask(rollout), params, key, on_progress)
            except Interrupted:
                self.prompts.set_state(before)
                raise
            rollout.gen_batches += 1
            rollout.generated += len(drawn)
            rollout.earned += sum(sum(g.rewards) / len(g.rewards) for g in drawn)
            rollout.agreed += sum(not g.varied for g in drawn)
            kept = [g for g in drawn if g.varied] if self.config.filter_zero_std else drawn
            rollout.groups = (rollout.groups + kept)[: self.config.num_prompts]
            rollout.prompts = self.prompts.stats()
        rollout.ended = time.perf_counter()
        return rollout

    def _answers(self, rollout: Rollout) -> Rollout:
        """As many rows as a rollout of samples: of other prompts each its data set's answer."""
        rollout.on_policy = False
        for prompt in self.prompts.next(self.config.num_prompts * self.sampling.num_samples):
            prompt_ids, ids = self.encode_answer(prompt)
            answer = Completion(prompt.response, tuple(ids), (), truncated=False)
            group = Group(prompt, tuple(prompt_ids), (answer,), rewards=(0.0,), breakdown={})
            rollout.groups.append(group)
        rollout.prompts = self.prompts.stats()
        rollout.ended = time.perf_counter()
        return rollout

    def _ask(self, rollout: Rollout) -> int:
        """How many prompts to draw: those missing, over the share that was kept so far."""
        missing = self.config.num_prompts - len(rollout.groups)
        if rollout.generated == 0:
            return missing
        share = max(len(rollout.groups) / rollout.generated, 0.25)
        return min(self.config.num_prompts, math.ceil(missing / share))

    def _draw(self, num: int, params: Params, key: jax.Array, on_progress) -> list[Group]:
        prompts = self.prompts.next(num)
        texts = [prompt.text for prompt in prompts]
        completions = self.generate(params, texts, self.sampling, key, on_progress=on_progress)
        rewards, breakdown = self._rewards(prompts, completions)
        groups, R = [], self.sampling.num_samples
        for q, prompt in enumerate(prompts):
            own = slice(q * R, (q + 1) * R)
            group = Group(
                prompt=prompt,
                prompt_ids=tuple(self.encode(prompt.text)),
                completions=tuple(completions[q]),
                rewards=tuple(rewards[own]),
                breakdown={name: tuple(values[own]) for name, values in breakdown.items()},
            )
            self.prompts.record(prompt.id, self._solve_rate(group), R)
            groups.append(group)
        return groups

    def _rewards(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Of all completions. Each process scores those of its part of the prompts.

        Also because a verifier has time limits: processes that scored the same completions could
        differ, and learn different things.
        """
        mine = hosts.share(len(prompts))
        flat = [c for row in completions[mine] for c in row]
        pairs = zip(prompts[mine], completions[mine], strict=True)
        scored = self.reward(flat, [p.answer for p, row in pairs for _ in row])
        if not hosts.several():
            return scored
        parts = hosts.exchange("rewards", json.dumps(scored).encode())
        rewards, breakdowns = zip(*map(json.loads, parts), strict=True)
        together = lambda lists: list(itertools.chain.from_iterable(lists))
        names = max(breakdowns, key=len)  # a part of no completions may name fewer
        return together(rewards), {
            name: together(part.get(name, []) for part in breakdowns) for name in names
        }

    def _solve_rate(self, group: Group) -> float:
        """The share of the completions that are right. Raises ValueError where it can be none."""
        solved = group.breakdown[self.solved_by]
        for value in solved:
            if not 0 <= value <= 1:
                raise ValueError(
                    f"rollout.solved_by is {self.solved_by!r}, but rewards.{self.solved_by} is "
                    f"{value} for a completion of {group.prompt.id}; its mean is the solve rate of "
                    "a prompt, so it must be within [0, 1]: name another reward"
                )
        return sum(solved) / len(solved)
