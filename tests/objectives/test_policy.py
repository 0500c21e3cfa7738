"""The policy gradient equals the papers' formulas, however its rows are packed, cut or spread."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import policy_reference as gold
import pytest
from tiny_models import assert_trees_close, packed_batch, tiny_model, tiny_params

from jaxreason.model.decoder import LanguageModel
from jaxreason.objectives.advantage import Advantage, TokenArrays, advantages
from jaxreason.objectives.policy import (
    PRESETS,
    Algorithm,
    PolicyGradient,
    kl,
    next_entropy_coef,
)
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import state as state_lib
from jaxreason.train.optim import OptimizerConfig, make_optimizer
from jaxreason.train.step import make_train_step
from jaxreason.types import PolicyBatch, TrainState

# --- what each algorithm is, written again from the papers (methods.md, section 8) ----------------

SPECS = {
    "grpo": dict(estimator="grpo", low=0.2, high=0.2, mean="sequence", kl="k3", beta=0.04),
    "dr_grpo": dict(estimator="dr_grpo", low=0.2, high=0.2, mean="constant", max_length=7),
    "dapo": dict(estimator="grpo", low=0.2, high=0.28, mean="token"),
    "gspo": dict(estimator="grpo", ratio="sequence", low=3e-4, high=4e-4, mean="sequence"),
    "cispo": dict(estimator="grpo", clip="cispo", cap=5.0, mean="token"),
    "rloo": dict(estimator="rloo", k1=0.05, low=0.2, high=0.2, mean="constant", max_length=7),
    "reinforce_pp": dict(estimator="reinforce_pp", k1=0.01, low=0.2, high=0.2, mean="token"),
    "reinforce_pp_baseline": dict(
        estimator="reinforce_pp_baseline", low=0.2, high=0.2, mean="token"
    ),
    "ppo": dict(
        estimator="gae", k1=0.001, low=0.2, high=0.2, mean="token", value_coef=0.1, value_clip=0.5
    ),
    # Switches that no preset turns on.
    "dual, token truncation": dict(
        estimator="batch", clip="dual", low=0.2, high=0.3, delta=3.0, mean="token",
        correction="token_truncate", is_max=1.1, is_min=0.9,
    ),
    "plain, k2, token mask": dict(
        estimator="dr_grpo", clip="none", mean="sequence", kl="k2", beta=0.1,
        correction="token_mask", is_min=0.9, is_max=1.2,
    ),
    "sequence truncation": dict(
        estimator="grpo", low=0.1, high=0.2, mean="constant", max_length=7,
        correction="sequence_truncate", is_max=1.1,
    ),
    "sequence mask": dict(
        estimator="grpo", low=0.2, high=0.2, mean="sequence", correction="sequence_mask",
        is_max=1.1,
    ),
    "gae at lambda 0.9, geometric mask": dict(
        estimator="gae", gamma=0.98, lam=0.9, low=0.2, high=0.2, mean="token", value_coef=0.5,
        correction="geometric_mask", is_min=0.95, is_max=1.05,
    ),
}  # fmt: skip

TAUGHT = ("opd", "gkd", "minillm")  # what they learn comes from a teacher: test_on_policy.py

_RENAMED = {"low": "epsilon", "high": "epsilon_high", "mean": "aggregation"}
_OF_ADVANTAGE = ("estimator", "k1", "gamma", "lam")


def algorithm(name: str) -> Algorithm:
    spec = SPECS[name]
    if name in PRESETS:  # as the recipe completes it
        preset = PRESETS[name]
        return dataclasses.replace(
            preset, policy=dataclasses.replace(preset.policy, max_length=spec.get("max_length"))
        )
    policy = {_RENAMED.get(k, k): v for k, v in spec.items() if k not in _OF_ADVANTAGE}
    advantage = {k: v for k, v in spec.items() if k in _OF_ADVANTAGE}
    return Algorithm(PolicyGradient(**policy), Advantage(**advantage))


# --- random cases ---------------------------------------------------------------------------------

ROWS, LENGTH = 8, 16
ARRAYS = ("logp", "old", "roll", "ref", "entropy", "values", "old_values")


@dataclasses.dataclass(frozen=True)
class Case:
    rewards_QR: np.ndarray
    sequences: list  # dicts of float64 arrays that float32 holds exactly
    places: list  # (row, first target, number of targets, document in its row) of each
    batch: PolicyBatch  # without advantages
    entropy_coef: float


def random_case(seed: int, packed: bool = True, size: int | None = None) -> Case:
    """2 or 3 prompts with 2 to 4 completions of 1 to 6 tokens; some tokens are not learnt."""
    random = np.random.default_rng(seed)
    Q, R = random.integers(2, 4), random.integers(2, 5)
    step = random.choice([2e-4, 0.05, 0.3, 12.0])  # how far the policy has moved
    sequences = []
    for _ in range(Q * R):
        n = size or random.integers(1, 7)
        mask = (random.random(n) > 0.15) * (random.random() > 0.1)
        draw = lambda scale: scale * random.normal(size=n)
        old, values = -np.abs(draw(1.0)), draw(1.0)
        arrays = dict(
            old=old, logp=old + draw(step), roll=old + draw(0.05), ref=old + draw(0.5),
            entropy=np.abs(draw(1.0)), values=values, old_values=values + draw(0.5),
        )  # fmt: skip
        exact = {k: v.astype(np.float32).astype(np.float64) for k, v in arrays.items()}
        sequences.append({"mask": mask.astype(np.float64), **exact})
    sequences[0]["mask"][-1] = 1.0  # a batch has something to learn from
    rewards_QR = random.integers(0, 2, (Q, R)) + random.choice([0.0, 0.1]) * random.normal(
        size=(Q, R)
    )
    coef = float(np.float32(random.choice([0.0, 0.02])))
    places = place(sequences, random, packed)
    return Case(rewards_QR, sequences, places, lay_out(sequences, places, coef), coef)


def place(sequences, random, packed):
    """Documents of a prompt of 1 to 3 ids and a completion; unpacked, one a row."""
    used, documents, places = np.zeros(2 * ROWS, int), np.zeros(2 * ROWS, int), []
    for number, s in enumerate(sequences):
        prompt, n = random.integers(1, 4), len(s["mask"])
        row = number
        if packed:
            row = int(np.argmax(used + prompt + n <= LENGTH))
        documents[row] += 1
        places.append((row, int(used[row] + prompt - 1), n, int(documents[row])))
        used[row] += prompt + n
    return places


def lay_out(sequences, places, entropy_coef) -> PolicyBatch:
    rows = max(row for row, *_ in places) + 1
    rows = ROWS if rows <= ROWS else 2 * ROWS
    grid = lambda: np.zeros((rows, LENGTH), np.float32)
    out, segments_BT = {name: grid() for name in ("mask", *ARRAYS)}, np.zeros((rows, LENGTH), int)
    for s, (row, first, n, document) in zip(sequences, places):
        for name, array_BT in out.items():
            array_BT[row, first : first + n] = s[name]
        start = int((segments_BT[row] > 0).sum())
        segments_BT[row, start : first + n + 1] = document
    ids_BT = np.broadcast_to(np.arange(rows)[:, None], (rows, LENGTH)).astype(np.int32)
    return PolicyBatch(
        tokens_BT=ids_BT,  # the row's number: how the stand-in model below finds its arrays
        targets_BT=ids_BT,
        weights_BT=out["mask"],
        segments_BT=segments_BT.astype(np.int32),
        positions_BT=ids_BT,
        advantages_BT=grid(),
        old_logprobs_BT=out["old"] * out["mask"],
        rollout_logprobs_BT=out["roll"] * out["mask"],
        ref_logprobs_BT=out["ref"] * out["mask"],
        old_values_BT=out["old_values"] * out["mask"],
        returns_BT=grid(),
        entropy_coef_B=np.full(rows, entropy_coef, np.float32),
    )


def on_grid(case: Case, arrays) -> np.ndarray:
    out_BT = np.zeros(case.batch.weights_BT.shape, np.float32)
    for array, (row, first, n, _) in zip(arrays, case.places):
        out_BT[row, first : first + n] = array[:n]
    return out_BT


def with_advantages(case: Case, config: Advantage) -> PolicyBatch:
    """The batch as the loop makes it: advantages from the code under test."""
    longest = max(len(s["mask"]) for s in case.sequences)
    pad = lambda name: np.stack(
        [np.pad(s[name], (0, longest - len(s["mask"])), constant_values=0) for s in case.sequences]
    )
    tokens = TokenArrays(pad("mask"), pad("old"), pad("ref"), pad("old_values"))
    estimate = advantages(config, case.rewards_QR, tokens)
    rows = np.broadcast_to(estimate.advantages.T, (longest, len(case.places))).T
    returns_BT = case.batch.returns_BT
    if estimate.returns_BT is not None:
        returns_BT = on_grid(case, estimate.returns_BT)
    advantages_BT = on_grid(case, rows) * case.batch.weights_BT
    return dataclasses.replace(case.batch, advantages_BT=advantages_BT, returns_BT=returns_BT)


class Lookup:
    """A stand-in for a model: its parameters are the log-probs, entropies and values themselves."""

    mesh, has_experts = None, False

    def complete(self, params, frozen, expert_load_LE):
        return params

    def hidden_and_balance(self, params, tokens_BT, segments_BT, positions_BT):
        return tokens_BT[:, 0], None

    def logprobs(self, params, h_B, targets_BT, *, temperature):
        assert temperature == 1.0
        return params["logp"][h_B], params["entropy"][h_B], None

    def values(self, params, h_B, length):
        return params["value_head"][h_B]


def lookup_params(case: Case):
    # What lies outside the completions must not matter: it is 3 and not 0.
    def fill(name):
        inside_BT = on_grid(case, [np.ones(len(s["mask"])) for s in case.sequences])
        return np.where(inside_BT > 0, on_grid(case, [s[name] for s in case.sequences]), 3.0)

    names = {"logp": "logp", "entropy": "entropy", "value_head": "values"}
    return {here: jnp.asarray(fill(there), jnp.float32) for here, there in names.items()}


@functools.cache
def compiled(name: str):
    """jitted (params, batch) -> ((loss, per-token means), gradients) as the train step adds up."""
    policy = algorithm(name).policy

    def total(params, batch):
        weights, loss = policy.weights(batch), policy.loss(Lookup(), params, None, batch)
        means = {key: x / weights["tokens"] for key, x in loss.metrics.items()}
        return sum(c * x / weights[key] for key, (x, c) in loss.terms.items()), means

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def expected(name: str, case: Case):
    spec = SPECS[name]
    chosen = {k: v for k, v in spec.items() if k in _OF_ADVANTAGE}
    A, returns = gold.advantages(chosen.pop("estimator"), case.rewards_QR, case.sequences, **chosen)
    return gold.loss_and_gradients(spec, case.sequences, A, returns, case.entropy_coef)


# --- the loss core --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_forty_random_cases_equal_the_formulas_in_float64(name):
    assert set(PRESETS) == {*SPECS} & set(PRESETS) | set(TAUGHT)
    for seed in range(40):
        case = random_case(seed)
        batch = with_advantages(case, algorithm(name).advantage)
        (loss, means), gradients = compiled(name)(lookup_params(case), batch)
        want, want_gradients, want_means = expected(name, case)
        # float32: a ratio e^d has a relative error of |d| * 6e-8, and terms of both signs cancel.
        scale = 1 + abs(want) + max(np.abs(on_grid(case, want_gradients["logp"])).max(), 0)
        assert float(loss) == pytest.approx(want, rel=2e-5, abs=2e-6 * scale), (seed, name)
        for here, there in {"logp": "logp", "entropy": "entropy", "value_head": "values"}.items():
            np.testing.assert_allclose(
                gradients[here], on_grid(case, want_gradients[there]), rtol=2e-5, atol=2e-7 * scale,
                err_msg=f"case {seed}: gradient of {there}",
            )  # fmt: skip
        for key in means.keys() & want_means.keys():
            tolerance = dict(rel=2e-5, abs=2e-6 * (1 + abs(want_means[key])))
            assert float(means[key]) == pytest.approx(want_means[key], **tolerance), (seed, key)


def on_policy(case: Case) -> Case:
    """The first update on a rollout: old log-probs are the policy's own, and no entropy bonus."""
    sequences = [{**s, "old": s["logp"], "roll": s["logp"]} for s in case.sequences]
    return dataclasses.replace(
        case, sequences=sequences, batch=lay_out(sequences, case.places, 0.0), entropy_coef=0.0
    )


