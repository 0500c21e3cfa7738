"""The time of a step, by part.

The model, all of it: matmuls and attention at a share of the peak that grows with their size,
elementwise work at a share of the memory's bandwidth, collectives at a share of their links' (the
slowest of those they cross). Gathers and sums of weights hide behind compute up to a stated share;
exchanges of activations do not. The constants are chips.Efficiency's, one set a chip; the bytes
that elementwise work moves are counted below.
"""

import dataclasses
import math
from collections.abc import Iterator

from jaxreason.parallel import rules
from jaxreason.parallel.chips import Chip
from jaxreason.parallel.workload import Layout, Weight, Workload, cache_bytes

# Bytes that one attention score moves where scores go through memory: fp32 products written, read
# for the maximum and again for the exponential, bf16 out and into the next product. The backward
# pass has two such products and reads two of its results twice.
_SCORE_BYTES = {"forward": 14, "backward": 26}
# A logit: fp32 written, read for its normaliser and its gradient, that written and read twice in
# bf16; and the head's fp32 gradient, read and written once a chunk of as many rows as it has
# columns.
_LOGIT_BYTES = 20 + 8
# What a layer keeps of a weight's product; nothing needs that of w_down again.
_PRODUCTS = {"wq": "qkv", "wk": "qkv", "wv": "qkv", "wo": "attention_projection",
             "w_gate": "gate_up", "w_up": "gate_up"}  # fmt: skip
_OPTIMIZER_BYTES = 32  # a weight and two moments read and written, the gradient read twice, fp32


def step_seconds(work: Workload, layout: Layout, chip: Chip) -> dict[str, float]:
    """Seconds of one step by part; collectives as far as compute does not hide them."""
    compute = {
        "matmul": _matmul_seconds(work, layout, chip),
        "attention": _attention_seconds(work, layout, chip),
        "memory": _memory_seconds(work, layout, chip),
    }
    hidden, shown = _collective_seconds(work, layout, chip)
    hideable = chip.efficiency.overlap * hidden
    exposed = hidden - min(hideable, sum(compute.values()))
    seconds = {**compute, "weight collectives": exposed, "activation collectives": shown}
    if work.rollout is not None:
        seconds["rollout"] = _rollout_seconds(work, layout, chip)
    return seconds


def _matmul_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    tokens = work.tokens / layout.num_devices  # every axis divides the work of a matmul
    total = 0.0
    for weight in work.matrices:
        flops = 8 if _again(weight, layout) else 6
        rows = layout.tokens(work) * work.met(weight) / weight.size * layout.ways("expert")
        narrow = min(*_sides(weight, layout), rows if weight.of_experts else layout.tokens(work))
        total += flops * work.met(weight) * tokens / _matmul_rate(chip, narrow)
    narrow = min(work.embed_dim, work.vocab_size / layout.ways("vocab"))
    head = 6 * work.head_params * tokens / _matmul_rate(chip, narrow)
    score = 2 * sum(map(work.met, work.matrices)) * tokens / _matmul_rate(chip, work.embed_dim)
    return total + head + score * (bool(work.rollout) + _counts_load(work, layout))


def _again(weight: Weight, layout: Layout) -> bool:
    """Whether its product is computed again in the backward pass; a mixture's always are."""
    kept_as = _PRODUCTS.get(weight.name.rsplit("/", 1)[-1])
    return kept_as is not None and (weight.of_experts or layout.recomputes(kept_as))


def _counts_load(work: Workload, layout: Layout) -> bool:
    """Whether the experts' load is counted in a forward pass of its own (train/step.py)."""
    return work.num_experts > 0 and layout.microbatches > 1


def _sides(weight: Weight, layout: Layout) -> tuple[float, float]:
    """Rows and columns of one layer's matrix on one device, its embed dim gathered."""
    dims = [(n, a) for n, a in zip(weight.shape, weight.axes) if a not in ("layer", "expert")]
    embed = math.prod(n for n, axis in dims if axis.endswith("embed"))
    other = math.prod(n / layout.ways(axis) for n, axis in dims if not axis.endswith("embed"))
    return embed, other


def _matmul_rate(chip: Chip, narrow: float) -> float:
    """FLOP/s of a product whose narrower dim is `narrow`."""
    e = chip.efficiency
    return chip.flops * e.matmul * narrow / (narrow + e.matmul_half)


