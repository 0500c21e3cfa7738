"""Which tensor of a Hugging Face checkpoint is which of ours: one table a family, both directions.

RoPE is the half-split one on both sides and norm weights are stored as theirs are (Gemma's w of
1 + w), so weights are reshaped and transposed, never permuted or changed.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxreason.model.config import DecoderConfig
from jaxreason.types import Params


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and its tensors in theirs, by dimension letters.

    In `theirs` a space separates the axes: ("DNH", "NH D") reads: ours is [D, N, H], theirs the
    matrix [N*H, D]. `{layer}` and `{expert}` in their name stand for one tensor each, which ours
    stacks along a leading L, or L and E.
    """

    path: str  # "layers/wq": keys of the parameter tree
    name: str
    ours: str
    theirs: str

    @property
    def stack(self) -> str:
        """The leading dims of ours that count tensors of theirs."""
        return ("L" if "{layer}" in self.name else "") + ("E" if "{expert}" in self.name else "")

    def places(self, sizes: Mapping[str, int]) -> Iterable[tuple[int, ...]]:
        """The index of each of their tensors in the leading dims of ours."""
        return itertools.product(*(range(sizes[dim]) for dim in self.stack))

    def name_at(self, place: tuple[int, ...]) -> str:
        keys = {"L": "layer", "E": "expert"}
        return self.name.format(**{keys[dim]: i for dim, i in zip(self.stack, place, strict=True)})

    def names(self, sizes: Mapping[str, int]) -> list[str]:
        return [self.name_at(place) for place in self.places(sizes)]

    def shape_here(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(sizes[dim] for dim in self.stack + self.ours)

    def shape_there(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of one tensor."""
        return tuple(math.prod(sizes[dim] for dim in axis) for axis in self.theirs.split())

    def to_here(self, there: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One tensor of theirs as ours; a view."""
        turned = there.T if self._transposed else there
        return turned.reshape([sizes[dim] for dim in self.ours])

    def to_there(self, here: np.ndarray) -> np.ndarray:
        """One tensor of ours as theirs; a view of a contiguous array, else a copy."""
        matrix = self.as_matrix(here)
        if " " not in self.theirs:
            return matrix[0]
        return matrix.T if self._transposed else matrix

    def as_matrix(self, here: np.ndarray) -> np.ndarray:
        """One tensor of ours, or a block of it, over the two axes of theirs; a vector is a row."""
        axes = self.theirs.split()
        first = 0 if len(axes) == 1 else len(axes[1 if self._transposed else 0])
        return here.reshape(math.prod(here.shape[:first]), -1)

    @property
    def _transposed(self) -> bool:
        return self.ours != self.theirs.replace(" ", "")


def _layer(path: str, name: str, ours: str, theirs: str) -> Row:
    return Row(f"layers/{path}", f"model.layers.{{layer}}.{name}", ours, theirs)


_EMBEDDING = Row("embedding", "model.embed_tokens.weight", "VD", "V D")
_FINAL_NORM = Row("final_norm", "model.norm.weight", "D", "D")
_HEAD = Row("lm_head", "lm_head.weight", "VD", "V D")
_ATTENTION = (
    _layer("attention_norm", "input_layernorm.weight", "D", "D"),
    _layer("wq", "self_attn.q_proj.weight", "DNH", "NH D"),
    _layer("wk", "self_attn.k_proj.weight", "DKH", "KH D"),
    _layer("wv", "self_attn.v_proj.weight", "DKH", "KH D"),
    _layer("wo", "self_attn.o_proj.weight", "NHD", "D NH"),
)
_QKV_BIAS = (
    _layer("bq", "self_attn.q_proj.bias", "NH", "NH"),
    _layer("bk", "self_attn.k_proj.bias", "KH", "KH"),
    _layer("bv", "self_attn.v_proj.bias", "KH", "KH"),
)
_QK_NORM = (
    _layer("q_norm", "self_attn.q_norm.weight", "H", "H"),
    _layer("k_norm", "self_attn.k_norm.weight", "H", "H"),
)
_MLP_NORM = (_layer("mlp_norm", "post_attention_layernorm.weight", "D", "D"),)
_FOUR_NORMS = (  # Gemma norms what attention and MLP read, and what they give
    _layer("post_attention_norm", "post_attention_layernorm.weight", "D", "D"),
    _layer("mlp_norm", "pre_feedforward_layernorm.weight", "D", "D"),
    _layer("post_mlp_norm", "post_feedforward_layernorm.weight", "D", "D"),
)
_MLP = (
    _layer("w_gate", "mlp.gate_proj.weight", "DF", "F D"),
    _layer("w_up", "mlp.up_proj.weight", "DF", "F D"),
    _layer("w_down", "mlp.down_proj.weight", "FD", "D F"),
)
_EXPERTS = (
    _layer("router", "mlp.gate.weight", "DE", "E D"),
    _layer("w_gate", "mlp.experts.{expert}.gate_proj.weight", "DF", "F D"),
    _layer("w_up", "mlp.experts.{expert}.up_proj.weight", "DF", "F D"),
    _layer("w_down", "mlp.experts.{expert}.down_proj.weight", "FD", "D F"),
)


def _table(*parts: tuple[Row, ...]) -> tuple[Row, ...]:
    return (_EMBEDDING, *itertools.chain(*parts), _FINAL_NORM, _HEAD)


TABLES: dict[str, tuple[Row, ...]] = {
    "qwen3": _table(_ATTENTION, _QK_NORM, _MLP_NORM, _MLP),
    "qwen3_moe": _table(_ATTENTION, _QK_NORM, _MLP_NORM, _EXPERTS),
    "qwen2": _table(_ATTENTION, _QKV_BIAS, _MLP_NORM, _MLP),
    "llama": _table(_ATTENTION, _MLP_NORM, _MLP),
    "gemma3_text": _table(_ATTENTION, _QK_NORM, _FOUR_NORMS, _MLP),
}
EMBEDDING, HEAD = _EMBEDDING.name, _HEAD.name

# Tensors that say nothing: old Llama checkpoints hold RoPE's frequencies, which follow from the
# config.
_FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
# The multimodal Gemma 3 (4b, 12b, 27b): the parts that see, and the names of the text part, of
# which the second is that of transformers 4.52 on.
_VISION = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
_TEXT_PARTS = (("language_model.", ""), ("model.language_model.", "model."))


def rows(config: DecoderConfig) -> tuple[Row, ...]:
    """The table of a model; without the head where the embedding is the head."""
    table = TABLES[config.family]
    return table[:-1] if config.tie_embeddings else table


def sizes(config: DecoderConfig) -> dict[str, int]:
    return {"V": config.vocab_size, "D": config.embed_dim, "F": config.mlp_dim,
            "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim,
            "L": config.num_layers, "E": config.num_experts}  # fmt: skip


def shapes(config: DecoderConfig, dtype: Any = np.float32) -> Params:
    """The parameter tree as jax.ShapeDtypeStruct."""
    tree: Params = {}
    for row in rows(config):
        put(tree, row.path, jax.ShapeDtypeStruct(row.shape_here(sizes(config)), dtype))
    return tree


def meaning(name: str, model_type: str) -> str | None:
    """The name in the tables of a tensor of theirs; None for one that is no part of the decoder."""
    if _FREQUENCIES.search(name) or vision_part(name, model_type):
        return None
    for prefix, instead in _TEXT_PARTS if model_type == "gemma3" else ():
        if name.startswith(prefix):
            return instead + name.removeprefix(prefix)
    return name


def vision_part(name: str, model_type: str) -> str | None:
    """vision_tower or multi_modal_projector, of a multimodal Gemma 3; else None."""
    match = _VISION.match(name) if model_type == "gemma3" else None
    return match and match[2]


def get(tree: Mapping[str, Any], path: str) -> Any:
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, last = path.split("/")
    functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[last] = leaf


def brief(names: Iterable[str]) -> list[str]:
    """Names as few texts: those that differ in their numbers alone become one with ranges.

    ["a.0.b", "a.1.b", "a.2.b", "c"] -> ["a.{0-2}.b", "c"].
    """
    numbers: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for name in names:
        texts = re.split(r"(?<=\.)\d+(?=\.)", name)
        found = tuple(map(int, re.findall(r"(?<=\.)\d+(?=\.)", name)))
        numbers.setdefault(tuple(texts), set()).add(found)
    return [
        "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, slots, fillvalue="")))
        for texts, found in numbers.items()
        for slots in _blocks(found)
    ]


def _blocks(found: set[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Tuples of numbers as products of ranges."""
    if found == {()}:
        return [()]
    rest: dict[int, set[tuple[int, ...]]] = {}
    for first, *others in found:
        rest.setdefault(first, set()).add(tuple(others))
    alike: dict[frozenset, list[int]] = {}
    for first, others in sorted(rest.items()):
        alike.setdefault(frozenset(others), []).append(first)
    return [
        (_ranges(firsts), *block) for others, firsts in alike.items() for block in _blocks(others)
    ]


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "{0-2,5}"; one number is itself."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return "{" + ",".join(texts) + "}"
