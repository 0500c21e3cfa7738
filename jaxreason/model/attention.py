"""Which attention implementation runs, and how it is laid on the mesh."""

import functools
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jaxreason.kernels import blockwise, reference, ring
from jaxreason.kernels.ring import Kernel, Ring
from jaxreason.parallel import rules
from jaxreason.types import AttentionMask

Attention = Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]

# Both honour all that AttentionMask can say, on every platform.
IMPLEMENTATIONS = {
    "blockwise": Kernel(blockwise.attention, blockwise.gradients),
    "reference": Kernel(reference.attention, reference.attention_gradients),
}


def build(name: str, mesh: Mesh | None, exchange: str = "ring") -> Attention:
    """`attention(q_BTNH, k_BSKH, v_BSKH, mask) -> out_BTNH`.

    On a mesh it runs under shard_map, batch and heads split as the table says, so that it is never
    replicated by accident. Where the context axis splits rows, they are in the order of
    `ring.stripes`. `auto` is `blockwise`. Raises ValueError for an unknown name.
    """
    name = "blockwise" if name == "auto" else name
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"mesh.attention is {name!r}; known implementations: {known}")
    kernel = IMPLEMENTATIONS[name]
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
