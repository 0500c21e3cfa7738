"""Text loss: weighted over batches, and in bits over bytes."""

import math

import jax
import jax.numpy as jnp
import pytest

from jaxreason.evals import perplexity


def test_a_uniform_byte_model_needs_eight_bits():
    assert perplexity.bits_per_byte(1000 * math.log(256), 1000) == pytest.approx(8.0)


def test_batches_are_weighted_by_their_tokens():
    nll_fn = jax.jit(lambda params, batch: (params * batch.sum(), jnp.float32(batch.size)))
    batches = [jnp.ones(30), 3 * jnp.ones(10)]
    values = perplexity.evaluate_text(nll_fn, 2.0, batches, num_bytes=80)
    assert values["loss"] == pytest.approx(3.0) and values["tokens"] == 40
    assert values["perplexity"] == pytest.approx(math.exp(3.0))
    assert values["bits_per_byte"] == pytest.approx(120 / math.log(2) / 80)


def test_nothing_to_measure_is_an_error():
    with pytest.raises(ValueError, match="no target tokens in 0 batches"):
        perplexity.evaluate_text(None, {}, [], 1)
    with pytest.raises(ValueError, match="num_bytes is 0"):
        perplexity.bits_per_byte(1.0, 0)
