"""A teacher's divergence on the rows of a rollout: GKD, MiniLLM, and beside a task's reward."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_distill import TEACHER, VALID, student, teacher, teacher_params
from tiny_models import assert_trees_close, packed_batch, tiny_model, tiny_params

from jaxreason.objectives.advantage import Advantage, TeacherAdvantage
from jaxreason.objectives.distill import DistillConfig
from jaxreason.objectives.on_policy import OnPolicyDistillation, objective_of
from jaxreason.objectives.policy import PRESETS, Algorithm, PolicyGradient
from jaxreason.types import PolicyBatch

ROWS = packed_batch([[7, 5], [9], [4, 3, 2]], length=12, vocab=VALID, loss_share=0.6)


def batch(scale=1.0, **changes) -> PolicyBatch:
    """Prompts, padding and forced tokens are where the weight is 0."""
    random = np.random.default_rng(0)
    drawn = lambda: (random.normal(size=ROWS.tokens_BT.shape) * ROWS.weights_BT).astype(np.float32)
    own = dict(advantages_BT=scale * drawn(), old_logprobs_BT=drawn() - 4 * ROWS.weights_BT)
    return PolicyBatch(**{**vars(ROWS), **own, "rollout_logprobs_BT": drawn(), **changes})


def mean_loss(objective, params, frozen, rows):
    """As the train step adds terms up."""
    weights, loss = objective.weights(rows), objective.loss(student(), params, frozen, rows)
    return sum(c * x / weights[name] for name, (x, c) in loss.terms.items())


def logits(model, params, rows):
    h_BTD = model.hidden(params, rows.tokens_BT, rows.segments_BT, rows.positions_BT)
    return jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params)[:VALID])


def dense(distill, policy, own_BTV, known_BTV, rows):
    """The same from logits of the whole vocabulary, by the papers' formulas."""
    T = distill.temperature
    q, p = jax.nn.softmax(own_BTV / T), jax.nn.softmax(jax.lax.stop_gradient(known_BTV) / T)
    kl = lambda a, b: (a * jnp.log(a / b)).sum(-1)
    m = 0.5 * (p + q)
    of = {"jsd": lambda: 0.5 * kl(p, m) + 0.5 * kl(q, m), "reverse_kl": lambda: kl(q, p)}
    mean = lambda x_BT: (rows.weights_BT * x_BT).sum() / rows.weights_BT.sum()
    total = distill.kd_coef * mean(of[distill.divergence]())
    if policy is None:
        return total
    logp_BTV = jax.nn.log_softmax(own_BTV / policy.temperature)
    logp_BT = jnp.take_along_axis(logp_BTV, rows.targets_BT[..., None], -1)[..., 0]
    r = jnp.exp((logp_BT - rows.old_logprobs_BT) * rows.weights_BT)
    surrogate = jnp.minimum(r * rows.advantages_BT, jnp.clip(r, 0.8, 1.2) * rows.advantages_BT)
    return total + mean(-surrogate)


@functools.cache
def known_logits():
    return jax.jit(functools.partial(logits, teacher()))(teacher_params(), ROWS)


CASES = {
    "gkd": PRESETS["gkd"],
    "minillm": PRESETS["minillm"],
    "gkd beside rewards": Algorithm(
        PolicyGradient(temperature=0.7),
        Advantage("grpo"),
        distill=DistillConfig(divergence="jsd", kd_coef=0.3, temperature=1.4),
    ),
}


@pytest.mark.parametrize(
    "name", ["gkd", "minillm", pytest.param("gkd beside rewards", marks=pytest.mark.slow)]
)
def test_loss_and_gradient_are_those_of_whole_logits(name):
    algorithm = CASES[name]
    objective = objective_of(algorithm, teacher())
    policy = algorithm.policy if name != "gkd" else None
    rows = batch()
    known_BTV = known_logits()

    def want(params):
        own_BTV = logits(student(), params, rows)
        return dense(objective.distill, policy, own_BTV, known_BTV, rows), own_BTV

    run = lambda f, **options: jax.jit(jax.value_and_grad(f, **options))
    (_, own_BTV), want_gradient = run(want, has_aux=True)(tiny_params())
    objective_loss = lambda params, known: mean_loss(objective, params, {"teacher": known}, rows)
    got, gradient = run(objective_loss)(tiny_params(), teacher_params())
    with jax.enable_x64(True):  # of the same float32 hidden states
        both = (np.asarray(x, np.float64) for x in (own_BTV, known_BTV))
        exact = dense(objective.distill, policy, *both, rows)
    assert float(got) == pytest.approx(float(exact), rel=1e-5)
    assert_trees_close(gradient, want_gradient, 2e-4)  # float32 sums in another order


