"""Which attention implementation runs, why not the others, and how it is laid on the mesh."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxreason.kernels import blockwise, cudnn, reference, ring, splash, tokamax
from jaxreason.kernels.check import held_against
from jaxreason.kernels.ring import Kernel, Ring
from jaxreason.parallel import rules
from jaxreason.types import AttentionMask

Attention = Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]

PLAIN = ("blockwise", "reference")  # XLA's own operations
_NVIDIA = ("gpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Use:
    """What a model asks of its attention."""

    platform: str  # of the devices: cpu | gpu | cuda | tpu
    dtype: str  # of q, k and v
    head_dim: int
    capability: str | None = None  # of NVIDIA GPUs: 9.0 is Hopper, 10.0 the B200
    segments: bool = True  # rows are packed or padded
    window: bool = False  # some layers slide
    offset: bool = False  # queries are the last of the keys
    parts: bool = False  # keys and values come in parts, merged by log-sum-exp (the context axis)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A kernel and what it cannot do; soft caps are honoured by all but cuDNN, and unused here."""

    kernel: Kernel  # whose gradients are None where parts cannot be merged
    platforms: tuple[str, ...] | None = None  # None: any
    capability: str | None = None  # of the only generation of GPUs whose instructions it uses
    package: str | None = None  # that it needs beside our own
    max_head_dim: int | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    segments: bool = True
    offset: bool = True
    by_name: str | None = None  # why `auto` does not take it
    ordered: Kernel | None = None  # the same bits in every run, where `kernel` has others

    def reasons(self, use: Use) -> list[str]:
        """Why it cannot do that; [] where it can."""
        found = []
        if self.platforms and use.platform not in self.platforms:
            found.append(f"runs on {self.platforms[0]}, not {use.platform}")
        elif self.capability and _generation(use.capability) != _generation(self.capability):
            found.append(f"is for compute capability {self.capability}, not {use.capability}")
        if self.package and not importlib.util.find_spec(self.package):
            found.append(f"needs the package {self.package}")
        if use.dtype not in self.dtypes:
            found.append(f"takes {' or '.join(self.dtypes)}, not {use.dtype}")
        if self.max_head_dim and use.head_dim > self.max_head_dim:
            found.append(f"head_dim is at most {self.max_head_dim}, not {use.head_dim}")
        if use.segments and not self.segments:
            found.append("cannot keep packed documents apart")
        if use.offset and not self.offset:
            found.append("cannot read keys from before the first query")
        if use.parts and self.kernel.gradients is None:
            found.append("cannot merge parts of a row that is split over devices")
        return found


def _generation(capability: str | None) -> str:
    """10.3 has the instructions of 10.0."""
    return (capability or "").partition(".")[0]


def _ours(module: str, **changes) -> Kernel:
    """A flash kernel of this package, whose GPU API is imported only for those who chose it.

    Args:
      changes: of its Config for the head dim.
    """

    def function(name: str) -> Callable:
        def call(q_BTNH, *operands, **options):
            kernels = importlib.import_module(f"jaxreason.kernels.{module}")
            if changes:
                config = kernels.config_for(q_BTNH.shape[-1])
                options["config"] = dataclasses.replace(config, **changes)
            return getattr(kernels, name)(q_BTNH, *operands, **options)

        return call

    return Kernel(function("attention"), function("gradients"))


def _for_one_generation(module: str, capability: str) -> Implementation:
    """`capability` is the module's COMPUTE_CAPABILITY."""
    return Implementation(
        _ours(module), _NVIDIA, capability, max_head_dim=256, dtypes=("bfloat16",),
        by_name=_NOT_RUN, ordered=_ours(module, ordered=True),
    )  # fmt: skip


_NOT_RUN = "has not run on a chip of ours"
# In the order in which `auto` takes them.
IMPLEMENTATIONS = {
    "splash": Implementation(
        Kernel(splash.attention, None), ("tpu",), offset=False, by_name=_NOT_RUN
    ),
    "cudnn": Implementation(
        Kernel(cudnn.attention, None), _NVIDIA, max_head_dim=128, dtypes=("bfloat16",),
        segments=False, offset=False,
    ),
    "flash": Implementation(_ours("flash"), _NVIDIA, max_head_dim=256, by_name=_NOT_RUN),
    "flash_sm90": _for_one_generation("flash_sm90", "9.0"),
    "flash_sm100": _for_one_generation("flash_sm100", "10.0"),
    "tokamax": Implementation(
        Kernel(tokamax.attention, None), _NVIDIA, package="tokamax", max_head_dim=256,
        segments=False, offset=False, by_name=_NOT_RUN,
    ),
    "blockwise": Implementation(Kernel(blockwise.attention, blockwise.gradients)),
    "reference": Implementation(
        Kernel(reference.attention, reference.attention_gradients), by_name="holds every score",
    ),
}  # fmt: skip