@pytest.mark.parametrize("name", [n for n in PRESETS if n not in ("grpo", *TAUGHT)])  # grpo: KL
def test_the_gradient_follows_the_sign_of_the_advantage(name):
    """Down the loss, tokens of positive advantage become likelier; a flipped sign flips it all."""
    case = on_policy(random_case(3))
    batch = with_advantages(case, algorithm(name).advantage)
    flipped = dataclasses.replace(batch, advantages_BT=-batch.advantages_BT)
    params = lookup_params(case)
    _, gradients = compiled(name)(params, batch)
    _, opposite = compiled(name)(params, flipped)
    learnt_BT = batch.weights_BT > 0
    np.testing.assert_array_equal(np.sign(gradients["logp"]), -np.sign(batch.advantages_BT))
    assert (np.asarray(gradients["logp"])[learnt_BT] != 0).any()
    np.testing.assert_array_equal(gradients["logp"], -opposite["logp"])


@pytest.mark.parametrize("name", ["grpo", "gspo", "dr_grpo", "sequence truncation"])
def test_packing_changes_nothing(name):
    """Means and ratios of a sequence are those of its segment; padding and empty rows are free."""
    for seed in (1, 2, 5):
        found = []
        for packed in (True, False):
            case = random_case(seed, packed)
            assert len({row for row, *_ in case.places}) < len(case.places) or not packed
            batch = with_advantages(case, algorithm(name).advantage)
            (loss, means), gradients = compiled(name)(lookup_params(case), batch)
            pieces = [gradients["logp"][row, first : first + n] for row, first, n, _ in case.places]
            found.append((loss, means, np.concatenate(pieces)))
        assert_trees_close(found[0], found[1], 1e-5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "ppo"])
