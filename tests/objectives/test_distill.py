"""Distillation equals its definition on a real model, its teacher wider and of another table; and
neither padding, microbatches nor devices change it."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from tiny_models import assert_trees_close, packed_batch, tiny_model, tiny_params

from jaxreason.kernels.linear_distill import Mix
from jaxreason.model.lora import LoraConfig
from jaxreason.objectives.distill import (
    DIVERGENCES,
    Distillation,
    TopKDistillation,
    check_teacher,
)
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step
from jaxreason.types import DistillBatch, Frozen

VALID, K = 50, 6  # tokens, of tables of 64 and 72 rows
ROWS = [[20, 12], [32], [5, 6, 7], [30], [3, 3], [16, 16], [9], [31]]
BATCH = packed_batch(ROWS, length=35, vocab=VALID, loss_share=0.6)
TEACHER = dict(vocab_size=72, embed_dim=48, num_layers=1)


def student(mesh=None):
    return tiny_model(mesh, VALID)


def teacher(mesh=None):
    return tiny_model(mesh, VALID, **TEACHER)


@functools.cache
def teacher_params():
    return jax.jit(teacher().init)(jax.random.key(3))


@functools.cache
def log_probs(of_teacher: bool):
    """float64 log-probs [B, T, VALID] of the batch."""
    model, params = (teacher(), teacher_params()) if of_teacher else (student(), tiny_params())
    rows = BATCH.tokens_BT, BATCH.segments_BT, BATCH.positions_BT
    h_BTD = np.asarray(jax.jit(model.hidden)(params, *rows), np.float64)
    z_BTV = h_BTD @ np.asarray(model.head_weight(params), np.float64)[:VALID].T
    return z_BTV - np.log(np.exp(z_BTV).sum(-1, keepdims=True))


@functools.cache
def stored(dtype=np.float32) -> DistillBatch:
    ids_BTK = np.argsort(-log_probs(True), axis=-1)[..., :K].astype(np.int32)
    logprobs_BTK = np.take_along_axis(log_probs(True), ids_BTK, -1).astype(dtype)
    return DistillBatch(**vars(BATCH), teacher_ids_BTK=ids_BTK, teacher_logprobs_BTK=logprobs_BTK)


def mean_loss(objective, model, params, frozen, batch):
    """(loss, metrics) as the train step adds them up."""
    weights, loss = objective.weights(batch), objective.loss(model, params, frozen, batch)
    metrics = {name: x / weights["distill"] for name, x in loss.metrics.items()}
    return sum(c * x / weights[name] for name, (x, c) in loss.terms.items()), metrics


def run(objective, batch, frozen=None):
    """(loss, metrics)."""
    return jax.jit(functools.partial(mean_loss, objective, student()))(tiny_params(), frozen, batch)


# --- definition -----------------------------------------------------------------------------------


def divergence(name: str, p, q, beta=0.5, alpha=0.1):
    """From the papers, of probabilities."""
    kl = lambda x, y: (x * np.log(x / y)).sum(-1)
    m = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
        "skew_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
    }[name]()


def weighted_mean(x_BT):
    return float((BATCH.weights_BT * x_BT).sum() / BATCH.weights_BT.sum())


def expected_metrics():
    log_p, log_q = log_probs(True), log_probs(False)
    nll = -np.take_along_axis(log_q, BATCH.targets_BT[..., None], -1)[..., 0]
    best = log_q.argmax(-1)
    return {
        "nll": weighted_mean(nll),
        "entropy": weighted_mean(-(np.exp(log_q) * log_q).sum(-1)),
        "mean_token_accuracy": weighted_mean(best == BATCH.targets_BT),
        "teacher_agreement": weighted_mean(best == log_p.argmax(-1)),
    }


def tempered(log_p, temperature):
    e = np.exp(log_p / temperature)
    return e / e.sum(-1, keepdims=True)


def test_the_teachers_distribution():
    """Loss and metrics in float64 from the hidden states; temperature, its square, the mixture."""
    options = dict(temperature=1.3, temperature_squared=True, kd_coef=0.7, nll_coef=0.4)
    objective = Distillation(teacher=teacher(), divergence="jsd", beta=0.3, **options)
    loss, metrics = run(objective, BATCH, {"teacher": teacher_params()})
    p, q = (tempered(log_probs(t), 1.3) for t in (True, False))
    want = {"kl": weighted_mean(divergence("jsd", p, q, beta=0.3)), **expected_metrics()}
    assert set(metrics) == set(want)
    for name, value in want.items():  # hidden states themselves are float32
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert float(loss) == pytest.approx(0.7 * 1.3**2 * want["kl"] + 0.4 * want["nll"], rel=1e-5)
    assert 0 < metrics["teacher_agreement"] < 1


@pytest.mark.parametrize("add_tail", [True, False])
def test_stored_log_probs(add_tail):
    batch = stored()
    objective = TopKDistillation(divergence="skew_kl", add_tail=add_tail, nll_coef=0.4)
    loss, metrics = run(objective, batch)
    found = []
    for log_p in (log_probs(True), log_probs(False)):
        top = np.exp(np.take_along_axis(log_p, batch.teacher_ids_BTK, -1))
        rest = 1 - top.sum(-1, keepdims=True)
        found.append(np.concatenate([top, rest], -1) if add_tail else top / (1 - rest))
    want = {"kl": weighted_mean(divergence("skew_kl", *found)), **expected_metrics()}
    for name, value in want.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-5), name
    assert float(loss) == pytest.approx(want["kl"] + 0.4 * want["nll"], rel=1e-5)


def test_names_are_what_the_kernels_read():
    """Each divergence's value on the printed vectors: tests/kernels/test_linear_distill.py."""
    mixes = {name: TopKDistillation(divergence=name).mix for name in DIVERGENCES}
    assert mixes == {
        "forward_kl": Mix(), "reverse_kl": Mix(beta=1.0), "jsd": Mix(beta=0.5),
        "skew_kl": Mix(skew=0.1), "skew_reverse_kl": Mix(beta=1.0, skew=0.1),
    }  # fmt: skip
    ends = [TopKDistillation(divergence="jsd", beta=beta).mix for beta in (0.0, 1.0)]
    assert ends == [mixes["forward_kl"], mixes["reverse_kl"]]  # as TRL's GKD
    other = TopKDistillation(divergence="skew_kl", alpha=0.3, temperature=2.0, add_tail=False)
    assert other.mix == Mix(skew=0.3, temperature=2.0, tail=False)
    squared = dataclasses.replace(other, temperature_squared=True, kd_coef=0.5)
    assert squared.mix.kl_coef == 2.0


