"""Every attention implementation against the reference on seeded random cases: GQA 1 to 8, head
dims 64 to 256, lengths 1 to 1,100, causal, packed, windowed, capped and all of it together.

`pytest -m attention_fuzz` runs all 200; 30 of them are among the default tests.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, case

from jaxreason.kernels import blockwise, flash, reference, splash

SEEDS = range(200)
_SMALL = flash.Tiles(32, 64, 4, 2)
IMPLEMENTATIONS = {
    "blockwise": blockwise.attention,
    "flash": functools.partial(
        flash.attention, config=flash.Config(flash.Tiles(64, 32, 4, 2), _SMALL, _SMALL, True)
    ),
    "splash": functools.partial(splash.attention, interpret=True),
}


def able(name: str, c: Case) -> bool:
    """Splash attends from a whole row to itself alone."""
    return name != "splash" or c.queries == c.keys


def results(attention, c: Case, dtype):
    """(out, lse or None, dq, dk, dv)."""
    q, k, v, dout, dlse = c.operands(dtype)
    mask = c.mask()

    @jax.jit
    def run(q, k, v):
        (out, lse), pullback = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
        # Of a row that reads nothing nothing may be asked: nan must not come through.
        dlse_or_none = None if lse is None else jnp.where(lse == -jnp.inf, jnp.nan, dlse)
        return out, lse, *pullback((dout, dlse_or_none))

    return run(q, k, v)


@functools.cache
def truth(seed: int, with_lse: bool):
    attention = reference.attention
    if not with_lse:
        attention = lambda *operands: (reference.attention(*operands)[0], None)
    return results(attention, case(seed), jnp.float32)


CASES = [(name, seed) for seed in SEEDS for name in IMPLEMENTATIONS if able(name, case(seed))]
DEFAULT = [c for c in CASES if case(c[1]).work < 2e8][:30]  # the simulated kernels are slow


@pytest.mark.attention_fuzz
@pytest.mark.parametrize(
    "name, seed",
    [
        pytest.param(n, s, id=f"{n}-{case(s)}", marks=[pytest.mark.slow] * ((n, s) not in DEFAULT))
        for n, s in CASES
    ],
)
def test_an_implementation_is_the_reference(name, seed):
    """float32: sums of up to 1,100 terms of size 1 in another order (about 1e-5 of the largest)."""
    c = case(seed)
    got = results(IMPLEMENTATIONS[name], c, jnp.float32)
    want = truth(seed, with_lse=got[1] is not None)
    for ours, true in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        finite = np.isfinite(true)
        assert (np.isfinite(ours) == finite).all()
        scale = max(1.0, np.abs(np.where(finite, true, 0)).max())
        np.testing.assert_allclose(
            np.where(finite, ours, 0), np.where(finite, true, 0), atol=2e-5 * scale
        )
