"""The decoder: Qwen3 in Flax NNX, and the functional handle that everything else uses.

Parameters travel as a plain nested dict (the NNX module is merged only while tracing):
  embedding [V, D], final_norm [D], lm_head [V, D] when untied, and under `layers`, stacked over L:
  attention_norm [D], wq [D, N, H], wk wv [D, K, H], q_norm k_norm [H], wo [N, H, D],
  mlp_norm [D], w_gate w_up [D, F], w_down [F, D].
A model with a value head has value_head/weight [D] and value_head/bias [1] besides.
Each carries its logical axes as metadata, from which initialisation, shardings, restore targets and
the optimizer's view of it derive.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxreason.kernels.decode import decode_attention, repeat_rows
from jaxreason.model import attention as attention_lib
from jaxreason.model import cache as cache_lib
from jaxreason.model.cache import Cache
from jaxreason.model.config import DecoderConfig
from jaxreason.model.heads import Head, ValueHead, values
from jaxreason.parallel import rules
from jaxreason.types import AttentionMask, Params, pytree_dataclass

REMAT = ("none", "full")


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a decoder runs; none of it changes what it computes, up to rounding."""

    dtype: str = "float32"  # of activations and of the weights as they multiply
    attention: str = "auto"
    remat: str = "none"  # full: every layer is recomputed in the backward pass
    scan_layers: bool = False  # one compiled layer in a loop; unrolled runs about 8 % faster on CPU

    def __post_init__(self):
        if self.remat not in REMAT:
            raise ValueError(f"mesh.remat is {self.remat!r}; it must be one of {', '.join(REMAT)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"mesh.dtype is {self.dtype!r}; it must be float32 or bfloat16")


@pytree_dataclass()
class LayerWeights:
    """One layer's weights as they multiply: cast, and concatenated where that saves matmuls."""

    attention_norm: jax.Array
    qkv: tuple[jax.Array, ...]  # [D, heads, H] each; together N + 2K heads
    q_norm: jax.Array
    k_norm: jax.Array
    wo: jax.Array
    mlp_norm: jax.Array
    gate_up: tuple[jax.Array, ...]  # [D, *] each; together 2F
    w_down: jax.Array


class Block(nnx.Module):
    """The parameters of one layer."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs):
        # Residual branches start small (GPT-2's rule): depth does not grow the stream's variance.
        out_std = c.init_std / math.sqrt(2 * c.num_layers)
        D, F, N, K, H = c.embed_dim, c.mlp_dim, c.num_heads, c.num_kv_heads, c.head_dim
        self.attention_norm = _ones((D,))
        self.wq = _normal(rngs, (D, N, H), ("embed", "heads", "head_dim"), c.init_std)
        self.wk = _normal(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), c.init_std)
        self.wv = _normal(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), c.init_std)
        self.q_norm = _ones((H,))
        self.k_norm = _ones((H,))
        self.wo = _normal(rngs, (N, H, D), ("heads", "head_dim", "embed"), out_std)
        self.mlp_norm = _ones((D,))
        self.w_gate = _normal(rngs, (D, F), ("embed", "mlp"), c.init_std)
        self.w_up = _normal(rngs, (D, F), ("embed", "mlp"), c.init_std)
        self.w_down = _normal(rngs, (F, D), ("mlp", "embed"), out_std)

    def weights(self, dtype: jnp.dtype, fuse: bool) -> LayerWeights:
        cast = lambda p: p[...].astype(dtype)
        join = lambda parts: (jnp.concatenate(parts, axis=1),) if fuse else tuple(parts)
        return LayerWeights(
            attention_norm=self.attention_norm[...],
            qkv=join([cast(self.wq), cast(self.wk), cast(self.wv)]),
            q_norm=self.q_norm[...],
            k_norm=self.k_norm[...],
            wo=cast(self.wo),
            mlp_norm=self.mlp_norm[...],
            gate_up=join([cast(self.w_gate), cast(self.w_up)]),
            w_down=cast(self.w_down),
        )


class Decoder(nnx.Module):
    """The parameters of the whole network; the layers are stacked on a leading L."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, value_head: bool = False):
        table = functools.partial(
            _normal, rngs, (c.vocab_size, c.embed_dim), ("vocab", "embed"), c.init_std
        )
        self.embedding = table()
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers = jax.vmap(lambda key: Block(c, nnx.Rngs(params=key)))(keys)
        self.final_norm = _ones((c.embed_dim,))
        if not c.tie_embeddings:
            self.lm_head = table()
        if value_head:
            self.value_head = ValueHead(c.embed_dim)


def _normal(rngs, shape, axes, std):
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def _ones(shape):
    return nnx.Param(jnp.ones(shape, jnp.float32), axes=("norm",))


# --- the maths of a layer -------------------------------------------------------------------------


def rms_norm(x, scale, eps):
    """Root-mean-square norm over the last dim, in float32. Source: arXiv 1910.07467."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * scale).astype(
        x.dtype
    )


def rope_tables(positions_BT, head_dim, theta):
    """cos and sin [B, T, 1, H/2] of the rotary angles. Source: arXiv 2104.09864."""
    # In numpy's float64: XLA's float32 pow is a few ulp off, which grows with the position.
    frequency = (theta ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angle = positions_BT[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTNH, cos, sin):
    """Rotary embedding on halves (x_i, x_{i + H/2}), the convention of Hugging Face's weights."""
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTNH.dtype)


