"""One kernel against the others: each held against the truth in float32, then timed in turn.

Data are random normal. What differs from the reference by more than its dtype rounds is an error
and is not timed; what cannot do a case is a row with the reason. The head's loss is here; attention
is in bench_attention.py.
"""

import dataclasses
import functools
import importlib.util
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import bench_peers as peers
import jax
import jax.numpy as jnp
import numpy as np
from bench_timing import (
    DeviceLostError,
    Settings,
    Timed,
    compiled,
    on_cpu,
    peaks,
    seconds_in_turn,
)

from jaxreason.kernels import linear_xent, reference, tokamax

# Error of a row of an array over the row's norm, or over that of the array's mean row where this is
# larger: bfloat16 operands give 1e-3 to 1e-2, softmax in bfloat16 more; a wrong block gives 1.
LIMITS = {"float32": 1e-3, "bfloat16": 5e-2}
_LOST = (  # what CUDA says then
    "cuda error illegal", "illegal memory access", "illegal instruction", "misaligned address",
    "launch failed", "launch failure",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entrant:
    """An implementation and how to build it; or why it takes no part."""

    name: str
    build: Callable[[], Timed] | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Work:
    """What all entrants compute; `amount` of FLOPs or bytes, which is what the case needs."""

    suite: str
    case: str
    mode: str
    shape: str
    amount: float
    unit: str  # TFLOP/s | GB/s
    baseline: tuple[str, ...]  # the first of them that runs is what the ratios are over
    error: Callable[[Any], float]  # of what was made, against the reference


@dataclasses.dataclass(frozen=True)
class Row:
    """An entrant's figures, or the reason why it has none."""

    suite: str
    case: str
    mode: str
    shape: str
    name: str
    unit: str
    reason: str = ""
    error: float | None = None
    temporaries: int | None = None  # bytes
    seconds: tuple[float, ...] = ()  # of a call, in every round
    rate: float | None = None  # median, in `unit`
    peak: float | None = None  # measured, in `unit`
    percent: float | None = None  # of it
    ratio: float | None = None  # baseline's seconds over these, median of the rounds
    baseline: str = ""


def dtype() -> jnp.dtype:
    return jnp.dtype(jnp.float32 if on_cpu() else jnp.bfloat16)


def normal(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    return jax.block_until_ready(_normal(seed, scale, shape, dtype()))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _normal(seed, scale, shape, dtype):
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def contest(
    work: Work, entrants: Sequence[Entrant], settings: Settings
) -> tuple[list[dict], list[str]]:
    """(a row of each entrant, what is wrong with those that compute something else)."""
    rows, errors, runs = [], [], {}
    for entrant in entrants:
        row = functools.partial(
            Row, work.suite, work.case, work.mode, work.shape, entrant.name, work.unit
        )
        reason, label = entrant.reason, f"{work.mode} {entrant.name}"
        if not reason and label in settings.broken:
            reason = settings.broken[label]
        if not reason:
            settings.note(label)
            try:
                run = entrant.build()
                made = run.once()
            except Exception as failure:  # of a compiler or a driver: any kind
                stop_if_lost(failure)
                reason = said(failure)
        if reason:
            rows.append(row(reason=reason))
            continue
        error, limit = work.error(made), LIMITS[dtype().name]
        del made
        if not error <= limit:
            errors.append(
                f"{work.suite}/{work.case} {label} is off by {error:.2g} of its rows' norm, "
                f"and at most {limit:g} is rounding"
            )
            continue
        runs[entrant.name] = run
        rows.append(row(error=error, temporaries=run.temporaries))
    seconds = seconds_in_turn(runs, settings)
    baseline = next((name for name in work.baseline if name in seconds), "")
    return [dataclasses.asdict(_timed(row, work, seconds, baseline)) for row in rows], errors


def _timed(row: Row, work: Work, seconds: dict[str, list[float]], baseline: str) -> Row:
    if row.name not in seconds:
        return row
    own = seconds[row.name]
    scale = {"TFLOP/s": 1e12, "GB/s": 1e9}[work.unit]
    rate, peak = work.amount / statistics.median(own) / scale, peaks().of(work.unit) / scale
    ratio = None
    if baseline:
        ratio = statistics.median(b / a for a, b in zip(own, seconds[baseline]))
    return dataclasses.replace(
        row,
        seconds=tuple(own),
        rate=rate,
        peak=peak,
        percent=100 * rate / peak,
        ratio=ratio,
        baseline=baseline,
    )


def stop_if_lost(failure: Exception) -> None:
    """CUDA gives every later call of a process the error of one bad access."""
    text = str(failure).lower().replace("_", " ")
    if any(sign in text for sign in _LOST):
        raise DeviceLostError(said(failure)) from failure


def said(failure: Exception) -> str:
    text = " ".join(str(failure).split()) or type(failure).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."


def row_error(found, wanted: np.ndarray) -> float:
    """The worst row's error, see LIMITS. NaN where something is not finite."""
    found, wanted = to_numpy(found).astype(np.float32), np.asarray(wanted, np.float32)
    norms = np.linalg.norm(wanted, axis=-1)
    floor = np.sqrt(np.mean(norms**2)) + 1e-30
    return float((np.linalg.norm(found - wanted, axis=-1) / np.maximum(norms, floor)).max())


def to_numpy(x) -> np.ndarray:
    if isinstance(x, (jax.Array, np.ndarray)):
        return np.asarray(x)
    return x.detach().float().cpu().numpy()


def platform_reason(wanted: str) -> str:
    platform = jax.default_backend()
    return "" if platform == wanted else f"runs on {wanted}, not {platform}"


def missing_reason(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package} is not installed"


# ------------------------------------------------------------------------ the head's loss


@dataclasses.dataclass(frozen=True)
class HeadCase:
    name: str
    tokens: int
    dim: int
    vocab: int


HEAD_CASES = {
    c.name: c
    for c in (
        HeadCase("tiny", 48 * 160, 128, 261),  # the quickstart's
        HeadCase("10m", 2048, 320, 8192),
        HeadCase("0.6b", 16384, 1024, 151_936),  # Qwen3's
        HeadCase("1.7b", 16384, 2048, 151_936),
        HeadCase("0.6b-4k", 4096, 1024, 151_936),
    )
}
_SOME = {"dh": 13, "dw": 97}  # every how manieth row of a gradient is compared


def bench_head(case: HeadCase, settings: Settings) -> tuple[list[dict], list[str]]:
    """The mean cross-entropy of a linear head, alone and with its gradients.

    2 T V D FLOPs forward and 4 T V D backward; what is computed again does not count.
    """
    h_TD = normal(0, case.tokens, case.dim)
    w_VD = normal(1, case.vocab, case.dim, scale=case.dim**-0.5)
    targets_T = jax.random.randint(jax.random.key(2), (case.tokens,), 0, case.vocab)
    truth = _head_truth(h_TD, w_VD, targets_T)
    flops, shape = 2.0 * h_TD.size * case.vocab, f"{case.tokens} x {case.dim} x {case.vocab}"
    rows, errors = [], []
    for mode, factor in (("forward", 1), ("forward + backward", 3)):
        work = Work(
            "linear_xent", case.name, mode, shape, factor * flops, "TFLOP/s", ("plain XLA",),
            functools.partial(_head_error, truth),
        )  # fmt: skip
        entrants = _head_entrants(h_TD, w_VD, targets_T, backward=factor == 3)
        found = contest(work, entrants, settings)
        rows, errors = rows + found[0], errors + found[1]
    return rows, errors


def _head_entrants(h_TD, w_VD, targets_T, backward: bool) -> list[Entrant]:
    weights = lambda targets_T: jnp.full(targets_T.shape, 1 / targets_T.size, jnp.float32)

    def build(loss: Callable) -> Callable[[], Timed]:
        whole = jax.value_and_grad(loss, (0, 1)) if backward else lambda *args: (loss(*args), ())
        named = lambda *args: _named_head(whole(*args))
        return lambda: compiled(named, h_TD, w_VD, targets_T)

    def ours(h_TD, w_VD, targets_T):
        return linear_xent.linear_xent(h_TD, w_VD, targets_T, weights(targets_T))[0]

    def plain(h_TD, w_VD, targets_T):
        z_TV = jnp.einsum("TD,VD->TV", h_TD, w_VD, preferred_element_type=jnp.float32)
        picked_T = jnp.take_along_axis(z_TV, targets_T[:, None], 1)[:, 0]
        return jnp.sum(weights(targets_T) * (jax.nn.logsumexp(z_TV, axis=-1) - picked_T))

    def of_tokamax(h_TD, w_VD, targets_T):
        loss = tokamax.package().linear_softmax_cross_entropy_loss
        return loss(h_TD, targets_T, w_VD.T, reduction="mean")

    of_torch = functools.partial(peers.linear_xent, h_TD, w_VD, targets_T, backward)
    return [
        Entrant("linear_xent", build(ours)),
        Entrant("plain XLA", build(plain)),
        Entrant("tokamax", build(of_tokamax), missing_reason("tokamax")),
        Entrant("torch", of_torch, peers.torch_missing() or ""),
    ]


def _named_head(found) -> dict:
    loss, gradients = found
    return {"loss": loss} | dict(zip(("dh", "dw"), gradients))


def _head_truth(h_TD, w_VD, targets_T) -> dict[str, np.ndarray]:
    """`reference.linear_xent` on some hundreds of rows at a time, in float32."""
    (T, D), V = h_TD.shape, w_VD.shape[0]
    chunk = next(n for n in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1) if T % n == 0)

    def body(w_VD, sums, part):
        h_CD, targets_C = part
        weights_C = jnp.full(chunk, 1 / T, jnp.float32)
        loss = lambda h, w: reference.linear_xent(h, w, targets_C, weights_C)[0]
        value, (dh_CD, dw_VD) = jax.value_and_grad(loss, (0, 1))(h_CD, w_VD)
        return (sums[0] + value, sums[1] + dw_VD), dh_CD

    def whole(h_TD, w_VD, targets_T):
        parts = (h_TD.reshape(-1, chunk, D), targets_T.reshape(-1, chunk))
        start = (jnp.zeros(()), jnp.zeros((V, D)))
        return jax.lax.scan(functools.partial(body, w_VD), start, parts)

    with jax.default_matmul_precision("highest"):
        operands = (h_TD.astype(jnp.float32), w_VD.astype(jnp.float32), targets_T)
        (loss, dw_VD), dh_TD = jax.jit(whole)(*operands)
    dh_TD = dh_TD.reshape(T, D)
    some = {"dh": dh_TD[:: _SOME["dh"]], "dw": dw_VD[:: _SOME["dw"]]}
    return {"loss": np.asarray(loss)} | {name: np.asarray(x) for name, x in some.items()}


def _head_error(truth: dict[str, np.ndarray], made: dict) -> float:
    """The largest: of the loss, relative, and of the rows of gradients that are looked at."""
    found = [abs(float(made["loss"]) / float(truth["loss"]) - 1)]
    found += [row_error(made[n][:: _SOME[n]], truth[n]) for n in _SOME if n in made]
    return float(np.max(found))  # NaN stays NaN
