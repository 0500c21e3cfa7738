"""Two Hugging Face directories, tensor by tensor."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

import numpy as np

from jaxreason.checkpoint import hf_names
from jaxreason.checkpoint.safetensors_files import FLOATS, Tensor, open_tensors, read_json

_CHUNK = 2**22  # elements in float64 at a time


@dataclasses.dataclass(frozen=True)
class Difference:
    """How one tensor differs. The numbers are inf where a comparison has no answer."""

    name: str
    kinds: str  # dtypes and shapes where they differ, else ""
    absolute: float  # the largest |a - b|
    relative: float  # the same over the largest |a|


@dataclasses.dataclass(frozen=True)
class Comparison:
    num_tensors: int  # in both
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    differences: tuple[Difference, ...]  # the largest relative one first

    @property
    def equal(self) -> bool:
        """Same names, shapes and dtypes, and every bit."""
        return not (self.only_a or self.only_b or self.differences)


def compare(
    a: pathlib.Path,
    b: pathlib.Path,
    on_progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Comparison:
    """Raises ValueError where one of them is no whole checkpoint."""
    in_a, in_b = _by_name(a), _by_name(b)
    both = [name for name in in_a if name in in_b]
    total, done, differences = sum(in_a[name].data.size for name in both), 0, []
    for name in both:
        found = _difference(name, in_a[name], in_b[name])
        differences += [] if found is None else [found]
        done += in_a[name].data.size
        on_progress(name, done, total)
    return Comparison(
        num_tensors=len(both),
        only_a=tuple(name for name in in_a if name not in in_b),
        only_b=tuple(name for name in in_b if name not in in_a),
        differences=tuple(sorted(differences, key=lambda d: (d.relative, d.absolute))[::-1]),
    )


def _by_name(directory: pathlib.Path) -> dict[str, Tensor]:
    """By the names of the tables: the text part of a multimodal Gemma 3 is that of a Gemma 3."""
    model_type = read_json(directory / "config.json").get("model_type")
    tensors, problems = open_tensors(directory)
    if problems:
        raise ValueError(f"{directory}: {'; '.join(problems)}")
    names = {hf_names.meaning(t.name, model_type) or t.name: t for t in tensors}
    if len(names) < len(tensors):
        raise ValueError(f"{directory} holds {len(tensors)} tensors of {len(names)} names")
    return dict(sorted(names.items()))


def _difference(name: str, a: Tensor, b: Tensor) -> Difference | None:
    same_kind = (a.kind, a.shape) == (b.kind, b.shape)
    if same_kind and np.array_equal(a.data, b.data):
        return None
    kinds = "" if same_kind else f"{a.kind}{list(a.shape)} | {b.kind}{list(b.shape)}"
    if a.shape != b.shape or not {a.kind, b.kind} <= set(FLOATS):
        return Difference(name, kinds, float("inf"), float("inf"))
    absolute = largest = 0.0
    for part_a, part_b in _chunks(a.array, b.array):
        # fmax and fmin leave nan out, so what is not a number on one side alone is looked for.
        apart = np.where((part_a == part_b) | (np.isnan(part_a) & np.isnan(part_b)), 0.0,
                         np.abs(part_a - part_b))  # fmt: skip
        absolute = max(absolute, float(np.nan_to_num(apart, nan=np.inf).max(initial=0.0)))
        largest = max(largest, float(np.nan_to_num(np.abs(part_a)).max(initial=0.0)))
    return Difference(name, kinds, absolute, absolute / largest if largest else absolute)


def _chunks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    for start in range(0, flat_a.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        yield flat_a[part].astype(np.float64), flat_b[part].astype(np.float64)
