"""Every attention implementation against the reference on seeded random cases: GQA 1 to 8, head
dims 64 to 256, lengths 1 to 1,100, causal, packed, windowed, capped and all of it together.

`pytest -m attention_fuzz` runs all 200; 30 of them are among the default tests.

Splash, whose kernels are a TPU's, runs again where a TPU's memories are simulated too: scratch and
blocks begin as nan, a read beyond a buffer raises, and an access that no semaphore orders is a
race. Triton's kernels (flash) have no such memories, and that simulation does not take them: they
address arrays themselves, and what guards the ends of these is the mask of each load and store. The
plain simulation hands them nan beyond an array's end; so a load without its mask is seen.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, case
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plt

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
    assert_is_the_reference(results(IMPLEMENTATIONS[name], case(seed), jnp.float32), seed)


def assert_is_the_reference(got, seed: int) -> None:
    want = truth(seed, with_lse=got[1] is not None)
    for ours, true in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        finite = np.isfinite(true)
        assert (np.isfinite(ours) == finite).all()
        scale = max(1.0, np.abs(np.where(finite, true, 0)).max())
        np.testing.assert_allclose(
            np.where(finite, ours, 0), np.where(finite, true, 0), atol=2e-5 * scale
        )


# --- beyond an array's end ------------------------------------------------------------------------

STRICT = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
)
# Of more than one block of 128, and little enough work for so slow a simulation.
STRICT_SEEDS = [s for s in SEEDS if able("splash", c := case(s)) and 128 < c.keys and c.work < 1e9]
STRICT_DEFAULT = sorted(STRICT_SEEDS, key=lambda s: case(s).work)[:2]


@pytest.mark.attention_fuzz
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(s, id=str(case(s)), marks=[pytest.mark.slow] * (s not in STRICT_DEFAULT))
        for s in STRICT_SEEDS
    ],
)
def test_splash_is_the_reference_where_a_tpus_memories_are_simulated(seed, monkeypatch, capfd):
    monkeypatch.setattr(splash, "_BLOCK", 128)
    strict = functools.partial(splash.attention, interpret=STRICT)
    try:
        assert_is_the_reference(results(strict, case(seed), jnp.float32), seed)
    finally:
        pltpu.reset_tpu_interpret_mode_state()  # it is left as it was where something raised
    assert "RACE DETECTED" not in capfd.readouterr().out  # jax 0.12 raises


def test_that_simulation_sees_what_it_is_for():
    """Scratch that is read before it is written is nan; a read beyond a buffer raises."""
    run = functools.partial(
        pl.pallas_call, out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=STRICT,
        grid=(1,), scratch_shapes=[pltpu.VMEM((8, 128), jnp.float32)],
    )  # fmt: skip

    def unwritten(x, out, scratch):
        out[...] = x[...] + scratch[...]

    def beyond(x, out, scratch):
        out[...] = x[pl.ds(1 + pl.program_id(0), 8)]

    x = jnp.ones((8, 128))
    assert np.isnan(run(unwritten)(x)).all()
    try:
        with pytest.raises(Exception, match=r"(?i)out-of-bounds"):
            jax.block_until_ready(run(beyond)(x))
    finally:
        pltpu.reset_tpu_interpret_mode_state()


def ragged() -> int:
    """The seed of a small case in which no number of rows is a whole number of blocks."""
    return next(
        s for s in SEEDS if case(s).queries % 32 and case(s).keys % 32 and case(s).keys > 64
        and case(s).queries > 64 and case(s).work < 2e8 and not case(s).segments
    )  # fmt: skip


def test_nan_lies_beyond_the_arrays_of_flash_and_never_reaches_a_result(monkeypatch):
    """Its results are the reference's; without the masks of its loads they are nan. So the
    simulation's nan is there to be read."""
    seed = ragged()
    assert_is_the_reference(results(IMPLEMENTATIONS["flash"], case(seed), jnp.float32), seed)
    load = plt.load
    monkeypatch.setattr(plt, "load", lambda ref, *, mask=None, other=None: load(ref))
    jax.clear_caches()
    got = results(IMPLEMENTATIONS["flash"], case(seed), jnp.float32)
    monkeypatch.undo()
    jax.clear_caches()
    out, _, dq, dk, dv = (np.isnan(x).any() for x in got)
    assert out and dq and dk and dv


def test_every_access_of_flash_is_masked(monkeypatch):
    """A store beyond an array's end is dropped in the simulation; on a chip it would land in the
    next row. All three kernels mask every one, and every load says what it gives instead."""
    seen, of = [], {"load": plt.load, "store": plt.store}

    def load(ref, *, mask=None, other=None):
        seen.append(("load", mask is not None and other is not None))
        return of["load"](ref, mask=mask, other=other)

    def store(ref, value, *, mask=None):
        seen.append(("store", mask is not None))
        return of["store"](ref, value, mask=mask)

    monkeypatch.setattr(plt, "load", load)
    monkeypatch.setattr(plt, "store", store)
    q, k, v, dout, dlse = case(ragged()).operands()

    def loss(q, k, v):
        return jax.vjp(lambda *qkv: IMPLEMENTATIONS["flash"](*qkv, case(ragged()).mask()), q, k, v)

    jax.eval_shape(lambda q, k, v: loss(q, k, v)[1]((dout, dlse)), q, k, v)
    kinds = [kind for kind, _ in seen]
    assert kinds.count("store") == 2 + 1 + 2  # out and lse; dq; dk and dv
    assert kinds.count("load") > 15 and all(masked for _, masked in seen)
