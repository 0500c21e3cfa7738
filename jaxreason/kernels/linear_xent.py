"""The linear head without logits_BTV: loss and log-probs from hidden states and head weights.

T rows of hidden states meet the V rows of the head a chunk of rows at a time, so the largest array
besides the gradient of the head is one chunk's logits. The loss knows its weights beforehand and
computes its gradients in the forward pass (as Liger Kernel does); nothing is recomputed. The
log-probs do not, and recompute each chunk in the backward pass.

Logits are float32 products of `h.dtype` operands; dlogits are rounded to `h.dtype` for the two
gradient matmuls, whose sums are float32. Chunks are cut from the row dim, which GSPMD cannot follow
where that dim is sharded: under a mesh, call these inside jax.shard_map.

Vocabulary sharding: with `axis_name`, shard i of that axis holds rows i*V_local, ... of the head;
`targets_T` and `valid_vocab` are global ids. Gradients need shard_map's check_vma=True.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.kernels.manual_axes import vary, varying_axes

_MASKED = -1e30  # finite, so that 0 * logit is 0: exp(_MASKED - lse) is exactly 0 in float32
_CHUNK_BYTES = 8 << 20  # of logits; 8 MiB beat 2, 16, 32 and 64 MiB on CPU at V = 8192


class XentMetrics(NamedTuple):
    """Sums over rows, each times its weight; no gradient flows through them."""

    nll: jax.Array  # -log p(target), without the z-loss
    z: jax.Array  # lse**2
    entropy: jax.Array  # nats
    correct: jax.Array  # 1 where no logit exceeds the target's


@dataclasses.dataclass(frozen=True)
class _Head:
    """What turns products into log-probabilities; static under jit."""

    temperature: float
    valid_vocab: int | None
    axis_name: str | None

    def sum(self, x):
        return x if self.axis_name is None else jax.lax.psum(x, self.axis_name)

    def max(self, x):
        return x if self.axis_name is None else jax.lax.pmax(x, self.axis_name)

    def ids(self, num_local: int) -> jax.Array:
        """Global vocabulary ids of this shard's rows, [1, V]."""
        ids_1V = jax.lax.broadcasted_iota(jnp.int32, (1, num_local), 1)
        if self.axis_name is None:
            return ids_1V
        return ids_1V + num_local * jax.lax.axis_index(self.axis_name)


def linear_xent(
    h_TD: jax.Array,
    w_VD: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    *,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    valid_vocab: int | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, XentMetrics]:
    """Weighted cross-entropy: loss = sum_t weights_t * (nll_t + z_loss * lse_t**2), float32, nats.

    Logits are h @ w.T / temperature. Rows of w from `valid_vocab` on get no probability and no
    gradient. Differentiable in h and w; targets and weights get zero gradients. A row of weight 0
    may have any target. The head's gradients are computed in the forward pass only when
    differentiated.
    """
    head = _Head(temperature, valid_vocab, axis_name)
    return _xent(head, z_loss, *_align(head, h_TD, w_VD, targets_T, weights_T))


