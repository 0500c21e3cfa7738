"""The evaluation of a stage: several named sets of problems, each sampled its own way."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax

from jaxreason import types
from jaxreason.evals import accuracy


@dataclasses.dataclass(frozen=True)
class EvalSet:
    name: str  # its key in summary.json
    problems: tuple[accuracy.Problem, ...]
    sampling: types.Sampling
    grade: accuracy.Grader
    ks: tuple[int, ...] = (4,)  # of avg@k and pass@k; the first also gives the breakdowns


def run(
    sets: Sequence[EvalSet],
    generate: accuracy.Generate,
    params: types.Params,
    key: jax.Array,
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """({set name: metrics}, samples of all sets, each with its `set`).

    A set's key depends on its name alone, so sets can be added without changing the others' draws.

    Raises:
      ValueError: two sets of one name.
    """
    metrics: dict[str, dict[str, Any]] = {}
    samples = []
    for s in sets:
        if s.name in metrics:
            raise ValueError(f"two evaluation sets are named {s.name!r}; names must differ")
        set_key = jax.random.fold_in(key, zlib.crc32(s.name.encode()))
        result = accuracy.evaluate(generate, params, s.problems, s.sampling, set_key, s.grade, s.ks)
        metrics[s.name] = result.metrics
        samples += [{"set": s.name, **sample} for sample in result.samples]
    return metrics, samples
