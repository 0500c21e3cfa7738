"""The weight files of a Hugging Face directory: mapped into memory to read, streamed to write.

Source: the format of safetensors (github.com/huggingface/safetensors, README): eight bytes of
header length, a JSON header {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from jaxreason.checkpoint.hf_names import brief

MAX_SHARD_BYTES = 5 * 10**9  # above it the weights are split and indexed, as transformers does
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a plain checkpoint holds, by safetensors' names.
FLOATS = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor in a file. Its bytes are mapped: they take memory of the page cache alone."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    kind: str  # safetensors' name of the dtype
    data: np.ndarray = dataclasses.field(repr=False)  # uint8

    @property
    def array(self) -> np.ndarray:
        """A read-only view; of FLOATS only."""
        return self.data.view(FLOATS[self.kind]).reshape(self.shape)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises ValueError, one line, when the file is missing or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a Hugging Face model directory") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- reading --------------------------------------------------------------------------------------


def open_tensors(directory: pathlib.Path) -> tuple[list[Tensor], list[str]]:
    """Every tensor of the directory, and what its index and headers get wrong.

    Raises ValueError when the files are not there or not whole.
    """
    weight_map = _weight_map(directory)
    files = sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]
    tensors, problems = [], []
    for file in files:
        in_file, duplicates = open_file(directory / file)
        tensors += in_file
        problems += [f"duplicate {name} in the header of {file}" for name in duplicates]
    if weight_map is not None:
        problems += _index_problems(weight_map, tensors)
    return tensors, problems


def _weight_map(directory: pathlib.Path) -> dict[str, str] | None:
    """Tensor -> file; None where one whole file holds all, which wins as in transformers."""
    if (directory / SINGLE).is_file():
        return None
    if not (directory / INDEX).is_file():
        raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{directory / INDEX} has no weight_map")
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        raise ValueError(f"{directory / INDEX} points to missing files: {', '.join(missing)}")
    return weight_map


def _index_problems(weight_map: Mapping[str, str], tensors: Iterable[Tensor]) -> list[str]:
    holds = {(tensor.name, tensor.file.name) for tensor in tensors}
    unlisted, wrong = {}, {}
    for name, file in sorted(holds):
        if name not in weight_map:
            unlisted.setdefault(file, []).append(name)
    for name, file in weight_map.items():
        if (name, file) not in holds:
            wrong.setdefault(file, []).append(name)
    problems = [
        f"{INDEX} has no entry for {', '.join(brief(names))}, which {file} holds"
        for file, names in unlisted.items()
    ]
    return problems + [
        f"{INDEX} says that {file} holds {', '.join(brief(names))}, which it does not"
        for file, names in wrong.items()
    ]


def open_file(path: pathlib.Path) -> tuple[list[Tensor], list[str]]:
    """(tensors, names that the header states twice) of one file.

    Raises ValueError when it is not whole.
    """
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # the library checks the header and that the tensors fill the file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length), object_pairs_hook=list)
    begin = 8 + length
    whole = path.stat().st_size > begin  # a file may hold no tensor, and nothing cannot be mapped
    data = np.asarray(np.memmap(path, np.uint8, "r", begin)) if whole else np.empty(0, np.uint8)
    tensors: dict[str, Tensor] = {}
    duplicates = []
    for name, fields in entries:
        if name == "__metadata__":
            continue
        if name in tensors:
            duplicates.append(name)
        fields = dict(fields)
        begin, end = fields["data_offsets"]
        shape = tuple(fields["shape"])
        tensors[name] = Tensor(path, name, shape, fields["dtype"], data[begin:end])
    return list(tensors.values()), duplicates


def misfits(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Sequence[Tensor]],
    optional: Collection[str] = (),
) -> list[str]:
    """Missing, unknown, duplicate, misshapen and non-float tensors, a text for each kind of them.

    Args:
      expected: name -> shape.
      found: name -> every tensor that goes by it.
      optional: names that may be missing.
    """
    missing = [name for name in expected if name not in found and name not in optional]
    unknown = [several[0].name for name, several in sorted(found.items()) if name not in expected]
    problems = [f"missing {name}" for name in brief(missing)]
    problems += [f"unknown {name}" for name in brief(unknown)]
    alike: dict[str, list[str]] = {}
    for name, several in sorted(found.items()):
        if len(several) > 1:
            problems.append(f"duplicate {name} in {', '.join(t.file.name for t in several)}")
        for tensor in several if name in expected else ():
            if tensor.shape != expected[name]:
                alike.setdefault(f"shape {tensor.shape}, not {expected[name]}", []).append(name)
            if tensor.kind not in FLOATS:
                floats = f"dtype {tensor.kind}, not one of {', '.join(FLOATS)}"
                alike.setdefault(floats, []).append(name)
    for problem, names in alike.items():
        problems += [f"{name} has {problem}" for name in brief(names)]
    return problems


# --- writing --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """{file name: its tensors}, in order, up to MAX_SHARD_BYTES; a larger one is alone."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.num_bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    name = "model-{:05d}-of-{:05d}.safetensors".format
    return {name(i, len(shards)): shard for i, shard in enumerate(shards, start=1)}


def write_shards(
    directory: pathlib.Path, shards: Mapping[str, list[Entry]], arrays: Iterator[np.ndarray]
) -> None:
    """Writes the planned files, and the index of several, one tensor in memory at a time.

    Args:
      arrays: the tensors in the order of the plan.
    """
    for file, entries in shards.items():
        with (directory / file).open("wb") as out:
            out.write(_header(entries))
            for entry in entries:
                array = next(arrays)
                assert (array.shape, array.dtype) == (entry.shape, entry.dtype), entry
                out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    if len(shards) > 1:
        weight_map = {entry.name: file for file, shard in shards.items() for entry in shard}
        total = sum(entry.num_bytes for shard in shards.values() for entry in shard)
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / INDEX, content)


def _header(entries: Iterable[Entry]) -> bytes:
    kinds = {dtype: kind for kind, dtype in FLOATS.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for entry in entries:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": kinds[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of eight
    return len(text).to_bytes(8, "little") + text