def test_nothing_is_learnt_from_oneself():
    """The divergence and its whole gradient are 0, but for rounding."""
    objective = Distillation(teacher=student(), divergence="skew_reverse_kl")
    run = functools.partial(mean_loss, objective, student())
    run = jax.jit(jax.value_and_grad(run, has_aux=True))
    (loss, metrics), gradients = run(tiny_params(), {"teacher": tiny_params()}, BATCH)
    assert abs(loss) < 1e-6 and optax.tree.norm(gradients) < 1e-5
    assert float(metrics["teacher_agreement"]) == pytest.approx(1)


@pytest.mark.slow
def test_adapters_learn_beside_a_teacher():
    """`frozen` holds the base that they adapt and the teacher's tree."""
    model = student().adapted(LoraConfig(rank=2))
    adapters = jax.jit(model.init)(jax.random.key(1))
    frozen = {**tiny_params(), "teacher": teacher_params()}
    objective = Distillation(teacher=teacher())

    def loss(adapters):
        return mean_loss(objective, model, model.complete(adapters, frozen), frozen, BATCH)[0]

    total, gradients = jax.jit(jax.value_and_grad(loss))(adapters)
    p, q = (np.exp(log_probs(t)) for t in (True, False))
    want = weighted_mean(divergence("forward_kl", p, q))
    assert float(total) == pytest.approx(want, rel=1e-5)
    assert optax.tree.norm(gradients) > 1e-3


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "shape"),
    [
        (72, {"fsdp": 4, "tensor": 2}),
        (56, {"fsdp": 4, "tensor": 2}),
        (None, {"fsdp": 2, "tensor": 2, "context": 2}),
    ],
)
def test_microbatches_and_eight_devices_change_nothing(rows, shape):
    """A step's loss, weights and metrics, of a teacher with so many rows, or stored: 2 microbatches
    on 8 devices. T = 35 is no multiple of anything, and over the tensor axis the student's
    table is in parts of 32 rows, the teacher's in parts of 36 or 28: where one ends the other does
    not."""
    batch = stored() if rows is None else BATCH
    options = dict(divergence="jsd", temperature=1.3, nll_coef=0.4)

    def one_step(mesh, microbatches=1):
        model, objective, frozen = student(mesh), TopKDistillation(**options), None
        if rows is not None:
            known = tiny_model(mesh, VALID, **{**TEACHER, "vocab_size": rows})
            objective = Distillation(teacher=known, **options)
            places = None if mesh is None else known.shardings()
            table_VE = teacher_params()["embedding"][:rows]
            weights = {**teacher_params(), "embedding": table_VE}
            frozen = Frozen(read={"teacher": jax.device_put(weights, places)})
        optimizer = optax.sgd(1.0)
        step = make_train_step(
            model, objective, optimizer, lambda s: 1e-2, microbatches=microbatches
        )
        state = state_lib.create(model, optimizer, jax.random.key(0), tiny_params())
        state, metrics = step(
            state, batch if mesh is None else hosts.to_global(mesh, batch), frozen
        )
        return metrics, jax.device_get(state.params)

    want, want_params = one_step(None)
    assert want["grad_norm"] > 0.01 and want["num_tokens"] == BATCH.weights_BT.sum()
    metrics, params = one_step(make_mesh(shape), 2)
    for name in want:  # float32 sums in another order
        assert float(metrics[name]) == pytest.approx(float(want[name]), rel=1e-5), name
    assert_trees_close(params, want_params, 1e-5)


