"""One layer: its parameters and its maths. What differs between families is in Family's switches.

Parameters: attention_norm [D], wq [D, N, H], wk wv [D, K, H], wo [N, H, D], mlp_norm [D], and
  w_gate w_up [D, F], w_down [F, D]   or, of experts, router [D, E], [E, D, F] twice and [E, F, D];
  bq [N, H], bk bv [K, H]             where queries, keys and values have biases;
  q_norm k_norm [H]                   where queries and keys are normed;
  post_attention_norm post_mlp_norm [D]   where a layer's outputs are.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxreason.model import moe
from jaxreason.model.config import DecoderConfig
from jaxreason.model.products import column_parallel, row_parallel
from jaxreason.model.rope import rotate
from jaxreason.parallel import rules
from jaxreason.types import Params, pytree_dataclass

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


@pytree_dataclass()
class LayerWeights:
    """One layer's weights as they multiply: cast, norms with their offset, and concatenated where
    that saves matmuls. What a family does not have is None."""

    attention_norm: jax.Array
    qkv: tuple[jax.Array, ...]  # [D, heads, H] each; together N + 2K heads
    qkv_bias: tuple[jax.Array, ...] | None  # [heads, H] each, as qkv
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    wo: jax.Array
    post_attention_norm: jax.Array | None
    mlp_norm: jax.Array
    router: jax.Array | None  # [D, E], float32
    gate_up: tuple[jax.Array, ...]  # [D, *] each, together 2F; of experts [E, D, F] each
    w_down: jax.Array
    post_mlp_norm: jax.Array | None
    lora: Params | None = None  # weight -> {"a", "b"}, b scaled

    def adapters(self, *names: str) -> tuple[Params | None, ...]:
        return tuple((self.lora or {}).get(name) for name in names)


class Block(nnx.Module):
    """The parameters of one layer."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        # Residual branches start small (GPT-2's rule): depth does not grow the stream's variance.
        out_std = c.init_std / math.sqrt(2 * c.num_layers)
        D, F, N, K, H = c.embed_dim, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
        E, traits = c.num_experts, c.traits
        self.attention_norm = norm_scale(c, D)
        self.wq = normal(rngs, (D, N, H), ("embed", "heads", "head_dim"), c.init_std)
        self.wk = normal(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), c.init_std)
        self.wv = normal(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), c.init_std)
        if traits.qkv_bias:
            self.bq, self.bk, self.bv = _bias(N, H), _bias(K, H), _bias(K, H)
        if traits.qk_norm:
            self.q_norm, self.k_norm = norm_scale(c, H), norm_scale(c, H)
        self.wo = normal(rngs, (N, H, D), ("heads", "head_dim", "embed"), out_std)
        if traits.post_norms:
            self.post_attention_norm, self.post_mlp_norm = norm_scale(c, D), norm_scale(c, D)
        self.mlp_norm = norm_scale(c, D)
        expert, of_expert = ((E,), ("expert",)) if traits.experts else ((), ())
        if traits.experts:
            self.router = normal(rngs, (D, E), ("embed", "router"), c.init_std)
        embed = "expert_embed" if traits.experts else "embed"
        into, out = (*of_expert, embed, "mlp"), (*of_expert, "mlp", embed)
        self.w_gate = normal(rngs, (*expert, D, F), into, c.init_std)
        self.w_up = normal(rngs, (*expert, D, F), into, c.init_std)
        self.w_down = normal(rngs, (*expert, F, D), out, out_std)

    def weights(
        self,
        c: DecoderConfig,
        dtype: jnp.dtype,
        fuse: bool,
        lora: Params | None = None,
        in_parts: bool = False,
    ) -> LayerWeights:
        """As the layer multiplies them; `lora` are this layer's adapters, b scaled.

        Args:
          in_parts: matrices keep their type, for products.py casts them where it gathers them.
        """
        cast = lambda p: p[...].astype(dtype)
        matrix = (lambda p: p[...]) if in_parts else cast
        norm = lambda name: multiplier(c, getattr(self, name)[...]) if hasattr(self, name) else None
        fuse = fuse and lora is None
        join = lambda axis, *parts: (jnp.concatenate(parts, axis),) if fuse else parts
        of_mlp = cast if c.traits.experts else matrix
        gate_up = of_mlp(self.w_gate), of_mlp(self.w_up)
        bias = None
        if c.traits.qkv_bias:
            bias = join(0, cast(self.bq), cast(self.bk), cast(self.bv))
        return LayerWeights(
            attention_norm=norm("attention_norm"),
            qkv=join(1, matrix(self.wq), matrix(self.wk), matrix(self.wv)),
            qkv_bias=bias,
            q_norm=norm("q_norm"),
            k_norm=norm("k_norm"),
            wo=matrix(self.wo),
            post_attention_norm=norm("post_attention_norm"),
            mlp_norm=norm("mlp_norm"),
            router=self.router[...] if c.traits.experts else None,
            gate_up=gate_up if c.traits.experts else join(1, *gate_up),
            w_down=of_mlp(self.w_down),
            post_mlp_norm=norm("post_mlp_norm"),
            lora=None if lora is None else jax.tree.map(lambda x: x.astype(dtype), lora),
        )


