"""Hugging Face Qwen3, both ways, through one name table: safetensors, config.json, tokenizer.

RoPE is the half-split one on both sides, so weights are reshaped and transposed, never permuted.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jaxreason.model.config import DecoderConfig
from jaxreason.types import Params

MAX_SHARD_BYTES = 5 * 10**9  # above it the export is split and indexed, as transformers does
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "BF16", "F16")  # what a plain checkpoint holds, in safetensors' names


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor in both worlds, by dimension letters; a space separates the axes of theirs.

    ("DNH", "NH D") reads: ours is [D, N, H], theirs the matrix [N*H, D]. `{layer}` in their name
    stands for one tensor a layer, which ours stacks along a leading L.
    """

    path: str  # "layers/wq": keys of the parameter tree
    name: str
    ours: str
    theirs: str

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.name

    def names(self, num_layers: int) -> list[str]:
        return [self.name.format(layer=i) for i in range(num_layers if self.stacked else 1)]

    def shape_here(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        dims = "L" + self.ours if self.stacked else self.ours
        return tuple(sizes[dim] for dim in dims)

    def shape_there(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[dim] for dim in axis) for axis in self.theirs.split())

    def to_here(self, there: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One layer's tensor of theirs, as ours."""
        dims = self.theirs.replace(" ", "")
        split = there.reshape([sizes[dim] for dim in dims])
        return split.transpose([dims.index(dim) for dim in self.ours])

    def to_there(self, here: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One layer's tensor of ours, as theirs; the inverse of `to_here`."""
        dims = self.theirs.replace(" ", "")
        return here.transpose([self.ours.index(dim) for dim in dims]).reshape(
            self.shape_there(sizes)
        )


_LAYER = "model.layers.{layer}."
TABLE = (
    Row("embedding", "model.embed_tokens.weight", "VD", "V D"),
    Row("layers/attention_norm", _LAYER + "input_layernorm.weight", "D", "D"),
    Row("layers/wq", _LAYER + "self_attn.q_proj.weight", "DNH", "NH D"),
    Row("layers/wk", _LAYER + "self_attn.k_proj.weight", "DKH", "KH D"),
    Row("layers/wv", _LAYER + "self_attn.v_proj.weight", "DKH", "KH D"),
    Row("layers/wo", _LAYER + "self_attn.o_proj.weight", "NHD", "D NH"),
    Row("layers/q_norm", _LAYER + "self_attn.q_norm.weight", "H", "H"),
    Row("layers/k_norm", _LAYER + "self_attn.k_norm.weight", "H", "H"),
    Row("layers/mlp_norm", _LAYER + "post_attention_layernorm.weight", "D", "D"),
    Row("layers/w_gate", _LAYER + "mlp.gate_proj.weight", "DF", "F D"),
    Row("layers/w_up", _LAYER + "mlp.up_proj.weight", "DF", "F D"),
    Row("layers/w_down", _LAYER + "mlp.down_proj.weight", "FD", "D F"),
    Row("final_norm", "model.norm.weight", "D", "D"),
    Row("lm_head", "lm_head.weight", "VD", "V D"),
)
_EMBEDDING, _HEAD = TABLE[0], TABLE[-1]


def _rows(config: DecoderConfig) -> tuple[Row, ...]:
    return TABLE[:-1] if config.tie_embeddings else TABLE


def _sizes(config: DecoderConfig) -> dict[str, int]:
    return {"V": config.vocab_size, "D": config.embed_dim, "F": config.mlp_dim,
            "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim,
            "L": config.num_layers}  # fmt: skip


def _get(tree: Mapping[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf


# --------------------------------------------------------------------------------------------------
# config.json


def config_from_hf(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The shape that a Qwen3 config.json describes, in transformers 4's or 5's spelling.

    Raises ValueError, one line, for what this decoder would not compute as transformers does
    (another model type, scaled RoPE, sliding windows, biases, quantised weights) and for missing
    keys; rope_theta in particular has no default.
    """
    _refuse_what_differs(hf_config)

    def need(key: str) -> Any:
        if hf_config.get(key) is None:
            raise ValueError(f"config.json has no {key}; a Qwen3 checkpoint states it")
        return hf_config[key]

    num_heads, embed_dim = need("num_attention_heads"), need("hidden_size")
    return DecoderConfig(
        vocab_size=need("vocab_size"),
        num_layers=need("num_hidden_layers"),
        embed_dim=embed_dim,
        mlp_dim=need("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=need("num_key_value_heads"),
        head_dim=hf_config.get("head_dim") or embed_dim // num_heads,
        rope_theta=_rope_theta(hf_config),
        norm_eps=need("rms_norm_eps"),
        tie_embeddings=need("tie_word_embeddings"),
        max_length=need("max_position_embeddings"),
        init_std=hf_config.get("initializer_range", 0.02),
    )


def _refuse_what_differs(hf: Mapping[str, Any]) -> None:
    """Raises on the first setting that this decoder would not compute as transformers does."""

    def refuse(when: Any, reason: str) -> None:
        if when:
            raise ValueError(f"config.json: {reason}")

    model_type, activation = hf.get("model_type"), hf.get("hidden_act", "silu")
    sliding = hf.get("use_sliding_window") or "sliding_attention" in (hf.get("layer_types") or ())
    refuse(model_type != "qwen3", f"model_type is {model_type!r}; only 'qwen3' is known")
    refuse(sliding, "sliding window attention is in use; only full attention is known")
    refuse(hf.get("attention_bias"), "attention_bias is true; only false is known")
    refuse(activation != "silu", f"hidden_act is {activation!r}; only 'silu' is known")
    refuse(hf.get("quantization_config"), "weights are quantised; only plain floats are known")


def _rope_theta(hf: Mapping[str, Any]) -> float:
    """transformers 5: rope_parameters.rope_theta; 4: rope_theta beside an optional rope_scaling."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: rope_type is {kind!r}; only unscaled RoPE is known")
    thetas = {float(t) for t in (rope.get("rope_theta"), hf.get("rope_theta")) if t is not None}
    if not thetas:
        raise ValueError("config.json has no rope_theta (nor rope_parameters.rope_theta)")
    if len(thetas) > 1:
        raise ValueError(f"config.json states two values of rope_theta: {sorted(thetas)}")
    return thetas.pop()


def config_to_hf(
    config: DecoderConfig, *, eos_id: int | None, pad_id: int | None, dtype: str = "float32"
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 and vLLM read: RoPE and dtype in both spellings."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "initializer_range": config.init_std,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * config.num_layers,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }


# --------------------------------------------------------------------------------------------------
# import


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where one tensor lies, from the headers alone."""

    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it


def import_hf(
    directory: str | pathlib.Path, *, dtype: Any = jnp.float32, shardings: Any = None
) -> tuple[DecoderConfig, Params]:
    """A Hugging Face Qwen3 directory as (config, parameter tree of jax arrays).

    Args:
      dtype: of every leaf.
      shardings: a tree like the parameters, one sharding a leaf; None: the default device.

    All headers are checked before any weight is read; then one stacked leaf is in host memory at a
    time. Raises one ValueError naming every unknown, missing, duplicate, misshapen or non-float
    tensor.
    """
    directory = pathlib.Path(directory)
    config = config_from_hf(_read_json(directory / "config.json"))
    sizes = _sizes(config)
    with contextlib.ExitStack() as stack:
        files = {path: _open(stack, path) for path in _weight_files(directory)}
        found = _headers(files)
        _check(directory, found, config)

        def read(name: str) -> np.ndarray:
            return files[found[name][0].file].get_tensor(name)

        if config.tie_embeddings and _HEAD.name in found:
            if not np.array_equal(read(_HEAD.name), read(_EMBEDDING.name)):
                raise ValueError(
                    f"{directory}: tie_word_embeddings is true, yet {_HEAD.name} differs from "
                    f"{_EMBEDDING.name}; set it to false to keep both"
                )
        params: Params = {}
        for row in _rows(config):
            layers = (row.to_here(read(name), sizes) for name in row.names(config.num_layers))
            leaf = np.empty(row.shape_here(sizes), np.dtype(dtype))
            for target, layer in zip(leaf if row.stacked else (leaf,), layers, strict=True):
                target[...] = layer
            sharding = None if shardings is None else _get(shardings, row.path)
            _put(params, row.path, jax.device_put(leaf, sharding))
    return config, params


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _weight_files(directory: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the weights; one whole file wins over an index, as in transformers."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if not (directory / _INDEX).is_file():
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
    names = sorted(set(_read_json(directory / _INDEX)["weight_map"].values()))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"{directory / _INDEX} points to missing files: {', '.join(missing)}")
    return [directory / name for name in names]


def _open(stack: contextlib.ExitStack, path: pathlib.Path) -> Any:
    try:
        return stack.enter_context(safetensors.safe_open(path, framework="numpy"))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _headers(files: Mapping[pathlib.Path, Any]) -> dict[str, list[_Tensor]]:
    found: dict[str, list[_Tensor]] = {}
    for path, handle in files.items():
        for name in handle.keys():
            view = handle.get_slice(name)
            tensor = _Tensor(path, tuple(view.get_shape()), view.get_dtype())
            found.setdefault(name, []).append(tensor)
    return found


def _check(
    directory: pathlib.Path, found: Mapping[str, list[_Tensor]], config: DecoderConfig
) -> None:
    """Raises one ValueError that lists every tensor the table and the config cannot explain."""
    sizes, problems = _sizes(config), []
    expected = {
        name: row.shape_there(sizes)
        for row in TABLE
        for name in row.names(config.num_layers)
    }  # fmt: skip
    required = [name for row in _rows(config) for name in row.names(config.num_layers)]
    problems += [f"missing {name}" for name in required if name not in found]
    for name, tensors in sorted(found.items()):
        if name not in expected:
            problems.append(f"unknown {name}")
            continue
        if len(tensors) > 1:
            problems.append(f"duplicate {name} in {', '.join(t.file.name for t in tensors)}")
        for tensor in tensors:
            if tensor.shape != expected[name]:
                problems.append(f"{name} has shape {tensor.shape}, not {expected[name]}")
            if tensor.dtype not in _FLOATS:
                problems.append(f"{name} has dtype {tensor.dtype}, not one of {', '.join(_FLOATS)}")
    if problems:
        raise ValueError(f"{directory} does not fit its config.json: {'; '.join(problems)}")


# --------------------------------------------------------------------------------------------------
# export


def export_hf(
    directory: str | pathlib.Path,
    config: DecoderConfig,
    params: Params,
    *,
    eos_id: int | None,
    pad_id: int | None,
    save_tokenizer: Callable[[pathlib.Path], None] | None = None,
    generation: Mapping[str, Any] | None = None,
    dtype: Any = np.float32,
) -> None:
    """Writes a directory that AutoModelForCausalLM and AutoTokenizer load; replaces an older one.

    Args:
      save_tokenizer: called with the directory being written; None: no tokenizer files.
      generation: sampling defaults for generation_config.json (temperature, top_p, ...).
      dtype: of the written weights, float32 or bfloat16.

    A value head is left out: their causal models have none. Everything is written beside and moved
    into place whole. Raises ValueError when `directory`
    holds something else than a Hugging Face model.
    """
    directory = pathlib.Path(directory).absolute()
    _refuse_to_replace(directory)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_weights(partial, config, params, np.dtype(dtype))
    hf_config = config_to_hf(config, eos_id=eos_id, pad_id=pad_id, dtype=np.dtype(dtype).name)
    _write_json(partial / "config.json", hf_config)
    ids = {"bos_token_id": None, "eos_token_id": eos_id, "pad_token_id": pad_id}
    _write_json(partial / "generation_config.json", {**ids, **(generation or {})})
    if save_tokenizer is not None:
        save_tokenizer(partial)
    _move_into_place(partial, directory)


def _refuse_to_replace(directory: pathlib.Path) -> None:
    """A mistyped output path must not cost a folder of the user's."""
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if names and not ("config.json" in names and names & {_SINGLE, _INDEX}):
        raise ValueError(f"{directory} is not empty and holds no Hugging Face model to replace")


def _move_into_place(partial: pathlib.Path, directory: pathlib.Path) -> None:
    """A full directory cannot be renamed over, so the older one steps aside for an instant."""
    aside = directory.with_name(f".{directory.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
    partial.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)


def _tensors(
    config: DecoderConfig, params: Params, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Their tensors in the table's order; one leaf of ours is on the host at a time."""
    sizes, rows = _sizes(config), _rows(config)
    params = {name: part for name, part in params.items() if name != "value_head"}
    got = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    expected = {row.path: row.shape_here(sizes) for row in rows}
    assert got == expected, f"parameters {got} are not those of {config}: {expected}"
    for row in rows:
        leaf = np.asarray(_get(params, row.path))
        names = row.names(config.num_layers)
        for name, layer in zip(names, leaf if row.stacked else (leaf,), strict=True):
            # safetensors writes the buffer as it lies in memory: strides must be the plain ones
            yield name, np.ascontiguousarray(row.to_there(layer, sizes), dtype)


def _shards(tensors: Iterator[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Tensors in order, grouped up to MAX_SHARD_BYTES; a larger one is alone in its group."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _write_weights(
    directory: pathlib.Path, config: DecoderConfig, params: Params, dtype: np.dtype
) -> None:
    written: list[list[str]] = []  # the names in each file
    for shard in _shards(_tensors(config, params, dtype)):
        # The final file name holds the number of shards, known only at the end.
        path = directory / f"shard-{len(written)}"
        safetensors.numpy.save_file(shard, path, metadata={"format": "pt"})
        written.append(list(shard))
    if len(written) == 1:
        (directory / "shard-0").rename(directory / _SINGLE)
        return
    weight_map = {}
    for i, names in enumerate(written):
        file = f"model-{i + 1:05d}-of-{len(written):05d}.safetensors"
        (directory / f"shard-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    total = dtype.itemsize * sum(leaf.size for leaf in jax.tree.leaves(params))
    _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
