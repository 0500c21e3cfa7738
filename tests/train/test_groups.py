"""A rollout's groups as rows: what is learnt, where it lies, and how it survives a checkpoint."""

import json

import numpy as np
import pytest

from jaxreason.train.groups import Group, RowsConfig, lay_out_updates, statistics
from jaxreason.types import Completion, Prompt

EOS = 1


def group(prompt_ids, sizes, rewards, *, first=10, truncated=(), forced=()):
    """Completions of these sizes, ids counting up from `first`, each ended by EOS."""
    completions = []
    for i, size in enumerate(sizes):
        ids = (*range(first, first + size - 1), EOS)
        completions.append(
            Completion(
                text=f"{size}",
                ids=ids,
                logprobs=tuple(-0.1 * j for j in range(size)),
                truncated=i in truncated,
                forced=tuple(j < 2 for j in range(size)) if i in forced else (),
            )
        )
    return Group(
        prompt=Prompt(id="s/0", text="?", answer="1", source="s"),
        prompt_ids=tuple(prompt_ids),
        completions=tuple(completions),
        rewards=tuple(rewards),
        breakdown={"accuracy": tuple(rewards)},
    )


UPDATES = [
    [group([5, 6, 7], [4, 9], [0.0, 1.0]), group([8], [2, 6], [1.0, 1.0])],
    [group([5, 6], [3, 3], [0.5, 0.0])],
]


def test_every_completion_with_its_end_is_learnt_and_no_prompt():
    """Faults 3 and 5: the end of sequence is a target with weight, also where it pads the rows."""
    for groups, rows in zip(
        UPDATES, lay_out_updates(UPDATES, RowsConfig(length=16, pad_id=EOS)), strict=True
    ):
        batch = rows.batch
        completions = [c for g in groups for c in g.completions]
        assert batch.weights_BT.sum() == sum(c.num_tokens for c in completions)
        targets = rows.gather(batch.targets_BT)
        weights = rows.gather(batch.weights_BT)
        for completion, target_T, weight_T in zip(completions, targets, weights, strict=True):
            n = completion.num_tokens
            assert tuple(target_T[:n]) == completion.ids and target_T[n - 1] == EOS
            assert (weight_T[:n] == 1).all() and not weight_T[n:].any()


def test_spread_puts_numbers_under_their_targets_and_gather_takes_them_back():
    (rows, _) = lay_out_updates(UPDATES, RowsConfig(length=16))
    inside = np.arange(rows.width) < rows.size_C[:, None]
    values = inside * (1.0 + np.arange(inside.size).reshape(inside.shape))
    spread = rows.spread(values)
    assert ((spread != 0) == (rows.batch.weights_BT != 0)).all()
    np.testing.assert_array_equal(rows.gather(spread), values)
    ones = rows.spread(np.arange(1.0, 1 + len(inside)))
    np.testing.assert_array_equal(
        rows.gather(ones), inside * np.arange(1, 1 + len(inside))[:, None]
    )


def test_updates_share_one_shape_rounded_up():
    rows = lay_out_updates(UPDATES, RowsConfig(length=16, multiple=4))
    assert [r.batch.tokens_BT.shape for r in rows] == [(4, 16), (4, 16)]


def test_truncated_and_forced_ids_have_no_weight():
    groups = [group([5], [4, 5], [0.0, 1.0], truncated=(0,), forced=(1,))]
    (rows,) = lay_out_updates([groups], RowsConfig(length=16, mask_truncated=True))
    first, second = rows.gather(rows.batch.weights_BT)
    assert first.tolist() == [0, 0, 0, 0, 0] and second.tolist() == [0, 0, 1, 1, 1]


def test_a_completion_too_long_for_a_row_is_refused():
    with pytest.raises(ValueError, match=r"train\.length is 8; .* has 12 ids"):
        lay_out_updates(UPDATES, RowsConfig(length=8))


def test_a_group_survives_json_bit_for_bit():
    whole = group([5], [4, 5], [0.1, 1 / 3], forced=(1,))
    assert Group.from_json(json.loads(json.dumps(whole.to_json()))) == whole


def test_statistics():
    groups = [group([5], [4, 6], [0.0, 1.0], truncated=(1,)), group([5], [2, 2], [1.0, 1.0])]
    values = statistics(groups)
    assert values["reward"] == 0.75 and values["frac_reward_zero_std"] == 0.5
    assert values["reward_std"] == pytest.approx(np.std([0, 1], ddof=1) / 2)
    assert values["completions/mean_length"] == 3.5 and values["completions/clipped_ratio"] == 0.25
    assert values["completions/max_terminated_length"] == 4
    assert values["rewards/accuracy/mean"] == 0.75
