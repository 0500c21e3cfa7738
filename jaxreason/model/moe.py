"""A mixture of experts in place of the MLP: the router, dropless dispatch, and its balance.

Source: Qwen3 (arXiv 2505.09388): top-k of a softmax over all experts, no shared expert; the balance
of the global batch (arXiv 2501.11873).

On a mesh every device routes its own tokens. Devices that differ in the axes `expert` and `tensor`
alone are peers: together they hold every expert. Tokens are gathered among peers, each device adds
up what its own experts give, and the sums are scattered back to where the tokens live.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxreason.kernels import grouped
from jaxreason.model.products import whole
from jaxreason.parallel import mesh as mesh_lib
from jaxreason.parallel import rules
from jaxreason.types import pytree_dataclass

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate_EDF, up_EDF, down_EFD

# A device's even share of the rows is worked through in this many parts. More make the buffers
# smaller, fewer the sums of weight gradients; a device with more than its share takes more parts.
_PARTS = 4
_WEIGHT_AXES = (
    ("expert", "expert_embed", "mlp"),
    ("expert", "expert_embed", "mlp"),
    ("expert", "mlp", "expert_embed"),
)
_TOKEN_AXES = rules.mesh_axes("batch") + rules.mesh_axes("residual")


@pytree_dataclass()
class Routing:
    """Where one layer's tokens went: sums over tokens, so that parts of a batch add up."""

    counts_E: jax.Array  # float32, tokens that chose each expert; sums to k times the tokens
    probs_E: jax.Array  # float32, the router's probabilities