# --- refusals -------------------------------------------------------------------------------------


def test_teachers_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"the teacher has 51 tokens and the student 50; .* one tok"
    ):
        check_teacher(student(), tiny_model(None, 51))
    with pytest.raises(ValueError, match="the teacher has 64 tokens and the student 50"):
        objective = Distillation(teacher=tiny_model())
        jax.eval_shape(
            functools.partial(objective.loss, student()), tiny_params(),
            {"teacher": tiny_params()}, BATCH,
        )  # fmt: skip
    with pytest.raises(ValueError, match="the teacher is on mesh None and the student on Mesh"):
        check_teacher(student(make_mesh({"data": 8})), teacher())
    check_teacher(student(), teacher())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(divergence="kl"), "divergence is 'kl'; it must be one of forward_kl, reverse_kl, .*"),
        (dict(beta=0.1), "beta is 0.1; forward_kl has none"),
        (dict(divergence="jsd", beta=1.1), r"beta is 1.1; it must be in \[0, 1\]"),
        (dict(divergence="jsd", alpha=0.1), "alpha is 0.1; jsd has none"),
        (dict(divergence="skew_kl", alpha=1.0), "alpha is 1.0; it must be between 0 and 1"),
        (dict(temperature=0.0), "temperature is 0.0; it must be above 0"),
        (dict(kd_coef=0.0), "kd_coef is 0.0; it must be above 0"),
        (dict(nll_coef=-0.1), "nll_coef is -0.1; it must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=rf"^train\.distill\.{message}$"):
        TopKDistillation(**options)
