"""The vocabulary on the mesh: embeddings, loss and log-probs without logits_BTV; the value head.

Each device runs the row-chunked kernel on its own rows, so no chunk ever spans devices; the
vocabulary is split over the tensor axis and the kernel reduces over it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxreason.kernels import linear_distill
from jaxreason.kernels import linear_xent as kernel
from jaxreason.kernels.linear_distill import Mix
from jaxreason.kernels.manual_axes import vary, varying_axes
from jaxreason.model.products import whole
from jaxreason.parallel import rules
from jaxreason.types import Params

_ROWS = rules.spec(("batch", "length"))
_TOKENS = rules.mesh_axes("batch") + rules.mesh_axes("length")


@dataclasses.dataclass(frozen=True)
class Head:
    """Functions of hidden_BTD and w_VD; `valid_vocab` masks the rows a tokenizer does not fill."""

    mesh: Mesh | None
    valid_vocab: int | None

    @property
    def _parallel(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    @property
    def _vocab_axis(self) -> str | None:
        split = self._parallel and rules.axis_size(self.mesh, "vocab") > 1
        return rules.RULES["vocab"] if split else None

    @property
    def _table(self) -> PartitionSpec:
        return PartitionSpec(self._vocab_axis, rules.RULES["embed"])

    def _on_mesh(self, fn, in_specs, out_specs):
        if not self._parallel:
            return fn
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def _whole(self, w_VD, h_BTD):
        """A device's rows of the head, gathered as they multiply.

        Typed as varying with the batch's rows before: so devices that have the same part of it add
        up the gradient of their part, not of the whole.
        """
        if not self._parallel:
            return w_VD
        w_VD = vary(w_VD, varying_axes(h_BTD))
        return whole(w_VD, ("vocab", "embed"), self.mesh, h_BTD.dtype)

    def embedded(self, table_VD, tokens_BT, dtype: jnp.dtype):
        """The tokens' rows of the table, as the residual stream lies.

        Each part of the table looks up its own: of the vocabulary the tokens in it, of the width
        the tokens of all devices, which then exchange parts of rows. So the table is not gathered,
        nor is its gradient ever whole. Cast after the lookup, so that the gradient adds up in
        float32: of a token that comes ten thousand times, bfloat16 sums stop growing after some
        hundred.
        """
        if not self._parallel:
            return table_VD[tokens_BT].astype(dtype)
        axis = self._vocab_axis
        parts = tuple(name for name in rules.mesh_axes("embed") if self.mesh.shape[name] > 1)

        def local(table_VD, tokens_BT):
            ids_X = tokens_BT.reshape(-1)
            if parts:
                ids_X = jax.lax.all_gather(ids_X, parts, tiled=True)
            if axis is None:
                x_XD = table_VD[ids_X].astype(dtype)
            else:
                ids_X = ids_X - table_VD.shape[0] * jax.lax.axis_index(axis)
                here_X = (ids_X >= 0) & (ids_X < table_VD.shape[0])
                rows_XD = table_VD[jnp.where(here_X, ids_X, 0)].astype(dtype)
                x_XD = jnp.where(here_X[:, None], rows_XD, 0)
            if parts:
                x_XD = jax.lax.all_to_all(x_XD, parts, split_axis=0, concat_axis=1, tiled=True)
            x_BTD = x_XD.reshape(*tokens_BT.shape, -1)
            if axis is None:
                return x_BTD
            return jax.lax.psum_scatter(x_BTD, axis, scatter_dimension=1, tiled=True)

        in_specs = (self._table, _ROWS)
        stream = rules.spec(("batch", "residual"))
        return self._on_mesh(local, in_specs, stream)(table_VD, tokens_BT)

    def xent(self, h_BTD, w_VD, targets_BT, weights_BT, *, temperature=1.0, z_loss=0.0):
        """(weighted sum of the loss, kernels.linear_xent.XentMetrics of weighted sums)."""
        run = functools.partial(
            kernel.linear_xent,
            temperature=temperature,
            z_loss=z_loss,
            valid_vocab=self.valid_vocab,
            axis_name=self._vocab_axis,
        )

        def local(h_BTD, w_VD, targets_BT, weights_BT):
            D, w_VD = h_BTD.shape[-1], self._whole(w_VD, h_BTD)
            sums = run(h_BTD.reshape(-1, D), w_VD, targets_BT.reshape(-1), weights_BT.reshape(-1))
            return jax.lax.psum(sums, _TOKENS) if self._parallel else sums

        in_specs = (_ROWS, self._table, _ROWS, _ROWS)
        return self._on_mesh(local, in_specs, PartitionSpec())(h_BTD, w_VD, targets_BT, weights_BT)

    def logprobs(self, h_BTD, w_VD, targets_BT, *, temperature=1.0):
        """(logp_BT, entropy_BT, lse_BT) of the targets at this temperature."""

        def local(h_BTD, w_VD, targets_BT):
            out = kernel.linear_logprobs(
                h_BTD.reshape(-1, h_BTD.shape[-1]),
                self._whole(w_VD, h_BTD),
                targets_BT.reshape(-1),
                temperature=temperature,
                valid_vocab=self.valid_vocab,
                axis_name=self._vocab_axis,
            )
            return tuple(x.reshape(targets_BT.shape) for x in out)

        in_specs = (_ROWS, self._table, _ROWS)
        return self._on_mesh(local, in_specs, (_ROWS, _ROWS, _ROWS))(h_BTD, w_VD, targets_BT)

    def kl(self, h_BTD, w_VD, teacher_h_BTE, teacher_w_VE, targets_BT, weights_BT, mix: Mix):
        """(weighted sum of a distillation loss, kernels.linear_distill.DistillSums).

        The teacher's table lies on the mesh as the student's does and may have other rows beyond
        the valid ones.
        """
        if self._vocab_axis is not None:
            teacher_w_VE = self._with_rows(teacher_w_VE, w_VD.shape[0])

        def local(h_BTD, w_VD, teacher_h_BTE, teacher_w_VE, targets_BT, weights_BT):
            teacher = _flat(teacher_h_BTE), self._whole(teacher_w_VE, teacher_h_BTE)
            return self._distilled(
                linear_distill.linear_distill, h_BTD, w_VD, teacher, targets_BT, weights_BT, mix
            )

        in_specs = (_ROWS, self._table, _ROWS, self._table, _ROWS, _ROWS)
        run = self._on_mesh(local, in_specs, PartitionSpec())
        return run(h_BTD, w_VD, teacher_h_BTE, teacher_w_VE, targets_BT, weights_BT)

    def topk_kl(self, h_BTD, w_VD, ids_BTK, logprobs_BTK, targets_BT, weights_BT, mix: Mix):
        """As `kl`, from the teacher's log-probs of K ids a token."""

        def local(h_BTD, w_VD, ids_BTK, logprobs_BTK, targets_BT, weights_BT):
            teacher = _flat(ids_BTK), _flat(logprobs_BTK)
            return self._distilled(
                linear_distill.linear_topk_distill, h_BTD, w_VD, teacher, targets_BT, weights_BT,
                mix,
            )  # fmt: skip

        in_specs = (_ROWS, self._table, _ROWS, _ROWS, _ROWS, _ROWS)
        run = self._on_mesh(local, in_specs, PartitionSpec())
        return run(h_BTD, w_VD, ids_BTK, logprobs_BTK, targets_BT, weights_BT)

    def top_k(self, h_BTD, w_VD, k: int, *, temperature=1.0):
        """(ids_BTK, logprobs_BTK) of the k likeliest tokens at this temperature."""

        def local(h_BTD, w_VD):
            found = linear_distill.linear_top_k(
                _flat(h_BTD), self._whole(w_VD, h_BTD), k, temperature=temperature,
                valid_vocab=self.valid_vocab, axis_name=self._vocab_axis,
            )  # fmt: skip
            return tuple(x_TK.reshape(*h_BTD.shape[:2], k) for x_TK in found)

        return self._on_mesh(local, (_ROWS, self._table), (_ROWS, _ROWS))(h_BTD, w_VD)

    def _distilled(self, run, h_BTD, w_VD, teacher, targets_BT, weights_BT, mix: Mix):
        """A kernel's sums over this device's rows, added up over the mesh."""
        rows = targets_BT.reshape(-1), weights_BT.reshape(-1)
        options = dict(valid_vocab=self.valid_vocab, axis_name=self._vocab_axis)
        w_VD = self._whole(w_VD, h_BTD)
        sums = run(_flat(h_BTD), w_VD, *teacher, *rows, mix, **options)
        return jax.lax.psum(sums, _TOKENS) if self._parallel else sums

    def _with_rows(self, teacher_w_VE, num_rows: int):
        """The table cut or filled up, so that each shard has the ids that the student's has."""
        lacks = max(num_rows - teacher_w_VE.shape[0], 0)
        if lacks:
            teacher_w_VE = jnp.pad(teacher_w_VE, ((0, lacks), (0, 0)))
        return rules.constrain(teacher_w_VE[:num_rows], self.mesh, "vocab", "embed")


def _flat(x_BTD):
    return x_BTD.reshape(-1, x_BTD.shape[-1])


class ValueHead(nnx.Module):
    """A scalar a token: weight [D], bias [1]. Born zero, so that it draws no random number."""

    def __init__(self, embed_dim: int):
        self.weight = nnx.Param(jnp.zeros((embed_dim,), jnp.float32), axes=("embed",))
        self.bias = nnx.Param(jnp.zeros((1,), jnp.float32), axes=("norm",))


def values(head: Params, h_BTD: jax.Array) -> jax.Array:
    """values_BT in float32: what the rest of the completion is worth before each target."""
    return jnp.einsum("BTD,D->BT", h_BTD.astype(jnp.float32), head["weight"]) + head["bias"]
