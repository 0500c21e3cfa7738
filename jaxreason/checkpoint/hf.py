"""Hugging Face directories, both ways: weights, config.json, generation_config.json, tokenizer.

The names of the tensors are in hf_names.py, config.json in hf_config.py.
"""

import collections
import concurrent.futures
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.checkpoint import hf_names
from jaxreason.checkpoint.hf_config import GENERATION, config_from_hf, config_to_hf
from jaxreason.checkpoint.hf_names import Row
from jaxreason.checkpoint.safetensors_files import (
    INDEX,
    SINGLE,
    Entry,
    Tensor,
    misfits,
    open_tensors,
    plan_shards,
    read_json,
    write_json,
    write_shards,
)
from jaxreason.checkpoint.whole_folder import written_whole
from jaxreason.model.config import DecoderConfig
from jaxreason.types import Params

# Told (what was read or written, bytes done, bytes in all) as the work goes on.
OnProgress = Callable[[str, int, int], None]

_READERS = min(8, os.cpu_count() or 1)
_PIECE_BYTES = 32 * 2**20  # of one reader's task
# A matrix is turned by strips of so many rows, copied first to rows that are not a power of two
# apart, which would all fall into one set of the cache: 16 times as fast as `b[...] = a.T`.
_STRIP, _PAD = 64, 32


# --- import ---------------------------------------------------------------------------------------


def import_hf(
    directory: str | pathlib.Path,
    *,
    dtype: Any = jnp.float32,
    shardings: Any = None,
    on_progress: OnProgress = lambda *_: None,
) -> tuple[DecoderConfig, Params]:
    """A Hugging Face directory as (config, parameter tree of jax arrays).

    Args:
      dtype: of every leaf; None: as each is stored.
      shardings: a tree like the parameters, one sharding a leaf; None: the default device.

    All headers are checked before any weight is read. The files are mapped, and each leaf is made
    in the memory that becomes the array where the platform allows (CPU); else one leaf is on the
    host at a time. Of a sharded leaf only the parts of this process are read. Raises one ValueError
    naming every unknown, missing, duplicate, misshapen or non-float tensor.
    """
    config, found = _checked(pathlib.Path(directory), dtype)
    rows, sizes = hf_names.rows(config), hf_names.sizes(config)
    total = sum(found[name].data.size for row in rows for name in row.names(sizes))
    params: Params = {}
    done = 0
    with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
        for row in rows:
            tensors = [found[name] for name in row.names(sizes)]
            read = _reader(row, sizes, tensors, dtype, pool)
            sharding = None if shardings is None else hf_names.get(shardings, row.path)
            hf_names.put(params, row.path, _placed(row.shape_here(sizes), sharding, read))
            done += sum(tensor.data.size for tensor in tensors)
            on_progress(row.path, done, total)
    return config, params


def checked_config(directory: str | pathlib.Path) -> DecoderConfig:
    """The shape of a directory, once all that can be told without its weights fits it.

    Raises ValueError as import_hf does.
    """
    return _checked(pathlib.Path(directory), jnp.float32)[0]


def left_out(directory: str | pathlib.Path) -> dict[str, int]:
    """{part: tensors} of what an import passes over: the parts of a Gemma 3 that see."""
    directory = pathlib.Path(directory)
    model_type = read_json(directory / "config.json").get("model_type")
    parts = [hf_names.vision_part(t.name, model_type) for t in open_tensors(directory)[0]]
    return dict(collections.Counter(part for part in parts if part is not None))


def _checked(directory: pathlib.Path, dtype: Any) -> tuple[DecoderConfig, dict[str, Tensor]]:
    """The config, and the tensors by their names in the table.

    Raises one ValueError that lists every one that the table and the config cannot explain.
    """
    hf_config = read_json(directory / "config.json")
    config = config_from_hf(hf_config)
    tensors, problems = open_tensors(directory)
    found: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        name = hf_names.meaning(tensor.name, hf_config["model_type"])
        if name is not None:
            found.setdefault(name, []).append(tensor)
    sizes = hf_names.sizes(config)
    expected = {
        name: row.shape_there(sizes)
        for row in hf_names.TABLES[config.family]
        for name in row.names(sizes)
    }
    problems += misfits(expected, found, {hf_names.HEAD} if config.tie_embeddings else set())
    if not problems:
        problems += _mixed(config, found) if dtype is None else []
        problems += _second_heads(config, found)
    if problems:
        raise ValueError(f"{directory} does not fit its config.json: {'; '.join(problems)}")
    return config, {name: several[0] for name, several in found.items()}


