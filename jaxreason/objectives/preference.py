"""Preference between two answers to one prompt: DPO, IPO, ORPO, SimPO.

A pair lies in one row of a Batch as two segments, one after the other: the chosen answer's id is
odd (1, 3, ...), the rejected one's the even id after it (2, 4, ...). Both repeat the prompt and
have weight 1 on their completion's targets. Sums and means over an answer are over its segment, so
packing changes nothing. With c and r the two log-probs of a pair, of whole answers or a token:

  dpo    c, r = log pi / ref of whole answers: -log sigmoid(beta (c - r)), arXiv 2305.18290
  ipo    c, r = mean a token of log pi / ref: (c - r - 1 / (2 beta))^2, arXiv 2310.12036; per token
         as TRL has it with its authors' consent
  orpo   c, r = mean a token of log pi: -beta log sigmoid(logit(e^c) - logit(e^r)) beside the SFT
         term, arXiv 2403.07691
  simpo  c, r = mean a token of log pi: -log sigmoid(beta (c - r) - gamma), arXiv 2405.14734

The SFT term is the mean of -log pi over all target tokens of the chosen answers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxreason.types import Batch, Loss, Params

LOSS_TYPES = ("dpo", "ipo", "orpo", "simpo")
_CERTAIN = -1e-6  # the log-odds of a mean log-prob above it would lose their last digits


@dataclasses.dataclass(frozen=True)
class Preference:
    """Mean over pairs of one of the losses, plus sft_coef times the SFT term.

    A segment without a partner, or a pair of which one has no target of weight, has no part in it.
    Metrics are means over pairs, as TRL has them: logps and rewards (beta times c and r) of whole
    answers for dpo and ipo, a token for orpo and simpo. Raises ValueError naming
    `train.preference.KEY`.
    """

    loss_type: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0  # dpo, simpo: the share of pairs that are the wrong way round
    gamma: float = 0.0  # simpo: the margin that beta (c - r) should have
    sft_coef: float = 0.0
    sft_prompt: bool = False  # the SFT term is over the prompt's tokens too, as in TRL's ORPO

    def __post_init__(self):
        known = ", ".join(LOSS_TYPES)
        _require(self.loss_type in LOSS_TYPES, "loss_type", repr(self.loss_type),
                 f"it must be one of {known}")  # fmt: skip
        _require(self.beta > 0, "beta", self.beta, "it must be above 0")
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing,
                 "it must be in [0, 0.5)")  # fmt: skip
        _require(not self.label_smoothing or self.loss_type in ("dpo", "simpo"),
                 "label_smoothing", self.label_smoothing, f"{self.loss_type} has none")  # fmt: skip
        _require(not self.gamma or self.loss_type == "simpo", "gamma", self.gamma,
                 f"{self.loss_type} has none")  # fmt: skip
        _require(self.gamma >= 0, "gamma", self.gamma, "it must be 0 or more")
        _require(self.sft_coef >= 0, "sft_coef", self.sft_coef, "it must be 0 or more")
        _require(not self.sft_prompt or self.sft_coef > 0, "sft_prompt", self.sft_prompt,
                 "it needs train.preference.sft_coef above 0")  # fmt: skip

    @property
    def needs_reference(self) -> bool:
        """Whether `frozen["reference"]` is read: a complete tree, also where LoRA is trained."""
        return self.loss_type in ("dpo", "ipo")

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        paired_BP = _paired(batch)
        totals = {"preference": paired_BP.sum()}
        if self.sft_coef:
            totals["sft"] = (paired_BP * _pair_sums(self._sft_mask(batch), batch)[0]).sum()
        return {
            **totals,
            "tokens": batch.weights_BT.sum(),
            "balance": (batch.segments_BT != 0).sum(),
        }

    def loss(self, model, params: Params, frozen: Params | None, batch: Batch) -> Loss:
        logp_BT, balance = _logprobs(model, params, batch)
        mask_BT, paired_BP = batch.weights_BT, _paired(batch)
        sizes = [jnp.maximum(n_BP, 1.0) for n_BP in _pair_sums(mask_BT, batch)]
        chosen_BP, rejected_BP = logps = _pair_sums(mask_BT * logp_BT, batch)
        if self.needs_reference:
            known = jax.lax.stop_gradient(frozen["reference"])
            ref_BT = jax.lax.stop_gradient(_logprobs(model, known, batch)[0])
            # Token by token: the sums of an answer of 10,000 tokens have errors of 1e-3.
            chosen_BP, rejected_BP = _pair_sums(mask_BT * (logp_BT - ref_BT), batch)
        else:
            chosen_BP, rejected_BP = logps = [x / n for x, n in zip(logps, sizes)]
        losses_BP = self._losses(chosen_BP, rejected_BP, sizes)
        terms = {"preference": ((paired_BP * losses_BP).sum(), 1.0)}
        if self.sft_coef:
            sft_BP = -_pair_sums(self._sft_mask(batch) * logp_BT, batch)[0]
            terms["sft"] = ((paired_BP * sft_BP).sum(), self.sft_coef)
        if balance is not None:
            terms["balance"] = (balance, model.config.router_aux_coef)
        measured = {
            "rewards/chosen": self.beta * chosen_BP,
            "rewards/rejected": self.beta * rejected_BP,
            "rewards/accuracies": chosen_BP > rejected_BP,
            "rewards/margins": self.beta * (chosen_BP - rejected_BP),
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
        metrics = {name: (paired_BP * x_BP).sum() for name, x_BP in measured.items()}
        return Loss(terms=terms, metrics=metrics)

    def _losses(self, chosen_BP, rejected_BP, sizes):
        """Of each pair; where there is none (all are 0) finite, and so is its gradient."""
        if self.loss_type == "ipo":
            margin_BP = chosen_BP / sizes[0] - rejected_BP / sizes[1]
            return (margin_BP - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "orpo":
            log_odds = lambda x_BP: x_BP - _log_complement(x_BP)
            odds_ratio_BP = log_odds(chosen_BP) - log_odds(rejected_BP)
            return -self.beta * jax.nn.log_sigmoid(odds_ratio_BP)
        margin_BP = self.beta * (chosen_BP - rejected_BP) - self.gamma
        right_BP, wrong_BP = jax.nn.log_sigmoid(margin_BP), jax.nn.log_sigmoid(-margin_BP)
        return -(1 - self.label_smoothing) * right_BP - self.label_smoothing * wrong_BP

    def _sft_mask(self, batch: Batch):
        """The targets of the SFT term; whose answer they are of is `_pair_sums`' part."""
        if not self.sft_prompt:
            return batch.weights_BT
        after_BT = jnp.roll(batch.segments_BT, -1, axis=1).at[:, -1].set(0)
        return (batch.segments_BT == after_BT).astype(jnp.float32)


