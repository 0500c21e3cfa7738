"""THE train step: every objective, every recipe."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxreason.model import moe
from jaxreason.model.decoder import LanguageModel
from jaxreason.report.profile import OPTIMIZER_SCOPE
from jaxreason.train.optim import Schedule
from jaxreason.train.state import shardings
from jaxreason.types import Frozen, Params, TrainState

TrainStep = Callable[[TrainState, object, Frozen | None], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    model: LanguageModel,
    objective,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    clip_norm: float = 0.0,
    microbatches: int = 1,
    num_shards: int = 1,
    xla_options: dict[str, object] | None = None,
) -> TrainStep:
    """jitted `(state, batch, frozen) -> (state, metrics)`; the state is donated.

    The loss of every term is its sum over the *global* batch divided by its weight over the global
    batch, so neither microbatches nor devices change it. A step whose gradient or loss is not
    finite changes nothing but the counters. What is `frozen` is never differentiated.
    """

    def step_fn(state: TrainState, batch, frozen):
        frozen = frozen or Frozen()
        weights = objective.weights(batch)
        first = next(iter(weights))  # before any tree.map, which sorts the names
        totals = {name: jnp.where(w > 0, w, 1.0) for name, w in weights.items()}

        pieces = split_microbatches(batch, microbatches, num_shards)
        load_LE = None
        if microbatches > 1 and model.has_experts:
            load_LE = _expert_load(model, model.complete(state.params, frozen.base), pieces)

        def mean_loss(params, piece):
            whole = model.complete(params, frozen.base, load_LE)
            loss = objective.loss(model, whole, frozen.read, piece)
            terms = {name: s / totals[name] for name, (s, _) in loss.terms.items()}
            means = jax.tree.map(lambda s: s / totals[first], loss.metrics)
            if "balance" in terms:
                means["aux_loss"] = terms["balance"]  # as TRL calls it
            return sum(c * terms[name] for name, (_, c) in loss.terms.items()), means

        (loss, means), grads = _accumulated(mean_loss, state.params, pieces, microbatches)
        with jax.named_scope(OPTIMIZER_SCOPE):
            state, own = updated(state, loss, grads)
        own["num_tokens"] = weights.get("tokens", weights[first])  # of pairs, the tokens in them
        return state, {"loss": loss, **means, **own}

    def updated(state: TrainState, loss, grads):
        """(the state after an update, or as it was where something is not finite; metrics)."""
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss)
        if clip_norm:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(grad_norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        rate = schedule(state.step)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            opt=keep(opt, state.opt),
            key=state.key,
            nonfinite=jnp.where(finite, 0, state.nonfinite + 1),
        )
        metrics = {"grad_norm": grad_norm, "learning_rate": rate, "nonfinite": state.nonfinite}
        return state, metrics

    places = shardings(model, optimizer)
    out = None if places is None else (places, None)
    return jax.jit(
        step_fn, donate_argnums=0, out_shardings=out, compiler_options=xla_options or None
    )


def _accumulated(mean_loss, params: Params, pieces, microbatches: int):
    """((loss, means), gradient), summed over the microbatches."""
    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    first = jax.tree.map(lambda x: x[0], pieces)
    if microbatches == 1:
        return value_and_grad(params, first)

    def add(sums, piece):
        return jax.tree.map(jnp.add, sums, value_and_grad(params, piece)), None

    shapes = jax.eval_shape(mean_loss, params, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes, params))
    return jax.lax.scan(add, zeros, pieces)[0]


def _expert_load(model: LanguageModel, whole: Params, pieces) -> jax.Array:
    """load_LE of the global batch: a forward pass before the one that learns.

    The balance loss is a product of two means over the batch, so its parts in the microbatches do
    not add up unless one of the two is known.
    """

    def counts(piece):
        routing_L = model.routing(whole, piece.tokens_BT, piece.segments_BT, piece.positions_BT)
        return routing_L.counts_E, (piece.segments_BT != 0).sum()

    counts_MLE, tokens_M = jax.lax.map(counts, pieces)
    return moe.load(counts_MLE.sum(0), tokens_M.sum())


def split_microbatches(batch, microbatches: int, num_shards: int):
    """[rows, ...] -> [microbatches, rows / microbatches, ...], cut inside each shard's block.

    So a device that holds whole shards keeps its rows in every microbatch.
    """

    def cut(x):
        x = x.reshape(num_shards, microbatches, -1, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0).reshape(microbatches, -1, *x.shape[3:])

    return jax.tree.map(cut, batch)