def test_microbatches_change_nothing(name):
    """Each denominator is the global batch's, and so are the metrics'."""
    case, config = random_case(4), algorithm(name)
    batch = with_advantages(case, config.advantage)

    def one_step(microbatches):
        optimizer, params = optax.sgd(1.0), lookup_params(case)
        step = make_train_step(
            Lookup(), config.policy, optimizer, lambda s: 1.0, microbatches=microbatches
        )
        zero = jnp.int32(0)
        state = TrainState(
            step=zero, params=params, opt=optimizer.init(params), key=jax.random.key(0),
            nonfinite=jnp.int32(0),
        )  # fmt: skip
        state, metrics = step(state, batch, None)
        return state.params, metrics

    whole = one_step(1)
    assert float(whole[1]["num_tokens"]) == batch.weights_BT.sum()
    for microbatches in (2, 4):
        assert_trees_close(one_step(microbatches), whole, 1e-6)


@pytest.mark.slow
def test_eight_devices_equal_one():
    """The real model with a value head, and every sum over sequences there is."""
    policy = PolicyGradient(
        ratio="sequence", epsilon=0.01, aggregation="sequence", kl="k3", beta=0.1,
        correction="sequence_truncate", is_max=1.2, value_coef=0.5, value_clip=0.2,
        temperature=0.7,
    )  # fmt: skip
    documents = [[20, 12], [32], [5, 6, 7], [30], [3, 3], [16, 16], [9], [31]]
    rows, random = packed_batch(documents, length=32, loss_share=0.6), np.random.default_rng(0)
    draw = lambda scale: (
        scale * random.normal(size=rows.tokens_BT.shape).astype(np.float32) * rows.weights_BT
    )
    old_BT = draw(0.3) - 4
    batch = PolicyBatch(
        **vars(rows), advantages_BT=draw(1.0), old_logprobs_BT=old_BT,
        rollout_logprobs_BT=old_BT + draw(0.05), ref_logprobs_BT=old_BT + draw(0.3),
        old_values_BT=draw(1.0), returns_BT=draw(1.0),
        entropy_coef_B=np.full(len(documents), 0.01, np.float32),
    )  # fmt: skip

    def one_step(mesh):
        model = LanguageModel(tiny_model().config, tiny_model().execution, mesh, value_head=True)
        optimizer = make_optimizer(OptimizerConfig(name="adamw"), model.axes)
        step = make_train_step(model, policy, optimizer, lambda s: 1e-3)
        params = model.with_value_head(tiny_params())
        state = state_lib.create(model, optimizer, jax.random.key(0), params)
        return step(state, batch if mesh is None else hosts.to_global(mesh, batch), None)[1]

    want, got = one_step(None), one_step(make_mesh({"data": 8}))
    assert want["grad_norm"] > 0 and 0 < want["clip_ratio/region_mean"] < 1
    for name in want:  # float32 sums over rows in another order
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-5, abs=1e-7), name


