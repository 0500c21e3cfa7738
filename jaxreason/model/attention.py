"""Which attention implementation runs, why not the others, and how it is laid on the mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxreason.kernels import blockwise, cudnn, reference, ring, splash
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
    segments: bool = True  # rows are packed or padded
    window: bool = False  # some layers slide
    offset: bool = False  # queries are the last of the keys
    parts: bool = False  # keys and values come in parts, merged by log-sum-exp (the context axis)


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A kernel and what it cannot do; soft caps are honoured by all but cuDNN, and unused here."""

    kernel: Kernel  # whose gradients are None where parts cannot be merged
    platforms: tuple[str, ...] | None = None  # None: any
    max_head_dim: int | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    segments: bool = True
    offset: bool = True
    by_name: str | None = None  # why `auto` does not take it

    def reasons(self, use: Use) -> list[str]:
        """Why it cannot do that; [] where it can."""
        found = []
        if self.platforms and use.platform not in self.platforms:
            found.append(f"runs on {self.platforms[0]}, not {use.platform}")
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


def _flash(name: str) -> Callable:
    """Of kernels/flash.py, whose Triton API is imported only for those who chose it."""

    def call(*operands, **options):
        from jaxreason.kernels import flash

        return getattr(flash, name)(*operands, **options)

    return call


# In the order in which `auto` takes them.
IMPLEMENTATIONS = {
    "splash": Implementation(
        Kernel(splash.attention, None), platforms=("tpu",), offset=False,
        by_name="has not run on a chip of ours",
    ),
    "cudnn": Implementation(
        Kernel(cudnn.attention, None), platforms=_NVIDIA, max_head_dim=128, dtypes=("bfloat16",),
        segments=False, offset=False,
    ),
    "flash": Implementation(
        Kernel(_flash("attention"), _flash("gradients")), platforms=_NVIDIA,
        max_head_dim=256, by_name="has not run on a chip of ours",
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
        able = (n for n, i in IMPLEMENTATIONS.items() if not i.by_name and not i.reasons(use))
        return next(able)  # blockwise is always able
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"mesh.attention is {name!r}; known implementations: {known}")
    if IMPLEMENTATIONS[name].reasons(use):
        said = {n: i.reasons(use) for n, i in IMPLEMENTATIONS.items()}
        able = " or ".join(n for n, reasons in said.items() if not reasons)
        why = "; ".join(f"{n}: {', '.join(reasons)}" for n, reasons in said.items() if reasons)
        raise ValueError(f"mesh.attention is {name!r}, which cannot do this ({why}); use {able}")
    return name


def check(name: str, use: Use) -> None:
    """Runs an implementation on this machine's devices, gradients too, beside `reference`.

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
        functools.partial(run, IMPLEMENTATIONS[name].kernel.attention, use.dtype),
        functools.partial(run, reference.attention, "float32"),
        setting=f"mesh.attention = {name}",
        instead="mesh.attention = blockwise",
    )


def build(name: str, mesh: Mesh | None, exchange: str = "ring") -> Attention:
    """`attention(q_BTNH, k_BSKH, v_BSKH, mask) -> out_BTNH` of a chosen implementation.

    On a mesh it runs under shard_map, batch and heads split as the table says, so that it is never
    replicated by accident. Where the context axis splits rows, they are in the order of
    `ring.stripes`.
    """
    kernel = IMPLEMENTATIONS[name].kernel
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
