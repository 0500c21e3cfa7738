"""Which attention implementation runs, and how it is laid on the mesh."""

from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxreason.kernels import blockwise, reference
from jaxreason.parallel import rules
from jaxreason.types import AttentionMask

Attention = Callable[[jax.Array, jax.Array, jax.Array, AttentionMask], jax.Array]

# Both honour all that AttentionMask can say, on every platform.
IMPLEMENTATIONS = {"blockwise": blockwise.attention, "reference": reference.attention}


def build(name: str, mesh: Mesh | None) -> Attention:
    """`attention(q_BTNH, k_BSKH, v_BSKH, mask) -> out_BTNH`.

    On a mesh it runs under shard_map, batch and heads split as the table says, so that it is never
    replicated by accident. `auto` is `blockwise`. Raises ValueError for an unknown name.
    """
    name = "blockwise" if name == "auto" else name
    if name not in IMPLEMENTATIONS:
        known = ", ".join(["auto", *IMPLEMENTATIONS])
        raise ValueError(f"mesh.attention is {name!r}; known implementations: {known}")
    kernel = IMPLEMENTATIONS[name]

    def attend(q_BTNH, k_BSKH, v_BSKH, mask):
        return kernel(q_BTNH, k_BSKH, v_BSKH, mask)[0]

    if mesh is None or mesh.size == 1:
        return attend
    heads = rules.spec(("batch", "length", "heads", "head_dim"))
    rows = PartitionSpec(rules.BATCH_AXES)

    def sharded(q_BTNH, k_BSKH, v_BSKH, mask):
        specs = (heads, heads, heads, jax.tree.map(lambda _: rows, mask))
        return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
            q_BTNH, k_BSKH, v_BSKH, mask
        )

    return sharded