# --- printed vectors, metrics, temperature --------------------------------------------------------


def test_kl_estimators():
    """methods.md's vector; k2 and k3 are never below 0, also where rounding could take them."""
    logp, ref = jnp.float32(-1.0), jnp.float32(-1.5)
    assert float(kl(logp, ref, "k2")) == pytest.approx(0.125)
    assert float(kl(logp, ref, "k3")) == pytest.approx(0.10653, abs=1e-5)
    for scale in (1e-5, 1e-3, 1.0, 30.0):  # about 1e-5, exp(-d) + d - 1 would be below 0
        d = jax.random.normal(jax.random.key(0), (10_000,)) * scale
        for estimator in ("k2", "k3"):
            assert float(kl(d, jnp.zeros_like(d), estimator).min()) >= 0


def one_sequence(policy: PolicyGradient, log_ratios, A, rho=()):
    """(loss, gradient of each log-prob, metrics) of one sequence with these log-ratios."""
    n = len(log_ratios)
    row = lambda values: np.array([values], np.float32)
    batch = PolicyBatch(
        tokens_BT=np.zeros((1, n), int), targets_BT=np.zeros((1, n), int),
        weights_BT=row([1.0] * n), segments_BT=np.ones((1, n), int),
        positions_BT=np.zeros((1, n), int),
        advantages_BT=row(A), old_logprobs_BT=row([-1.0] * n), rollout_logprobs_BT=row([-1.0] * n),
    )  # fmt: skip
    logp = jnp.asarray(row(log_ratios)) - 1

    def total(logp):
        loss = policy.loss(Lookup(), {"logp": logp, "entropy": logp}, None, batch)
        return loss.terms["policy"][0], loss.metrics

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logp)
    return float(loss), np.asarray(gradient)[0], metrics


