"""The decoder in Flax NNX, and the functional handle that everything else uses.

Parameters travel as a plain nested dict (the NNX module is merged only while tracing):
  embedding [V, D], final_norm [D], lm_head [V, D] when untied, and under `layers`, stacked over L,
  those of model/layer.py. A value head has value_head/weight [D] and value_head/bias [1] besides,
  LoRA adapters are under `lora` (model/lora.py).
Each carries its logical axes as metadata, from which initialisation, shardings, restore targets and
the optimizer's view of it derive.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxreason.kernels.decode import repeat_rows
from jaxreason.model import attention as attention_lib
from jaxreason.model import cache as cache_lib
from jaxreason.model import decode_choice, moe, rope
from jaxreason.model import lora as lora_lib
from jaxreason.model.cache import Cache
from jaxreason.model.config import DecoderConfig
from jaxreason.model.execution import Execution
from jaxreason.model.heads import Head, ValueHead, values
from jaxreason.model.layer import (
    Block,
    LayerWeights,
    finish_layer,
    multiplier,
    norm_scale,
    normal,
    qkv,
    rms_norm,
)
from jaxreason.model.lora import LoraConfig
from jaxreason.model.products import splits_weights
from jaxreason.model.rows import Rows
from jaxreason.parallel import mesh as mesh_lib
from jaxreason.parallel import rules
from jaxreason.types import AttentionMask, Params, pytree_dataclass

_LOAD = "expert_load"  # beside the parameters, where they see a part of the batch


class Decoder(nnx.Module):
    """The parameters of the whole network; the layers are stacked on a leading L."""

    def __init__(self, c: DecoderConfig, rngs: nnx.Rngs, value_head: bool = False):
        table = functools.partial(
            normal, rngs, (c.vocab_size, c.embed_dim), ("vocab", "embed"), c.init_std
        )
        self.embedding = table()
        keys = jax.random.split(rngs.params(), c.num_layers)
        self.layers = jax.vmap(lambda key: Block(c, nnx.Rngs(params=key)))(keys)
        self.final_norm = norm_scale(c, c.embed_dim)
        if not c.tie_embeddings:
            self.lm_head = table()
        if value_head:
            self.value_head = ValueHead(c.embed_dim)


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
      lora: adapters are what is trained: `init`, `shapes`, `axes`, `shardings` and `abstract` are
        theirs, and `complete` joins them with the frozen base that they adapt.
    Raises ValueError when a weight does not divide on the mesh, or the vocabulary is too small.
    """

    def __init__(
        self,
        config: DecoderConfig,
        execution: Execution = Execution(),
        mesh: Mesh | None = None,
        valid_vocab: int | None = None,
        value_head: bool = False,
        lora: LoraConfig | None = None,
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
        use = attention_lib.Use(
            platform=mesh_lib.platform(mesh),
            dtype=execution.dtype,
            head_dim=config.head_dim,
            capability=mesh_lib.capability(mesh),
            window=any(config.sliding),
            parts=mesh is not None and rules.axis_size(mesh, "length") > 1,
        )
        self.attention_use, self.attention = use, attention_lib.choose(execution.attention, use)
        deterministic = execution.deterministic
        self._attention = attention_lib.build(
            self.attention, mesh, execution.context, deterministic
        )
        self.rows = Rows(mesh)
        # The rollout engine splits rows over the mesh by itself.
        lane = dataclasses.replace(use, segments=False, offset=True, parts=False)
        able = not attention_lib.IMPLEMENTATIONS[self.attention].reasons(lane)
        prefills = attention_lib.choose(self.attention if able else "auto", lane)
        self._attend_lane = attention_lib.build(prefills, None)
        if prefills not in attention_lib.PLAIN:
            self._attend_lane = decode_choice.per_head(self._attend_lane, mesh, dim=2)
        self.cache_dtype = jnp.dtype(execution.cache_dtype)
        self.decode_use = decode_choice.Use(
            use.platform, use.dtype, execution.cache_dtype, use.head_dim, use.window
        )
        self.decode_attention = decode_choice.choose(execution.decode_attention, self.decode_use)
        self._decode_attention = decode_choice.build(self.decode_attention, mesh)
        self._experts, self._experts_lane = moe.build(execution.experts, mesh)
        # Concatenating weights that are split over the tensor axis would move them between devices.
        self._fuse = mesh is None or rules.axis_size(mesh, "heads") == 1
        self.value_head, self.lora = value_head, lora
        declare = lambda head: nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), head))
        self._graph = nnx.graphdef(declare(False))
        state = nnx.state(declare(value_head))
        self.shapes: Params = nnx.to_pure_dict(state)
        self.axes: Params = nnx.to_pure_dict(
            jax.tree.map(_logical_axes, state, is_leaf=lambda v: isinstance(v, nnx.Variable))
        )
        self.body_params = _params_met(self.shapes["layers"], self.axes["layers"], config)
        if lora is not None:
            shapes, axes = lora_lib.declare(lora, self.shapes, self.axes)
            if value_head:
                shapes["value_head"] = self.shapes["value_head"]
                axes["value_head"] = self.axes["value_head"]
            self.shapes, self.axes = shapes, axes
        if mesh is not None:
            self.shardings()  # raises now, not at the first step

    def adapted(self, lora: LoraConfig | None, value_head: bool = False) -> "LanguageModel":
        """This plain model as a stage trains it; itself where that trains all of it and no more.

        Raises ValueError where the adapters do not fit the model.
        """
        if lora is None and not value_head:
            return self
        return LanguageModel(
            self.config, self.execution, self.mesh, self.valid_vocab, value_head, lora
        )

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters; adapters that change nothing yet, of a LoRA model."""
        if self.lora is not None:
            return self.with_value_head(lora_lib.init(self.shapes, key))
        module = Decoder(self.config, nnx.Rngs(params=key), self.value_head)
        return nnx.to_pure_dict(nnx.state(module))

    def with_value_head(self, params: Params) -> Params:
        """The parameters as a tree of this model: a value head that they lack is added, zero."""
        if not self.value_head:
            return params
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes["value_head"])
        return {"value_head": zeros, **params}

    def complete(
        self, params: Params, frozen: Params | None, expert_load_LE: jax.Array | None = None
    ) -> Params:
        """The tree that the functions below read: of a LoRA model, frozen base and scaled adapters.

        It says by itself what the adapters add, so that a plain model of the same shape reads it.

        Args:
          frozen: the base of a LoRA model; a plain model has no use for it.
          expert_load_LE: of the global batch, where `params` see a part of it; see `moe.balance`.
        """
        whole = params if self.lora is None else {**frozen, **lora_lib.scaled(self.lora, params)}
        return whole if expert_load_LE is None else {**whole, _LOAD: expert_load_LE}

    def merge(self, params: Params) -> Params:
        """The complete tree without adapters: they become part of the weights, in float32."""
        return lora_lib.merge(params) if "lora" in params else params

    def _module(self, params: Params) -> Decoder:
        """The network alone, whatever else the tree has."""
        own = ("embedding", "layers", "final_norm", "lm_head")
        return nnx.merge(self._graph, {k: v for k, v in params.items() if k in own})

    def shardings(self) -> Params:
        """Where each weight lives, from the rules table."""

        def of(path, shape, axes):
            name = "/".join(str(getattr(k, "key", k)) for k in path)
            return rules.sharding(self.mesh, name, shape.shape, axes)

        return jax.tree_util.tree_map_with_path(of, self.shapes, self.axes)

    def abstract(self, dtype: jnp.dtype | None = None) -> Params:
        """Shapes with the sharding of each weight: what a restore is told to fill.

        Args:
          dtype: None is float32.
        """
        if self.mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            places = jax.tree.map(lambda _: device, self.shapes)
        else:
            places = self.shardings()
        return jax.tree.map(
            lambda s, place: jax.ShapeDtypeStruct(s.shape, dtype or s.dtype, sharding=place),
            self.shapes,
            places,
        )

    @property
    def has_experts(self) -> bool:
        return self.config.traits.experts

    @property
    def expert_product(self) -> str | None:
        """The implementation of kernels/grouped.py that runs; None without experts."""
        return self._experts.implementation if self.has_experts else None

    @property
    def num_params(self) -> int:
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.shapes))

    # -- training ----------------------------------------------------------------------------------

    def hidden(self, params: Params, tokens_BT, segments_BT, positions_BT) -> jax.Array:
        """hidden_BTD after the final norm, every document of a row on its own.

        Where the mesh splits rows, T is that of `Rows.arranged`: only the head's functions below
        know which position is where.
        """
        return self._forward(params, tokens_BT, segments_BT, positions_BT)[0]

    def hidden_and_balance(self, params: Params, tokens_BT, segments_BT, positions_BT):
        """(hidden_BTD, the load-balancing loss summed over the tokens; None without experts)."""
        h_BTD, routing_L = self._forward(params, tokens_BT, segments_BT, positions_BT)
        if routing_L is None:
            return h_BTD, None
        load_LE = params.get(_LOAD)
        if load_LE is None:
            load_LE = moe.load(routing_L.counts_E, (segments_BT != 0).sum())
        return h_BTD, moe.balance(routing_L, load_LE)

    def routing(self, params: Params, tokens_BT, segments_BT, positions_BT) -> moe.Routing:
        """Where the tokens went, stacked over layers."""
        return self._forward(params, tokens_BT, segments_BT, positions_BT)[1]

    def _forward(self, params, tokens_BT, segments_BT, positions_BT):
        c = self.config
        module = self._module(params)
        tokens_BT, segments_BT, positions_BT = (
            self.rows.arranged(x_BT) for x_BT in (tokens_BT, segments_BT, positions_BT)
        )
        angles = self._angles(positions_BT)
        real_BT = segments_BT != 0
        in_parts = splits_weights(self.mesh)

        def layer(sliding: bool):
            mask = self._mask(sliding, q_segments_BT=segments_BT, kv_segments_BS=segments_BT)

            def apply(x_BTD, parameters):
                block, adapters = parameters
                w = block.weights(c, self.dtype, self._fuse, adapters, in_parts)
                q, k, v = qkv(c, w, x_BTD, *angles[sliding], mesh=self.mesh)
                attended_BTNH = self._attention(q, k, v, mask)
                return finish_layer(c, w, x_BTD, attended_BTNH, self._experts, real_BT, self.mesh)

            # A mixture decides by itself what its experts keep (moe.py): a policy around it that
            # saves all else would keep their inner rows.
            return self.execution.rematerialised(apply, in_parts and not c.traits.experts)

        x_BTD, routing_L = _scan_layers(
            {sliding: layer(sliding) for sliding in set(c.sliding)},
            c.sliding,
            self._embed(module.embedding[...], tokens_BT),
            (module.layers, params["lora"]["layers"] if "lora" in params else None),
            unroll=not self.execution.scan_layers,
        )
        return self._final_norm(x_BTD, module.final_norm[...]), routing_L

    def _angles(self, positions_BT) -> dict[bool, tuple[jax.Array, jax.Array]]:
        """cos and sin of the layers that slide (True) and that do not (False), of those there are.

        A model with a base of its own for sliding layers scales the others' alone.
        """
        c = self.config
        whole, local = (c.rope_theta, c.rope_scaling), (c.local_rope_theta, None)
        of = {False: whole, True: whole if c.local_rope_theta is None else local}
        return {
            sliding: rope.tables(positions_BT, c.head_dim, *of[sliding])
            for sliding in sorted(set(c.sliding))
        }

    def _mask(self, sliding: bool, **data) -> AttentionMask:
        window = self.config.window if sliding else None
        return AttentionMask(window=window, scale=self.config.attention_scale, **data)

    def _final_norm(self, x, scale):
        return rms_norm(x, multiplier(self.config, scale), self.config.norm_eps)

    def head_weight(self, params: Params) -> jax.Array:
        return params["embedding" if self.config.tie_embeddings else "lm_head"]

    def xent(self, params, h_BTD, targets_BT, weights_BT, **options):
        """Weighted sums of the cross-entropy; see kernels.linear_xent.linear_xent."""
        targets_BT, weights_BT = self.rows.arranged(targets_BT), self.rows.arranged(weights_BT)
        return self.head.xent(h_BTD, self.head_weight(params), targets_BT, weights_BT, **options)

    def logprobs(self, params, h_BTD, targets_BT, **options):
        """(logp_BT, entropy_BT, lse_BT); see kernels.linear_xent.linear_logprobs."""
        arranged_BT = self.rows.arranged(targets_BT)
        found = self.head.logprobs(h_BTD, self.head_weight(params), arranged_BT, **options)
        return tuple(self.rows.restored(x_BT, targets_BT.shape[1]) for x_BT in found)

    def kl(self, params, h_BTD, teacher_h_BTE, teacher_w_VE, targets_BT, weights_BT, mix):
        """Weighted sums against a teacher on this mesh; see kernels.linear_distill.

        Args:
          teacher_h_BTE, teacher_w_VE: its `hidden` of the same rows and its `head_weight`.
        """
        rows = self.rows.arranged(targets_BT), self.rows.arranged(weights_BT)
        return self.head.kl(
            h_BTD, self.head_weight(params), teacher_h_BTE, teacher_w_VE, *rows, mix
        )

    def topk_kl(self, params, h_BTD, ids_BTK, logprobs_BTK, targets_BT, weights_BT, mix):
        """As `kl`, against a teacher's stored log-probs; see linear_topk_distill."""
        rows = map(self.rows.arranged, (ids_BTK, logprobs_BTK, targets_BT, weights_BT))
        return self.head.topk_kl(h_BTD, self.head_weight(params), *rows, mix)

    def top_k(self, params, h_BTD, length: int, k: int, **options):
        """(ids_BTK, logprobs_BTK) of rows of `length`; see kernels.linear_distill.linear_top_k."""
        found = self.head.top_k(h_BTD, self.head_weight(params), k, **options)
        return tuple(self.rows.restored(x_BTK, length) for x_BTK in found)

    def values(self, params: Params, h_BTD: jax.Array, length: int) -> jax.Array:
        """values_BT of the value head, float32.

        Args:
          length: T of the rows that h_BTD was made of.
        """
        return self.rows.restored(values(params["value_head"], h_BTD), length)

    def _embed(self, table_VD, tokens_BT):
        return self._scaled(self.head.embedded(table_VD, tokens_BT, self.dtype))

    def _scaled(self, x):
        """Embeddings as they enter. The factor is rounded too, as the family was trained."""
        if not self.config.traits.scale_embeddings:
            return x
        return x * jnp.asarray(math.sqrt(self.config.embed_dim), x.dtype)

    # -- generation --------------------------------------------------------------------------------

    def decode_weights(self, params: Params) -> DecodeWeights:
        """The weights as the decode loop multiplies them: cast, joined, gathered over fsdp.

        What stays split is what the tensor axis splits; every lane has all experts.
        """
        params = self.merge(params)
        module = self._module(params)
        of_block = lambda block: block.weights(self.config, self.dtype, self._fuse)
        stacked = jax.vmap(of_block)(module.layers)
        layers = [jax.tree.map(lambda x: x[i], stacked) for i in range(self.config.num_layers)]
        place = lambda x, *axes: rules.constrain(x, self.mesh, *axes)
        return DecodeWeights(
            embedding=place(params["embedding"].astype(self.dtype), "norm", "model"),
            layers=tuple(self._placed(w) for w in layers),
            final_norm=place(params["final_norm"], "norm"),
            head_VD=place(self.head_weight(params).astype(self.dtype), "vocab", "model"),
        )

    def _placed(self, w: LayerWeights) -> LayerWeights:
        expert = ("whole",) if self.config.traits.experts else ()
        axes = {
            "qkv": ("model", "heads", "head_dim"),
            "qkv_bias": ("bias", "head_dim"),
            "wo": ("heads", "head_dim", "model"),
            "router": ("model", "router"),
            "gate_up": (*expert, "model", "mlp"),
            "w_down": (*expert, "mlp", "model"),
        }
        fields = {field.name: getattr(w, field.name) for field in dataclasses.fields(w)}
        place = lambda x, name: rules.constrain(x, self.mesh, *axes.get(name, ("norm",)))
        return LayerWeights(
            **{
                name: jax.tree.map(lambda x: place(x, name), value)
                for name, value in fields.items()
            }
        )

    def prefill(self, weights: DecodeWeights, tokens_BT, sizes_B, cache: Cache) -> Cache:
        """Reads the first `sizes_B` tokens of each row after what the cache holds of it.

        The cache needs room for T more positions in every row; the rest of T is written too, beyond
        the row's new length.
        """
        c, T = self.config, tokens_BT.shape[1]
        positions_BT = cache.lengths_B[:, None] + jnp.arange(T)
        angles = self._angles(positions_BT)
        x_BTD = self._scaled(weights.embedding[tokens_BT])
        ks, vs = [], []
        for i, w in enumerate(weights.layers):
            q_BTNH, k_BTKH, v_BTKH = qkv(c, w, x_BTD, *angles[c.sliding[i]])
            ks.append(cache_lib.write(cache.k[i], jnp.swapaxes(k_BTKH, 1, 2), cache.lengths_B))
            vs.append(cache_lib.write(cache.v[i], jnp.swapaxes(v_BTKH, 1, 2), cache.lengths_B))
            if len(ks) < c.num_layers:  # of the last layer only keys and values are needed
                # As the cache keeps them, so that how a prompt is cut into chunks changes nothing.
                k_BSKH, v_BSKH = (jnp.swapaxes(x[-1], 1, 2).astype(self.dtype) for x in (ks, vs))
                mask = self._mask(c.sliding[i], q_offset_B=cache.lengths_B)
                attended_BTNH = self._attend_lane(q_BTNH, k_BSKH, v_BSKH, mask)
                x_BTD, _ = finish_layer(c, w, x_BTD, attended_BTNH, self._experts_lane)
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
        angles = self._angles(positions_B1)
        x_BTD = self._scaled(weights.embedding[tokens_B][:, None])
        lengths_B = cache.lengths_B + 1
        ks, vs = [], []
        for i, w in enumerate(weights.layers):
            q_BTNH, k_BTKH, v_BTKH = qkv(c, w, x_BTD, *angles[c.sliding[i]])
            ks.append(cache_lib.write(cache.k[i], jnp.swapaxes(k_BTKH, 1, 2), cache.lengths_B))
            vs.append(cache_lib.write(cache.v[i], jnp.swapaxes(v_BTKH, 1, 2), cache.lengths_B))
            shared = prefix and (prefix.k[i], prefix.v[i], prefix.lengths_B)
            out_BNH = self._decode_attention(
                q_BTNH[:, 0],
                ks[-1],
                vs[-1],
                lengths_B,
                prefix=shared,
                scale=c.attention_scale,
                window=c.window if c.sliding[i] else None,
            )
            x_BTD, _ = finish_layer(c, w, x_BTD, out_BNH[:, None], self._experts_lane)
        h_BD = self._final_norm(x_BTD[:, 0], weights.final_norm)
        logits_BV = self._logits(h_BD, weights.head_VD)
        return logits_BV, Cache(k=tuple(ks), v=tuple(vs), lengths_B=lengths_B)

    def _logits(self, h_BD, head_VD):
        logits_BV = jnp.einsum("BD,VD->BV", h_BD, head_VD, preferred_element_type=jnp.float32)
        if self.valid_vocab is None:
            return logits_BV
        return jnp.where(jnp.arange(self.config.vocab_size) < self.valid_vocab, logits_BV, -jnp.inf)