def _attention_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """Forward 4 FLOPs a key and channel, backward 8 (and a recomputed forward where not kept)."""
    e, tokens = chip.efficiency, work.tokens / layout.num_devices
    passes = 3 + layout.recomputes("attention") + _counts_load(work, layout)  # backward two
    length = 2 * work.keys_per_query / work.num_layers  # as long as a causal row with those keys
    # A head narrower than the matmul unit's 128 leaves part of it idle (FA3's tables, tokamax's).
    share = e.attention * length / (length + e.attention_half) * min(1, work.head_dim / 128) ** 0.5
    channels = work.num_heads * work.head_dim
    flops = 4 * passes * channels * work.keys_per_query * tokens
    seconds = flops / (chip.flops * share)
    if layout.attention == "flash":
        return seconds
    forward = passes - 2
    moved = forward * _SCORE_BYTES["forward"] + _SCORE_BYTES["backward"]
    every = 2 * work.keys_per_query  # the square; in blocks, 8 bands of its causal half
    keys = every if layout.attention == "reference" else 9 / 16 * every
    scores = work.num_heads * keys * tokens
    products = 2 * forward + 5  # backward, the scores once more
    flops = 2 * products * work.head_dim * scores
    return moved * scores / (chip.bandwidth * e.memory) + flops / _matmul_rate(chip, work.head_dim)


def _memory_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """Norms, rotations, activations, residuals; the logits; the optimizer."""
    tokens = work.tokens / layout.num_devices
    heads = (work.num_heads + 2 * work.num_kv_heads) * work.head_dim
    mlp = work.mlp_dim * max(work.experts_per_token, 1)
    numbers = 10 * work.embed_dim + 2 * heads + 3 * mlp  # read and written in a forward pass
    if work.num_experts:  # rows are copied in the order of experts, and back
        numbers += 6 * work.embed_dim * work.experts_per_token
    passes = 3 if layout.kept is None else 4
    layers = passes * work.num_layers * numbers * work.dtype_bytes * tokens
    logits = _LOGIT_BYTES * work.vocab_size * tokens
    optimizer = _OPTIMIZER_BYTES * sum(map(layout.share, work.weights))
    accumulation = 0.0
    if layout.microbatches > 1:  # a sum of gradients, read and written
        accumulation = 12 * layout.microbatches * sum(map(layout.share, work.weights))
    moved = layers + logits + optimizer + accumulation
    return moved / (chip.bandwidth * chip.efficiency.memory)


def _collective_seconds(work: Workload, layout: Layout, chip: Chip) -> tuple[float, float]:
    """(what may hide, what does not) of the seconds of a step's collectives."""
    seconds = {True: 0.0, False: 0.0}
    for one in exchanges(work, layout):
        once = exchange_seconds(chip, layout, one.axes, one.volume)
        seconds[one.hides] += one.times * one.rounds * once
    return seconds[True], seconds[False]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """A collective: each device of those along `axes` gets `volume` bytes, so often in a step."""

    axes: tuple[str, ...]
    volume: float
    times: float
    hides: bool  # behind compute: weights and their gradients may
    rounds: int = 1  # 2: a sum that all get, which is split and then gathered


def exchanges(work: Workload, layout: Layout) -> list[Exchange]:
    """All of a step; docs/collectives.md has them as XLA makes them. Those of one device, too."""
    found = [*_weights(work, layout), _rows(work, layout), *_stream(work, layout)]
    found += _of_experts(work, layout)
    ring = _ring_volume(work, layout)
    found.append(Exchange(("context",), ring, work.num_layers * layout.microbatches, False))
    return [one for one in found if math.prod(layout.shape.get(a, 1) for a in one.axes) > 1]


def _weights(work: Workload, layout: Layout) -> Iterator[Exchange]:
    """A layer's matrices are gathered once in either pass, and once more to count the experts'
    load; the head once; all in the activations' type. Their gradients are summed and split in fp32.
    Between copies of the weights XLA keeps the sum for the end for the tables alone."""
    times = layout.microbatches
    for split in {w.of_experts for w in work.matrices}:
        axes = rules.mesh_axes("expert_embed" if split else "embed")
        ways = math.prod(layout.shape.get(axis, 1) for axis in axes)
        gathered = ways * sum(layout.share(w) for w in work.matrices if w.of_experts is split)
        gathers = 2 + _counts_load(work, layout)
        yield Exchange(axes, (gathers * work.dtype_bytes + 4) * gathered, times, True)
    head = work.head_params / layout.ways("vocab")
    yield Exchange(rules.mesh_axes("embed"), (work.dtype_bytes + 4) * head, times, True)
    for of_layers, sums in ((True, 1 if layout.sums_once else times), (False, 1)):
        copies = sum(layout.share(w) for w in work.weights if w.of_layers is of_layers)
        yield Exchange(("data",), 4 * copies, sums, True, rounds=2)


