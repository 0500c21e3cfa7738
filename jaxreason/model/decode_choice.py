"""Which attention decodes, and from which cache; why not the others; how it is laid on the mesh."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxreason.kernels import decode, reference
from jaxreason.kernels.check import held_against
from jaxreason.model.cache import stored
from jaxreason.parallel import rules

PLAIN = ("xla",)  # XLA's own operations
_NVIDIA = ("gpu", "cuda")


@dataclasses.dataclass(frozen=True)
class Use:
    """What a model asks of the attention that decodes."""

    platform: str  # of the devices: cpu | gpu | cuda | tpu
    dtype: str  # of queries and results
    cache_dtype: str  # of keys and values
    head_dim: int
    window: bool = False  # some layers slide


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A form of kernels.decode.decode_attention and what it cannot do."""

    kernel: Callable[..., jax.Array]
    platforms: tuple[str, ...] | None = None  # None: any
    max_head_dim: int | None = None
    cache_dtypes: tuple[str, ...] = ()  # that it reads beside the queries' own
    by_name: str | None = None  # why `auto` does not take it

    def reasons(self, use: Use) -> list[str]:
        """Why it cannot do that; [] where it can."""
        found = []
        if self.platforms and use.platform not in self.platforms:
            found.append(f"runs on {self.platforms[0]}, not {use.platform}")
        if use.cache_dtype not in (use.dtype, *self.cache_dtypes):
            readable = " or ".join((use.dtype, *self.cache_dtypes))
            found.append(f"reads a cache of {readable}, not {use.cache_dtype}")
        if self.max_head_dim and use.head_dim > self.max_head_dim:
            found.append(f"head_dim is at most {self.max_head_dim}, not {use.head_dim}")
        return found


def _pallas(*operands, **options) -> jax.Array:
    """Of kernels/decode_pallas.py, whose Triton API is imported only for those who chose it."""
    from jaxreason.kernels import decode_pallas

    return decode_pallas.decode_attention(*operands, **options)


# In the order in which `auto` takes them.
IMPLEMENTATIONS = {
    "pallas": Implementation(
        _pallas, platforms=_NVIDIA, max_head_dim=256, cache_dtypes=("float8_e4m3fn",),
        by_name="has not run on a chip of ours",
    ),
    "xla": Implementation(decode.decode_attention),
}  # fmt: skip


def choose(name: str, use: Use) -> str:
    """The implementation of `mesh.decode_attention = name` for that use.

    Raises ValueError for an unknown name, and with every implementation's reason where what is
    asked cannot be done.
    """
    if name not in ("auto", *IMPLEMENTATIONS):
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"mesh.decode_attention is {name!r}; known implementations: {known}")
    said = {n: i.reasons(use) for n, i in IMPLEMENTATIONS.items()}
    able = [n for n, reasons in said.items() if not reasons]
    if name == "auto":
        taken = [n for n in able if not IMPLEMENTATIONS[n].by_name]
    else:
        taken = [n for n in able if n == name]
    if taken:
        return taken[0]
    for n in able if name == "auto" else ():
        said[n] = [f"is taken only by name, as it {IMPLEMENTATIONS[n].by_name}"]
    why = "; ".join(f"{n}: {', '.join(reasons)}" for n, reasons in said.items() if reasons)
    instead = f"mesh.decode_attention = {able[0]}" if able else "mesh.kv_cache_dtype = auto"
    raise ValueError(
        f"mesh.decode_attention is {name!r} and the cache {use.cache_dtype}, which cannot be "
        f"({why}); set {instead}"
    )


def check(name: str, use: Use) -> None:
    """Runs an implementation on this machine's devices, with a shared prefix too, beside
    `reference`.

    Raises ValueError with both numbers where they differ by more than bfloat16 rounds, and with the
    compiler's words where it cannot run here.
    """
    B, N, K, S, P, H = 4, 4, 2, 200, 2, use.head_dim
    lengths_B, before_P = jnp.array([1, 77, 200, 130]), jnp.array([150, 9])
    keys = jax.random.split(jax.random.key(0), 5)
    q_BNH = jax.random.normal(keys[0], (B, N, H), use.dtype)
    cached = lambda key, rows: stored(jax.random.normal(key, (rows, K, S, H)), use.cache_dtype)
    own, shared = [cached(k, B) for k in keys[1:3]], [cached(k, P) for k in keys[3:]]
    options = dict(window=100 if use.window else None)

    def run():
        decode_attention = functools.partial(IMPLEMENTATIONS[name].kernel, **options)
        return {
            "output": decode_attention(q_BNH, *own, lengths_B),
            "output with a shared prefix": decode_attention(
                q_BNH, *own, lengths_B, prefix=(*shared, before_P)
            ),
        }

    def truth():
        f32 = lambda x: x.astype(jnp.float32)
        before_B = decode.repeat_rows(before_P, B)
        joined = [
            _after(decode.repeat_rows(f32(prefix), B), f32(x), before_B)
            for prefix, x in zip(shared, own, strict=True)
        ]
        attention = functools.partial(reference.decode_attention, f32(q_BNH), **options)
        return {
            "output": attention(*map(f32, own), lengths_B),
            "output with a shared prefix": attention(*joined, before_B + lengths_B),
        }

    held_against(
        run,
        truth,
        setting=f"mesh.decode_attention = {name}",
        instead="mesh.decode_attention = xla, mesh.kv_cache_dtype = auto",
    )


def _after(first_BKSH: jax.Array, second_BKSH: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Of each row the first lengths_b positions of `first`, then those of `second`."""
    put = lambda whole, new, i: jax.lax.dynamic_update_slice(whole, new, (0, i, 0))
    return jax.vmap(put)(jnp.concatenate([first_BKSH] * 2, 2), second_BKSH, lengths_B)


def build(name: str, mesh: Mesh | None) -> Callable[..., jax.Array]:
    """kernels.decode.decode_attention of a chosen implementation, for a lane of the engine.

    XLA splits its own operations as their operands lie.
    """
    kernel = IMPLEMENTATIONS[name].kernel
    if name in PLAIN:
        return kernel
    positional = lambda q_BNH, k_BKSH, v_BKSH, lengths_B, prefix, **options: kernel(
        q_BNH, k_BKSH, v_BKSH, lengths_B, prefix=prefix, **options
    )
    split = per_head(positional, mesh, dim=1)
    return lambda *operands, prefix=None, **options: split(*operands, prefix, **options)


def per_head(attend: Callable, mesh: Mesh | None, dim: int) -> Callable:
    """`attend` where each device has the heads that the table gives it.

    For lanes of the rollout engine, whose shard_map leaves the heads' axis to the compiler: it
    would gather the operands of a kernel that it does not know, and run it on every device. Outside
    of the engine a call is an error of shard_map's.

    Args:
      attend: (q, k, v, *more, **options) -> out; options are static.
      dim: where the heads are, of all operands of more than two dims and of the result.
    """
    if mesh is None or mesh.size == 1:
        return attend
    heads = PartitionSpec(*[None] * dim, rules.RULES["heads"])
    spec = lambda x: heads if x.ndim > 2 else PartitionSpec()

    def split(*operands, **options):
        return jax.shard_map(
            functools.partial(attend, **options),
            in_specs=jax.tree.map(spec, operands),
            out_specs=heads,
            axis_names=set(rules.mesh_axes("heads")),
            check_vma=False,
        )(*operands)

    return split