def _scan_layers(layers, kinds, x_BTD, stack, unroll: bool):
    """(x_BTD after all layers, what each gave beside it, stacked over L).

    The body of the loop is the shortest run of kinds that repeats: of Gemma 3 five sliding layers
    and a global one. What is left over comes after the loop.

    Args:
      layers: kind -> `(x_BTD, parameters of one layer) -> (x_BTD, more)`.
      kinds: of the L layers.
      stack: the parameters, [L, ...].
    """
    L = len(kinds)
    if len(layers) == 1:
        return jax.lax.scan(layers[kinds[0]], x_BTD, stack, unroll=L if unroll else 1)
    period = next(p for p in range(1, L + 1) if all(kinds[i] == kinds[i % p] for i in range(L)))
    rounds, rest = divmod(L, period)

    def run(kinds, x_BTD, stack):
        given = []
        for i, kind in enumerate(kinds):
            x_BTD, more = layers[kind](x_BTD, jax.tree.map(lambda p: p[i], stack))
            given.append(more)
        return x_BTD, jax.tree.map(lambda *parts: jnp.stack(parts), *given)

    fold = lambda p: p[: rounds * period].reshape(rounds, period, *p.shape[1:])
    body = functools.partial(run, kinds[:period])
    x_BTD, given = jax.lax.scan(
        body, x_BTD, jax.tree.map(fold, stack), unroll=rounds if unroll else 1
    )
    given = jax.tree.map(lambda y: y.reshape(rounds * period, *y.shape[2:]), given)
    if rest:
        x_BTD, last = run(kinds[:rest], x_BTD, jax.tree.map(lambda p: p[rounds * period :], stack))
        given = jax.tree.map(lambda *parts: jnp.concatenate(parts), given, last)
    return x_BTD, given


def _params_met(shapes: Params, axes: Params, c: DecoderConfig) -> int:
    """Parameters of all layers that a token meets: of experts, those of the ones it chooses."""

    def met(name: str) -> int:
        size = math.prod(shapes[name].shape)
        of_experts = "expert" in axes[name]
        return size // c.num_experts * c.experts_per_token if of_experts else size

    return sum(map(met, shapes))


def _logical_axes(variable: nnx.Variable) -> tuple[str, ...]:
    """The axes a weight was declared with; a stacked one has one dim more, in front."""
    axes, ndim = tuple(variable.get_metadata("axes")), variable.get_value().ndim
    return ("layer",) * (ndim - len(axes)) + axes
