"""Arithmetic on numbers alone: the work of a token, the memory of a device, the pace of a step."""

import dataclasses
import math

from jaxreason.parallel.chips import Chip
from jaxreason.parallel.step_time import step_seconds
from jaxreason.parallel.workload import Layout, Workload, cache_bytes, widths

_BLOCK, _SCORES = 64, 6  # queries of a block (kernels/blockwise.py), and its arrays alive at once
_SQUARES = 4  # arrays of every score that kernels/reference.py has alive at once, or keeps


def flops_per_token(
    *,
    body_params: int,
    head_params: int,
    attention_dim: int,
    keys_per_query: float,
    frozen: bool = False,
) -> float:
    """Training FLOPs a token, forward and backward, without recomputation.

    6 a parameter that multiplies (the embedding lookup is free, a tied head counts once as head),
    plus attention: 12 a key that a query reads, in each layer, times heads * head_dim. With the
    keys of causal attention that reproduces prime-rl's and Megatron-Bridge's published figures; a
    full square is nanochat's and llm-foundry's count.

    Args:
      body_params: parameters of all layers that a token meets, embedding and head excluded; of
        experts, those of the ones it chooses.
      head_params: vocabulary x model dim.
      attention_dim: query heads x head dim.
      keys_per_query: of all layers together, the mean over a row: see `causal_keys`.
      frozen: the parameters have no gradient of their own (LoRA's base): 4 a parameter.
    """
    per_param = 4.0 if frozen else 6.0
    return per_param * (body_params + head_params) + 12 * attention_dim * keys_per_query


def causal_keys(length: int, window: int | None = None) -> float:
    """The mean number of keys that a query of a row of `length` reads in one layer.

    Half the length, to the half of a key that the published counts leave out; with a window, the
    window less what the first queries lack.
    """
    reach = length if window is None else min(window, length)
    return reach * (1 - reach / (2 * length))


def model_flops(work: Workload) -> float:
    """Of a token, without recomputation."""
    return flops_per_token(
        body_params=sum(work.met(w) for w in work.weights if w.of_layers),
        head_params=work.head_params,
        attention_dim=work.num_heads * work.head_dim,
        keys_per_query=work.keys_per_query,
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device, by part: bytes, and seconds of a step that nothing hides."""

    memory: dict[str, float]
    seconds: dict[str, float]
    tokens: int
    num_devices: int
    mfu: float

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def binds(self) -> str:
        """The part that takes longest."""
        return max(self.seconds, key=self.seconds.get)


def estimate(work: Workload, layout: Layout, chip: Chip) -> Estimate:
    seconds = step_seconds(work, layout, chip)
    flops = model_flops(work) * work.tokens / layout.num_devices
    return Estimate(
        memory=memory_bytes(work, layout, chip),
        seconds=seconds,
        tokens=work.tokens,
        num_devices=layout.num_devices,
        mfu=flops / sum(seconds.values()) / chip.flops,
    )


# --- memory ---------------------------------------------------------------------------------------


def memory_bytes(work: Workload, layout: Layout, chip: Chip) -> dict[str, float]:
    """Bytes of one device by part, as XLA lays a step out: its arguments, and the most that is
    alive of everything else at once.

    Two moments compete: the loss, and the backward pass of a layer; what is kept of the layers is
    there in both. Where an update samples first, its cache and its copy of the weights take the
    place of both.
    """
    held = sum(map(layout.share, work.weights))
    kept = work.num_layers * layout.tokens(work) * work.dtype_bytes * _kept_numbers(work, layout)
    loss, layer = _loss_bytes(work, layout, chip), _layer_bytes(work, layout, chip)
    parts = {
        "weights and optimizer": 12 * held,
        "batch": 20 * work.tokens / layout.ways("batch") * (1 if layout.microbatches == 1 else 2),
        "gradients": 4 * held * (1 if layout.microbatches == 1 else 2),
        "kept activations": kept,
        "loss" if loss > layer else "one layer": max(loss, layer),
    }
    if work.rollout is not None:
        training = sum(parts.values()) - parts["weights and optimizer"]
        parts["rollout"] = max(0.0, _sampling_bytes(work, layout) - training)
    return parts


def _kept_numbers(work: Workload, layout: Layout) -> float:
    """A layer's activations that wait for its backward pass, a token."""
    embed, heads, mlp = widths(work, layout)
    if work.num_experts:  # a mixture keeps its input alone, whatever the policy (model/moe.py)
        mlp = 0.0
    attended = work.num_heads * work.head_dim / layout.ways("heads")
    if layout.kept is None:  # norms and rotations keep fp32; the MLP its gate twice
        squares = 0.0
        if layout.attention == "reference":  # fp32
            squares = 4 * _SQUARES * work.length * work.num_heads / layout.ways("heads")
        return 10 * embed + 5.5 * heads + 6 * mlp + squares / work.dtype_bytes
    sizes = {
        "qkv": heads,
        "attention": attended + 2 * work.num_heads / layout.ways("heads"),  # and fp32 lse
        "attention_projection": embed,
        "gate_up": 2 * mlp,
    }
    return embed + sum(sizes[name] for name in layout.kept)


def _loss_bytes(work: Workload, layout: Layout, chip: Chip) -> float:
    """The head gathered in the activations' type, its fp32 gradient, and of a chunk: the logits in
    fp32, their gradient, and what it adds to the head's, in fp32. The TPU compiler fuses the last
    two."""
    vocab = work.vocab_size / layout.ways("vocab")
    rows = min(layout.tokens(work), max(work.embed_dim, 64))  # of a chunk: kernels/linear_xent.py
    table = vocab * work.embed_dim
    if chip.platform == "tpu":
        return (4 + work.dtype_bytes) * table + 4 * vocab * rows
    return (4 + 4 + work.dtype_bytes) * table + (4 + work.dtype_bytes) * vocab * rows


def _layer_bytes(work: Workload, layout: Layout, chip: Chip) -> float:
    """What a layer computes again and the gradients of it, its scores; its weights, gathered and
    put in order, and their gradients; that of the head waits meanwhile, whole: it is split behind
    the layers. Its share is among the gradients."""
    embed, heads, mlp = widths(work, layout)
    tokens, dtype = layout.tokens(work), work.dtype_bytes
    numbers = 8 * embed + 4 * heads
    if work.num_experts:  # rows in the order of experts: in, out, and their gradients
        numbers += 4 * work.embed_dim * work.experts_per_token
    if not (work.num_experts and chip.platform == "tpu"):  # there the inner rows are gone by then
        numbers += 8 * mlp
    keys = {"blockwise": _BLOCK * _SCORES, "reference": work.length * _SQUARES, "flash": 0}
    scores = 4 * tokens * work.num_heads / layout.ways("heads") * keys[layout.attention]
    gathered = sum(
        w.size / math.prod(layout.ways(a) for a in w.axes if not a.endswith("embed"))
        for w in work.matrices
    )
    weights = (2 * dtype + 4) * gathered / work.num_layers
    head = 4 * work.head_params / layout.ways("vocab") * (1 - 1 / layout.ways("embed"))
    return tokens * numbers * dtype + scores + weights + head


def _sampling_bytes(work: Workload, layout: Layout) -> float:
    r = work.rollout
    weights = work.dtype_bytes * sum(w.size for w in work.weights) / layout.ways("heads")
    rows = r.slots / layout.ways("lane")
    return weights + rows * (r.prompt + r.completion) * cache_bytes(work, layout)
