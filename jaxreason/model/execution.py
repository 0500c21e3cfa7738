"""How a decoder runs: its precision, its kernels, and what the backward pass recomputes."""

import dataclasses
from collections.abc import Callable

import jax

from jaxreason.kernels.ring import EXCHANGES
from jaxreason.model.products import GATHERED

# What the backward pass finds again instead of computing it twice, of each layer.
KEEPABLE = ("qkv", "attention", "attention_projection", "gate_up")
# What keys and values are kept in while sampling; None: in Execution.dtype.
CACHE_DTYPES = {"auto": None, "fp8_e4m3": "float8_e4m3fn"}
REMAT = {"full": (), "save_attention": ("attention",), "save_projections": KEEPABLE}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder runs; none of it changes what it computes, up to rounding."""

    dtype: str = "float32"  # of activations and of the weights as they multiply
    attention: str = "auto"
    experts: str = "auto"  # kernels/grouped.py: auto | loop | megablox | pallas
    remat: str = "none"  # none | full | save_attention | save_projections | names of KEEPABLE, by +
    offload: tuple[str, ...] = ()  # of KEEPABLE: kept in the host's memory instead of the device's
    scan_layers: bool = False  # one compiled layer in a loop; unrolled runs about 8 % faster on CPU
    deterministic: bool = False  # gradients of attention have the same bits in every run
    context: str = "ring"  # how keys and values meet where rows are split: ring | gather
    decode_attention: str = "auto"  # of model/decode_choice.py: auto | xla | pallas
    kv_cache_dtype: str = "auto"  # one of CACHE_DTYPES; fp8_e4m3 is half of bfloat16

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"mesh.dtype is {self.dtype!r}; it must be float32 or bfloat16")
        if self.context not in EXCHANGES:
            raise ValueError(
                f"mesh.context is {self.context!r}; it must be {' or '.join(EXCHANGES)}"
            )
        if self.kv_cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"mesh.kv_cache_dtype is {self.kv_cache_dtype!r}; it must be "
                f"{' or '.join(CACHE_DTYPES)}"
            )
        for key, names in (("remat", self.kept or ()), ("offload", self.offload)):
            for name in names:
                if name not in KEEPABLE:
                    known = ", ".join(("none", *REMAT)) + ", or some of " if key == "remat" else ""
                    raise ValueError(
                        f"mesh.{key} has {name!r}; it must be {known}{', '.join(KEEPABLE)}"
                    )
        if self.offload and self.kept is None:
            raise ValueError("mesh.offload is set and mesh.remat is none, which keeps everything")

    @property
    def cache_dtype(self) -> str:
        """Of keys and values while sampling."""
        return CACHE_DTYPES[self.kv_cache_dtype] or self.dtype

    @property
    def kept(self) -> tuple[str, ...] | None:
        """What a layer keeps for the backward pass; None: all there is, nothing is recomputed."""
        return None if self.remat == "none" else REMAT.get(self.remat, tuple(self.remat.split("+")))

    def rematerialised(self, layer: Callable, in_parts: bool = False) -> Callable:
        """The layer, with all recomputed in the backward pass that is not kept.

        Args:
          in_parts: its weights are split over devices, and gathered again there in any case.
        """
        if self.kept is None:
            policy = jax.checkpoint_policies.save_anything_except_these_names(GATHERED)
            return jax.checkpoint(layer, policy=policy) if in_parts else layer
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[name for name in self.kept if name not in self.offload],
            names_which_can_be_offloaded=list(self.offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
        return jax.checkpoint(layer, policy=policy)
