"""What the host computes between rollout and update: advantages, shaped rewards, mismatch.

Plain numpy in float64, returned as float32: the arrays are small, and float32 sums over a large
batch would depend on its order. Completion r of prompt q is row b = q * R + r everywhere; T counts
the tokens of the completions alone, padded to the longest. A token is *learnt* where its mask is 1.
"""

import dataclasses

import numpy as np

GROUPED = ("grpo", "dr_grpo", "rloo", "batch", "reinforce_pp_baseline")
ESTIMATORS = (*GROUPED, "reinforce_pp", "gae", "external", "none")
_MIN_VARIANCE = 1e-8  # of whitened advantages, as OpenRLHF's


@dataclasses.dataclass(frozen=True)
class Advantage:
    """How rewards become advantages. Raises ValueError naming `train.advantage.KEY`.

    With m and s the mean and the deviation (ddof 1) of a prompt's rewards R:
      grpo                   (R - m) / (s + eps)                     arXiv 2402.03300
      dr_grpo                R - m                                   arXiv 2503.20783
      rloo                   R - mean of the prompt's other rewards  arXiv 2402.14740
      batch                  (R - m) / (deviation over the whole batch + eps)  arXiv 2508.08221
      reinforce_pp_baseline  R - m, whitened over all tokens         arXiv 2501.03262
      reinforce_pp           discounted rewards to come, whitened    arXiv 2501.03262
      gae                    with the value head, whitened           arXiv 1506.02438
      external               none of the rewards': a teacher's alone, see TeacherAdvantage
      none                   0: there is no policy gradient (objectives/on_policy.py, GKD)
    """

    estimator: str = "grpo"
    kl_in_reward: float = 0.0  # beta of -beta * k1 = -beta * (logp_old - logp_ref) a token
    gamma: float = 1.0  # reinforce_pp, gae: discount a token
    lam: float = 1.0  # gae: 1 is returns minus values, 0 one-step differences
    eps: float = 1e-6  # grpo, batch

    def __post_init__(self):
        def require(holds, key, right):
            if not holds:
                raise ValueError(f"train.advantage.{key} is {getattr(self, key)!r}; {right}")

        require(
            self.estimator in ESTIMATORS, "estimator", f"it must be one of {', '.join(ESTIMATORS)}"
        )
        require(self.kl_in_reward >= 0, "kl_in_reward", "it must be 0 or more")
        require(
            self.kl_in_reward == 0 or self.estimator not in ("external", "none"),
            "kl_in_reward",
            f"train.advantage.estimator = {self.estimator} reads no rewards",
        )
        require(0 < self.gamma <= 1, "gamma", "it must be in (0, 1]")
        require(0 <= self.lam <= 1, "lam", "it must be in [0, 1]")
        require(self.eps > 0, "eps", "it must be above 0")


@dataclasses.dataclass(frozen=True)
class TeacherAdvantage:
    """What a teacher says of each sampled token, as an advantage. ValueErrors name `train.teacher`.

    The reward of token t is r_t = log p_teacher - log p_sampler, and its advantage is `coef` times
      r_t alone, at gamma 0: on-policy distillation (Thinking Machines Lab, 2025), every token
        for itself;
      r_t + gamma r_{t+1} + ..., discounted rewards to come: MiniLLM (arXiv 2306.08543), which
        divides by the number of tokens left (`length_norm`) and whitens. With `future` r_t itself
        and its token are left out, as in the paper, whose loss has the exact KL of that step in
        their place (its code and TRL's count r_t both times).
    """

    coef: float = 1.0
    gamma: float = 0.0
    length_norm: bool = False
    whiten: bool = False
    future: bool = False

    def __post_init__(self):
        if self.coef < 0:
            raise ValueError(f"train.teacher.coef is {self.coef}; it must be 0 or more")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"train.teacher.gamma is {self.gamma}; it must be in [0, 1]")
        if self.future and not self.gamma:
            raise ValueError("train.teacher.future is True; it needs train.teacher.gamma above 0")

    def advantages(
        self, teacher_logprobs_BT: np.ndarray, sampled_logprobs_BT: np.ndarray, mask_BT: np.ndarray
    ) -> np.ndarray:
        """float64 [B, T], 0 where not learnt; arrays as in TokenArrays."""
        learnt_BT = mask_BT > 0
        gap_BT = np.asarray(teacher_logprobs_BT, np.float64) - sampled_logprobs_BT
        out_BT = np.where(learnt_BT, gap_BT, 0.0)
        if self.gamma:
            out_BT = _gae(out_BT, np.zeros(out_BT.shape), mask_BT, self.gamma, 1.0)
        left_BT = learnt_BT[:, ::-1].cumsum(1)[:, ::-1]
        if self.future:
            out_BT, left_BT = out_BT - np.where(learnt_BT, gap_BT, 0.0), left_BT - 1
        if self.length_norm:
            out_BT = out_BT / np.maximum(left_BT, 1)
        if self.whiten:
            out_BT = whiten(out_BT, mask_BT)
        return self.coef * out_BT