def choose(name: str, use: Use) -> str:
    """The implementation of `mesh.attention = name` for that use.

    Raises ValueError for an unknown name, and with every implementation's reason for one that
    cannot do what is asked.
    """
    if name == "auto":
        return next(n for n, why in passed_over(use).items() if not why)  # blockwise always can
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"mesh.attention is {name!r}; known implementations: {known}")
    if IMPLEMENTATIONS[name].reasons(use):
        said = {n: i.reasons(use) for n, i in IMPLEMENTATIONS.items()}
        *most, last = (n for n, reasons in said.items() if not reasons)  # two at least
        able = f"{', '.join(most)} or {last}"
        why = "; ".join(f"{n}: {', '.join(reasons)}" for n, reasons in said.items() if reasons)
        raise ValueError(f"mesh.attention is {name!r}, which cannot do this ({why}); use {able}")
    return name


def passed_over(use: Use) -> dict[str, str]:
    """Why `auto` does not take each implementation; "" of those that it could."""
    return {
        name: ", ".join(i.reasons(use) or filter(None, [i.by_name]))
        for name, i in IMPLEMENTATIONS.items()
    }


def said(name: str, use: Use) -> str:
    """The choice as a run prints it: with what else is made for these devices, and why not that."""
    made = [n for n, i in IMPLEMENTATIONS.items() if i.platforms and use.platform in i.platforms]
    others = [f"{n} {why}" for n, why in passed_over(use).items() if n in made and n != name]
    return f"attention: {name}" + (f" ({'; '.join(others)})" if others else "")


def check(name: str, use: Use, deterministic: bool = False) -> None:
    """Runs an implementation on this machine's devices, gradients too, beside `reference`.
    `deterministic` as for `build`.

    Raises ValueError with both numbers where they differ by more than bfloat16 rounds, and with the
    compiler's words where it cannot run here.
    """
    T, N, K = 320, 4, 2
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(1, T, heads, use.head_dim) for heads in (N, K, K, N)]
    operands = [jax.random.normal(key, shape, use.dtype) for key, shape in zip(keys, shapes)]
    ids_1T = jnp.repeat(jnp.array([[1, 2, 0]], jnp.int32), jnp.array([150, 140, 30]), axis=1)
    segments = dict(q_segments_BT=ids_1T, kv_segments_BS=ids_1T) if use.segments else {}
    mask = AttentionMask(window=100 if use.window else None, **segments)

    def run(attention, dtype):
        *qkv, dout_BTNH = (operand.astype(dtype) for operand in operands)
        out_BTNH, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, mask)[0], *qkv)
        gradients = {f"gradient of {n}": g for n, g in zip("qkv", pullback(dout_BTNH))}
        return {"output": out_BTNH} | gradients

    held_against(
        functools.partial(run, _kernel(name, deterministic).attention, use.dtype),
        functools.partial(run, reference.attention, "float32"),
        setting=f"mesh.attention = {name}",
        instead="mesh.attention = blockwise",
    )


def _kernel(name: str, deterministic: bool) -> Kernel:
    implementation = IMPLEMENTATIONS[name]
    return (deterministic and implementation.ordered) or implementation.kernel


def build(
    name: str, mesh: Mesh | None, exchange: str = "ring", deterministic: bool = False
) -> Attention:
    """`attention(q_BTNH, k_BSKH, v_BSKH, mask) -> out_BTNH` of a chosen implementation.

    `deterministic` takes the form whose gradients have the same bits in every run. On a mesh it
    runs under shard_map, batch and heads split as the table says, so that it is never replicated by
    accident. Where the context axis splits rows, they are in the order of `ring.stripes`.
    """
    kernel = _kernel(name, deterministic)
    attention = kernel.attention
    if mesh is not None and rules.axis_size(mesh, "length") > 1:
        attention = functools.partial(ring.attention, Ring(kernel, rules.RULES["length"], exchange))

    def attend(q_BTNH, k_BSKH, v_BSKH, mask):
        return attention(q_BTNH, k_BSKH, v_BSKH, mask)[0]

    if mesh is None or mesh.size == 1:
        return attend
    heads = rules.spec(("batch", "length", "heads", "head_dim"))
    row = rules.spec(("batch", "length"))

    def sharded(q_BTNH, k_BSKH, v_BSKH, mask):
        specs = (heads, heads, heads, jax.tree.map(lambda _: row, mask))
        return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
            q_BTNH, k_BSKH, v_BSKH, mask
        )

    return sharded