def route(
    h_XD: jax.Array, router_DE: jax.Array, num_chosen: int, normalised: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(probs_XE, the chosen experts' weights_XK and ids_XK), all but the ids in float32.

    The product too is in float32: rounded to bf16 it changes which experts are chosen.
    """
    logits_XE = jnp.einsum(
        "XD,DE->XE",
        h_XD.astype(jnp.float32),
        router_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    probs_XE = jax.nn.softmax(logits_XE, axis=-1)
    weights_XK, ids_XK = jax.lax.top_k(probs_XE, num_chosen)
    if normalised:
        weights_XK = weights_XK / weights_XK.sum(-1, keepdims=True)
    return probs_XE, weights_XK, ids_XK


def mixture(
    h_XD, weights_XK, ids_XK, experts: Weights, activation: Callable, implementation: str = "loop"
) -> jax.Array:
    """out_XD: the weighted sum of each token's experts; every token reaches every one it chose."""
    (X, K), E = ids_XK.shape, experts[0].shape[0]
    by_expert_R = jnp.argsort(ids_XK.reshape(-1), stable=True)
    sizes_E = jnp.bincount(ids_XK.reshape(-1), length=E)
    rows_RD = h_XD[by_expert_R // K]
    out_RD = _mlps(activation, implementation, sizes_E, rows_RD, experts)
    out_XKD = out_RD[jnp.argsort(by_expert_R)].reshape(X, K, -1)  # back in the order of tokens
    mixed_XD = jnp.einsum("XKD,XK->XD", out_XKD, weights_XK, preferred_element_type=jnp.float32)
    return mixed_XD.astype(h_XD.dtype)


def _mlps(activation: Callable, implementation: str, sizes_E, rows_RD, experts: Weights):
    """Each row's gated MLP; zeros for rows beyond the sizes."""
    gate_EDF, up_EDF, down_EFD = experts
    product = lambda x, w: grouped.grouped_matmul(x, w, sizes_E, implementation)
    return product(activation(product(rows_RD, gate_EDF)) * product(rows_RD, up_EDF), down_EFD)


def summarise(probs_XE, ids_XK, real_X) -> Routing:
    """Over the tokens that are real: the others, padding, load no expert that matters."""
    E = probs_XE.shape[-1]
    chosen_XE = jax.nn.one_hot(ids_XK, E, dtype=jnp.float32).sum(1)
    real_X = real_X.astype(jnp.float32)
    return Routing(
        counts_E=jnp.einsum("XE,X->E", chosen_XE, real_X),
        probs_E=jnp.einsum("XE,X->E", probs_XE, real_X),
    )


def balance(routing_L: Routing, load_LE: jax.Array) -> jax.Array:
    """The load-balancing loss, summed over the tokens of `routing_L`: E sum_e load_e prob_e.

    A mean over layers, as published; transformers pools the layers' counts, so that one layer's
    imbalance may hide another's. Perfect balance gives k a token.

    Args:
      routing_L: stacked over layers.
      load_LE: the share of the *global* batch's tokens that chose each expert; no gradient.
    """
    E = load_LE.shape[-1]
    per_layer_L = E * jnp.einsum("LE,LE->L", jax.lax.stop_gradient(load_LE), routing_L.probs_E)
    return per_layer_L.mean()


def load(counts_LE: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """The share of the tokens that chose each expert; zeros where there are no tokens."""
    return counts_LE / jnp.maximum(num_tokens, 1)


# --- on the mesh ----------------------------------------------------------------------------------


def build(implementation: str, mesh: Mesh | None) -> tuple["Experts", "Experts"]:
    """Experts as training runs them, and as the rollout engine does, which splits rows by itself.

    Raises ValueError for an unknown implementation, or one that the devices cannot run.
    """
    implementation = grouped.choose(implementation, mesh_lib.platform(mesh))
    return Experts(mesh, implementation), Experts(None, implementation)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Router and experts, where they lie.

    On a mesh nothing but the layer's input is kept for the backward pass: kept, gathered experts
    would undo their sharding.
    """

    mesh: Mesh | None = None
    implementation: str = "loop"  # of kernels/grouped.py

    def __call__(
        self,
        h_BTD: jax.Array,
        real_BT: jax.Array | None,
        router_DE: jax.Array,
        experts: Weights,
        *,
        num_chosen: int,
        normalised: bool,
        activation: Callable,
    ) -> tuple[jax.Array, Routing | None]:
        """(out_BTD, the routing of the global batch's tokens `real_BT`, or None without them)."""
        choose = functools.partial(route, num_chosen=num_chosen, normalised=normalised)
        if self.mesh is None or self.mesh.size == 1:
            h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
            probs_XE, weights_XK, ids_XK = choose(h_XD, router_DE)
            out_XD = mixture(h_XD, weights_XK, ids_XK, experts, activation, self.implementation)
            routing = None if real_BT is None else summarise(probs_XE, ids_XK, real_BT.reshape(-1))
            return out_XD.reshape(h_BTD.shape), routing

        @jax.checkpoint
        def local(h_BTD, real_BT, router_DE, experts):
            h_XD = h_BTD.reshape(-1, h_BTD.shape[-1])
            probs_XE, weights_XK, ids_XK = choose(h_XD, router_DE)
            out_XD = self._exchanged(h_XD, weights_XK, ids_XK, self._whole(experts), activation)
            routing = summarise(probs_XE, ids_XK, real_BT.reshape(-1))
            return out_XD.reshape(h_BTD.shape), jax.lax.psum(routing, _TOKEN_AXES)

        stream = rules.spec(("batch", "residual"))
        weights = tuple(rules.spec(axes) for axes in _WEIGHT_AXES)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(stream, stream, PartitionSpec(), weights),
            out_specs=(stream, PartitionSpec()),
            check_vma=False,
        )(h_BTD, real_BT, router_DE, experts)

    def _split(self, *axes: str) -> tuple[str, ...]:
        return tuple(axis for axis in axes if self.mesh.shape[axis] > 1)

    def _whole(self, experts: Weights) -> Weights:
        """A device's experts, gathered over the axes that split their D; their F stays split."""
        named = zip(experts, _WEIGHT_AXES)
        return tuple(whole(w, axes, self.mesh, dim="expert_embed") for w, axes in named)

    def _exchanged(self, h_XD, weights_XK, ids_XK, experts: Weights, activation) -> jax.Array:
        """out_XD of a device's own tokens, which its peers' experts have seen too."""
        peers = self._split("expert", "tensor")
        if not peers:
            return mixture(h_XD, weights_XK, ids_XK, experts, activation, self.implementation)
        gather = lambda x: jax.lax.all_gather(x, peers, tiled=True)
        h_XD, weights_XK, ids_XK = gather(h_XD), gather(weights_XK), gather(ids_XK)
        ways, E = self.mesh.shape["expert"], experts[0].shape[0]
        if ways == 1:
            out_XD = mixture(h_XD, weights_XK, ids_XK, experts, activation, self.implementation)
        else:
            ids_XK = ids_XK - E * jax.lax.axis_index("expert")
            ids_XK = jnp.where((ids_XK >= 0) & (ids_XK < E), ids_XK, E)
            mlps = functools.partial(_mlps, activation, self.implementation)
            part = -(-ids_XK.size // (ways * _PARTS))
            out_XD = _own_mixture(mlps, part, h_XD, weights_XK, ids_XK, experts)
        # Rounded before they are added over peers, as other exchanges of activations are.
        out_XD = out_XD.astype(h_XD.dtype)
        return jax.lax.psum_scatter(out_XD, peers, scatter_dimension=0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _own_mixture(mlps: Callable, part: int, h_XD, weights_XK, ids_XK, experts: Weights):
    """float32 out_XD: the weighted sum of the experts that are here, whatever their load.

    Rows are sorted by expert and worked through `part` at a time, those that chose an expert that
    is not here not at all. So time follows the load and memory does not.

    Args:
      mlps: `(sizes_E, rows_RD, experts) -> out_RD`.
      ids_XK: E for an expert that is not here.
    """
    rows, num_parts = _sorted_rows(part, weights_XK, ids_XK, experts[0].shape[0])

    def add(i, out_XD):
        token_R, _, weight_R, sizes_E = rows(i)
        out_RD = mlps(sizes_E, h_XD[token_R], experts)
        return out_XD.at[token_R].add(out_RD * weight_R[:, None])

    return jax.lax.fori_loop(0, num_parts, add, jnp.zeros(h_XD.shape, jnp.float32))


def _own_mixture_forward(mlps, part, *operands):
    return _own_mixture(mlps, part, *operands), operands


def _own_mixture_backward(mlps, part, operands, dout_XD):
    h_XD, weights_XK, ids_XK, experts = operands
    rows, num_parts = _sorted_rows(part, weights_XK, ids_XK, experts[0].shape[0])

    def add(i, sums):
        dh_XD, dweights_N, dexperts = sums
        token_R, choice_R, weight_R, sizes_E = rows(i)
        dout_RD = dout_XD[token_R]
        out_RD, pullback = jax.vjp(functools.partial(mlps, sizes_E), h_XD[token_R], experts)
        drows_RD, dparts = pullback((dout_RD * weight_R[:, None]).astype(out_RD.dtype))
        return (
            dh_XD.at[token_R].add(drows_RD.astype(jnp.float32)),
            dweights_N.at[choice_R].add(jnp.einsum("RD,RD->R", dout_RD, out_RD)),
            jax.tree.map(jnp.add, dexperts, dparts),
        )

    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    start = (zeros(h_XD), zeros(weights_XK.reshape(-1)), jax.tree.map(zeros, experts))
    dh_XD, dweights_N, dexperts = jax.lax.fori_loop(0, num_parts, add, start)
    dexperts = jax.tree.map(lambda d, w: d.astype(w.dtype), dexperts, experts)
    return dh_XD.astype(h_XD.dtype), dweights_N.reshape(weights_XK.shape), None, dexperts


_own_mixture.defvjp(_own_mixture_forward, _own_mixture_backward)


def _sorted_rows(part: int, weights_XK, ids_XK, num_experts: int):
    """(`i -> (token, choice among X K, weight, sizes_E)` of the i-th part's rows, their number).

    The rows of the last part that are beyond the sizes have no expert here.
    """
    ids_N, weights_N = ids_XK.reshape(-1), weights_XK.reshape(-1)
    by_expert_N = jnp.pad(jnp.argsort(ids_N, stable=True), (0, part))
    ends_E = jnp.cumsum(jnp.bincount(ids_N, length=num_experts))

    def rows(i):
        choice_R = jax.lax.dynamic_slice_in_dim(by_expert_N, i * part, part)
        sizes_E = jnp.diff(jnp.clip(ends_E - i * part, 0, part), prepend=0)
        return choice_R // ids_XK.shape[1], choice_R, weights_N[choice_R], sizes_E

    return rows, -(-ends_E[-1] // part)
