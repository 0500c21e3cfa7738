"""Distillation into a linear head without logits_BTV: a divergence, the cross-entropy, metrics.

One pass over the student's logits, a chunk of rows at a time as in linear_xent.py, gives all of
them, and with the weights known beforehand also the gradients. The teacher is another linear head,
or the k log-probs a row that were stored of it.

With stored log-probs the vocabulary is k + 1 events, the last of which is "none of these k": the
divergence between the two models' distributions over events. It is at most that over the vocabulary
and rises towards it with k. Without that tail it is between the two conditional distributions.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxreason.kernels import linear_xent as linear
from jaxreason.kernels.linear_xent import _MASKED, _Head

# Least probability of a teacher's tail: 1 - sum(p) has no digits below it in float32, and none
# at all where the log-probs were kept in bfloat16 and add up to more than 1.
_LEAST_TAIL = 1e-7
_EVENTS = _Head(1.0, None, None)  # they are on every vocabulary shard


@dataclasses.dataclass(frozen=True)
class Mix:
    """A row's loss: kl_coef * divergence(teacher P, student Q) + nll_coef * -log q(target), nats.

    beta 0 is KL(P || Q), 1 is KL(Q || P); between them the generalised Jensen-Shannon divergence
    beta * KL(P || M) + (1 - beta) * KL(Q || M) with M = beta * P + (1 - beta) * Q, whose limits at
    0 and 1 are 0: the scale jumps there. A `skew` s mixes some of the first into the second:
    KL(P || s * P + (1 - s) * Q) at beta 0, KL(Q || s * Q + (1 - s) * P) at 1. The temperature
    divides both models' logits in the divergence, which is not multiplied by its square; the
    cross-entropy and the metrics are at temperature 1.
    """

    beta: float = 0.0
    skew: float = 0.0
    temperature: float = 1.0
    kl_coef: float = 1.0
    nll_coef: float = 0.0
    tail: bool = True  # of stored log-probs: whether all other tokens are one event more

    def __post_init__(self):
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta is {self.beta}; it must be in [0, 1]")
        if not 0 <= self.skew < 1:
            raise ValueError(f"skew is {self.skew}; it must be in [0, 1)")
        if self.skew and 0 < self.beta < 1:
            raise ValueError(f"skew is {self.skew} and beta {self.beta}; a skew needs beta 0 or 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be above 0")


def _check_vocabulary(head: _Head, w_VD, teacher_w_VE) -> None:
    """Raises ValueError where a row of one table is not the same token's in the other."""
    rows, teacher_rows = w_VD.shape[0], teacher_w_VE.shape[0]
    padded = head.axis_name is None and (head.valid_vocab or rows) <= min(rows, teacher_rows)
    if rows != teacher_rows and not padded:
        raise ValueError(
            f"the teacher's head has {teacher_rows} rows and the student's {rows}, of which "
            f"{head.valid_vocab or rows} are tokens; a KL needs one vocabulary"
        )


class DistillSums(NamedTuple):
    """Sums over rows, each times its weight; no gradient flows through them."""

    kl: jax.Array  # the divergence at its temperature, without its coefficient
    nll: jax.Array
    entropy: jax.Array  # of the student, nats
    correct: jax.Array  # 1 where no logit of the student exceeds the target's
    agree: jax.Array  # 1 where no logit of the student exceeds that of the teacher's likeliest


class _Model(NamedTuple):
    """A teacher that is another head over the same vocabulary."""

    h_TE: jax.Array
    w_VE: jax.Array


class _Stored(NamedTuple):
    """A teacher's k likeliest tokens."""

    ids_TK: jax.Array
    logprobs_TK: jax.Array


def linear_distill(
    h_TD: jax.Array,
    w_VD: jax.Array,
    teacher_h_TE: jax.Array,
    teacher_w_VE: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    mix: Mix = Mix(),
    *,
    valid_vocab: int | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, DistillSums]:
    """Weighted sum over rows of the loss that `mix` says, float32.

    Rows of either table from `valid_vocab` on get no probability and no gradient. Sharded over
    `axis_name` both tables have as many rows; else they may differ, beyond `valid_vocab`.
    Differentiable in h and w only. A row of weight 0 may have any target.
    Sources: GKD, arXiv 2306.13649; DistiLLM, arXiv 2402.03898.
    """
    head = _Head(1.0, valid_vocab, axis_name)
    _check_vocabulary(head, w_VD, teacher_w_VE)
    h_TD, w_VD, *others = linear._align(
        head, h_TD, w_VD, teacher_h_TE, teacher_w_VE, targets_T, weights_T
    )
    return _distill(head, mix, h_TD, w_VD, _Model(*others[:2]), *others[2:])


