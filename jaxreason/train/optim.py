"""Optimizers and learning-rate schedules, from Optax.

An optimizer here is built for learning rate 1; the train step multiplies its update by
`schedule(step)`. So the schedule depends on the step alone: a skipped step, a resumed run and a
longer `train.steps` need no care.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax

from jaxreason.types import Params

Schedule = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Keys of `train.optimizer`. Defaults are those of small-model pretraining."""

    name: str = "adamw"  # adamw | muon
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # cosine | wsd | constant, after a linear warm-up
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: the last steps, in which the rate falls linearly
    final_scale: float = 0.1  # the rate at the end, as a share of learning_rate
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; never of norms
    clip_norm: float = 1.0  # of the global gradient; 0 is off

    def __post_init__(self):
        if self.name not in ("adamw", "muon"):
            raise ValueError(f"train.optimizer.name is {self.name!r}; it must be adamw or muon")
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(
                f"train.optimizer.schedule is {self.schedule!r}; it must be cosine, wsd or constant"
            )
        if self.learning_rate <= 0:
            raise ValueError(
                f"train.optimizer.learning_rate is {self.learning_rate}; it must be above 0"
            )


def make_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate of step 0, 1, ..., steps - 1. WSD: arXiv 2404.06395.

    Raises ValueError when warm-up and decay do not fit into `steps`.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_scale
    decay = {"cosine": 0, "constant": 0, "wsd": config.decay_steps}[config.schedule]
    if config.warmup_steps + decay > steps:
        raise ValueError(
            f"train.optimizer: warmup_steps + decay_steps = {config.warmup_steps} + {decay} "
            f"exceed train.steps = {steps}"
        )
    # The first step already moves: its rate is peak / warmup_steps, not 0.
    warmup = optax.linear_schedule(peak / max(config.warmup_steps, 1), peak,
                                   max(config.warmup_steps - 1, 1))  # fmt: skip
    after = steps - config.warmup_steps
    if config.schedule == "cosine":
        rest = optax.cosine_decay_schedule(peak, max(after, 1), config.final_scale)
    elif config.schedule == "constant":
        rest = optax.constant_schedule(peak)
    else:
        rest = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, final, max(decay, 1))],
            [after - decay],
        )
    return optax.join_schedules([warmup, rest], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, axes: Params) -> optax.GradientTransformation:
    """The update at learning rate 1. `axes` are the model's logical axes (LanguageModel.axes)."""
    decays = jax.tree.map(_is_matrix, axes, is_leaf=_is_axes)
    if config.name == "adamw":
        return optax.adamw(
            1.0, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
            mask=decays,
        )  # fmt: skip
    muon = optax.contrib.muon(
        1.0,
        beta=0.95,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=jax.tree.map(_muon_dims, axes, is_leaf=_is_axes),
        # Updates of Adam's size, so that one learning rate serves both groups (arXiv 2502.16982).
        consistent_rms=0.2,
    )
    # Muon's own mask does not reach the weights it leaves to Adam: it would decay the norms.
    return optax.chain(muon, optax.add_decayed_weights(-config.weight_decay, decays))


def _is_axes(node) -> bool:
    return isinstance(node, tuple)


def _is_matrix(axes: tuple[str, ...]) -> bool:
    return "norm" not in axes and "bias" not in axes


def _muon_dims(axes: tuple[str, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Rows and columns of each layer's matrix; None (Adam) for the table, the head and norms.

    Muon's own default takes 2-D leaves, which with stacked layers are the norms [L, D] and the
    embedding, and leaves the matrices [L, in, out] to Adam: exactly the wrong way round.
    """
    if axes[0] != "layer" or not _is_matrix(axes):
        return None
    first = 2 if axes[1] == "expert" else 1  # a matrix of its own, as a layer's is
    dims = tuple(range(first, len(axes)))
    into = dims[:1] if axes[first] in ("embed", "expert_embed", "rank") else dims[:-1]
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=into, output_axis=tuple(d for d in dims if d not in into)
    )