def project(x, w, num_in: int = 1):
    """x [B, T, *in] times w [*in, *out] over its first `num_in` dims -> [B, T, *out].

    One product of two matrices, sums in float32: the gradient of w of the same einsum over
    [B, T, ...] costs 2.5 times as much on CPU, where XLA then transposes the larger operand.
    """
    *rows, into, out = *x.shape[:2], w.shape[:num_in], w.shape[num_in:]
    x_XI, w_IO = x.reshape(-1, math.prod(into)), w.reshape(math.prod(into), -1)
    out_XO = jnp.einsum("XI,IO->XO", x_XI, w_IO, preferred_element_type=jnp.float32)
    return out_XO.astype(x.dtype).reshape(*rows, *out)


def qkv(c: DecoderConfig, w: LayerWeights, x_BTD, cos, sin):
    """Normed and rotated queries [B,T,N,H], keys and values [B,T,K,H]."""
    h_BTD = rms_norm(x_BTD, w.attention_norm, c.norm_eps)
    heads = jnp.concatenate([project(h_BTD, part) for part in w.qkv], axis=2)
    q_BTNH, k_BTKH, v_BTKH = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2)
    q_BTNH = rotate(rms_norm(q_BTNH, w.q_norm, c.norm_eps), cos, sin)
    k_BTKH = rotate(rms_norm(k_BTKH, w.k_norm, c.norm_eps), cos, sin)
    return q_BTNH, k_BTKH, v_BTKH


def finish_layer(c: DecoderConfig, w: LayerWeights, x_BTD, attended_BTNH):
    """Output projection, then the SwiGLU MLP, both on the residual stream."""
    x_BTD = x_BTD + project(attended_BTNH, w.wo, num_in=2)
    h_BTD = rms_norm(x_BTD, w.mlp_norm, c.norm_eps)
    gate_up = jnp.concatenate([project(h_BTD, part) for part in w.gate_up], axis=-1)
    gate_BTF, up_BTF = jnp.split(gate_up, 2, axis=-1)
    return x_BTD + project(jax.nn.silu(gate_BTF) * up_BTF, w.w_down)


# --- the handle -----------------------------------------------------------------------------------


@pytree_dataclass()
class DecodeWeights:
    """All weights as the decode loop multiplies them, made once before the loop."""

    embedding: jax.Array
    layers: tuple[LayerWeights, ...]
    final_norm: jax.Array
    head_VD: jax.Array