def test_sequence_ratio():
    """methods.md: log r = [.1, -.2, .05] -> s = .98347, and so is the size of each gradient."""
    policy = PolicyGradient(ratio="sequence", clip="none")
    loss, gradient, metrics = one_sequence(policy, [0.1, -0.2, 0.05], [1.0] * 3)
    assert float(metrics["ratio/mean"]) / 3 == pytest.approx(0.98347, abs=5e-6)
    assert -loss / 3 == pytest.approx(0.98347, abs=5e-6)
    np.testing.assert_allclose(gradient, -0.98347, atol=5e-6)


def test_clip_ratios_count_the_tokens_that_lost_gradient():
    log_ratios = np.log([0.5, 0.5, 1.0, 1.5, 1.5, 4.0])
    A = [1.0, -1.0, 1.0, 1.0, -1.0, -1.0]
    want = {"ppo": (1, 1, 2), "dual": (1, 1, 3), "cispo": (0, 1, 1), "none": (0, 0, 0)}
    for clip, counts in want.items():
        options = {"dual": dict(delta=3.0), "cispo": dict(cap=3.0)}.get(clip, {})
        _, gradient, metrics = one_sequence(PolicyGradient(clip=clip, **options), log_ratios, A)
        got = [metrics[f"clip_ratio/{name}_mean"] for name in ("low", "high", "region")]
        assert tuple(int(x) for x in got) == counts, clip
        if clip != "cispo":  # which keeps a gradient for every token
            assert (gradient == 0).sum() == counts[2]
        else:
            np.testing.assert_allclose(gradient, -np.minimum(np.exp(log_ratios), 3) * A, rtol=1e-6)


