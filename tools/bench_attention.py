"""Attention of whole rows and of single queries: every implementation of ours, and the peers.

FLOPs are those of the pairs of queries and keys that a case lets meet, the diagonal counted half:
4 H N a pair forward (half of the square where attention is causal), and 2.5 times that backward.
Bytes of single queries are those of the keys and values that the rows may read, each once.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import bench_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import (
    Entrant,
    Work,
    contest,
    dtype,
    missing_reason,
    normal,
    platform_reason,
    row_error,
)
from bench_timing import Settings, Timed, compiled

from jaxreason.kernels import decode, reference, tokamax
from jaxreason.model.attention import IMPLEMENTATIONS, Use
from jaxreason.parallel.mesh import capability
from jaxreason.types import AttentionMask

Qkv = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class RowsCase:
    """Rows that attend to themselves, causally."""

    name: str
    rows: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    documents: int = 1  # of unequal lengths in each row
    window: int | None = None


ROWS_CASES = {
    c.name: c
    for c in (
        RowsCase("tiny", 48, 160, 4, 2, 32),  # the quickstart's
        RowsCase("tiny-packed", 48, 160, 4, 2, 32, documents=3),
        RowsCase("10m", 8, 256, 5, 5, 64),
        RowsCase("4k", 4, 4096, 16, 8, 128),  # Qwen3-0.6B and 1.7B
        RowsCase("4k-packed", 4, 4096, 16, 8, 128, documents=8),
        RowsCase("8k", 2, 8192, 16, 8, 128),
        RowsCase("4k-hd64", 4, 4096, 32, 8, 64),  # Llama-3.2-1B
        RowsCase("4k-window", 4, 4096, 4, 1, 256, window=512),  # Gemma-3-1B
        RowsCase("2k", 8, 2048, 16, 8, 128),
        RowsCase("16k", 1, 16384, 16, 8, 128),
    )
}


def bench_rows(case: RowsCase, settings: Settings) -> tuple[list[dict], list[str]]:
    """Forward alone, then with all gradients."""
    operands = rows_operands(case)
    truth = rows_truth(operands)
    B, T, N, H = operands.q_BTNH.shape
    shape = f"{B} x {T}, {N}/{case.kv_heads} heads of {H}"
    if case.documents > 1:
        shape += f", {case.documents} documents a row"
    if case.window:
        shape += f", window {case.window}"
    flops = 4.0 * H * N * num_pairs(operands)
    rows, errors = [], []
    for mode, factor in (("forward", 1.0), ("forward + backward", 3.5)):
        work = Work(
            "attention", case.name, mode, shape, factor * flops, "TFLOP/s",
            ("jax.nn cudnn", "jax.nn xla"), functools.partial(rows_error, truth),
        )  # fmt: skip
        entrants = [*_ours(case, operands, factor > 1), *_theirs(case, operands, factor > 1)]
        found = contest(work, entrants, settings)
        rows, errors = rows + found[0], errors + found[1]
    return rows, errors


@dataclasses.dataclass(frozen=True)
class RowsOperands:
    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    dout_BTNH: jax.Array
    mask: AttentionMask

    @property
    def qkv(self) -> Qkv:
        return self.q_BTNH, self.k_BTKH, self.v_BTKH


def rows_operands(case: RowsCase) -> RowsOperands:
    size = lambda heads: (case.rows, case.length, heads, case.head_dim)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    arrays = [normal(i, *size(n)) for i, n in enumerate(heads)]
    segments = {}
    if case.documents > 1:
        ids_BT = jnp.asarray(_documents(case.rows, case.length, case.documents))
        segments = dict(q_segments_BT=ids_BT, kv_segments_BS=ids_BT)
    return RowsOperands(*arrays, AttentionMask(window=case.window, **segments))


def _documents(rows: int, length: int, documents: int) -> np.ndarray:
    """int32 ids from 1, rising; the rows are full."""
    rng = np.random.default_rng(0)
    cuts = [np.sort(rng.choice(length - 1, documents - 1, replace=False)) for _ in range(rows)]
    return np.stack([1 + np.searchsorted(c, np.arange(length)) for c in cuts]).astype(np.int32)


def num_pairs(operands: RowsOperands) -> float:
    """Queries and keys that meet in all rows; a query and its own key count half."""
    (B, T), window = operands.q_BTNH.shape[:2], operands.mask.window
    lengths = np.array([T] * B)
    if operands.mask.q_segments_BT is not None:
        ids_BT = np.asarray(operands.mask.q_segments_BT)
        lengths = np.concatenate([np.unique(row, return_counts=True)[1] for row in ids_BT])
    lengths = lengths.astype(float)
    beyond = 0.0 if window is None else np.maximum(lengths - window, 0.0)
    return float((lengths**2 - beyond**2).sum() / 2)


def _entry(attention: Callable, backward: bool) -> Callable:
    """`attention(q, k, v, mask) -> out` as the function that is timed."""

    def run(q_BTNH, k_BTKH, v_BTKH, dout_BTNH, mask):
        if not backward:
            return [{"out": attention(q_BTNH, k_BTKH, v_BTKH, mask)}]
        of_qkv = lambda *qkv: attention(*qkv, mask)
        out_BTNH, pullback = jax.vjp(of_qkv, q_BTNH, k_BTKH, v_BTKH)
        return {"out": out_BTNH} | dict(zip(("dq", "dk", "dv"), pullback(dout_BTNH)))

    return run


def _build(attention: Callable, operands: RowsOperands, backward: bool) -> Callable[[], Timed]:
    arrays = (*operands.qkv, operands.dout_BTNH, operands.mask)
    return lambda: compiled(_entry(attention, backward), *arrays)


def _ours(case: RowsCase, operands: RowsOperands, backward: bool) -> Iterator[Entrant]:
    use = Use(
        jax.default_backend(), dtype().name, case.head_dim, capability(None),
        segments=case.documents > 1, window=case.window is not None,
    )  # fmt: skip
    for name, implementation in IMPLEMENTATIONS.items():
        if name == "tokamax":  # among the peers, with a mask of every pair where rows are packed
            continue
        reason = "; ".join(implementation.reasons(use))
        if name == "reference":
            reason = "is what the others are held against, and holds every score"
        call = lambda *args, kernel=implementation.kernel: kernel.attention(*args)[0]
        yield Entrant(name, _build(call, operands, backward), reason)


def _theirs(case: RowsCase, operands: RowsOperands, backward: bool) -> Iterator[Entrant]:
    def of_jax(q_BTNH, k_BTKH, v_BTKH, mask, attention, **options):
        if mask.q_segments_BT is not None:  # they know no segments
            options["mask"] = reference.visible(mask, case.length, case.length)[:, None]
        if mask.window is not None:
            options["local_window_size"] = (mask.window - 1, 0)
        return attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, **options)

    def of_tokamax(*args):
        return of_jax(*args, tokamax.package().dot_product_attention)

    for name in ("cudnn", "xla"):
        call = functools.partial(
            of_jax, attention=jax.nn.dot_product_attention, implementation=name
        )
        reason = platform_reason("gpu") if name == "cudnn" else ""
        yield Entrant(f"jax.nn {name}", _build(call, operands, backward), reason)
    yield Entrant("tokamax", _build(of_tokamax, operands, backward), missing_reason("tokamax"))
    see_BTS = None
    if operands.mask.q_segments_BT is not None or case.window is not None:
        see_BTS = reference.visible(operands.mask, case.length, case.length)
        see_BTS = jnp.broadcast_to(see_BTS, (case.rows, *see_BTS.shape[1:]))
    for name, backend in peers.torch_backends().items():
        build = functools.partial(
            peers.attention, [operands.qkv], backend, operands.dout_BTNH if backward else None,
            see_BTS, causal=see_BTS is None,
        )  # fmt: skip
        yield Entrant(name, build, peers.torch_missing() or "")


def _looked_at(operands: RowsOperands) -> list[tuple[int, int]]:
    """(row, key/value head) whose queries, keys and values are compared: no others act on them."""
    return [(0, 0), (operands.q_BTNH.shape[0] - 1, operands.k_BTKH.shape[2] - 1)]


def _cut(name: str, x, row: int, head: int, num_kv_heads: int):
    group = x.shape[2] // num_kv_heads if name in ("out", "dq") else 1
    return x[row : row + 1, :, head * group : (head + 1) * group]


def rows_truth(operands: RowsOperands) -> list[tuple[int, int, int, dict[str, np.ndarray]]]:
    """[(row, key/value head, how many of these, the arrays of `reference` there)], in float32."""
    num_kv_heads, found = operands.k_BTKH.shape[2], []
    arrays = dict(zip(("out", "dk", "dv", "dq"), (*operands.qkv, operands.dout_BTNH)))
    run = jax.jit(_entry(lambda *args: reference.attention(*args)[0], backward=True))
    for row, head in _looked_at(operands):
        cut = [_cut(n, x, row, head, num_kv_heads) for n, x in arrays.items()]
        mask = jax.tree.map(lambda x: x[row : row + 1], operands.mask)
        with jax.default_matmul_precision("highest"):
            made = run(*(x.astype(jnp.float32) for x in cut), mask)
        truth = {name: np.asarray(x) for name, x in made.items()}
        found.append((row, head, num_kv_heads, truth))
    return found


def rows_error(truth, made) -> float:
    made = made[0] if isinstance(made, list) else made
    return float(np.max([
        row_error(_cut(name, x, row, head, num_kv_heads), wanted[name])
        for row, head, num_kv_heads, wanted in truth
        for name, x in made.items()
    ]))  # fmt: skip


# -------------------------------------------------------------------------- single queries


@dataclasses.dataclass(frozen=True)
class QueryCase:
    """One query a row against its cache, as in one layer of a decoding step."""

    name: str
    rows: int
    size: int  # positions of the cache
    heads: int
    kv_heads: int
    head_dim: int
    full: bool = True  # else rows are of all lengths
    prefixes: int = 0  # how many runs of rows share one
    prefix_size: int = 0


QUERY_CASES = {
    c.name: c
    for c in (
        QueryCase("tiny", 48, 128, 4, 2, 32, full=False),
        QueryCase("tiny-prefix", 48, 64, 4, 2, 32, full=False, prefixes=3, prefix_size=128),
        QueryCase("10m", 64, 256, 5, 5, 64),
        QueryCase("256x1k", 256, 1024, 16, 8, 128),  # Qwen3-0.6B and 1.7B
        QueryCase("256x1k-mixed", 256, 1024, 16, 8, 128, full=False),
        QueryCase("256-prefix", 256, 256, 16, 8, 128, full=False, prefixes=16, prefix_size=1024),
        QueryCase("64x4k", 64, 4096, 16, 8, 128),
        QueryCase("1x4k", 1, 4096, 16, 8, 128),
    )
}
_CACHE_BYTES = {"cpu": 2**22, "gpu": 2**28, "tpu": 2**28}  # of all layers: more than caches hold


@dataclasses.dataclass(frozen=True)
class Layer:
    q_BNH: jax.Array
    k_BKSH: jax.Array
    v_BKSH: jax.Array
    prefix: decode.Prefix | None


def bench_queries(case: QueryCase, settings: Settings) -> tuple[list[dict], list[str]]:
    """Layer after layer, each with keys and values of its own, as many as no cache holds."""
    lengths_B = _lengths(case)
    layers = [_layer(case, 0)]
    needed = _bytes(case, layers[0], lengths_B)
    count = max(1, min(28, math.ceil(_CACHE_BYTES[jax.default_backend()] / needed)))
    layers += [_layer(case, i) for i in range(1, count)]
    truth = {i: _query_truth(case, layers[i], lengths_B) for i in {0, count - 1}}
    spread = "all full" if case.full else "1 to all of them filled"
    shape = f"{case.rows} x {case.size}, {spread}, {case.heads}/{case.kv_heads} heads of "
    shape += f"{case.head_dim}, {count} layers"
    if case.prefixes:
        shape += f", {case.prefixes} prefixes of {case.prefix_size}"
    work = Work(
        "decode_attention", case.name, "forward", shape, float(count * needed), "GB/s",
        ("decode",), functools.partial(_query_error, _query_rows(case), truth),
    )  # fmt: skip
    return contest(work, list(_query_entrants(case, layers, lengths_B)), settings)


def _lengths(case: QueryCase) -> jax.Array:
    found = np.full(case.rows, case.size)
    if not case.full:
        found = np.random.default_rng(0).integers(1, case.size + 1, case.rows)
    return jnp.asarray(found, jnp.int32)


def _layer(case: QueryCase, number: int) -> Layer:
    K, H = case.kv_heads, case.head_dim
    draw = lambda i, *shape: normal(5 * number + i, *shape)
    prefix = None
    if case.prefixes:
        P, size = case.prefixes, case.prefix_size
        lengths_P = jnp.full(P, size, jnp.int32)
        prefix = (draw(3, P, K, size, H), draw(4, P, K, size, H), lengths_P)
    own = [draw(i, case.rows, K, case.size, H) for i in (1, 2)]
    return Layer(draw(0, case.rows, case.heads, H), *own, prefix)


def _bytes(case: QueryCase, layer: Layer, lengths_B: jax.Array) -> int:
    """Of the keys and values that are read, the queries and what is made of them."""
    positions = int(lengths_B.sum()) + case.prefixes * case.prefix_size
    pairs = 2 * positions * case.kv_heads * case.head_dim
    return (pairs + 2 * layer.q_BNH.size) * layer.q_BNH.dtype.itemsize


def _query_entrants(case: QueryCase, layers: list[Layer], lengths_B) -> Iterator[Entrant]:
    def build(attention: Callable) -> Callable[[], Timed]:
        def run(layers, lengths_B):
            return [{"out": attention(*layer, lengths_B)} for layer in layers]

        operands = [(x.q_BNH, x.k_BKSH, x.v_BKSH, x.prefix) for x in layers]
        return lambda: compiled(run, operands, lengths_B)

    def ours(q_BNH, k_BKSH, v_BKSH, prefix, lengths_B):
        return decode.decode_attention(q_BNH, k_BKSH, v_BKSH, lengths_B, prefix=prefix)

    def in_pallas(q_BNH, k_BKSH, v_BKSH, prefix, lengths_B):
        from jaxreason.kernels import decode_pallas

        return decode_pallas.decode_attention(q_BNH, k_BKSH, v_BKSH, lengths_B, prefix=prefix)

    yield Entrant("decode", build(ours))
    yield Entrant("decode_pallas", build(in_pallas), platform_reason("gpu"))
    # Their caches are [B, S, K, H], made before the clock runs.
    shared = "takes no shared prefix" if case.prefixes else ""
    theirs = [] if shared else [_as_rows(layer) for layer in layers]

    def of_jax(layers, lengths_B, implementation):
        call = functools.partial(
            jax.nn.dot_product_attention,
            key_value_seq_lengths=lengths_B, implementation=implementation,
        )  # fmt: skip
        return [{"out": call(*layer)[:, 0]} for layer in layers]

    for name in ("cudnn", "xla"):
        run = functools.partial(of_jax, implementation=name)
        build_it = functools.partial(compiled, run, theirs, lengths_B)
        reason = platform_reason("gpu") if name == "cudnn" else ""
        yield Entrant(f"jax.nn {name}", build_it, reason or shared)
    see_BTS = None if case.full else (jnp.arange(case.size) < lengths_B[:, None])[:, None]
    for name, backend in peers.torch_backends().items():
        build_it = functools.partial(peers.attention, theirs, backend, None, see_BTS, causal=False)
        yield Entrant(name, build_it, peers.torch_missing() or shared)


def _as_rows(layer: Layer) -> Qkv:
    swapped = jax.jit(lambda x: jnp.swapaxes(x, 1, 2))
    return layer.q_BNH[:, None], swapped(layer.k_BKSH), swapped(layer.v_BKSH)


def _query_rows(case: QueryCase) -> np.ndarray:
    """Those that are compared: of several prefixes."""
    return np.unique([0, min(1, case.rows - 1), case.rows // 2, case.rows - 1])


def _query_truth(case: QueryCase, layer: Layer, lengths_B) -> np.ndarray:
    """`reference` on the rows that are compared, each with its whole prefix before its cache."""
    found = []
    for b in _query_rows(case):
        k_1KSH, v_1KSH = layer.k_BKSH[b : b + 1], layer.v_BKSH[b : b + 1]
        before = 0
        if layer.prefix is not None:
            p, before = b // (case.rows // case.prefixes), case.prefix_size
            k_1KSH = jnp.concatenate([layer.prefix[0][p : p + 1], k_1KSH], axis=2)
            v_1KSH = jnp.concatenate([layer.prefix[1][p : p + 1], v_1KSH], axis=2)
        whole = (x.astype(jnp.float32) for x in (layer.q_BNH[b : b + 1], k_1KSH, v_1KSH))
        with jax.default_matmul_precision("highest"):
            out_1NH = reference.decode_attention(*whole, before + lengths_B[b : b + 1])
        found.append(np.asarray(out_1NH))
    return np.concatenate(found)


def _query_error(rows: np.ndarray, truth: dict[int, np.ndarray], made: list[dict]) -> float:
    """The worst of the first and the last layer. Theirs are [B, 1, N, H] in torch."""
    of = lambda i: made[i]["out"].reshape(made[i]["out"].shape[0], *truth[i].shape[1:])
    return float(np.max([row_error(of(i)[rows], wanted) for i, wanted in truth.items()]))