def _logprobs(model, params: Params, batch: Batch):
    """(logp_BT of the targets, the load-balancing loss of a mixture of experts or None)."""
    h_BTD, balance = model.hidden_and_balance(
        params, batch.tokens_BT, batch.segments_BT, batch.positions_BT
    )
    return model.logprobs(params, h_BTD, batch.targets_BT)[0], balance


def _log_complement(logp_BP):
    """log(1 - e^x) of x <= 0, finite at 0.

    Source: M. Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.
    """
    x_BP = jnp.minimum(logp_BP, _CERTAIN)
    near_BP, far_BP = jnp.log(-jnp.expm1(x_BP)), jnp.log1p(-jnp.exp(x_BP))
    return jnp.where(x_BP > -math.log(2), near_BP, far_BP)


# --- sums over the pairs of packed rows -----------------------------------------------------------


def _pair_sums(x_BT, batch: Batch):
    """Sums over the chosen and over the rejected of each pair: two [B, P], P = ceil(T / 2)."""
    pairs = -(-batch.segments_BT.shape[1] // 2)  # a row of T tokens has at most T segments
    sum_row = lambda x_T, s_T: jax.ops.segment_sum(x_T, s_T, num_segments=1 + 2 * pairs)
    sums_BS = jax.vmap(sum_row)(x_BT, batch.segments_BT)
    return sums_BS[:, 1::2], sums_BS[:, 2::2]


def _paired(batch: Batch):
    """1 for each pair of which both have something to learn from, else 0: float32 [B, P]."""
    chosen_BP, rejected_BP = _pair_sums(batch.weights_BT, batch)
    return ((chosen_BP > 0) & (rejected_BP > 0)).astype(jnp.float32)


def _require(holds: bool, key: str, value, right: str):
    if not holds:
        raise ValueError(f"train.preference.{key} is {value}; {right}")


# --- presets --------------------------------------------------------------------------------------

# Numbers are the papers', or their authors' code.
PRESETS: dict[str, Preference] = {
    "dpo": Preference(),
    "ipo": Preference("ipo"),
    "orpo": Preference("orpo", sft_coef=1.0),  # TRL: also sft_prompt
    "simpo": Preference("simpo", beta=2.0, gamma=1.0),
    # Efficient Long CoT, arXiv 2505.18440: pruned chosen over full.
    "pruning": Preference(sft_coef=0.3),
}