@dataclasses.dataclass(frozen=True)
class TokenArrays:
    """What is known of every completion token, padded to [B, T]; padding may hold anything."""

    mask_BT: np.ndarray  # 1 where the token is learnt; 0 on padding and on forced tokens
    old_logprobs_BT: np.ndarray | None = None  # the trainer's; for the KL in the reward
    ref_logprobs_BT: np.ndarray | None = None  # the reference's
    values_BT: np.ndarray | None = None  # gae: the value head's, before each token is drawn
    external_BT: np.ndarray | None = None  # advantages from elsewhere; added to the estimator's


@dataclasses.dataclass(frozen=True)
class Estimate:
    """float32 advantages, one a completion [B] or one a token [B, T], 0 where not learnt."""

    advantages: np.ndarray
    returns_BT: np.ndarray | None = None  # gae: what the value head learns


def advantages(
    config: Advantage, rewards_QR: np.ndarray, tokens: TokenArrays | None = None
) -> Estimate:
    """The advantages of Q groups of R completions; see Advantage for the definitions.

    `tokens` is needed by estimators that whiten over tokens or see their order, and by a KL in the
    reward. Those of `tokens.external_BT` are added, so that a task's reward and a teacher mix. A
    completion without a learnt token still counts in its group's mean and deviation.
    Raises ValueError where an estimator that compares the completions of a prompt has but one.
    """
    if config.estimator == "none":
        return Estimate(np.zeros(tokens.mask_BT.shape, np.float32))
    if config.estimator == "external":
        return Estimate((tokens.external_BT * tokens.mask_BT).astype(np.float32))
    estimate = _of_rewards(config, rewards_QR, tokens)
    if tokens is None or tokens.external_BT is None:
        return estimate
    own = estimate.advantages
    own_BT = (own[:, None] if own.ndim == 1 else own) * tokens.mask_BT
    mixed_BT = own_BT + tokens.external_BT * tokens.mask_BT
    return dataclasses.replace(estimate, advantages=mixed_BT.astype(np.float32))


def _of_rewards(config: Advantage, rewards_QR: np.ndarray, tokens: TokenArrays | None) -> Estimate:
    rewards_QR = np.asarray(rewards_QR, np.float64)
    num_samples = rewards_QR.shape[1]
    if config.estimator in GROUPED and num_samples < 2:
        raise ValueError(
            f"sampling.num_samples is {num_samples}; train.advantage.estimator = "
            f"{config.estimator} compares the completions of a prompt and needs at least 2"
        )
    if config.estimator in ("reinforce_pp", "gae"):
        rewards_BT = _token_rewards(config, rewards_QR.reshape(-1), tokens)
        values_BT = np.zeros(tokens.mask_BT.shape)
        if config.estimator == "reinforce_pp":  # GAE without values at lambda 1: rewards to come
            raw_BT = _gae(rewards_BT, values_BT, tokens.mask_BT, config.gamma, 1.0)
            return Estimate(whiten(raw_BT, tokens.mask_BT).astype(np.float32))
        values_BT = np.asarray(tokens.values_BT, np.float64) * tokens.mask_BT
        raw_BT = _gae(rewards_BT, values_BT, tokens.mask_BT, config.gamma, config.lam)
        whitened_BT = whiten(raw_BT, tokens.mask_BT).astype(np.float32)
        return Estimate(whitened_BT, (raw_BT + values_BT).astype(np.float32))
    if config.kl_in_reward:
        penalty_B = config.kl_in_reward * _k1(tokens).sum(1)
        rewards_QR = rewards_QR - penalty_B.reshape(rewards_QR.shape)
    centred_QR = rewards_QR - rewards_QR.mean(1, keepdims=True)
    if config.estimator == "reinforce_pp_baseline":
        raw_BT = centred_QR.reshape(-1, 1) * tokens.mask_BT
        return Estimate(whiten(raw_BT, tokens.mask_BT).astype(np.float32))
    scale = {
        "grpo": lambda: 1 / (rewards_QR.std(1, ddof=1, keepdims=True) + config.eps),
        "batch": lambda: 1 / (rewards_QR.std(ddof=1) + config.eps),
        "dr_grpo": lambda: 1.0,
        "rloo": lambda: num_samples / (num_samples - 1),
    }[config.estimator]()
    return Estimate((centred_QR * scale).reshape(-1).astype(np.float32))