def linear_topk_distill(
    h_TD: jax.Array,
    w_VD: jax.Array,
    teacher_ids_TK: jax.Array,
    teacher_logprobs_TK: jax.Array,
    targets_T: jax.Array,
    weights_T: jax.Array,
    mix: Mix = Mix(),
    *,
    valid_vocab: int | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, DistillSums]:
    """As `linear_distill`, from K different ids a row and the teacher's log-probs of them.

    The log-probs are those at the temperature of `mix`: of the tail nothing is known at another.
    Ids are global and of any order; the student has no probability for one from `valid_vocab` on,
    so that its row's loss is beyond 1e20. A row of weight 0 may have any finite log-probs.
    """
    head = _Head(1.0, valid_vocab, axis_name)
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    tokens, K = valid_vocab or w_VD.shape[0] * shards, teacher_ids_TK.shape[1]
    if not 1 <= K <= tokens:
        raise ValueError(f"k is {K}; it must be in [1, {tokens}], the number of tokens")
    if K == tokens:  # nothing is left for a tail
        mix = dataclasses.replace(mix, tail=False)
    h_TD, w_VD, *others = linear._align(
        head, h_TD, w_VD, teacher_ids_TK, teacher_logprobs_TK, targets_T, weights_T
    )
    return _distill(head, mix, h_TD, w_VD, _Stored(*others[:2]), *others[2:])