def _rows(work: Workload, layout: Layout) -> Exchange:
    """Of the embedding: each device looks up its columns of all tokens' rows, and they exchange
    these; on the way back their gradients. A tensor axis does it in each of its parts."""
    rows = work.dtype_bytes * layout.tokens(work) * work.embed_dim
    times = layout.microbatches * (2 + _counts_load(work, layout))
    return Exchange(rules.mesh_axes("embed"), rows, times, False)


def _stream(work: Workload, layout: Layout) -> Iterator[Exchange]:
    """The stream is gathered before attention and MLP and its sums split after, in both passes; and
    where a layer is computed again, gathered again for the gradients of its weights. The head
    gathers it, and the embedding splits its sum. Of experts: `_of_experts`."""
    stream = work.dtype_bytes * layout.tokens(work) * work.embed_dim
    branches = 1 if work.num_experts else 2
    a_layer = 4 * branches + 2 * _counts_load(work, layout)
    if layout.kept is not None:
        a_layer += branches + layout.recomputes("attention_projection")
    yield Exchange(("tensor",), stream, layout.microbatches * work.num_layers * a_layer, False)
    yield Exchange(("tensor",), stream, 3 * layout.microbatches, False)
    yield Exchange(("tensor",), stream, layout.microbatches, False, rounds=2)


def _ring_volume(work: Workload, layout: Layout) -> float:
    """Keys and values go once around in the forward pass; they and their gradients in the other."""
    ways = layout.shape.get("context", 1)
    heads = work.num_kv_heads / layout.ways("kv_heads")
    ring = ways * layout.tokens(work) * 2 * heads * work.head_dim
    forward = (2 if layout.recomputes("attention") else 1) * work.dtype_bytes
    return ring * (forward + work.dtype_bytes + 4)  # gradients travel in fp32


def _of_experts(work: Workload, layout: Layout) -> Iterator[Exchange]:
    """Peers gather each other's tokens and scatter what their experts give; in the backward pass
    tokens once more, and the gradients of both. To count the load, forward alone once more. A
    token's choices, ids and weights in fp32, are gathered beside it, the weights' gradients
    scattered."""
    if not work.num_experts:
        return
    tokens = layout.ways("expert") * layout.tokens(work)
    again = _counts_load(work, layout)
    of_token = (5 + 2 * again) * work.embed_dim * work.dtype_bytes
    of_choice = (2 + again) * (4 + 4) + 4
    volume = tokens * (of_token + of_choice * work.experts_per_token)
    times = layout.microbatches * work.num_layers
    yield Exchange(("expert", "tensor"), volume, times, False)


def exchange_seconds(chip: Chip, layout: Layout, axes: tuple[str, ...], volume: float) -> float:
    """A gather, a split sum or an exchange in which each device of the group gets `volume` bytes.

    Within an island a device receives all but its own part over its fast links. What comes from
    other islands arrives once, over the slow links of all the group's devices there, around a ring:
    each island on it adds its latency.
    """
    group, here = _group(chip, layout, axes)
    if group == 1:
        return 0.0
    e, links = chip.efficiency, chip.links
    inside = volume * (group - 1) / group / links.inside
    islands = group / here
    between = volume * (islands - 1) / islands / (links.between * here)
    return max(inside if here > 1 else 0.0, between) / e.link + e.latency * islands


def _group(chip: Chip, layout: Layout, axes: tuple[str, ...]) -> tuple[int, int]:
    """(devices along these axes, those of them in one island): inner axes take neighbours."""
    room, group, here = chip.links.island, 1, 1
    for axis, size in reversed(layout.shape.items()):
        near = math.gcd(size, room)
        room //= near
        if axis in axes:
            group, here = group * size, here * near
    return group, here


def _rollout_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """Every weight and every key and value so far, read once a token; prompts are small beside."""
    r = work.rollout
    completions = work.tokens / (r.prompt + r.completion)
    waves = max(1.0, completions / r.slots)
    rows = r.slots / layout.ways("lane")
    weights = work.dtype_bytes * sum(w.size for w in work.weights) / layout.ways("heads")
    cache = rows * cache_bytes(work, layout) * (r.prompt + r.completion / 2)
    a_token = (weights + cache) / (chip.bandwidth * chip.efficiency.memory)
    return waves * r.completion * a_token
