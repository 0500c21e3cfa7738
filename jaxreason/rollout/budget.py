"""The thinking budget inside the decode loop: how long a reasoning lasts, as traced state.

A completion thinks from its first token until the closing tag. When it has thought `limit` tokens,
the end of the reasoning is written for it, token by token (s1's wording, arXiv 2501.19393,
Qwen3's, arXiv 2505.09388, or the tag alone); a closing tag drawn while waits are left gives way to
"Wait".
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.text.chat import ThinkingIds
from jaxreason.types import WORDINGS, ThinkingBudget, pytree_dataclass

_WAIT = len(WORDINGS)  # the script after those
_NO_LIMIT = np.iinfo(np.int32).max


@pytree_dataclass()
class Budget:
    """Where each row is in its reasoning."""

    thinking_B: jax.Array  # bool
    spent_B: jax.Array  # int32, tokens thought so far
    limit_B: jax.Array  # int32
    waits_B: jax.Array  # int32, ends still to be replaced
    wording_B: jax.Array  # int32, the script that ends the reasoning
    script_B: jax.Array  # int32, the script that is written, or was last
    at_B: jax.Array  # int32, its next token; at its end nothing is written
    last_BC: jax.Array  # int32, as many last ids as the closing tag has; -1 before the first


def start(budgets: list[ThinkingBudget | None], thinking: ThinkingIds) -> Budget:
    """Of rows that have drawn nothing; None has no budget, and never thinks."""
    B, C = len(budgets), len(thinking.close)
    given = [b or ThinkingBudget() for b in budgets]
    ints = lambda values: np.array(values, np.int32)
    return Budget(
        thinking_B=np.array([b is not None for b in budgets], bool),
        spent_B=np.zeros(B, np.int32),
        limit_B=ints([_NO_LIMIT if b.max_tokens is None else b.max_tokens for b in given]),
        waits_B=ints([b.waits for b in given]),
        wording_B=ints([WORDINGS.index(b.wording) for b in given]),
        script_B=np.full(B, _WAIT, np.int32),
        at_B=np.full(B, len(thinking.wait), np.int32),
        last_BC=np.full((B, C), -1, np.int32),
    )


def control(budget: Budget, drawn_B: jax.Array, thinking: ThinkingIds):
    """(token_B, forced_B, removed_B, budget): what stands in place of the drawn tokens.

    removed_B are ids to take back first: the beginning of a closing tag of several ids that was
    drawn, and is replaced by "Wait" as a whole. Only the log-probability of that "Wait" is then one
    after the tag's beginning; it was not drawn, and nothing is learnt from it.
    """
    scripts = [*(thinking.ends[w] for w in WORDINGS), thinking.wait]
    longest = max(map(len, scripts))
    ids_XN = jnp.array([[*ids, *[0] * (longest - len(ids))] for ids in scripts], jnp.int32)
    size_X = jnp.array([len(ids) for ids in scripts], jnp.int32)
    close_C = jnp.array(thinking.close, jnp.int32)

    # At the limit the end is written, even in the middle of "Wait": budgets are exact.
    ends_B = budget.thinking_B & (budget.spent_B >= budget.limit_B)
    writes_B = budget.at_B < size_X[budget.script_B]
    last_BC = jnp.concatenate([budget.last_BC[:, 1:], drawn_B[:, None]], axis=1)
    closes_B = budget.thinking_B & ~ends_B & ~writes_B & (last_BC == close_C).all(1)
    waits_B = closes_B & (budget.waits_B > 0)

    script_B = jnp.where(ends_B, budget.wording_B, jnp.where(waits_B, _WAIT, budget.script_B))
    at_B = jnp.where(ends_B | waits_B, 0, budget.at_B)
    forced_B = ends_B | waits_B | writes_B
    token_B = jnp.where(forced_B, ids_XN[script_B, at_B], drawn_B)
    removed_B = jnp.where(waits_B, len(thinking.close) - 1, 0)
    thinking_B = budget.thinking_B & ~ends_B & (~closes_B | waits_B)
    last_BC = jnp.where(waits_B[:, None], -1, last_BC).at[:, -1].set(token_B)
    return (
        token_B,
        forced_B,
        removed_B,
        dataclasses.replace(
            budget,
            thinking_B=thinking_B,
            spent_B=budget.spent_B - removed_B + thinking_B,
            waits_B=budget.waits_B - waits_B,
            script_B=script_B,
            at_B=at_B + forced_B,
            last_BC=last_BC,
        ),
    )
