"""The policy gradient: one loss, switches that combine freely, and presets by the papers' names.

With pi the policy of this step, old the trainer's before the first update on this rollout, roll the
sampler's and ref the reference's, the loss of a sampled token t of sequence i with advantage A is

  rho_it * surrogate(r_it, A_it)  +  beta * KL_it(pi, ref)  -  entropy_coef * H_it,

  r   = exp(log pi - log old), its own (`ratio=token`) or of the sequence (`ratio=sequence`);
  rho = a function of old / roll, a constant (`correction`): sampler and trainer round differently.

A document of the packed batch is one sequence: sums over a sequence are sums over a segment, so
packing changes nothing. Log-ratios are clipped to +-20, as verl and OpenRLHF do.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxreason.objectives.advantage import Advantage, TeacherAdvantage
from jaxreason.objectives.distill import DistillConfig
from jaxreason.types import Loss, Params, PolicyBatch

RATIOS = ("token", "sequence")
CLIPS = ("ppo", "dual", "cispo", "none")
AGGREGATIONS = ("token", "sequence", "constant")
KLS = ("none", "k2", "k3")
CORRECTIONS = (
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_mask",
)
_MAX_LOG_RATIO = 20.0


@dataclasses.dataclass(frozen=True)
class PolicyGradient:
    """The objective of reinforcement learning on a PolicyBatch.

    Its terms are `policy` and, with a value head, `value`. The weight `tokens` comes first and
    belongs to no term: every metric is a mean over learnt tokens, whatever the loss is divided by.
    Raises ValueError naming `train.policy.KEY`.
    """

    ratio: str = "token"  # sequence: the geometric mean of the tokens' (GSPO, arXiv 2507.18071)
    clip: str = "ppo"  # none: -r A, the plain policy gradient where r is 1
    epsilon: float = 0.2  # ppo, dual: no gradient below r = 1 - epsilon where A < 0
    epsilon_high: float | None = None  # ... above r = 1 + epsilon_high where A > 0; None: epsilon
    delta: float | None = None  # dual: ... above r = delta where A < 0; verl 3, INTELLECT-2 4
    cap: float | None = None  # cispo: absolute limit of r, not 1 + epsilon_high; ScaleRL 5
    # token: mean over all tokens; sequence: mean over sequences of the mean over their tokens;
    # constant: sum over (sequences * max_length). A sequence counts if it has a learnt token.
    aggregation: str = "token"
    max_length: int | None = None  # constant: the sampler's token limit
    kl: str = "none"  # estimator in the loss; k1 exists in the reward only (advantage.py)
    beta: float = 0.0  # its coefficient
    correction: str = "none"  # how rho is truncated (clipped into the bounds) or masked (0 outside)
    is_min: float | None = None  # bounds of rho; geometric_mask: of its mean over the sequence
    is_max: float | None = None
    value_coef: float = 0.0  # of the value loss; 0: no value head
    value_clip: float | None = None  # how far a value counts as moved from its old one
    temperature: float = 1.0  # the rollout's: log-probs and entropy are those of logits / it

    def __post_init__(self):
        _one_of("ratio", self.ratio, RATIOS)
        _one_of("clip", self.clip, CLIPS)
        _one_of("aggregation", self.aggregation, AGGREGATIONS)
        _one_of("kl", self.kl, KLS)
        _one_of("correction", self.correction, CORRECTIONS)
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        _require(0 <= self.epsilon <= 1, "epsilon", self.epsilon, "it must be in [0, 1]")
        _require(high >= 0, "epsilon_high", self.epsilon_high, "it must be 0 or more")
        _only_with("delta", self.delta, "clip", self.clip, ("dual",))
        _only_with("cap", self.cap, "clip", self.clip, ("cispo",))
        if self.clip == "dual":
            _require(self.delta > 1 + high, "delta", self.delta, f"it must be above {1 + high:g}")
        if self.clip == "cispo":
            _require(self.cap > 0, "cap", self.cap, "it must be above 0")
        if self.clip == "cispo" and self.ratio == "sequence":
            raise ValueError("train.policy.clip is cispo; it needs train.policy.ratio = token")
        if self.max_length is not None:
            _require(self.max_length > 0, "max_length", self.max_length, "it must be 1 or more")
        _require(self.beta >= 0, "beta", self.beta, "it must be 0 or more")
        if self.beta > 0 and self.kl == "none":
            raise ValueError(f"train.policy.beta is {self.beta}; it needs train.policy.kl k2 or k3")
        self._check_bounds()
        _require(self.value_coef >= 0, "value_coef", self.value_coef, "it must be 0 or more")
        if self.value_clip is not None:
            _require(self.value_clip > 0, "value_clip", self.value_clip, "it must be above 0")
        _require(self.temperature > 0, "temperature", self.temperature, "it must be above 0")

    def _check_bounds(self):
        _only_with("is_max", self.is_max, "correction", self.correction, CORRECTIONS[1:])
        if self.correction == "geometric_mask":
            _only_with("is_min", self.is_min, "correction", self.correction, ("geometric_mask",))
        if self.is_min is not None:
            _require(self.is_max is not None, "is_min", self.is_min, "it needs a correction")
            _require(0 <= self.is_min < self.is_max, "is_min", self.is_min,
                     f"it must be 0 or more and below is_max {self.is_max:g}")  # fmt: skip

    # -- the objective's two functions -------------------------------------------------------------

    def weights(self, batch: PolicyBatch) -> dict[str, jax.Array]:
        tokens = batch.weights_BT.sum()
        totals = {"tokens": tokens, "policy": tokens}
        if self.aggregation != "token":
            # The number of sequences; round, because 1/3 + 1/3 + 1/3 is not always 1.
            totals["policy"] = jnp.round(_sequence_shares(batch).sum())
        if self.aggregation == "constant":
            assert self.max_length is not None, "the recipe gives the sampler's limit"
            totals["policy"] *= self.max_length
        if self.value_coef:
            totals["value"] = tokens
        return {**totals, "balance": (batch.segments_BT != 0).sum()}

    def loss(self, model, params: Params, frozen: dict[str, Params], batch: PolicyBatch) -> Loss:
        return self.loss_of(model, params, *_hidden(model, params, batch), batch)

    def loss_of(self, model, params: Params, h_BTD, balance, batch: PolicyBatch) -> Loss:
        """`loss` from what the model's hidden_and_balance gives: for those who share the pass."""
        mask_BT, A_BT = batch.weights_BT, batch.advantages_BT
        logp_BT, entropy_BT, values_BT = self._heads(model, params, h_BTD, batch)
        r_BT = self._ratios(logp_BT, batch)
        policy_BT = self._correction(batch) * self._surrogate(r_BT, logp_BT, A_BT)
        losses_BT = policy_BT
        measured = {"policy_loss": policy_BT, "entropy": entropy_BT, "ratio/mean": r_BT}
        measured |= self._clipped(r_BT, A_BT)
        if batch.ref_logprobs_BT is not None:
            kl_BT = kl(logp_BT, batch.ref_logprobs_BT, self.kl if self.kl != "none" else "k3")
            measured["kl"] = kl_BT
            losses_BT = losses_BT + self.beta * kl_BT
        assert batch.ref_logprobs_BT is not None or self.kl == "none"
        if batch.entropy_coef_B is not None:
            losses_BT = losses_BT - batch.entropy_coef_B[:, None] * entropy_BT
        share_BT = _sequence_shares(batch) if self.aggregation == "sequence" else mask_BT
        terms = {"policy": ((share_BT * losses_BT).sum(), 1.0)}
        if self.value_coef:
            measured["value_loss"] = self._value_loss(values_BT, batch)
            terms["value"] = ((mask_BT * measured["value_loss"]).sum(), self.value_coef)
        if balance is not None:
            terms["balance"] = (balance, model.config.router_aux_coef)
        metrics = {name: (mask_BT * x_BT).sum() for name, x_BT in measured.items()}
        return Loss(terms=terms, metrics=metrics)

    def score(self, model, params: Params, batch: PolicyBatch):
        """(logp_BT, entropy_BT, values_BT or None) of the targets at the rollout's temperature.

        The old and the reference log-probs are made by it too, so that no temperature can differ.
        There are values where the parameters have a value head.
        """
        return self._heads(model, params, _hidden(model, params, batch)[0], batch)

    def _heads(self, model, params: Params, h_BTD, batch: PolicyBatch):
        logp_BT, entropy_BT, _ = model.logprobs(
            params, h_BTD, batch.targets_BT, temperature=self.temperature
        )
        values_BT = None
        if "value_head" in params:
            values_BT = model.values(params, h_BTD, batch.tokens_BT.shape[1])
        return logp_BT, entropy_BT, values_BT

    # -- the switches ------------------------------------------------------------------------------

    def _ratios(self, logp_BT, batch: PolicyBatch):
        """r_BT; of a sequence: its value at every token, and each token's own gradient."""
        d_BT = _log_ratio(logp_BT, batch.old_logprobs_BT) * batch.weights_BT
        if self.ratio == "sequence":
            mean_BT = _sequence_mean(d_BT, batch)
            d_BT = jax.lax.stop_gradient(mean_BT) + d_BT - jax.lax.stop_gradient(d_BT)
        return jnp.exp(d_BT)

    @property
    def _range(self) -> tuple[float, float]:
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        return 1 - self.epsilon, 1 + high

    def _surrogate(self, r_BT, logp_BT, A_BT):
        """The loss of each token, before the correction."""
        if self.clip == "none":
            return -r_BT * A_BT
        if self.clip == "cispo":
            return -jax.lax.stop_gradient(jnp.minimum(r_BT, self.cap)) * A_BT * logp_BT
        loss_BT = jnp.maximum(-r_BT * A_BT, -jnp.clip(r_BT, *self._range) * A_BT)
        if self.clip == "dual":
            loss_BT = jnp.where(A_BT < 0, jnp.minimum(loss_BT, -self.delta * A_BT), loss_BT)
        return loss_BT

    def _clipped(self, r_BT, A_BT) -> dict[str, jax.Array]:
        """Which tokens the clip keeps from having their whole gradient; TRL's names."""
        none_BT = jnp.zeros_like(r_BT, bool)
        low_BT = high_BT = dual_BT = none_BT
        if self.clip == "cispo":
            high_BT = r_BT > self.cap
        elif self.clip != "none":
            lowest, highest = self._range
            low_BT = (r_BT < lowest) & (A_BT < 0)
            high_BT = (r_BT > highest) & (A_BT > 0)
        if self.clip == "dual":
            dual_BT = (r_BT > self.delta) & (A_BT < 0)
        return {
            "clip_ratio/low_mean": low_BT,
            "clip_ratio/high_mean": high_BT,
            "clip_ratio/region_mean": low_BT | high_BT | dual_BT,
        }

    def _correction(self, batch: PolicyBatch):
        """rho_BT, a constant: data, not parameters, go in."""
        if self.correction == "none":
            return jnp.ones_like(batch.weights_BT)
        d_BT = _log_ratio(batch.old_logprobs_BT, batch.rollout_logprobs_BT) * batch.weights_BT
        rho_BT = jnp.exp(d_BT)
        if self.correction.startswith("sequence"):
            sum_BT = _sequence_sum(d_BT, batch)
            rho_BT = jnp.exp(jnp.clip(sum_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
        lowest = 0.0 if self.is_min is None else self.is_min
        if self.correction.endswith("truncate"):
            return jnp.clip(rho_BT, lowest, self.is_max)
        judged_BT = rho_BT
        if self.correction == "geometric_mask":
            judged_BT = jnp.exp(_sequence_mean(d_BT, batch))
        return jnp.where((judged_BT >= lowest) & (judged_BT <= self.is_max), rho_BT, 0.0)

    def _value_loss(self, values_BT, batch: PolicyBatch):
        """Half the squared error; clipped, the larger of two (PPO's code, arXiv 2005.12729)."""
        error_BT = (values_BT - batch.returns_BT) ** 2
        if self.value_clip is not None:
            moved_BT = jnp.clip(values_BT - batch.old_values_BT, -self.value_clip, self.value_clip)
            near_BT = batch.old_values_BT + moved_BT
            error_BT = jnp.maximum(error_BT, (near_BT - batch.returns_BT) ** 2)
        return 0.5 * error_BT


def kl(logp_BT: jax.Array, ref_logprobs_BT: jax.Array, estimator: str) -> jax.Array:
    """k2 or k3 of each token: estimates of KL(pi, ref) that are never negative.

    Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    d_BT = _log_ratio(logp_BT, ref_logprobs_BT)
    # expm1: exp(-d) + d - 1 is below 0 by rounding where d is small.
    return 0.5 * d_BT**2 if estimator == "k2" else jnp.maximum(jnp.expm1(-d_BT) + d_BT, 0.0)


def next_entropy_coef(
    coef: float, entropy: float, target: float, step_size: float = 0.005
) -> tuple[float, float]:
    """Adaptive entropy control -> (the coefficient to keep, the one to apply at the next step).

    The kept one rises by `step_size` where the mean entropy (nats a token) is under its target and
    falls, not below 0, where it is above; it is applied only while the entropy is at or under the
    target. Source: Skywork-OR1, arXiv 2505.22312 (target 0.2, step 0.005).
    """
    coef = max(0.0, coef + (step_size if entropy < target else -step_size))
    return coef, coef if entropy <= target else 0.0


def _hidden(model, params: Params, batch: PolicyBatch):
    """(h_BTD, the load-balancing loss of a mixture of experts or None)."""
    rows = batch.tokens_BT, batch.segments_BT, batch.positions_BT
    return model.hidden_and_balance(params, *rows)


# --- sums over the sequences of packed rows -------------------------------------------------------


def _log_ratio(logp_BT, other_BT):
    return jnp.clip(logp_BT - other_BT, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)


def _sequence_sum(x_BT, batch: PolicyBatch):
    """The sum over each token's own segment, at every token of it."""
    ids = batch.segments_BT.shape[1] + 1  # a row of T tokens has at most T segments, and padding
    sum_row = lambda x_T, s_T: jax.ops.segment_sum(x_T, s_T, num_segments=ids)[s_T]
    return jax.vmap(sum_row)(x_BT, batch.segments_BT)


def _sequence_mean(x_BT, batch: PolicyBatch):
    """The mean over the learnt tokens of each token's own segment; `x_BT` is 0 elsewhere."""
    return _sequence_sum(x_BT, batch) / jnp.maximum(_sequence_sum(batch.weights_BT, batch), 1.0)


def _sequence_shares(batch: PolicyBatch):
    """Each learnt token's share of its sequence: they add up to the number of sequences."""
    return batch.weights_BT / jnp.maximum(_sequence_sum(batch.weights_BT, batch), 1.0)


# --- one-line errors ------------------------------------------------------------------------------


def _require(holds: bool, key: str, value, right: str):
    if not holds:
        raise ValueError(f"train.policy.{key} is {value}; {right}")


def _one_of(key: str, value: str, choices: tuple[str, ...]):
    _require(value in choices, key, repr(value), f"it must be one of {', '.join(choices)}")


def _only_with(key: str, value, switch: str, choice: str, readers: tuple[str, ...]):
    """A number is given exactly when the switch that reads it is on."""
    if choice in readers:
        _require(value is not None, key, value, f"train.policy.{switch} = {choice} needs a number")
    else:
        _require(value is None, key, value,
                 f"train.policy.{switch} = {choice} does not read it: leave it None")  # fmt: skip


# --- presets --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A loss and the advantages that it is meant for.

    Raises ValueError where GAE and the value head do not come together, and where nothing makes
    advantages or what is learnt without them does not go together.
    """

    policy: PolicyGradient
    advantage: Advantage
    teacher: TeacherAdvantage | None = None
    distill: DistillConfig | None = None  # a divergence from a teacher, see objectives/on_policy.py
    lmbda: float = 1.0  # share of the steps on samples; the rest are on the data set's own answers

    def __post_init__(self):
        self._check_distilled()
        if self.advantage.estimator == "external" and self.teacher is None:
            raise ValueError(
                "train.advantage.estimator is external, which leaves the advantages to a teacher; "
                "set train.teacher.from or another estimator"
            )
        has_head, estimator = self.policy.value_coef > 0, self.advantage.estimator
        if has_head != (estimator == "gae"):
            raise ValueError(
                f"train.policy.value_coef is {self.policy.value_coef} and train.advantage."
                f"estimator is {estimator}; a value head and gae need each other"
            )

    def _check_distilled(self):
        if not 0 <= self.lmbda <= 1:
            raise ValueError(f"rollout.lmbda is {self.lmbda}; it must be in [0, 1]")
        if not self.has_policy and self.distill is None:
            raise ValueError(
                "train.advantage.estimator is none, which leaves nothing but a teacher's "
                "divergence to learn; set train.distill.kd_coef or another estimator"
            )
        if not self.has_policy and self.teacher is not None:
            raise ValueError(
                "train.advantage.estimator is none, and train.teacher has switches of advantages "
                "set; leave them out, or set it to external"
            )
        if self.lmbda < 1 and self.distill is None:
            raise ValueError(
                f"rollout.lmbda is {self.lmbda}; only a teacher's divergence (train.algorithm = "
                "gkd, or train.distill) is learnt from answers that were not sampled"
            )
        unread = {"kl": self.policy.kl != "none", "value_coef": self.policy.value_coef > 0}
        for key, on in unread.items():
            if on and not (self.has_policy and self.lmbda == 1):
                raise ValueError(
                    f"train.policy.{key} is {getattr(self.policy, key)!r}; it needs samples and "
                    "advantages: rollout.lmbda = 1 and an estimator other than none"
                )

    @property
    def has_policy(self) -> bool:
        """Whether there is a policy gradient."""
        return self.advantage.estimator != "none"

    @property
    def needs_values(self) -> bool:
        return self.policy.value_coef > 0

    @property
    def needs_reference(self) -> bool:
        return self.policy.kl != "none" or self.advantage.kl_in_reward > 0


# Numbers are those that the papers or their authors' code print. With `kl` "none" and
# `kl_in_reward` 0 no reference model is kept.
PRESETS: dict[str, Algorithm] = {
    # DeepSeekMath, arXiv 2402.03300, equations 3-4: beta 0.04.
    "grpo": Algorithm(
        PolicyGradient(aggregation="sequence", kl="k3", beta=0.04), Advantage("grpo")
    ),
    # arXiv 2503.20783: neither the group's deviation nor the sequence's length divides.
    "dr_grpo": Algorithm(PolicyGradient(aggregation="constant"), Advantage("dr_grpo")),
    # arXiv 2503.14476: clip-higher and the token mean; its other parts are the loop's.
    "dapo": Algorithm(PolicyGradient(epsilon_high=0.28), Advantage("grpo")),
    # arXiv 2507.18071: the ratio of the whole sequence, so its range is tiny.
    "gspo": Algorithm(
        PolicyGradient(ratio="sequence", epsilon=3e-4, epsilon_high=4e-4, aggregation="sequence"),
        Advantage("grpo"),
    ),
    # MiniMax-M1, arXiv 2506.13585, which prints no cap: ScaleRL's 5, an absolute limit of r.
    "cispo": Algorithm(PolicyGradient(clip="cispo", cap=5.0), Advantage("grpo")),
    # arXiv 2402.14740, with TRL's clip and KL: whole sequences, so no length divides.
    "rloo": Algorithm(PolicyGradient(aggregation="constant"), Advantage("rloo", kl_in_reward=0.05)),
    # arXiv 2501.03262, with OpenRLHF's KL coefficient.
    "reinforce_pp": Algorithm(PolicyGradient(), Advantage("reinforce_pp", kl_in_reward=0.01)),
    # The same paper's form with the group's mean as the baseline; no KL, as OpenRLHF's default.
    "reinforce_pp_baseline": Algorithm(PolicyGradient(), Advantage("reinforce_pp_baseline")),
    # arXiv 1707.06347 as verl and OpenRLHF set it for language models (lambda 1, value clip 0.5);
    # the head shares the trunk, so its loss has TRL's coefficient.
    "ppo": Algorithm(
        PolicyGradient(value_coef=0.1, value_clip=0.5), Advantage("gae", kl_in_reward=0.001)
    ),
    # Thinking Machines Lab, "On-Policy Distillation", 2025: importance sampling without a clip,
    # every token for itself, no reward of the task.
    "opd": Algorithm(PolicyGradient(clip="none"), Advantage("external"), TeacherAdvantage()),
    # arXiv 2306.13649 as TRL sets it: the JSD at beta 0.5, half of the steps on samples.
    "gkd": Algorithm(
        PolicyGradient(), Advantage("none"), distill=DistillConfig(divergence="jsd"), lmbda=0.5
    ),
    # arXiv 2306.08543: the reverse KL of whole sequences, of each step exactly and of what follows
    # it by the policy gradient. Numbers of LMOps' scripts; not there: samples that the teacher
    # mixes into, and the loss on plain text.
    "minillm": Algorithm(
        PolicyGradient(),
        Advantage("external"),
        TeacherAdvantage(gamma=0.95, length_norm=True, whiten=True, future=True),
        DistillConfig(divergence="reverse_kl"),
    ),
}
