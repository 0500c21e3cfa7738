"""Next-token prediction: the objectives of pretraining and supervised fine-tuning."""

import dataclasses

import jax

from jaxreason.types import TASKS, Batch, Loss, Params, TaskBatch


@dataclasses.dataclass(frozen=True)
class LanguageModeling:
    """Weighted mean over target tokens of -log p(target), plus z_loss * log(Z)^2.

    Of a mixture of experts also the load-balancing loss (model.moe.balance), over all tokens.
    The z-loss keeps the head's normaliser near 1 (PaLM, arXiv 2204.02311, section 5).
    """

    z_loss: float = 0.0

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        return {"nll": batch.weights_BT.sum(), "balance": (batch.segments_BT != 0).sum()}

    def loss(self, model, params: Params, frozen: dict[str, Params], batch: Batch) -> Loss:
        h_BTD, balance = model.hidden_and_balance(
            params, batch.tokens_BT, batch.segments_BT, batch.positions_BT
        )
        loss, sums = model.xent(
            params, h_BTD, batch.targets_BT, batch.weights_BT, z_loss=self.z_loss
        )
        terms = {"nll": (loss, 1.0)}
        if balance is not None:
            terms["balance"] = (balance, model.config.router_aux_coef)
        return Loss(
            terms=terms,
            metrics={"nll": sums.nll, "entropy": sums.entropy, "mean_token_accuracy": sums.correct},
        )


@dataclasses.dataclass(frozen=True)
class StepByStep:
    """Distilling Step-by-Step (arXiv 2305.02301): alpha * L_label + (1 - alpha) * L_rationale.

    Each is the mean of -log p(target), plus z_loss * log(Z)^2, over the global batch's target
    tokens of that task alone, as in the authors' code, whose alpha is 0.5: however long rationales
    are, the mix is alpha's. Of a batch without one of the tasks that term is 0.

    Raises:
      ValueError: alpha is not in [0, 1].
    """

    alpha: float = 0.5
    z_loss: float = 0.0

    def __post_init__(self):
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"train.alpha is {self.alpha}; it must be in [0, 1]")

    def weights(self, batch: TaskBatch) -> dict[str, jax.Array]:
        """ "tokens" comes first and belongs to no term: metrics are means over both tasks."""
        tasks = {task: self._weights(batch, task).sum() for task in TASKS}
        balance = (batch.segments_BT != 0).sum()
        return {"tokens": batch.weights_BT.sum(), **tasks, "balance": balance}

    def loss(self, model, params: Params, frozen: dict[str, Params], batch: TaskBatch) -> Loss:
        h_BTD, balance = model.hidden_and_balance(
            params, batch.tokens_BT, batch.segments_BT, batch.positions_BT
        )
        logp_BT, entropy_BT, lse_BT = model.logprobs(params, h_BTD, batch.targets_BT)
        loss_BT = self.z_loss * lse_BT**2 - logp_BT
        coefficients = {"label": self.alpha, "rationale": 1 - self.alpha}
        terms = {
            task: ((self._weights(batch, task) * loss_BT).sum(), coefficient)
            for task, coefficient in coefficients.items()
        }
        if balance is not None:
            terms["balance"] = (balance, model.config.router_aux_coef)
        measured = {"nll": -logp_BT, "entropy": entropy_BT}
        metrics = {name: (batch.weights_BT * x_BT).sum() for name, x_BT in measured.items()}
        return Loss(terms=terms, metrics=metrics)

    def _weights(self, batch: TaskBatch, task: str) -> jax.Array:
        return batch.weights_BT * (batch.tasks_BT == 1 + TASKS.index(task))
