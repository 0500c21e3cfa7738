"""Groups: what a rollout brings home, how it is kept in a checkpoint, and its rows for training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.data.packing import Example, Piece, best_fit_decreasing, lay_out
from jaxreason.types import Batch, Completion, Prompt


@dataclasses.dataclass(frozen=True)
class Group:
    """One prompt, its R completions and what they earned."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]
    breakdown: Mapping[str, tuple[float, ...]]  # each reward function's own values

    @property
    def varied(self) -> bool:
        """Whether the rewards differ: a group that agrees has no advantage to learn from."""
        return max(self.rewards) > min(self.rewards)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Group":
        return cls(
            prompt=Prompt(**content["prompt"]),
            prompt_ids=tuple(content["prompt_ids"]),
            completions=tuple(
                Completion(
                    text=c["text"],
                    ids=tuple(c["ids"]),
                    logprobs=tuple(c["logprobs"]),
                    truncated=c["truncated"],
                    forced=tuple(c["forced"]),
                )
                for c in content["completions"]
            ),
            rewards=tuple(content["rewards"]),
            breakdown={name: tuple(values) for name, values in content["breakdown"].items()},
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """The C completions of one update laid into rows; their order is the groups' own."""

    batch: Batch
    row_C: np.ndarray  # of each completion
    first_C: np.ndarray  # place of the input whose target is the completion's first id
    size_C: np.ndarray  # ids of the completion
    width: int  # the largest size of all updates of the rollout

    def gather(self, values_BT: np.ndarray) -> np.ndarray:
        """What lies under each completion's ids: [C, width], 0 after its last."""
        row, place, inside = self._places()
        return np.where(inside, values_BT[row, np.where(inside, place, 0)], 0)

    def spread(self, values_CT: np.ndarray) -> np.ndarray:
        """The inverse of `gather`; of one number a completion [C], that number under every id."""
        row, place, inside = self._places()
        if values_CT.ndim == 1:
            values_CT = values_CT[:, None]
        out_BT = np.zeros(self.batch.tokens_BT.shape, np.float32)
        values_CT = np.broadcast_to(values_CT, inside.shape)
        out_BT[np.broadcast_to(row, inside.shape)[inside], place[inside]] = values_CT[inside]
        return out_BT

    def _places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row [C, 1], place [C, width], whether the completion has that many ids [C, width])."""
        step_T = np.arange(self.width)
        return self.row_C[:, None], self.first_C[:, None] + step_T, step_T < self.size_C[:, None]


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """The shape of an update's rows."""

    length: int  # of a row; holds the longest prompt and completion
    multiple: int = 8  # rows are rounded up to this, so that few shapes are compiled
    pad_id: int = 0
    mask_truncated: bool = False  # overlong filter: completions the limit cut off are not learnt


def lay_out_updates(updates: Sequence[Sequence[Group]], config: RowsConfig) -> list[Rows]:
    """Packs each update's groups, best-fit decreasing, all into equally many rows.

    A completion's ids have weight 1, the end of sequence too; its prompt, ids that a thinking
    budget forced and, with `mask_truncated`, completions that were cut off have weight 0.

    Raises ValueError when a prompt with its completion is longer than a row.
    """
    examples = [
        [_example(group, c, config) for group in groups for c in group.completions]
        for groups in updates
    ]
    longest = max(len(e.ids_T) for update in examples for e in update)
    if longest > config.length:
        raise ValueError(
            f"train.length is {config.length}; a prompt with its completion has {longest} ids"
        )
    placed = [best_fit_decreasing([len(e.ids_T) for e in u], config.length) for u in examples]
    needed = max(max(rows) for rows in placed) + 1
    num_rows = -(-needed // config.multiple) * config.multiple
    width = max(c.num_tokens for groups in updates for group in groups for c in group.completions)
    return [
        _lay_out(groups, [Piece(e, row, 0, len(e.ids_T)) for e, row in zip(update, rows)],
                 num_rows, width, config)
        for groups, update, rows in zip(updates, examples, placed, strict=True)
    ]  # fmt: skip


def _example(group: Group, completion: Completion, config: RowsConfig) -> Example:
    ids_T = np.array(group.prompt_ids + completion.ids, np.int32)
    weights_T = np.zeros(len(ids_T), np.float32)
    if not (config.mask_truncated and completion.truncated):
        own_T = weights_T[len(group.prompt_ids) :]
        own_T[:] = 1.0
        if completion.forced:
            own_T[np.array(completion.forced)] = 0.0
    return Example(ids_T, weights_T)


def _lay_out(
    groups: Sequence[Group], pieces: Sequence[Piece], num_rows: int, width: int, config: RowsConfig
) -> Rows:
    prompts_C = np.array([len(g.prompt_ids) for g in groups for _ in g.completions])
    used_B, starts = np.zeros(num_rows, int), []
    for piece in pieces:  # within a row in the order given, as `lay_out` has it
        starts.append(used_B[piece.row])
        used_B[piece.row] += piece.stop
    return Rows(
        batch=lay_out(pieces, num_rows, config.length, config.pad_id),
        row_C=np.array([piece.row for piece in pieces]),
        first_C=np.array(starts) + prompts_C - 1,
        size_C=np.array([piece.stop for piece in pieces]) - prompts_C,
        width=width,
    )


def statistics(groups: Sequence[Group]) -> dict[str, float]:
    """Rewards and lengths of a rollout, under the names users know (facts/peers.md, TRL's).

    `reward_std` is the mean over groups of the deviation within the group. A completion is
    terminated when no limit cut it off.
    """
    rewards_QR = np.array([g.rewards for g in groups])
    completions = [c for g in groups for c in g.completions]
    lengths = np.array([c.num_tokens for c in completions])
    truncated = np.array([c.truncated for c in completions])
    values = {
        "reward": rewards_QR.mean(),
        "reward_std": rewards_QR.std(axis=1, ddof=1 if rewards_QR.shape[1] > 1 else 0).mean(),
        "frac_reward_zero_std": np.mean([not g.varied for g in groups]),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": truncated.mean(),
    }
    ended = lengths[~truncated]
    if len(ended):
        values["completions/mean_terminated_length"] = ended.mean()
        values["completions/min_terminated_length"] = ended.min()
        values["completions/max_terminated_length"] = ended.max()
    for name in groups[0].breakdown:
        own = np.array([value for g in groups for value in g.breakdown[name]])
        values[f"rewards/{name}/mean"] = own.mean()
        values[f"rewards/{name}/std"] = own.std()
    return {name: float(value) for name, value in values.items()}
