"""Advantages equal their definitions, and the numbers that methods.md prints."""

import numpy as np
import policy_reference as gold
import pytest

from jaxreason.objectives.advantage import (
    ESTIMATORS,
    Advantage,
    TeacherAdvantage,
    TokenArrays,
    advantages,
    mismatch,
    whiten,
)

ONE_OF_FOUR = np.array([[1.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    "estimator, want",
    [
        ("grpo", [1.499997, -0.499999, -0.499999, -0.499999]),  # ddof 1; ddof 0 gives 1.732, -.577
        ("dr_grpo", [0.75, -0.25, -0.25, -0.25]),
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("batch", [1.499997, -0.499999, -0.499999, -0.499999]),  # one group is the batch
    ],
)
def test_printed_vectors(estimator, want):
    got = advantages(Advantage(estimator), ONE_OF_FOUR).advantages
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1.1e-6)


def random_tokens(seed, Q, R):
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(Q * R):
        n = random.integers(1, 9)
        arrays = {name: random.normal(size=n) for name in ("old", "ref", "old_values")}
        learnt = (random.random(n) > 0.2) * (random.random() > 0.1)
        sequences.append({"mask": learnt.astype(float), **arrays})
    longest = max(len(s["mask"]) for s in sequences)

    def pad(name):  # with NaN where nothing may be read, the mask apart
        filler = 0.0 if name == "mask" else np.nan
        padded = [np.pad(s[name], (0, longest - len(s[name])), constant_values=filler)
                  for s in sequences]  # fmt: skip
        return np.stack(padded)

    tokens = TokenArrays(pad("mask"), pad("old"), pad("ref"), pad("old_values"))
    return sequences, tokens, random.normal(size=(Q, R))


@pytest.mark.parametrize("estimator", [e for e in ESTIMATORS if e not in ("external", "none")])
def test_forty_random_cases_equal_the_definition(estimator):
    options = dict(gamma=0.97, lam=0.9) if estimator in ("gae", "reinforce_pp") else {}
    for seed in range(40):
        Q, R = 1 + seed % 4, 2 + seed % 3
        sequences, tokens, rewards_QR = random_tokens(seed, Q, R)
        for k1 in (0.0, 0.1):
            config = Advantage(estimator, kl_in_reward=k1, **options)
            got = advantages(config, rewards_QR, tokens)
            want, returns = gold.advantages(estimator, rewards_QR, sequences, k1, **options)
            for b, (s, want_T) in enumerate(zip(sequences, want)):
                n = len(want_T)
                row_T = got.advantages[b] * s["mask"] if got.advantages.ndim == 1 else (
                    got.advantages[b, :n])  # fmt: skip
                np.testing.assert_allclose(row_T, want_T, rtol=1e-5, atol=1e-6)
                if returns is not None:
                    np.testing.assert_allclose(got.returns_BT[b, :n], returns[b], rtol=1e-5,
                                               atol=1e-6)  # fmt: skip
            assert (got.returns_BT is not None) == (estimator == "gae")
            assert np.isfinite(got.advantages).all()


def test_the_kl_in_the_reward_is_k1():
    """methods.md: logp -1, reference -1.5 -> k1 = .5 a token; signed, so only a reward has it."""
    ones = np.ones((2, 3))
    tokens = TokenArrays(ones, -1.0 * ones, np.stack([-1.5 * ones[0], -0.5 * ones[0]]))
    config = Advantage("dr_grpo", kl_in_reward=0.1)
    got = advantages(config, np.array([[1.0, 1.0]]), tokens).advantages
    np.testing.assert_allclose(got, [-0.15, 0.15], rtol=1e-6)


def test_gae_at_lambda_1_is_the_return_minus_the_value():
    """Tokens that are not learnt (a forced end of thinking) take no time and carry no value."""
    mask_BT = np.array([[1, 1, 0, 1], [1, 0, 0, 0]])
    values_BT = np.array([[0.5, 0.2, 9.0, 0.1], [0.3, 9.0, 9.0, 9.0]])
    tokens = TokenArrays(mask_BT, values_BT=values_BT)
    got = advantages(Advantage("gae"), np.array([[1.0, 0.0]]), tokens)
    np.testing.assert_allclose(got.returns_BT, [[1, 1, 0, 1], [0, 0, 0, 0]], atol=1e-7)
    want = whiten((got.returns_BT - values_BT) * mask_BT, mask_BT)
    np.testing.assert_allclose(got.advantages, want, atol=1e-6)


def test_whitening_is_over_all_learnt_tokens():
    random = np.random.default_rng(0)
    x_BT, mask_BT = random.normal(3.0, 5.0, (6, 9)), random.integers(0, 2, (6, 9))
    got = whiten(x_BT, mask_BT)
    learnt = got[mask_BT > 0]
    assert learnt.mean() == pytest.approx(0, abs=1e-12) and learnt.std() == pytest.approx(1)
    assert (got[mask_BT == 0] == 0).all()
    assert (whiten(np.full((2, 3), 7.0), np.ones((2, 3))) == 0).all()  # nothing to tell apart
    assert (whiten(x_BT, np.zeros((6, 9))) == 0).all()


def test_a_group_that_agrees_teaches_nothing():
    for estimator in ("grpo", "dr_grpo", "rloo", "batch"):
        rewards_QR = np.array([[0.1] * 3, [0.0, 1.0, 0.0]])  # 0.1 * 3 / 3 is not 0.1 in floats
        got = advantages(Advantage(estimator), rewards_QR).advantages
        np.testing.assert_allclose(got[:3], 0, atol=1e-9)
        assert (got[3:] != 0).all()


def test_external_advantages_are_given_for_each_token():
    external_BT, mask_BT = np.array([[0.5, -2.0, 7.0]]), np.array([[1, 1, 0]])
    tokens = TokenArrays(mask_BT, external_BT=external_BT)
    got = advantages(Advantage("external"), np.zeros((1, 1)), tokens).advantages
    np.testing.assert_array_equal(got, np.float32([[0.5, -2.0, 0.0]]))


def test_a_teachers_advantages_are_added_to_the_rewards():
    external_BT, mask_BT = np.array([[0.5, -2.0, 7.0], [1.0, 0.0, 0.0]]), np.array([[1, 1, 0]] * 2)
    tokens = TokenArrays(mask_BT, external_BT=external_BT)
    got = advantages(Advantage("dr_grpo"), np.array([[1.0, 0.0]]), tokens).advantages
    np.testing.assert_allclose(got, [[1.0, -1.5, 0.0], [0.5, -0.5, 0.0]])


def test_a_teacher_scores_every_token_for_itself_or_what_comes_after():
    teacher, sampled = np.log([[0.5, 0.2, 0.9]]), np.log([[0.25, 0.4, 0.1]])
    mask_BT = np.array([[1, 1, 0]])
    gaps = np.log([2.0, 0.5])
    of = lambda **fields: TeacherAdvantage(**fields).advantages(teacher, sampled, mask_BT)[0]
    np.testing.assert_allclose(of(coef=2.0), [2 * gaps[0], 2 * gaps[1], 0])
    np.testing.assert_allclose(of(gamma=0.9), [gaps[0] + 0.9 * gaps[1], gaps[1], 0])
    # MiniLLM: divided by the tokens that are left, of which padding is none (fault 8).
    normed = [(gaps[0] + 0.9 * gaps[1]) / 2, gaps[1], 0]
    np.testing.assert_allclose(of(gamma=0.9, length_norm=True), normed)
    whitened = of(gamma=0.9, length_norm=True, whiten=True)
    np.testing.assert_allclose(whitened, [1, -1, 0])
    with pytest.raises(ValueError, match=r"train.teacher.gamma is 2; it must be in"):
        TeacherAdvantage(gamma=2)


def test_one_completion_a_prompt_has_no_group():
    for estimator in ("grpo", "dr_grpo", "rloo", "batch", "reinforce_pp_baseline"):
        with pytest.raises(ValueError, match=r"sampling.num_samples is 1; .* needs at least 2"):
            advantages(Advantage(estimator), np.ones((4, 1)))
    tokens = TokenArrays(np.ones((4, 2)))
    assert advantages(Advantage("reinforce_pp"), np.arange(4.0)[:, None], tokens).advantages.any()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(estimator="a2c"), "train.advantage.estimator is 'a2c'; it must be one of grpo,"),
        (dict(kl_in_reward=-1.0), "train.advantage.kl_in_reward is -1.0; it must be 0 or more"),
        (dict(estimator="external", kl_in_reward=0.1), "estimator = external reads no rewards"),
        (dict(gamma=1.5), "train.advantage.gamma is 1.5; it must be in (0, 1]"),
        (dict(lam=-0.1), "train.advantage.lam is -0.1; it must be in [0, 1]"),
        (dict(eps=0.0), "train.advantage.eps is 0.0; it must be above 0"),
    ],
)
def test_mistakes_are_named_in_one_line(options, message):
    with pytest.raises(ValueError) as error:
        Advantage(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_mismatch_of_sampler_and_trainer():
    old, rollout = np.array([[-1.0, -2.0, 9.0]]), np.array([[-1.1, -1.8, 0.0]])
    got = mismatch(old, rollout, np.array([[1, 1, 0]]))
    d = np.array([0.1, -0.2])
    assert got == pytest.approx(
        {
            "rollout/token_mult_prob_error": np.exp(abs(d)).mean(),
            "rollout/mismatch_kl": (np.exp(d) - d - 1).mean(),
            "sampling/sampling_logp_difference/mean": 0.15,
            "sampling/sampling_logp_difference/max": 0.2,
            "sampling/importance_sampling_ratio/min": np.exp(-0.2),
            "sampling/importance_sampling_ratio/mean": np.exp(d).mean(),
            "sampling/importance_sampling_ratio/max": np.exp(0.1),
        }
    )
    same = mismatch(old, old, np.ones((1, 3)))
    assert same["rollout/token_mult_prob_error"] == 1 and same["rollout/mismatch_kl"] == 0