def _mixed(config: DecoderConfig, found: Mapping[str, list[Tensor]]) -> list[str]:
    """Leaves whose layers are stored in several dtypes, where each is to keep its own."""
    sizes = hf_names.sizes(config)
    kinds = {
        row.name: sorted({found[name][0].kind for name in row.names(sizes)})
        for row in hf_names.rows(config)
    }
    return [f"{name} is in {' and '.join(k)}" for name, k in kinds.items() if len(k) > 1]


def _second_heads(config: DecoderConfig, found: Mapping[str, list[Tensor]]) -> list[str]:
    """A head beside a tied embedding is the same tensor written twice, or a wrong config."""
    if not config.tie_embeddings or hf_names.HEAD not in found:
        return []
    head, table = (found[name][0] for name in (hf_names.HEAD, hf_names.EMBEDDING))
    if head.kind == table.kind and np.array_equal(head.data, table.data):
        return []
    return [
        f"tie_word_embeddings is true, yet {hf_names.HEAD} differs from {hf_names.EMBEDDING} "
        "(set it to false to keep both)"
    ]


_Read = Callable[[tuple[slice, ...]], np.ndarray]  # a block of a leaf, by its index


def _reader(
    row: Row,
    sizes: Mapping[str, int],
    tensors: Sequence[Tensor],
    dtype: Any,
    pool: concurrent.futures.Executor,
) -> _Read:
    shape, num_stacked = row.shape_here(sizes), len(row.stack)
    dtype = tensors[0].array.dtype if dtype is None else np.dtype(dtype)
    views = dict(zip(row.places(sizes), tensors, strict=True))

    def read(index: tuple[slice, ...]) -> np.ndarray:
        ranges = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
        block = _aligned([len(r) for r in ranges], dtype)
        pieces = []
        for there, tensor in views.items():
            if any(i not in r for i, r in zip(there, ranges)):
                continue
            here = tuple(r.index(i) for i, r in zip(there, ranges))
            source = row.to_here(tensor.array, sizes)[index[num_stacked:]]
            pieces += _pieces(row.as_matrix(block[here]), row.as_matrix(source))
        for _ in pool.map(lambda piece: _copy(*piece), pieces):
            pass
        return block

    return read