def linear_top_k(
    h_TD: jax.Array,
    w_VD: jax.Array,
    k: int,
    *,
    temperature: float = 1.0,
    valid_vocab: int | None = None,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(ids_TK int32, logprobs_TK float32) of each row's k likeliest tokens, the likeliest first.

    The log-probs are over the whole vocabulary, of logits / temperature. Not differentiable.
    Raises ValueError where there are not k tokens.
    """
    head = _Head(temperature, valid_vocab, axis_name)
    shards = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    V = w_VD.shape[0]
    tokens = valid_vocab or V * shards
    if not 1 <= k <= tokens:
        raise ValueError(f"k is {k}; it must be in [1, {tokens}], the number of tokens")
    h_TD, w_VD = linear._align(head, h_TD, w_VD)

    def everywhere(x_CK):  # those of all shards side by side, and the same in each
        if axis_name is None:
            return x_CK
        shape = (x_CK.shape[0], shards, x_CK.shape[1])
        mine = jnp.zeros(shape, x_CK.dtype).at[:, jax.lax.axis_index(axis_name)].set(x_CK)
        return jax.lax.psum(mine, axis_name).reshape(x_CK.shape[0], -1)

    def chunk(h_CD):
        logp_CV = linear._log_softmax(head, linear._logits(head, h_CD, w_VD))
        logp_CK, at_CK = jax.lax.top_k(logp_CV, min(k, V))
        logp_CK, ids_CK = everywhere(logp_CK), everywhere(at_CK + head.ids(V)[0, 0])
        logp_CK, at_CK = jax.lax.top_k(logp_CK, k)
        return None, (jnp.take_along_axis(ids_CK, at_CK, 1), logp_CK)

    return linear._over_rows(chunk, (h_TD,), w_VD, grad=False)[1]


# --- one pass -------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _distill(head, mix, h_TD, w_VD, teacher, targets_T, weights_T):
    def chunk(h_CD, targets_C, weights_C, *teacher_rows):
        return None, _chunk(head, mix, h_CD, w_VD, _of(teacher, teacher_rows), targets_C)[0]

    return _total(mix, _run(chunk, h_TD, w_VD, teacher, targets_T, weights_T)[1], weights_T)


def _distill_fwd(head, mix, h_TD, w_VD, teacher, targets_T, weights_T):
    def chunk(h_CD, targets_C, weights_C, *teacher_rows):
        known = _of(teacher, teacher_rows)
        sums_C, dz_CV = _chunk(head, mix, h_CD, w_VD, known, targets_C)
        dw_VD, dh_CD = linear._gradients(head, weights_C[:, None] * dz_CV, h_CD, w_VD)
        return dw_VD, (sums_C, dh_CD)

    rows = (h_TD, w_VD, teacher, targets_T, weights_T)
    dw_VD, (sums_T, dh_TD) = _run(chunk, *rows, grad=True)
    return _total(mix, sums_T, weights_T), (dh_TD, dw_VD.astype(w_VD.dtype))


def _distill_bwd(head, mix, gradients, cotangents):
    return *linear._scaled(gradients, cotangents[0]), None, None, None


_distill.defvjp(_distill_fwd, _distill_bwd)


def _run(chunk, h_TD, w_VD, teacher, targets_T, weights_T, grad: bool = False):
    of_teacher = (teacher.h_TE,) if isinstance(teacher, _Model) else teacher
    rows = (h_TD, targets_T, weights_T, *of_teacher)
    # Beside the logits of a model, or the logits without the k likeliest tokens.
    return linear._over_rows(chunk, rows, w_VD, grad, num_heads=2)


def _of(teacher, rows):
    """The teacher of a chunk's rows alone."""
    return _Model(*rows, teacher.w_VE) if isinstance(teacher, _Model) else _Stored(*rows)


def _total(mix: Mix, sums_T: DistillSums, weights_T):
    sums = DistillSums(*(jnp.sum(weights_T * x_T) for x_T in sums_T))
    return mix.kl_coef * sums.kl + mix.nll_coef * sums.nll, sums


def _chunk(head: _Head, mix: Mix, h_CD, w_VD, teacher, targets_C):
    """What `DistillSums` adds up of each row, and the loss's gradient in the logits [C, V]."""
    z_CV = linear._logits(head, h_CD, w_VD)
    rows = linear._row_stats(head, z_CV, targets_C)
    divergence = _from_model if isinstance(teacher, _Model) else _from_stored
    kl_C, dz_CV, agree_C = divergence(head, mix, z_CV, teacher)
    dz_CV = dz_CV * (mix.kl_coef / mix.temperature)
    if mix.nll_coef:
        hot_CV = head.ids(z_CV.shape[1]) == targets_C[:, None]
        dz_CV += mix.nll_coef * (jnp.exp(z_CV - rows.lse[:, None]) - hot_CV)
    return DistillSums(kl_C, -rows.logp, rows.entropy, rows.correct, agree_C), dz_CV


def _from_model(head: _Head, mix: Mix, z_CV, teacher: _Model):
    """(divergence [C], its gradient in the tempered logits, whether the models agree [C])."""
    known_CV = linear._logits(head, teacher.h_TE, teacher.w_VE)
    known_CV = _with_rows(known_CV, z_CV.shape[1])
    tempered = lambda y_CV: y_CV if mix.temperature == 1 else y_CV / mix.temperature
    log_p_CV, log_q_CV = (linear._log_softmax(head, tempered(y_CV)) for y_CV in (known_CV, z_CV))
    kl_C, dz_CV = _divergence(head, (mix.beta, mix.skew), log_p_CV, log_q_CV)
    likeliest = lambda y_CV: y_CV >= head.max(y_CV.max(-1))[:, None]
    both_CV = likeliest(known_CV) & likeliest(z_CV)
    return kl_C, dz_CV, head.max(both_CV.max(-1).astype(jnp.float32))


def _from_stored(head: _Head, mix: Mix, z_CV, teacher: _Stored):
    """As `_from_model`. An event's logit is the log-sum-exp of its tokens' logits."""
    V = z_CV.shape[1]
    y_CV = z_CV if mix.temperature == 1 else z_CV / mix.temperature
    local_CK = teacher.ids_TK - head.ids(V)[0, 0]
    here_CK = (local_CK >= 0) & (local_CK < V)
    column_CK = jnp.where(here_CK, local_CK, V)  # V: other shards' ids, which scatters drop
    row_C1 = jnp.arange(len(y_CV))[:, None]
    picked_CK = jnp.take_along_axis(y_CV, jnp.where(here_CK, local_CK, 0), 1)
    events_CK = head.max(jnp.where(here_CK, picked_CK, _MASKED))
    log_p_CK = jnp.maximum(teacher.logprobs_TK.astype(jnp.float32), _MASKED)
    best_C1 = log_p_CK.argmax(-1, keepdims=True)
    agree_C = jnp.take_along_axis(events_CK, best_C1, 1)[:, 0] >= head.max(y_CV.max(-1))

    if mix.tail:
        tail_C1 = 1 - jnp.exp(log_p_CK).sum(-1, keepdims=True)
        log_p_CK = _beside(log_p_CK, jnp.log(jnp.maximum(tail_C1, _LEAST_TAIL)))
        rest_CV = y_CV.at[row_C1, column_CK].set(_MASKED, mode="drop")
        rest_C1 = _log_sum_exp(head, rest_CV)
        events_CK = _beside(events_CK, rest_C1)
    log_p_CK, log_q_CK = (linear._log_softmax(_EVENTS, x_CK) for x_CK in (log_p_CK, events_CK))
    kind = (mix.beta, mix.skew)
    kl_C, devents_CK = _divergence(_EVENTS, kind, log_p_CK, log_q_CK)

    dz_CV = jnp.zeros_like(y_CV)
    if mix.tail:
        devents_CK, dtail_C1 = devents_CK[:, :-1], devents_CK[:, -1:]
        dz_CV = jnp.exp(rest_CV - rest_C1) * dtail_C1  # exactly 0 where an id was taken out
    dz_CV = dz_CV.at[row_C1, column_CK].add(devents_CK, mode="drop")
    return kl_C, dz_CV, agree_C.astype(jnp.float32)


def _beside(x_CK, x_C1):
    return jnp.concatenate([x_CK, x_C1], axis=1)


def _log_sum_exp(head: _Head, y_CV):
    top_C1 = head.max(y_CV.max(-1, keepdims=True))
    return top_C1 + jnp.log(head.sum(jnp.exp(y_CV - top_C1).sum(-1, keepdims=True)))


def _divergence(head: _Head, kind: tuple[float, float], log_p_CV, log_q_CV):
    """The divergence of each row [C] and its gradient in the student's logits [C, V].

    Args:
      kind: beta and skew, as `Mix` has them.
    """
    beta, skew = kind
    p_CV, q_CV = jnp.exp(log_p_CV), jnp.exp(log_q_CV)
    if skew:
        return _skew_divergence(head, beta, skew, log_p_CV, log_q_CV)
    if beta == 0:
        return head.sum((p_CV * (log_p_CV - log_q_CV)).sum(-1)), q_CV - p_CV
    if beta == 1:
        log_m_CV, to_p = log_p_CV, 0.0
    else:
        log_m_CV = jnp.logaddexp(log_p_CV + jnp.log(beta), log_q_CV + jnp.log1p(-beta))
        to_p = head.sum((p_CV * (log_p_CV - log_m_CV)).sum(-1)) * beta
    student = 1.0 if beta == 1 else 1 - beta
    to_q = head.sum((q_CV * (log_q_CV - log_m_CV)).sum(-1))
    dz_CV = student * q_CV * (log_q_CV - log_m_CV - to_q[:, None])
    return to_p + student * to_q, dz_CV


def _skew_divergence(head: _Head, beta, skew, log_p_CV, log_q_CV):
    """`_divergence` of a mixture M that has `skew` of the first distribution in it."""
    of_q = skew if beta == 1 else 1 - skew  # in M
    log_m_CV = jnp.logaddexp(log_p_CV + math.log(1 - of_q), log_q_CV + math.log(of_q))
    q_CV = jnp.exp(log_q_CV)
    if beta == 0:
        loss_C = head.sum((jnp.exp(log_p_CV) * (log_p_CV - log_m_CV)).sum(-1))
        dq_CV = -of_q * jnp.exp(log_p_CV - log_m_CV)
    else:
        loss_C = head.sum((q_CV * (log_q_CV - log_m_CV)).sum(-1))
        dq_CV = log_q_CV - log_m_CV - of_q * jnp.exp(log_q_CV - log_m_CV)
    return loss_C, q_CV * (dq_CV - head.sum((q_CV * dq_CV).sum(-1))[:, None])


def _with_rows(z_CV, num_rows: int):
    """A teacher's logits for as many rows as the student has; those that it lacks are masked."""
    lacks = max(num_rows - z_CV.shape[1], 0)
    if lacks:
        z_CV = jnp.pad(z_CV, ((0, 0), (0, lacks)), constant_values=_MASKED)
    return z_CV[:, :num_rows]
