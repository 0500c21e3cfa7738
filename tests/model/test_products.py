"""Products and lookups of bfloat16: what their gradients multiply, and in what they add up."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_model

from jaxreason.model.execution import Execution
from jaxreason.model.products import project


def operands(shapes, dtype):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def products(jaxpr):
    """Every product of matrices in it, inside loops and calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from products(inner)


SHAPES = [
    ((2, 5, 8), (8, 6), 1),  # the MLP
    ((2, 5, 8), (8, 3, 4), 1),  # queries
    ((2, 5, 3, 4), (3, 4, 8), 2),  # the output projection
]


@pytest.mark.parametrize("x_shape, w_shape, num_in", SHAPES)
def test_gradients_of_bfloat16_multiply_bfloat16(x_shape, w_shape, num_in):
    x, w = operands([x_shape, w_shape], jnp.bfloat16)
    loss = lambda x, w: project(x, w, num_in).astype(jnp.float32).sum()
    found = list(products(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(x, w).jaxpr))
    assert len(found) == 3
    for product in found:
        assert [v.aval.dtype for v in product.invars] == [jnp.bfloat16] * 2
        assert product.outvars[0].aval.dtype == jnp.float32  # what they add up in


@pytest.mark.parametrize("x_shape, w_shape, num_in", SHAPES)
def test_gradients_of_bfloat16_are_those_of_float32(x_shape, w_shape, num_in):
    """Of the same numbers: one rounding at the end, 2**-9 of each, and no other."""
    x, w = operands([x_shape, w_shape], jnp.bfloat16)
    out_shape = (*x_shape[:2], *w_shape[num_in:])
    (dout,) = operands([out_shape], jnp.bfloat16)

    def gradients(dtype):
        run = lambda x, w: project(x, w, num_in)
        _, pullback = jax.vjp(run, x.astype(dtype), w.astype(dtype))
        return pullback(dout.astype(dtype))

    for narrow, wide in zip(gradients(jnp.bfloat16), gradients(jnp.float32)):
        assert narrow.dtype == jnp.bfloat16
        np.testing.assert_allclose(narrow.astype(np.float32), wide, rtol=2**-8, atol=1e-6)


def test_the_gradient_of_a_frequent_token_does_not_stop_growing():
    """4,096 times the same token, each with a gradient of 1: bfloat16 sums end at 256."""
    model = tiny_model(execution=Execution(dtype="bfloat16"), num_layers=1)
    shape = model.shapes["embedding"].shape
    tokens_BT = jnp.full((4, 1024), 3)
    looked_up = lambda table_VD: model._embed(table_VD, tokens_BT).astype(jnp.float32).sum()
    gradient_VD = jax.grad(looked_up)(jnp.ones(shape))
    np.testing.assert_array_equal(gradient_VD[3], 4096.0)
    assert not gradient_VD[4:].any()