def _placed(shape: tuple[int, ...], sharding: Any, read: _Read) -> jax.Array:
    if sharding is None:
        return jax.device_put(read((slice(None),) * len(shape)), may_alias=True)
    blocks: dict[tuple, np.ndarray] = {}  # replicas are read once

    def block(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in blocks:
            blocks[key] = read(index)
        return blocks[key]

    return jax.make_array_from_callback(shape, sharding, block)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array at a multiple of 64 bytes, which JAX on CPU takes over without a copy."""
    num_bytes = int(np.prod(shape)) * dtype.itemsize
    room = np.empty(num_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + num_bytes].view(dtype).reshape(shape)


def _pieces(target: np.ndarray, source: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(target, source, axis that lies apart in the file) of parts for one reader each."""
    axis = int(abs(source.strides[1]) > abs(source.strides[0]))
    size = source.shape[axis]
    step = max(_STRIP, _PIECE_BYTES * size // max(source.nbytes, 1))
    for start in range(0, size, step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        yield target[part], source[part], axis


def _copy(target: np.ndarray, source: np.ndarray, axis: int) -> None:
    """target[...] = source, both matrices, in an order that is kind to the caches."""
    if target.dtype == source.dtype:
        # As integers: numpy holds the interpreter's lock while it copies bfloat16.
        integers = {2: np.uint16, 4: np.uint32}[target.itemsize]
        target, source = target.view(integers), source.view(integers)
    if axis == 0:
        target[...] = source
        return
    height, width = source.shape[1], source.shape[0]
    strip = np.empty((_STRIP, width + _PAD), target.dtype)[:, :width]
    for start in range(0, height, _STRIP):
        part = strip[: height - start]
        part[...] = source[:, start : start + _STRIP].T
        target[:, start : start + _STRIP] = part.T


# --- export ---------------------------------------------------------------------------------------


def export_hf(
    directory: str | pathlib.Path,
    config: DecoderConfig,
    params: Params,
    *,
    generation: Mapping[str, Any],
    save_tokenizer: Callable[[pathlib.Path], None] | None = None,
    dtype: Any = None,
    on_progress: OnProgress = lambda *_: None,
) -> None:
    """Writes a directory that AutoModelForCausalLM and AutoTokenizer load; replaces an older one.

    Args:
      generation: the content of generation_config.json: eos_token_id (or a list), pad_token_id,
        bos_token_id, temperature, top_p, ...; config.json has the ids too.
      save_tokenizer: called with the directory being written; None: no tokenizer files.
      dtype: of the written weights; None: as each is.

    A value head is left out: their causal models have none. Everything is written beside and moved
    into place whole; whatever goes wrong leaves no half of it. Raises ValueError when `directory`
    holds something else than a Hugging Face model, when the shape has no config.json, or when the
    disk is full.
    """
    directory = pathlib.Path(directory).absolute()
    _refuse_to_replace(directory)
    entries = _entries(config, params, dtype)
    generation = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **generation}
    hf_config = config_to_hf(
        config,
        eos_id=generation["eos_token_id"],
        pad_id=generation["pad_token_id"],
        bos_id=generation["bos_token_id"],
        dtype=entries[0].dtype.name,
    )
    shards, arrays = plan_shards(entries), _arrays(config, params, entries, on_progress)
    with written_whole(directory, sum(entry.num_bytes for entry in entries)) as partial:
        write_shards(partial, shards, arrays)
        write_json(partial / "config.json", hf_config)
        write_json(partial / GENERATION, generation)
        if save_tokenizer is not None:
            save_tokenizer(partial)


def _refuse_to_replace(directory: pathlib.Path) -> None:
    """A mistyped output path must not cost a folder of the user's."""
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if names and not ("config.json" in names and names & {SINGLE, INDEX}):
        raise ValueError(f"{directory} is not empty and holds no Hugging Face model to replace")


def _entries(config: DecoderConfig, params: Params, dtype: Any) -> list[Entry]:
    """Their tensors in the table's order."""
    sizes, rows = hf_names.sizes(config), hf_names.rows(config)
    got = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(policy_of(params))[0]
    }
    expected = {row.path: row.shape_here(sizes) for row in rows}
    assert got == expected, f"parameters {got} are not those of {config}: {expected}"
    return [
        Entry(name, row.shape_there(sizes), np.dtype(dtype or hf_names.get(params, row.path).dtype))
        for row in rows
        for name in row.names(sizes)
    ]


def policy_of(params: Params) -> Params:
    """The parameters without a critic's head: what is sampled from, scored and exported."""
    return {name: part for name, part in params.items() if name != "value_head"}


def _arrays(
    config: DecoderConfig, params: Params, entries: Sequence[Entry], on_progress: OnProgress
) -> Iterator[np.ndarray]:
    """Their tensors, in the entries' order; one leaf of ours is on the host at a time."""
    sizes, waiting = hf_names.sizes(config), iter(entries)
    total, done = sum(entry.num_bytes for entry in entries), 0
    for row in hf_names.rows(config):
        leaf = np.asarray(hf_names.get(params, row.path))
        for place in row.places(sizes):
            entry = next(waiting)
            there = row.to_there(leaf[place])
            array = np.empty(there.shape, entry.dtype)
            for piece in _pieces(_matrix(array), _matrix(there)):
                _copy(*piece)
            done += entry.num_bytes
            on_progress(entry.name, done, total)
            yield array


def _matrix(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 2 else array[None]
