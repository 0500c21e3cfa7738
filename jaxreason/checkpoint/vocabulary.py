"""More tokens than a checkpoint was trained with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxreason.model.config import DecoderConfig
from jaxreason.types import Params


def resize_vocab(
    params: Params, config: DecoderConfig, new_size: int, used_rows: int
) -> tuple[DecoderConfig, Params]:
    """The model with tables of `new_size` rows; those from `used_rows` on are the mean of the rest.

    Args:
      used_rows: entries of the tokenizer it was trained with. Rows beyond are padding, which no
        token ever moved, and become new tokens' as well as the added ones.

    The mean of the known tokens keeps the softmax over them almost as it was, which random rows do
    not (J. Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021).
    """
    assert 0 < used_rows <= config.vocab_size <= new_size, (used_rows, config.vocab_size, new_size)
    tables = {
        name: _with_mean_rows(params[name], new_size, used_rows)
        for name in ("embedding", "lm_head")
        if name in params
    }
    return dataclasses.replace(config, vocab_size=new_size), {**params, **tables}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _with_mean_rows(table_VD: jax.Array, new_size: int, used_rows: int) -> jax.Array:
    known_VD = table_VD[:used_rows]
    mean_D = known_VD.mean(0, dtype=jnp.float32).astype(table_VD.dtype)
    added_VD = jnp.broadcast_to(mean_D, (new_size - used_rows, *mean_D.shape))
    return jnp.concatenate([known_VD, added_VD])
