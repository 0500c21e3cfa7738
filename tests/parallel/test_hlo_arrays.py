"""Arrays of a compiled program: what is updated in place is one, what is copied is two."""

import collections

import jax
import jax.numpy as jnp
import pytest

from jaxreason.parallel import hlo_arrays

N = 1_000  # of a size that nothing else has
X = jax.ShapeDtypeStruct((N,), jnp.float32)


def float32_arrays(function, *arguments, **options) -> int:
    """How many of N elements the compiled function holds."""
    text = jax.jit(function, **options).lower(*arguments).compile().as_text()
    arrays = hlo_arrays.program(text).arrays()
    return collections.Counter((a.dtype, a.size) for a in arrays)["f32", N]


def test_a_donated_argument_and_its_result_are_one():
    update = lambda x: 2 * x + 1
    assert float32_arrays(update, X) == 2
    assert float32_arrays(update, X, donate_argnums=0) == 1


def test_a_loop_s_carry_is_one_array():
    """It begins at an argument that is not donated: that one is another."""

    def run(x, times):
        return jax.lax.fori_loop(0, times, lambda i, x: jnp.sin(x), x)

    steps = jax.ShapeDtypeStruct((), jnp.int32)
    once = float32_arrays(run, X, steps, donate_argnums=0)
    assert once < float32_arrays(run, X, steps) <= once + 2


def test_an_update_of_a_part_writes_into_its_operand():
    put = lambda x, i: jax.lax.dynamic_update_slice(x, jnp.ones(3), (i,))
    index = jax.ShapeDtypeStruct((), jnp.int32)
    assert float32_arrays(put, X, index, donate_argnums=0) == 1


def test_an_array_that_is_kept_beside_another_counts():
    """Both are results, so that neither can take the other's place."""
    assert float32_arrays(lambda x: (jnp.sin(x), jnp.cos(x)), X) == 3


def test_a_text_that_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="does not end"):
        hlo_arrays.program("ENTRY %main (x: f32[3]) -> f32[3] {\n  %x = f32[3]{0} parameter(0\n}")
