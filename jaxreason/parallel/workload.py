"""What a step computes and how it is laid out: the numbers that the arithmetic of cost reads."""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import AbstractMesh

from jaxreason.parallel import rules

KEPT = ("qkv", "attention", "attention_projection", "gate_up")  # what a layer may keep for backward


@dataclasses.dataclass(frozen=True)
class Weight:
    """One leaf of the parameter tree. A stacked one has all layers in it."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical, of parallel/rules.py

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def of_layers(self) -> bool:
        return "layer" in self.axes

    @property
    def of_experts(self) -> bool:
        return "expert" in self.axes


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The sampling before an update of reinforcement learning: the tokens that it trains on."""

    slots: int  # rows that are sampled at once, on all devices together
    prompt: int  # tokens a row
    completion: int


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a step computes: the shape of the model and of the batch."""

    weights: tuple[Weight, ...]
    num_layers: int
    embed_dim: int
    mlp_dim: int  # of one expert where there are experts
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    keys_per_query: float  # of all layers together
    rows: int
    length: int
    tied: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    dtype_bytes: int = 2  # of activations and of the weights as they multiply
    rollout: Rollout | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.embed_dim

    def met(self, weight: Weight) -> float:
        """Its parameters that a token meets."""
        share = self.experts_per_token / self.num_experts if weight.of_experts else 1.0
        return weight.size * share

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """Of the layers; norms, biases and the tables are not among them."""
        return tuple(w for w in self.weights if w.of_layers and len(w.shape) > 2 and
                     "bias" not in w.axes)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layout:
    """How it is laid out: what a tuner chooses."""

    shape: Mapping[str, int]  # mesh axis -> size, as parallel.mesh.AXES orders them
    microbatches: int = 1
    kept: frozenset[str] | None = None  # of KEPT, the rest is recomputed; None: all of everything
    # blockwise: scores go through memory | reference: all at once | flash: they stay on the chip
    attention: str = "blockwise"
    sums_once: bool = False  # gradients over copies of the weights: once a step, not a microbatch

    @property
    def mesh(self) -> AbstractMesh:
        return AbstractMesh(tuple(self.shape.values()), tuple(self.shape))

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape.values())

    def ways(self, logical: str) -> int:
        return math.prod(self.shape.get(axis, 1) for axis in rules.mesh_axes(logical))

    def share(self, weight: Weight) -> float:
        """Elements of the weight on one device."""
        return weight.size / math.prod(self.ways(axis) for axis in weight.axes)

    def tokens(self, work: Workload) -> float:
        """Of one microbatch, on one device."""
        return work.tokens / self.microbatches / self.ways("batch") / self.ways("length")

    def recomputes(self, name: str) -> bool:
        return self.kept is not None and name not in self.kept


def widths(work: Workload, layout: Layout) -> tuple[float, float, float]:
    """Numbers a token: of the stream, of queries, keys and values, of the MLP's inner dim.

    The stream's share is that of a token of which the device has all else: layouts split it over
    the tensor axis, too.
    """
    embed = work.embed_dim / (layout.ways("residual") / layout.ways("length"))
    heads = (work.num_heads + 2 * work.num_kv_heads) * work.head_dim / layout.ways("heads")
    mlp = work.mlp_dim * max(work.experts_per_token, 1) / layout.ways("mlp")
    return embed, heads, mlp


def cache_bytes(work: Workload, layout: Layout) -> float:
    """Keys and values of one position of one row on one device."""
    heads = work.num_kv_heads / layout.ways("kv_heads")
    return 2 * work.num_layers * heads * work.head_dim * work.dtype_bytes