class LanguageModel:
    """Pure functions of a parameter tree: what objectives, samplers and checkpoints see of a model.

    Args:
      valid_vocab: the tokenizer's entries, when the table has more rows (Qwen3: 151,669 of
        151,936); the rest get no probability and no gradient.
      value_head: whether the tree has a scalar-per-token head (PPO); Hugging Face exports drop it.
    Raises ValueError when a weight does not divide on the mesh, or the vocabulary is too small.
    """

    def __init__(
        self,
        config: DecoderConfig,
        execution: Execution = Execution(),
        mesh: Mesh | None = None,
        valid_vocab: int | None = None,
        value_head: bool = False,
    ):
        if valid_vocab is not None and valid_vocab > config.vocab_size:
            raise ValueError(
                f"model.vocab_size = {config.vocab_size} is smaller than "
                f"the tokenizer's {valid_vocab} entries"
            )
        self.config, self.execution, self.mesh = config, execution, mesh
        padded = valid_vocab is not None and valid_vocab < config.vocab_size
        self.valid_vocab = valid_vocab if padded else None
        self.dtype = jnp.dtype(execution.dtype)
        self.head = Head(mesh, self.valid_vocab)
        self._attention = attention_lib.build(execution.attention, mesh)
        # The rollout engine splits rows over the mesh by itself.
        self._attend_lane = attention_lib.build(execution.attention, None)
        # Concatenating weights that are split over the tensor axis would move them between devices.
        self._fuse = mesh is None or rules.axis_size(mesh, "heads") == 1
        self.value_head = value_head
        declare = lambda head: nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), head))
        self._graph = nnx.graphdef(declare(False))
        state = nnx.state(declare(value_head))
        self.shapes: Params = nnx.to_pure_dict(state)
        self.axes: Params = nnx.to_pure_dict(
            jax.tree.map(_logical_axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        )
        if mesh is not None:
            self.shardings()  # raises now, not at the first step

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters."""
        module = Decoder(self.config, nnx.Rngs(params=key), self.value_head)
        return nnx.to_pure_dict(nnx.state(module))

    def with_value_head(self, params: Params) -> Params:
        """The parameters as a tree of this model: a value head that they lack is added, zero."""
        if not self.value_head:
            return params
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes["value_head"])
        return {"value_head": zeros, **params}

    def _module(self, params: Params) -> Decoder:
        """The network alone, which runs on parameters with and without a value head."""
        return nnx.merge(self._graph, {k: v for k, v in params.items() if k != "value_head"})

    def shardings(self) -> Params:
        """Where each weight lives, from the rules table."""

        def of(path, shape, axes):
            name = "/".join(str(getattr(k, "key", k)) for k in path)
            return rules.sharding(self.mesh, name, shape.shape, axes)

        return jax.tree_util.tree_map_with_path(of, self.shapes, self.axes)

    def abstract(self) -> Params:
        """Shapes with the sharding of each weight: what a restore is told to fill."""
        if self.mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: device, self.shapes)
        else:
            places = self.shardings()
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
            self.shapes,
            places,
        )

    @property
    def num_params(self) -> int:
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.shapes))

    # -- training ----------------------------------------------------------------------------------

    def hidden(self, params: Params, tokens_BT, segments_BT, positions_BT) -> jax.Array:
        """hidden_BTD after the final norm, every document of a row on its own."""
        c = self.config
        module = self._module(params)
        mask = AttentionMask(q_segments_BT=segments_BT, kv_segments_BS=segments_BT)
        cos, sin = rope_tables(positions_BT, c.head_dim, c.rope_theta)
        x_BTD = self._embed(module.embedding[...], tokens_BT)

        def layer(x_BTD, block):
            w = block.weights(self.dtype, self._fuse)
            q, k, v = qkv(c, w, x_BTD, cos, sin)
            x_BTD = finish_layer(c, w, x_BTD, self._attention(q, k, v, mask))
            x_BTD = rules.constrain(x_BTD, self.mesh, "batch", "length", "model")
            return x_BTD, None

        if self.execution.remat == "full":
            layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
        unroll = 1 if self.execution.scan_layers else c.num_layers
        x_BTD, _ = jax.lax.scan(layer, x_BTD, module.layers, unroll=unroll)
        return rms_norm(x_BTD, module.final_norm[...], c.norm_eps)

    def head_weight(self, params: Params) -> jax.Array:
        return params["embedding" if self.config.tie_embeddings else "lm_head"]

    def xent(self, params, h_BTD, targets_BT, weights_BT, **options):
        """Weighted sums of the cross-entropy; see kernels.linear_xent.linear_xent."""
        return self.head.xent(h_BTD, self.head_weight(params), targets_BT, weights_BT, **options)

    def logprobs(self, params, h_BTD, targets_BT, **options):
        """(logp_BT, entropy_BT, lse_BT); see kernels.linear_xent.linear_logprobs."""
        return self.head.logprobs(h_BTD, self.head_weight(params), targets_BT, **options)

    def values(self, params: Params, h_BTD: jax.Array) -> jax.Array:
        """values_BT of the value head, float32."""
        return values(params["value_head"], h_BTD)

    def _embed(self, table_VD, tokens_BT):
        # A table split on both dims makes XLA rematerialise it around the gather: gather it whole.
        table_VD = table_VD.astype(self.dtype)
        if self.mesh is not None and self.mesh.size > 1:
            whole = NamedSharding(self.mesh, PartitionSpec())
            table_VD = jax.lax.with_sharding_constraint(table_VD, whole)
        return rules.constrain(table_VD[tokens_BT], self.mesh, "batch", "length", "model")

    # -- generation --------------------------------------------------------------------------------

    def decode_weights(self, params: Params) -> DecodeWeights:
        """The weights as the decode loop multiplies them: cast, joined, gathered over fsdp.

        What stays split is what the tensor axis splits.
        """
        module = self._module(params)
        stacked = jax.vmap(lambda block: block.weights(self.dtype, self._fuse))(module.layers)
        place = lambda x, *axes: rules.constrain(x, self.mesh, *axes)

        def layer(w: LayerWeights) -> LayerWeights:
            return LayerWeights(
                attention_norm=place(w.attention_norm, "norm"),
                qkv=tuple(place(x, "model", "heads", "head_dim") for x in w.qkv),
                q_norm=place(w.q_norm, "norm"),
                k_norm=place(w.k_norm, "norm"),
                wo=place(w.wo, "heads", "head_dim", "model"),
                mlp_norm=place(w.mlp_norm, "norm"),
                gate_up=tuple(place(x, "model", "mlp") for x in w.gate_up),
                w_down=place(w.w_down, "mlp", "model"),
            )

        layers = [jax.tree.map(lambda x: x[i], stacked) for i in range(self.config.num_layers)]
        return DecodeWeights(
            embedding=place(params["embedding"].astype(self.dtype), "norm", "model"),
            layers=tuple(map(layer, layers)),
            final_norm=place(params["final_norm"], "norm"),
            head_VD=place(self.head_weight(params).astype(self.dtype), "vocab", "model"),
        )

    def prefill(self, weights: DecodeWeights, tokens_BT, sizes_B, cache: Cache) -> Cache:
        """Reads the first `sizes_B` tokens of each row after what the cache holds of it.

        The cache needs room for T more positions in every row; the rest of T is written too, beyond
        the row's new length.
        """
        c, T = self.config, tokens_BT.shape[1]
        positions_BT = cache.lengths_B[:, None] + jnp.arange(T)
        cos, sin = rope_tables(positions_BT, c.head_dim, c.rope_theta)
        mask = AttentionMask(q_offset_B=cache.lengths_B)
        x_BTD = weights.embedding[tokens_BT]
        ks, vs = [], []
        for w, k_BKSH, v_BKSH in zip(weights.layers, cache.k, cache.v, strict=True):
            q_BTNH, k_BTKH, v_BTKH = qkv(c, w, x_BTD, cos, sin)
            ks.append(cache_lib.write(k_BKSH, jnp.swapaxes(k_BTKH, 1, 2), cache.lengths_B))
            vs.append(cache_lib.write(v_BKSH, jnp.swapaxes(v_BTKH, 1, 2), cache.lengths_B))
            if len(ks) < c.num_layers:  # of the last layer only keys and values are needed
                k_BSKH, v_BSKH = jnp.swapaxes(ks[-1], 1, 2), jnp.swapaxes(vs[-1], 1, 2)
                attended_BTNH = self._attend_lane(q_BTNH, k_BSKH, v_BSKH, mask)
                x_BTD = finish_layer(c, w, x_BTD, attended_BTNH)
        return Cache(k=tuple(ks), v=tuple(vs), lengths_B=cache.lengths_B + sizes_B)

    def decode(
        self, weights: DecodeWeights, tokens_B, cache: Cache, prefix: Cache | None = None
    ) -> tuple[jax.Array, Cache]:
        """One more token a row -> (logits_BV of the one after it, the cache with it).

        Args:
          prefix: what P neighbouring runs of B / P rows each have before their cache.
        """
        c = self.config
        before_B = 0 if prefix is None else repeat_rows(prefix.lengths_B, tokens_B.shape[0])
        positions_B1 = (before_B + cache.lengths_B)[:, None]
        cos, sin = rope_tables(positions_B1, c.head_dim, c.rope_theta)
        x_BTD = weights.embedding[tokens_B][:, None]
        lengths_B = cache.lengths_B + 1
        ks, vs = [], []
        for i, w in enumerate(weights.layers):
            q_BTNH, k_BTKH, v_BTKH = qkv(c, w, x_BTD, cos, sin)
            ks.append(cache_lib.write(cache.k[i], jnp.swapaxes(k_BTKH, 1, 2), cache.lengths_B))
            vs.append(cache_lib.write(cache.v[i], jnp.swapaxes(v_BTKH, 1, 2), cache.lengths_B))
            shared = prefix and (prefix.k[i], prefix.v[i], prefix.lengths_B)
            out_BNH = decode_attention(q_BTNH[:, 0], ks[-1], vs[-1], lengths_B, prefix=shared)
            x_BTD = finish_layer(c, w, x_BTD, out_BNH[:, None])
        h_BD = rms_norm(x_BTD[:, 0], weights.final_norm, c.norm_eps)
        logits_BV = self._logits(h_BD, weights.head_VD)
        return logits_BV, Cache(k=tuple(ks), v=tuple(vs), lengths_B=lengths_B)

    def _logits(self, h_BD, head_VD):
        logits_BV = jnp.einsum("BD,VD->BV", h_BD, head_VD, preferred_element_type=jnp.float32)
        if self.valid_vocab is None:
            return logits_BV
        return jnp.where(jnp.arange(self.config.vocab_size) < self.valid_vocab, logits_BV, -jnp.inf)


def _logical_axes(variable: nnx.Variable) -> tuple[str, ...]:
    """The axes a weight was declared with; a stacked one has one dim more, in front."""
    axes, ndim = tuple(variable.get_metadata("axes")), variable.get_value().ndim
    return ("layer",) * (ndim - len(axes)) + axes