def test_log_probs_are_of_the_rollout_temperature():
    """Fault 11: the trainer scores the distribution that the sampler drew from."""
    model, rows = tiny_model(), packed_batch([[9, 14]], length=24)

    @functools.partial(jax.jit, static_argnums=0)
    def scored(policy, params):
        h_BTD = model.hidden(params, rows.tokens_BT, rows.segments_BT, rows.positions_BT)
        logits_BTV = jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))
        return logits_BTV, policy.score(model, params, rows)

    for temperature in (0.6, 1.0):
        logits_BTV, got = scored(PolicyGradient(temperature=temperature), tiny_params())
        logp_BT, entropy_BT, values_BT = got
        z_BTV = np.asarray(logits_BTV, np.float64) / temperature
        want_BTV = z_BTV - np.log(np.exp(z_BTV).sum(-1, keepdims=True))
        want_BT = np.take_along_axis(want_BTV, rows.targets_BT[..., None], -1)[..., 0]
        np.testing.assert_allclose(logp_BT, want_BT, rtol=1e-5, atol=1e-5)
        want_BT = -(np.exp(want_BTV) * want_BTV).sum(-1)
        np.testing.assert_allclose(entropy_BT, want_BT, rtol=1e-5, atol=1e-5)
        assert values_BT is None


def test_adaptive_entropy():
    """Up under the target, down above it, never below 0; applied only at or under the target."""
    assert next_entropy_coef(0.01, 0.1, 0.2) == pytest.approx((0.015, 0.015))
    assert next_entropy_coef(0.01, 0.3, 0.2) == pytest.approx((0.005, 0.0))
    assert next_entropy_coef(0.001, 0.3, 0.2) == (0.0, 0.0)
    assert next_entropy_coef(0.0, 0.1, 0.2, step_size=0.1) == (0.1, 0.1)


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = [
    (dict(ratio="word"), "train.policy.ratio is 'word'; it must be one of token, sequence"),
    (
        dict(kl="k1", beta=0.1),
        "train.policy.kl is 'k1'; it must be one of none, k2, k3",
    ),  # fault 15
    (dict(epsilon=-0.1), "train.policy.epsilon is -0.1; it must be in"),
    (dict(epsilon_high=-1.0), "train.policy.epsilon_high is -1.0; it must be 0 or more"),
    (dict(clip="dual"), "train.policy.delta is None; train.policy.clip = dual needs a number"),
    (dict(clip="dual", delta=1.1), "train.policy.delta is 1.1; it must be above 1.2"),
    (dict(delta=3.0), "train.policy.delta is 3.0; train.policy.clip = ppo does not read it"),
    (dict(clip="cispo"), "train.policy.cap is None; train.policy.clip = cispo needs a number"),
    (dict(clip="cispo", cap=5.0, ratio="sequence"), "clip is cispo; it needs train.policy.ratio"),
    (dict(beta=0.04), "train.policy.beta is 0.04; it needs train.policy.kl k2 or k3"),
    (dict(correction="token_mask"), "train.policy.is_max is None; train.policy.correction ="),
    (dict(correction="geometric_mask", is_max=1.1), "train.policy.is_min is None; train.policy.co"),
    (dict(correction="token_mask", is_min=2.0, is_max=1.1), "is_min is 2.0; it must be 0 or more"),
    (dict(is_min=0.5), "train.policy.is_min is 0.5; it needs a correction"),
    (dict(value_clip=0.0), "train.policy.value_clip is 0.0; it must be above 0"),
    (dict(max_length=0), "train.policy.max_length is 0; it must be 1 or more"),
    (dict(temperature=0.0), "train.policy.temperature is 0.0; it must be above 0"),
]


@pytest.mark.parametrize(
    "options, message", MISTAKES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_mistakes_are_named_in_one_line(options, message):
    with pytest.raises(ValueError) as error:
        PolicyGradient(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_value_head_and_gae_need_each_other():
    with pytest.raises(ValueError, match=r"value_coef is 0.0 and train.advantage.estimator is gae"):
        Algorithm(PolicyGradient(), Advantage("gae"))
    with pytest.raises(
        ValueError, match=r"value_coef is 0.1 and train.advantage.estimator is grpo"
    ):
        Algorithm(PolicyGradient(value_coef=0.1), Advantage("grpo"))


def test_which_presets_keep_a_reference_and_a_value_head():
    reference = {name for name, preset in PRESETS.items() if preset.needs_reference}
    assert reference == {"grpo", "rloo", "reinforce_pp", "ppo"}
    assert {name for name, preset in PRESETS.items() if preset.needs_values} == {"ppo"}
