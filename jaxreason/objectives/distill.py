"""Distillation of a teacher's distributions: the teacher in the same step, or its stored top k.

With P the teacher's distribution of the next token and Q the student's, both at `temperature`, the
loss of a target is kd_coef * divergence + nll_coef * -log Q_1(target), Q_1 at temperature 1:

  forward_kl       KL(P || Q): covers all that the teacher may say
  reverse_kl       KL(Q || P): keeps to what the teacher would say
  jsd              beta * KL(P || M) + (1 - beta) * KL(Q || M), M = beta * P + (1 - beta) * Q;
                   beta 0 is forward_kl and 1 reverse_kl (GKD, arXiv 2306.13649). The limits there
                   are 0, so the scale jumps: another beta wants another learning rate.
  skew_kl          KL(P || alpha * P + (1 - alpha) * Q): bounded (DistiLLM, arXiv 2402.03898)
  skew_reverse_kl  KL(Q || alpha * Q + (1 - alpha) * P)

On the student's own samples (GKD, MiniLLM) it is a term of objectives/on_policy.py: no gradient
flows through what was sampled. Means are over the weights of all targets, so padding has no part in
them.
"""

import dataclasses

import jax

from jaxreason.kernels.linear_distill import DistillSums, Mix
from jaxreason.model.decoder import LanguageModel
from jaxreason.types import Batch, DistillBatch, Loss, Params

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")
_JSD_BETA, _SKEW = 0.5, 0.1  # TRL's GKD and the paper's middle; DistiLLM's code


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What both objectives share. Raises ValueError naming `train.distill.KEY`."""

    divergence: str = "forward_kl"
    beta: float | None = None  # jsd; None: 0.5
    alpha: float | None = None  # skew_*; None: 0.1
    temperature: float = 1.0  # divides the logits of both models in the divergence
    # Hinton's factor (arXiv 1503.02531), which keeps the gradient's size as the temperature rises.
    # Off, as in TRL's GKD and DistiLLM's code.
    temperature_squared: bool = False
    kd_coef: float = 1.0
    nll_coef: float = 0.0

    def __post_init__(self):
        known = ", ".join(DIVERGENCES)
        _require(self.divergence in DIVERGENCES, "divergence", repr(self.divergence),
                 f"it must be one of {known}")  # fmt: skip
        if self.beta is not None:
            _require(self.divergence == "jsd", "beta", self.beta, f"{self.divergence} has none")
            _require(0 <= self.beta <= 1, "beta", self.beta, "it must be in [0, 1]")
        if self.alpha is not None:
            skewed = self.divergence.startswith("skew")
            _require(skewed, "alpha", self.alpha, f"{self.divergence} has none")
            _require(0 < self.alpha < 1, "alpha", self.alpha, "it must be between 0 and 1")
        _require(self.temperature > 0, "temperature", self.temperature, "it must be above 0")
        _require(self.kd_coef > 0, "kd_coef", self.kd_coef, "it must be above 0")
        _require(self.nll_coef >= 0, "nll_coef", self.nll_coef, "it must be 0 or more")

    @property
    def mix(self) -> Mix:
        """The same as the kernels read it."""
        beta = {"reverse_kl": 1.0, "skew_reverse_kl": 1.0}.get(self.divergence, 0.0)
        if self.divergence == "jsd":
            beta = _JSD_BETA if self.beta is None else self.beta
        skew = 0.0
        if self.divergence.startswith("skew"):
            skew = _SKEW if self.alpha is None else self.alpha
        kl_coef = self.kd_coef * (self.temperature**2 if self.temperature_squared else 1.0)
        return Mix(beta, skew, self.temperature, kl_coef, self.nll_coef)

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"distill": batch.weights_BT.sum(), "balance": (batch.segments_BT != 0).sum()}

    def _loss(self, model, total, sums: DistillSums, balance) -> Loss:
        terms = {"distill": (total, 1.0)}
        if balance is not None:
            terms["balance"] = (balance, model.config.router_aux_coef)
        metrics = {
            "kl": sums.kl,
            "nll": sums.nll,
            "entropy": sums.entropy,
            "mean_token_accuracy": sums.correct,
            "teacher_agreement": sums.agree,
        }
        return Loss(terms=terms, metrics=metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(DistillConfig):
    """From a teacher that runs in the same step, its parameters in `frozen["teacher"]`."""

    teacher: LanguageModel

    def loss(self, model: LanguageModel, params: Params, frozen: Params, batch: Batch) -> Loss:
        _, balance, total, sums = divergence(
            model, params, self.teacher, frozen["teacher"], batch, self.mix
        )
        return self._loss(model, total, sums, balance)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKDistillation(DistillConfig):
    """From the log-probs of a teacher's k likeliest tokens, which a DistillBatch holds.

    They must be those at `temperature`. The divergence is between the distributions over these k
    and, with `add_tail`, one event for all other tokens; without, between those given these k.
    """

    add_tail: bool = True

    @property
    def mix(self) -> Mix:
        return dataclasses.replace(super().mix, tail=self.add_tail)

    def loss(
        self, model: LanguageModel, params: Params, frozen: Params | None, batch: DistillBatch
    ) -> Loss:
        h_BTD, balance = model.hidden_and_balance(
            params, batch.tokens_BT, batch.segments_BT, batch.positions_BT
        )
        total, sums = model.topk_kl(
            params, h_BTD, batch.teacher_ids_BTK, batch.teacher_logprobs_BTK, batch.targets_BT,
            batch.weights_BT, self.mix,
        )  # fmt: skip
        return self._loss(model, total, sums, balance)


def divergence(
    model: LanguageModel,
    params: Params,
    teacher: LanguageModel,
    teacher_params: Params,
    batch: Batch,
    mix: Mix,
) -> tuple[jax.Array, jax.Array | None, jax.Array, DistillSums]:
    """(h_BTD and load-balancing loss of the model, the summed divergence, what it consists of).

    No gradient reaches the teacher. Raises ValueError as `check_teacher` does.
    """
    check_teacher(model, teacher)
    rows = batch.tokens_BT, batch.segments_BT, batch.positions_BT
    known = jax.lax.stop_gradient(teacher_params)
    teacher_h_BTE = teacher.hidden(known, *rows)
    h_BTD, balance = model.hidden_and_balance(params, *rows)
    total, sums = model.kl(
        params, h_BTD, teacher_h_BTE, teacher.head_weight(known), batch.targets_BT,
        batch.weights_BT, mix,
    )  # fmt: skip
    return h_BTD, balance, total, sums


def check_teacher(model: LanguageModel, teacher: LanguageModel) -> None:
    """Raises ValueError where the models have not the same tokens, or lie on different meshes."""
    tokens, teachers = (m.valid_vocab or m.config.vocab_size for m in (model, teacher))
    if tokens != teachers:
        raise ValueError(
            f"the teacher has {teachers} tokens and the student {tokens}; distillation compares "
            "them token by token: both need one tokenizer"
        )
    if model.mesh != teacher.mesh:
        raise ValueError(f"the teacher is on mesh {teacher.mesh} and the student on {model.mesh}")


def _require(holds: bool, key: str, value, right: str):
    if not holds:
        raise ValueError(f"train.distill.{key} is {value}; {right}")
