"""Next-token prediction: the objective of pretraining and supervised fine-tuning."""

import dataclasses

import jax

from jaxreason.types import Batch, Loss, Params


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