def test_no_gradient_reaches_the_teacher():
    objective = objective_of(PRESETS["minillm"], teacher())
    loss = lambda known: mean_loss(objective, tiny_params(), {"teacher": known}, batch())
    gradient = jax.jit(jax.grad(loss))(teacher_params())
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_prompts_and_padding_have_no_part():
    """Other tokens after everything, other targets and numbers where the weight is 0."""
    objective = objective_of(PRESETS["minillm"], teacher())
    rows, frozen = batch(), {"teacher": teacher_params()}
    unread_BT, padding_BT = rows.weights_BT == 0, rows.segments_BT == 0
    junk = lambda where_BT, x_BT, value: np.where(where_BT, value, x_BT).astype(x_BT.dtype)
    other = dataclasses.replace(
        rows,
        tokens_BT=junk(padding_BT, rows.tokens_BT, 11),
        targets_BT=junk(unread_BT, rows.targets_BT, 12),
        advantages_BT=junk(padding_BT, rows.advantages_BT, 0),
    )
    run = jax.jit(jax.value_and_grad(functools.partial(mean_loss, objective)))
    want, got = (run(tiny_params(), frozen, each) for each in (rows, other))
    assert float(got[0]) == float(want[0])
    assert_trees_close(got[1], want[1], 0.0)


def test_a_policy_that_is_its_own_teacher_learns_nothing_from_it():
    objective = objective_of(PRESETS["gkd"], student())
    run = jax.jit(jax.value_and_grad(functools.partial(mean_loss, objective)))
    loss, gradient = run(tiny_params(), {"teacher": tiny_params()}, batch())
    assert abs(loss) < 1e-6
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-5


def test_a_teacher_of_another_vocabulary_is_refused():
    objective = objective_of(PRESETS["gkd"], tiny_model(None, VALID + 1, **TEACHER))
    with pytest.raises(ValueError, match="the teacher has 51 tokens and the student 50"):
        jax.eval_shape(
            functools.partial(mean_loss, objective), tiny_params(), {"teacher": {}}, batch()
        )


def test_without_a_divergence_the_policy_gradient_is_all():
    assert objective_of(PRESETS["opd"], teacher()) == PRESETS["opd"].policy
    assert isinstance(objective_of(PRESETS["gkd"], teacher()), OnPolicyDistillation)


# --- MiniLLM's decomposition ----------------------------------------------------------------------


def conditionals(random, V):
    """log p of the first token [V], and of the second given it [V, V]."""
    return [jax.nn.log_softmax(jnp.array(random.normal(size=s), jnp.float32)) for s in (V, (V, V))]


def test_both_parts_together_are_the_gradient_of_the_sequences_kl():
    """All sequences of two tokens. Seen to fail with `future` off, where r_t counts twice."""
    V, random = 3, np.random.default_rng(1)
    log_p, logits = conditionals(random, V), conditionals(random, V)
    logq = lambda theta: [jax.nn.log_softmax(x) for x in theta]
    pairs = list(itertools.product(range(V), range(V)))
    of = lambda tables, a, b: jnp.stack([tables[0][a], tables[1][a, b]])

    def whole(theta):  # the sum over sequences of q log(q / p)
        q, p = ([of(t, a, b).sum() for a, b in pairs] for t in (logq(theta), log_p))
        return sum(jnp.exp(x) * (x - y) for x, y in zip(q, p, strict=True))

    sampled = np.array([of(logq(logits), a, b) for a, b in pairs])
    known = np.array([of(log_p, a, b) for a, b in pairs])
    taught = TeacherAdvantage(gamma=1.0, future=True)
    advantages = taught.advantages(known, sampled, np.ones(sampled.shape))
    chances = np.exp(sampled.sum(1))

    def decomposed(theta):
        q = logq(theta)
        kl = lambda x, y: (jnp.exp(x) * (x - y)).sum(-1)
        total = 0.0
        for i, (a, b) in enumerate(pairs):
            policy = -(advantages[i] * of(q, a, b)).sum()
            steps = kl(q[0], log_p[0]) + kl(q[1][a], log_p[1][a])
            total += chances[i] * (policy + steps)
        return total

    got, want = (jax.jit(jax.grad(f))(logits) for f in (decomposed, whole))
    assert_trees_close(got, want, 1e-5)


def test_what_follows_is_discounted_and_divided_by_what_is_left():
    gap_T = np.array([[1.0, 2.0, 4.0, 7.0]])
    mask_T = np.array([[1.0, 1.0, 1.0, 0.0]])
    run = lambda **own: TeacherAdvantage(gamma=0.5, future=True, **own).advantages(
        gap_T, np.zeros((1, 4)), mask_T
    )
    np.testing.assert_allclose(run(), [[0.5 * 2 + 0.25 * 4, 0.5 * 4, 0, 0]])
    np.testing.assert_allclose(run(length_norm=True), [[1.0, 2.0, 0, 0]])
    with pytest.raises(ValueError, match=r"train\.teacher\.future is True; it needs .*gamma above"):
        TeacherAdvantage(future=True)


# --- what does not go together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(distill=None), "estimator is none, which leaves nothing"),
        (dict(teacher=TeacherAdvantage()), "estimator is none, and train.teacher has switches"),
        (dict(lmbda=1.5), r"rollout\.lmbda is 1\.5; it must be in \[0, 1\]"),
        (dict(advantage=Advantage("grpo"), distill=None), r"rollout\.lmbda is 0\.5; only a"),
        (dict(policy=PolicyGradient(kl="k3", beta=0.1)), r"train\.policy\.kl is 'k3'; it needs"),
    ],
)
def test_what_does_not_go_together_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["gkd"], **changes)
