"""Loss of held-out text: perplexity a token, and bits a byte, which no tokenizer can flatter."""

import math
from collections.abc import Callable, Iterable

import jax

from jaxreason import types

NllFn = Callable[[types.Params, types.Batch], tuple[jax.Array, jax.Array]]


def bits_per_byte(nll_nats_sum: float, num_bytes: int) -> float:
    """Total negative log-likelihood in nats over the UTF-8 bytes it predicts, in bits a byte.

    Raises:
      ValueError: no bytes.
    """
    if num_bytes < 1:
        raise ValueError(f"num_bytes is {num_bytes}; bits per byte need at least one byte of text")
    return nll_nats_sum / (math.log(2) * num_bytes)


def evaluate_text(
    nll_fn: NllFn, params: types.Params, batches: Iterable[types.Batch], num_bytes: int
) -> dict[str, float]:
    """Averages `nll_fn(params, batch) -> (sum of nats, sum of weights)`, jitted by the caller.

    Returns `loss` (nats a target token), `perplexity`, `bits_per_byte` (over `num_bytes`, the UTF-8
    bytes of the text the targets spell) and `tokens` (targets).

    Raises:
      ValueError: the batches have no target tokens, or `num_bytes` is 0.
    """
    sums = [nll_fn(params, batch) for batch in batches]  # read at the end: nothing waits meanwhile
    nll = math.fsum(float(batch_nll) for batch_nll, _ in sums)
    tokens = math.fsum(float(weight) for _, weight in sums)
    if tokens <= 0:
        raise ValueError(f"text evaluation has no target tokens in {len(sums)} batches")
    loss = nll / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,  # exp(710) is past float64
        "bits_per_byte": bits_per_byte(nll, num_bytes),
        "tokens": tokens,
    }
