"""The time of a step, by part.

The model, all of it: matmuls and attention at a share of the peak that grows with their size,
elementwise work at a share of the memory's bandwidth, collectives at a share of their links' (the
slowest of those they cross). Gathers and sums of weights hide behind compute up to a stated share;
exchanges of activations do not. The constants are chips.Efficiency's, one set a chip; the bytes
that elementwise work moves are counted below.
"""

import math

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
    again = {"wq": "qkv", "wk": "qkv", "wv": "qkv", "wo": "attention_projection",
             "w_gate": "gate_up", "w_up": "gate_up"}  # fmt: skip
    total = 0.0
    for weight in work.matrices:
        name = weight.name.rsplit("/", 1)[-1]
        flops = 8 if name in again and layout.recomputes(again[name]) else 6
        rows = layout.tokens(work) * work.met(weight) / weight.size * layout.ways("expert")
        narrow = min(*_sides(weight, layout), rows if weight.of_experts else layout.tokens(work))
        total += flops * work.met(weight) * tokens / _matmul_rate(chip, narrow)
    narrow = min(work.embed_dim, work.vocab_size / layout.ways("vocab"))
    head = 6 * work.head_params * tokens / _matmul_rate(chip, narrow)
    score = 2 * sum(map(work.met, work.matrices)) * tokens / _matmul_rate(chip, work.embed_dim)
    return total + head + score * (bool(work.rollout) + _counts_load(work, layout))


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
    scores = 9 / 8 * work.num_heads * work.keys_per_query * tokens  # 8 bands of a causal square
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
    """(of weights and gradients, of activations) in a step."""
    copies = 2 * exchange_seconds(chip, layout, ("data",), 4 * sum(map(layout.share, work.weights)))
    weights = work.num_layers * _per_layer_weights(work, layout, chip)
    weights += _table_seconds(work, layout, chip)
    sums = 1 if layout.sums_once else layout.microbatches
    per_layer = (
        _tensor_seconds(work, layout, chip)
        + _context_seconds(work, layout, chip)
        + _expert_seconds(work, layout, chip)
    )
    return (
        layout.microbatches * weights + sums * copies,
        work.num_layers * layout.microbatches * per_layer,
    )


def _table_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """Embedding and head are gathered in fp32; their gradients are summed, one in fp32."""
    axes, table = rules.mesh_axes("embed"), work.head_params / layout.ways("vocab")
    gathers = 1 if work.tied else 2
    return gathers * exchange_seconds(chip, layout, axes, 4 * table) + exchange_seconds(
        chip, layout, axes, (4 + work.dtype_bytes) * table
    )


def _per_layer_weights(work: Workload, layout: Layout, chip: Chip) -> float:
    """Gathered in both passes, and once more where the layer is computed again; gradients are
    summed and split in fp32."""
    gathers = 2 if layout.kept is None else 3
    seconds = 0.0
    for split in {w.of_experts for w in work.matrices}:
        axes = rules.mesh_axes("expert_embed" if split else "embed")
        ways = math.prod(layout.shape.get(axis, 1) for axis in axes)
        numbers = sum(layout.share(w) for w in work.matrices if w.of_experts is split)
        numbers *= ways / work.num_layers
        gathered = exchange_seconds(chip, layout, axes, work.dtype_bytes * numbers)
        seconds += gathers * gathered + exchange_seconds(chip, layout, axes, 4 * numbers)
    return seconds


def _tensor_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """The stream is gathered before attention and MLP and its sums split after, in both passes; and
    where a layer is computed again, gathered again for the gradients of its weights."""
    stream = work.dtype_bytes * layout.tokens(work) * work.embed_dim
    times = 8 + 2 * (layout.kept is not None) + layout.recomputes("attention_projection")
    return times * exchange_seconds(chip, layout, ("tensor",), stream)


def _context_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """Keys and values go once around in the forward pass; they and their gradients in the other."""
    ways = layout.shape.get("context", 1)
    heads = work.num_kv_heads / layout.ways("kv_heads")
    ring = ways * layout.tokens(work) * 2 * heads * work.head_dim
    forward = (2 if layout.recomputes("attention") else 1) * work.dtype_bytes
    moved = ring * (forward + work.dtype_bytes + 4)  # gradients travel in fp32
    return exchange_seconds(chip, layout, ("context",), moved)


def _expert_seconds(work: Workload, layout: Layout, chip: Chip) -> float:
    """Each chosen expert's copy of a token there and back, in both passes."""
    if not work.num_experts:
        return 0.0
    rows = layout.tokens(work) * work.experts_per_token * work.embed_dim
    passes = 3 if layout.recomputes("gate_up") else 2
    return 2 * passes * exchange_seconds(chip, layout, ("expert",), work.dtype_bytes * rows)


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