def normal(rngs, shape, axes, std) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def norm_scale(c: DecoderConfig, size: int) -> nnx.Param:
    """A norm's weight, so that offset + weight is 1."""
    return nnx.Param(jnp.full((size,), 1 - c.traits.norm_offset, jnp.float32), axes=("norm",))


def multiplier(c: DecoderConfig, scale):
    """What a norm multiplies by, float32: 1 + w of a weight stored in bf16 does not fit bf16."""
    scale = scale.astype(jnp.float32)
    return scale + c.traits.norm_offset if c.traits.norm_offset else scale


def _bias(heads: int, head_dim: int) -> nnx.Param:
    return nnx.Param(jnp.zeros((heads, head_dim), jnp.float32), axes=("bias", "head_dim"))


# --- the maths ------------------------------------------------------------------------------------


def rms_norm(x, scale, eps):
    """Root-mean-square norm over the last dim, in float32. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * scale).astype(
        x.dtype
    )


def qkv(c: DecoderConfig, w: LayerWeights, x_BTD, cos, sin, mesh: Mesh | None = None):
    """Normed and rotated queries [B,T,N,H], keys and values [B,T,K,H]."""
    h_BTD = _normed(c, x_BTD, w.attention_norm, mesh)
    parts = column_parallel(h_BTD, w.qkv, w.adapters("wq", "wk", "wv"), mesh)
    parts = [checkpoint_name(part, "qkv") for part in parts]
    if w.qkv_bias is not None:
        parts = [part + bias for part, bias in zip(parts, w.qkv_bias, strict=True)]
    if len(parts) == 1:  # joined
        parts = jnp.split(parts[0], [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
    q_BTNH, k_BTKH, v_BTKH = parts
    if w.q_norm is not None:
        q_BTNH = rms_norm(q_BTNH, w.q_norm, c.norm_eps)
        k_BTKH = rms_norm(k_BTKH, w.k_norm, c.norm_eps)
    return rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin), v_BTKH


def finish_layer(
    c: DecoderConfig,
    w: LayerWeights,
    x_BTD,
    attended_BTNH,
    experts: moe.Experts,
    real_BT=None,
    mesh: Mesh | None = None,
):
    """Output projection, then the gated MLP, both on the residual stream.

    Returns (x_BTD, moe.Routing over the tokens of `real_BT`, or None without it or experts).
    """
    out_BTD = row_parallel(attended_BTNH, w.wo, *w.adapters("wo"), mesh)
    out_BTD = checkpoint_name(out_BTD, "attention_projection")
    x_BTD = x_BTD + _post_norm(c, out_BTD, w.post_attention_norm)
    if c.traits.experts:
        out_BTD, routing = _experts(c, w, x_BTD, experts, real_BT)
    else:
        out_BTD, routing = _mlp(c, w, x_BTD, mesh), None
    return x_BTD + _post_norm(c, out_BTD, w.post_mlp_norm), routing


def _normed(c: DecoderConfig, x_BTD, scale, mesh: Mesh | None):
    """The stream normed where it lies, split along T over the tensor axis too."""
    return rules.constrain(rms_norm(x_BTD, scale, c.norm_eps), mesh, "batch", "residual", "model")


def _post_norm(c: DecoderConfig, out_BTD, scale):
    return out_BTD if scale is None else rms_norm(out_BTD, scale, c.norm_eps)


def _mlp(c: DecoderConfig, w: LayerWeights, x_BTD, mesh: Mesh | None):
    h_BTD = _normed(c, x_BTD, w.mlp_norm, mesh)
    parts = column_parallel(h_BTD, w.gate_up, w.adapters("w_gate", "w_up"), mesh)
    if len(parts) == 1:  # joined
        parts = jnp.split(parts[0], 2, axis=-1)
    gate_BTF, up_BTF = (checkpoint_name(part, "gate_up") for part in parts)
    inner_BTF = _ACTIVATIONS[c.traits.activation](gate_BTF) * up_BTF
    return row_parallel(inner_BTF, w.w_down, *w.adapters("w_down"), mesh)


def _experts(c: DecoderConfig, w: LayerWeights, x_BTD, experts: moe.Experts, real_BT):
    """The stream is normed where it lies; it is the experts that gather it."""
    return experts(
        rms_norm(x_BTD, w.mlp_norm, c.norm_eps),
        real_BT,
        w.router,
        (*w.gate_up, w.w_down),
        num_chosen=c.experts_per_token,
        normalised=c.norm_expert_weights,
        activation=_ACTIVATIONS[c.traits.activation],
    )