def whiten(x_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 over the learnt tokens of the whole batch; 0 elsewhere."""
    count = max(mask_BT.sum(), 1)
    centred_BT = (x_BT - (x_BT * mask_BT).sum() / count) * mask_BT
    return centred_BT / np.sqrt(max((centred_BT**2).sum() / count, _MIN_VARIANCE))


def _k1(tokens: TokenArrays) -> np.ndarray:
    """The signed KL estimate of each learnt token: fit for a reward, never for a loss."""
    d_BT = np.asarray(tokens.old_logprobs_BT, np.float64) - tokens.ref_logprobs_BT
    return np.where(tokens.mask_BT > 0, d_BT, 0.0)


def _token_rewards(config: Advantage, rewards_B: np.ndarray, tokens: TokenArrays) -> np.ndarray:
    """The completion's reward at its last learnt token, minus beta * k1 at every one."""
    mask_BT = tokens.mask_BT
    rewards_BT = np.zeros(mask_BT.shape)
    if config.kl_in_reward:
        rewards_BT -= config.kl_in_reward * _k1(tokens)
    last_B = mask_BT.shape[1] - 1 - np.argmax(mask_BT[:, ::-1] > 0, axis=1)
    learnt_B = mask_BT.any(1)
    rewards_BT[np.arange(len(rewards_B)), last_B] += np.where(learnt_B, rewards_B, 0.0)
    return rewards_BT


def _gae(rewards_BT, values_BT, mask_BT, gamma: float, lam: float) -> np.ndarray:
    """Generalised advantages, backwards over the learnt tokens: the others take no time.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lam * A_{t+1}.
    """
    out_BT = np.zeros(mask_BT.shape)
    advantage_B, value_B = np.zeros(len(mask_BT)), np.zeros(len(mask_BT))
    for t in reversed(range(mask_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * value_B - values_BT[:, t]
        learnt_B = mask_BT[:, t] > 0
        advantage_B = np.where(learnt_B, delta_B + gamma * lam * advantage_B, advantage_B)
        value_B = np.where(learnt_B, values_BT[:, t], value_B)
        out_BT[:, t] = np.where(learnt_B, advantage_B, 0.0)
    return out_BT


def mismatch(
    old_logprobs: np.ndarray, rollout_logprobs: np.ndarray, mask: np.ndarray
) -> dict[str, float]:
    """How far the trainer's log-probs lie from the sampler's, over the tokens where `mask` is set.

    Names as NeMo-RL (`token_mult_prob_error`, the mean of exp|d|), prime-rl (`mismatch_kl`, the k3
    of sampler and trainer, >= 0) and TRL (`sampling/...`) have them. Arrays of one shape, any rank.
    """
    chosen = np.asarray(mask) > 0
    d = np.asarray(old_logprobs, np.float64)[chosen] - np.asarray(rollout_logprobs)[chosen]
    assert d.size, "no token to compare"
    ratio, difference = np.exp(d), np.abs(d)
    measured = {
        "rollout/token_mult_prob_error": np.exp(difference).mean(),
        "rollout/mismatch_kl": (np.expm1(d) - d).mean(),
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
        "sampling/importance_sampling_ratio/min": ratio.min(),
        "sampling/importance_sampling_ratio/mean": ratio.mean(),
        "sampling/importance_sampling_ratio/max": ratio.max(),
    }
    return {name: float(value) for name, value in measured.items()}
