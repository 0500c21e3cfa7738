"""LoRA: a frozen base, and for chosen weights a trained product of two thin matrices.

y = x W + (alpha / rank) x A B, with A random and B zero, so that training starts at the base.
The adapters are a tree of their own under `lora`: `layers/wq/a` [L, D, r], `layers/wq/b`
[L, r, N, H], and so on. Source: arXiv 2106.09685.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxreason.types import Params

# PEFT's names of the modules: the weights here, and how many of a weight's dims are inputs.
TARGETS = {
    "q_proj": ("wq", 1),
    "k_proj": ("wk", 1),
    "v_proj": ("wv", 1),
    "o_proj": ("wo", 2),
    "gate_proj": ("w_gate", 1),
    "up_proj": ("w_up", 1),
    "down_proj": ("w_down", 1),
}
_INPUTS = dict(TARGETS.values())
BASE_DTYPE = jnp.bfloat16  # of the frozen base; it is multiplied in the execution's


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Keys of `train.lora`. Rank 0 trains the weights themselves."""

    rank: int = 0
    alpha: float = 16.0  # the product is multiplied by alpha / rank
    targets: tuple[str, ...] = tuple(TARGETS)

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 0:
            raise ValueError(f"train.lora.rank is {self.rank}; it must be 0 (off) or more")
        if self.alpha <= 0:
            raise ValueError(f"train.lora.alpha is {self.alpha}; it must be above 0")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ValueError(
                f"train.lora.targets holds {repr(unknown[0]) if unknown else 'nothing'}; "
                f"known: {', '.join(TARGETS)}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def weights(self) -> tuple[str, ...]:
        """The names here of what is adapted."""
        return tuple(TARGETS[name][0] for name in self.targets)


def declare(config: LoraConfig, shapes: Params, axes: Params) -> tuple[Params, Params]:
    """(shapes, logical axes) of the adapters of a model with these layers.

    Raises ValueError for a target that is a stack of experts, and for a rank that no weight of
    that shape can have.
    """
    adapters, adapter_axes = {}, {}
    for name in config.weights:
        shape, ax = shapes["layers"][name].shape, axes["layers"][name]
        if "expert" in ax:
            raise ValueError(
                f"train.lora.targets holds {_peft_name(name)}, which is a stack of experts here; "
                "q_proj, k_proj, v_proj and o_proj can be adapted"
            )
        cut = 1 + _INPUTS[name]
        most = min(math.prod(shape[1:cut]), math.prod(shape[cut:]))
        if config.rank > most:
            raise ValueError(
                f"train.lora.rank is {config.rank}; {_peft_name(name)} has at most rank {most} "
                "in this model"
            )
        adapters[name] = {
            "a": jax.ShapeDtypeStruct((*shape[:cut], config.rank), jnp.float32),
            "b": jax.ShapeDtypeStruct((shape[0], config.rank, *shape[cut:]), jnp.float32),
        }
        adapter_axes[name] = {"a": (*ax[:cut], "rank"), "b": ("layer", "rank", *ax[cut:])}
    return {"lora": {"layers": adapters}}, {"lora": {"layers": adapter_axes}}


def init(shapes: Params, key: jax.Array) -> Params:
    """Adapters: A uniform in +-1/sqrt(inputs) (PEFT's default), B zero."""
    layers = {}
    for i, (name, pair) in enumerate(sorted(shapes["lora"]["layers"].items())):
        shape = pair["a"].shape
        bound = 1 / math.sqrt(math.prod(shape[1:-1]))
        a = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -bound, bound)
        layers[name] = {"a": a, "b": jnp.zeros(pair["b"].shape, jnp.float32)}
    return {"lora": {"layers": layers}}


def scaled(config: LoraConfig, params: Params) -> Params:
    """The tree with alpha / rank taken into B, so that W + A B says all of it."""
    layers = {
        name: {"a": pair["a"], "b": config.scale * pair["b"]}
        for name, pair in params["lora"]["layers"].items()
    }
    return {**params, "lora": {"layers": layers}}


def merge(params: Params) -> Params:
    """The plain tree that computes the same as a complete one: W + A B, in float32.

    The weights without an adapter keep their dtype. A sum rounded to the base's bf16 would lose
    the small part of what was learnt.
    """
    adapters = params["lora"]["layers"]

    def merged(name: str, w: jax.Array) -> jax.Array:
        if name not in adapters:
            return w
        a, b = adapters[name]["a"], adapters[name]["b"]
        L, rank = a.shape[0], a.shape[-1]
        delta = jnp.einsum(
            "LIR,LRO->LIO",
            a.reshape(L, -1, rank),
            b.reshape(L, rank, -1),
            precision=jax.lax.Precision.HIGHEST,
        )
        return w.astype(jnp.float32) + delta.reshape(w.shape)

    layers = {name: merged(name, w) for name, w in params["layers"].items()}
    return {k: v for k, v in params.items() if k != "lora"} | {"layers": layers}


def _peft_name(weight: str) -> str:
    return next(name for name, (here, _) in TARGETS.items() if here == weight)
