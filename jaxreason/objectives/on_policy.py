"""A divergence from a teacher on the rows of a rollout, alone or beside the policy gradient.

With P the teacher's distribution of the next token and Q the policy's, the loss is

  policy gradient (objectives/policy.py, or none)  +  kd_coef * mean over tokens of D(P, Q),

D over the whole vocabulary, by objectives/distill.py's names and numbers:
  gkd      the JSD alone, on samples and on the data set's own answers (arXiv 2306.13649);
  minillm  KL(Q || P) of every step exactly, and of all that follows it by the policy gradient
           (arXiv 2306.08543, single-step decomposition).
Beside advantages of a task's reward it is GKD's own mixture with reinforcement learning.

Where a token was drawn is data: no gradient flows through sampling, nor into the teacher.
"""

import dataclasses

import jax

from jaxreason.model.decoder import LanguageModel
from jaxreason.objectives.distill import DistillConfig, divergence
from jaxreason.objectives.policy import Algorithm, PolicyGradient
from jaxreason.types import Loss, Params, PolicyBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnPolicyDistillation:
    """The objective of reinforcement learning with a teacher in `frozen["teacher"]`.

    Its terms are those of `policy`, where there is one, and `distill`, a mean over learnt tokens.
    Raises ValueError where the teacher has other tokens or lies on another mesh.
    """

    distill: DistillConfig
    teacher: LanguageModel
    policy: PolicyGradient | None = None  # None: nothing is learnt from advantages

    def weights(self, batch: PolicyBatch) -> dict[str, jax.Array]:
        tokens = batch.weights_BT.sum()
        own = {"tokens": tokens, "balance": (batch.segments_BT != 0).sum()}
        if self.policy is not None:
            own = self.policy.weights(batch)
        return {**own, "distill": tokens}

    def loss(self, model, params: Params, frozen: dict[str, Params], batch: PolicyBatch) -> Loss:
        h_BTD, balance, total, sums = divergence(
            model, params, self.teacher, frozen["teacher"], batch, self.distill.mix
        )
        if self.policy is not None:
            loss = self.policy.loss_of(model, params, h_BTD, balance, batch)
            terms, metrics = loss.terms, loss.metrics
        else:
            terms, metrics = {}, {"entropy": sums.entropy}
            if balance is not None:
                terms = {"balance": (balance, model.config.router_aux_coef)}
        own = {"distill_loss": sums.kl, "teacher_agreement": sums.agree}
        return Loss(terms={**terms, "distill": (total, 1.0)}, metrics={**metrics, **own})


def objective_of(
    algorithm: Algorithm, teacher: LanguageModel | None
) -> PolicyGradient | OnPolicyDistillation:
    """What the train step learns by. `teacher` is the teacher's model, where there is one."""
    if algorithm.distill is None:
        return algorithm.policy
    policy = algorithm.policy if algorithm.has_policy else None
    return OnPolicyDistillation(distill=algorithm.distill, teacher=teacher, policy=policy)