def linear_logprobs(
    h_TD: jax.Array,
    w_VD: jax.Array,
    targets_T: jax.Array,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-prob of each row's target, entropy and log-sum-exp of its logits: three float32 [T].

    All three are differentiable in h and w. Arguments are those of `linear_xent`.
    """
    head = _Head(temperature, valid_vocab, axis_name)
    return _logprobs(head, *_align(head, h_TD, w_VD, targets_T))


def _align(head: _Head, h_TD, w_VD, *others: jax.Array) -> list[jax.Array]:
    """Inside shard_map, gives h and w one type: varying over the union of all arguments' axes.

    So the gradients of replicated arguments (h over the vocabulary axis, w over the batch axes) are
    summed over those axes.
    """
    axes = varying_axes(h_TD, w_VD, *others)
    if head.axis_name is not None:
        if not varying_axes(jax.lax.axis_index(head.axis_name)):
            raise ValueError(
                f"axis_name={head.axis_name!r} needs jax.shard_map(..., check_vma=True), "
                "which sums gradients over the axes an argument is replicated on"
            )
        axes |= {head.axis_name}
    return [vary(h_TD, axes), vary(w_VD, axes), *others]


def _over_rows(
    chunk: Callable[..., tuple[Any, Any]],
    rows: tuple[jax.Array, ...],
    w_VD: jax.Array,
    grad: bool,
    num_heads: int = 1,
) -> tuple[jax.Array | None, Any]:
    """Runs `dw_VD, out = chunk(*slices)` over chunks of rows; sums dw, concatenates out.

    `dw_VD` is None unless `grad`. The last chunk is padded with zeros: weight or cotangent 0. Each
    row has logits of `num_heads`.
    """
    num_rows = rows[0].shape[0]
    chunk_rows = _chunk_rows(num_rows, *w_VD.shape, num_heads)
    if chunk_rows == num_rows:
        return chunk(*rows)
    num_chunks = -(-num_rows // chunk_rows)
    pad = num_chunks * chunk_rows - num_rows

    def split(x):
        x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_chunks, chunk_rows, *x.shape[1:])

    def body(total, slices):
        part, out = chunk(*slices)
        return jax.tree.map(jnp.add, total, part), out

    zeros = vary(jnp.zeros(w_VD.shape, jnp.float32), varying_axes(w_VD)) if grad else None
    total, out = jax.lax.scan(body, zeros, tuple(map(split, rows)))
    return total, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], out)


def _chunk_rows(num_rows: int, vocab: int, dim: int, num_heads: int) -> int:
    """Rows of a chunk: as few chunks as the bound on the logits allows, then of equal size.

    Every chunk adds to dw_VD, so logits smaller than that array save no memory worth having and
    cost a pass over it for little work: of all heads a chunk has at least `dim` rows (of each 64).
    """
    most = max(_CHUNK_BYTES // (4 * vocab * num_heads), dim // num_heads, 64)
    if num_rows <= most:
        return num_rows
    even = -(-num_rows // -(-num_rows // most))
    return -(-even // 8) * 8


def _logits(head: _Head, h_CD, w_VD):
    """float32 [C, V]; ids from valid_vocab on are masked."""
    w_VD = w_VD.astype(h_CD.dtype)
    z_CV = jnp.einsum("CD,VD->CV", h_CD, w_VD, preferred_element_type=jnp.float32)
    if head.temperature != 1.0:
        z_CV = z_CV / head.temperature
    if head.valid_vocab is not None:
        z_CV = jnp.where(head.ids(z_CV.shape[1]) < head.valid_vocab, z_CV, _MASKED)
    return z_CV


def _gradients(head: _Head, dz_CV, h_CD, w_VD):
    """dw_VD in float32 and dh_CD of h's dtype from the gradient of the (tempered) logits."""
    dz_CV = (dz_CV / head.temperature if head.temperature != 1.0 else dz_CV).astype(h_CD.dtype)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dh_CD = dot("CV,VD->CD", dz_CV, w_VD.astype(h_CD.dtype)).astype(h_CD.dtype)
    return dot("CV,CD->VD", dz_CV, h_CD), dh_CD


def _log_softmax(head: _Head, z_CV):
    top_C = head.max(z_CV.max(-1))
    below_CV = z_CV - top_C[:, None]
    return below_CV - jnp.log(head.sum(jnp.exp(below_CV).sum(-1)))[:, None]


class _Rows(NamedTuple):
    """What one pass over the logits says of each row, [C] or [T] float32."""

    logp: jax.Array
    entropy: jax.Array
    lse: jax.Array
    correct: jax.Array


def _row_stats(head: _Head, z_CV, targets_C) -> _Rows:
    top_C = head.max(z_CV.max(-1))
    below_CV = z_CV - top_C[:, None]  # the entropy of a sharp row keeps its digits in these
    e_CV = jnp.exp(below_CV)
    total_C = head.sum(e_CV.sum(-1))
    log_total_C = jnp.log(total_C)
    lse_C = top_C + log_total_C
    entropy_C = log_total_C - head.sum((e_CV * below_CV).sum(-1)) / total_C
    local_C = targets_C - head.ids(z_CV.shape[1])[0, 0]
    here_C = (local_C >= 0) & (local_C < z_CV.shape[1])  # false for any id where the weight is 0
    picked_C = jnp.take_along_axis(z_CV, jnp.where(here_C, local_C, 0)[:, None], 1)[:, 0]
    z_C = head.sum(jnp.where(here_C, picked_C, 0.0))
    return _Rows(z_C - lse_C, entropy_C, lse_C, (z_C >= top_C).astype(jnp.float32))


def _stats(head: _Head, h_TD, w_VD, targets_T) -> _Rows:
    def chunk(h_CD, targets_C):
        return None, _row_stats(head, _logits(head, h_CD, w_VD), targets_C)

    return _over_rows(chunk, (h_TD, targets_T), w_VD, grad=False)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _xent(head, z_loss, h_TD, w_VD, targets_T, weights_T):
    return _xent_sums(z_loss, _stats(head, h_TD, w_VD, targets_T), weights_T)


def _xent_sums(z_loss, rows: _Rows, weights_T):
    nll, z, entropy, correct = (
        jnp.sum(weights_T * x_T) for x_T in (-rows.logp, rows.lse**2, rows.entropy, rows.correct)
    )
    return nll + z_loss * z, XentMetrics(nll, z, entropy, correct)


def _xent_fwd(head, z_loss, h_TD, w_VD, targets_T, weights_T):
    def chunk(h_CD, targets_C, weights_C):
        z_CV = _logits(head, h_CD, w_VD)
        rows = _row_stats(head, z_CV, targets_C)
        p_CV = jnp.exp(z_CV - rows.lse[:, None])
        if z_loss:
            p_CV *= 1 + 2 * z_loss * rows.lse[:, None]
        hot_CV = head.ids(z_CV.shape[1]) == targets_C[:, None]
        dw_VD, dh_CD = _gradients(head, weights_C[:, None] * (p_CV - hot_CV), h_CD, w_VD)
        return dw_VD, (rows, dh_CD)

    dw_VD, (rows, dh_TD) = _over_rows(chunk, (h_TD, targets_T, weights_T), w_VD, grad=True)
    return _xent_sums(z_loss, rows, weights_T), (dh_TD, dw_VD.astype(w_VD.dtype))


def _xent_bwd(head, z_loss, gradients, cotangents):
    return *_scaled(gradients, cotangents[0]), None, None


def _scaled(gradients, cotangent):
    return [(cotangent * g.astype(jnp.float32)).astype(g.dtype) for g in gradients]


_xent.defvjp(_xent_fwd, _xent_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(head, h_TD, w_VD, targets_T):
    rows = _stats(head, h_TD, w_VD, targets_T)
    return rows.logp, rows.entropy, rows.lse


def _logprobs_fwd(head, h_TD, w_VD, targets_T):
    logp_T, entropy_T, lse_T = _logprobs(head, h_TD, w_VD, targets_T)
    return (logp_T, entropy_T, lse_T), (h_TD, w_VD, targets_T, entropy_T, lse_T)


def _logprobs_bwd(head, residuals, cotangents):
    h_TD, w_VD, targets_T, entropy_T, lse_T = residuals

    def chunk(h_CD, targets_C, entropy_C, lse_C, dlogp_C, dentropy_C, dlse_C):
        logp_CV = _logits(head, h_CD, w_VD) - lse_C[:, None]
        hot_CV = head.ids(logp_CV.shape[1]) == targets_C[:, None]
        # d entropy / d logit_v = -p_v * (log p_v + entropy)
        per_p_CV = (dlse_C - dlogp_C - dentropy_C * entropy_C)[:, None]
        per_p_CV -= dentropy_C[:, None] * logp_CV
        dz_CV = dlogp_C[:, None] * hot_CV + jnp.exp(logp_CV) * per_p_CV
        return _gradients(head, dz_CV, h_CD, w_VD)

    rows = (h_TD, targets_T, entropy_T, lse_T, *cotangents)
    dw_VD, dh_TD = _over_rows(chunk, rows, w_VD, grad=True)
    return dh_TD, dw_VD.astype(w_VD.dtype), None


_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)
