"""Every form of decode attention against the reference on seeded random cases: GQA 1 to 8, head
dims 64 to 256, caches of 1 to 1,100 positions, lengths from none to all, shared prefixes, windows,
soft caps, caches of three dtypes. The kernel's caches hold nan beyond the lengths.

`pytest -m attention_fuzz` runs all; 30 of them are among the default tests.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.kernels import decode, decode_pallas, reference

SEEDS = range(200)


@dataclasses.dataclass(frozen=True)
class Case:
    seed: int
    rows: int
    kv_heads: int
    group: int
    head_dim: int
    size: int  # positions of each row's own cache
    prefixes: int | None  # how many, each of an equal run of rows
    prefix_size: int
    window: int | None
    soft_cap: float | None
    dtype: str  # of the queries
    cache_dtype: str
    tile: int  # keys that the kernel reads at once

    def __str__(self):
        heads = f"{self.kv_heads * self.group}/{self.kv_heads}x{self.head_dim}"
        prefix = f"{self.prefixes}x{self.prefix_size}" if self.prefixes else ""
        flags = "window" * (self.window is not None), "cap" * (self.soft_cap is not None)
        parts = f"{self.seed}", f"{self.rows}x{self.size}", prefix, heads, *flags
        return "-".join(filter(None, (*parts, self.dtype, self.cache_dtype)))

    @property
    def work(self) -> int:
        """Multiplications of the scores."""
        keys = self.size + (self.prefix_size if self.prefixes else 0)
        return self.rows * keys * self.kv_heads * self.group * self.head_dim


def case(seed: int) -> Case:
    random = np.random.default_rng(seed)
    of = lambda choices: random.choice(choices).item()
    length = lambda: int(np.exp(random.uniform(0, np.log(1101))))
    prefixes = of([1, 2, 3]) if random.random() < 0.5 else None
    rows = (prefixes or 1) * of([1, 2, 5])
    size, prefix_size = length(), length()
    dtype = of(["float32", "bfloat16"])
    return Case(
        seed=seed, rows=rows, kv_heads=of([1, 2]), group=of([1, 2, 4, 8]),
        head_dim=of([64, 80, 128, 256]), size=size, prefixes=prefixes, prefix_size=prefix_size,
        window=int(random.integers(1, size + prefix_size)) if random.random() < 0.4 else None,
        soft_cap=of([0.5, 5.0]) if random.random() < 0.3 else None,
        dtype=dtype, cache_dtype=of([dtype, "float8_e4m3fn"]), tile=of([16, 64]),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Inputs:
    """In numpy: operations of JAX one by one would be compiled for each case's shapes."""

    q_BNH: np.ndarray
    own: tuple[np.ndarray, np.ndarray]  # k_BKSH, v_BKSH
    lengths_B: np.ndarray
    shared: tuple[np.ndarray, np.ndarray] | None
    before_P: np.ndarray | None

    def call(self, attention, beyond: float) -> np.ndarray:
        """`attention` of caches that hold `beyond` where nothing may be read."""

        def filled(x_BKSH, lengths_B):
            after_BS = np.arange(x_BKSH.shape[2]) >= lengths_B[:, None]
            return np.where(after_BS[:, None, :, None], np.array(beyond, x_BKSH.dtype), x_BKSH)

        own = [filled(x, self.lengths_B) for x in self.own]
        prefix = None
        if self.shared is not None:
            prefix = (*(filled(x, self.before_P) for x in self.shared), self.before_P)
        return np.asarray(attention(self.q_BNH, *own, self.lengths_B, prefix=prefix))


def inputs(c: Case) -> Inputs:
    random = np.random.default_rng(c.seed)
    normal = lambda dtype, *shape: random.standard_normal(shape).astype(jnp.dtype(dtype))

    def lengths(number, size):
        """None, all, and anything between."""
        drawn = random.integers(0, size + 1, number)
        ends = random.choice([0, size], number)
        return np.where(random.random(number) < 0.3, ends, drawn).astype(np.int32)

    def pair(rows, size):
        return tuple(normal(c.cache_dtype, rows, c.kv_heads, size, c.head_dim) for _ in "kv")

    q_BNH = normal(c.dtype, c.rows, c.kv_heads * c.group, c.head_dim)
    own, lengths_B = pair(c.rows, c.size), lengths(c.rows, c.size)
    if not c.prefixes:
        return Inputs(q_BNH, own, lengths_B, None, None)
    shared, before_P = pair(c.prefixes, c.prefix_size), lengths(c.prefixes, c.prefix_size)
    return Inputs(q_BNH, own, lengths_B, shared, before_P)


def truth(c: Case, x: Inputs) -> np.ndarray:
    """The reference in float32, each row over one cache that holds its prefix and its own."""
    room = c.size + (c.prefix_size if c.prefixes else 0)
    joined = np.zeros((2, c.rows, c.kv_heads, room, c.head_dim), np.float32)
    lengths_B = np.zeros(c.rows, np.int32)
    for b in range(c.rows):
        p, parts = b * (c.prefixes or 0) // c.rows, []
        if x.shared is not None:
            parts.append([y[p, :, : x.before_P[p]] for y in x.shared])
        parts.append([y[b, :, : x.lengths_B[b]] for y in x.own])
        for part in parts:
            start, lengths_B[b] = lengths_B[b], lengths_B[b] + part[0].shape[1]
            joined[:, b, :, start : lengths_B[b]] = part
    run = jitted(reference.decode_attention, c)
    return np.asarray(run(x.q_BNH.astype(np.float32), *joined, lengths_B))


def jitted(attention, c: Case):
    return jax.jit(functools.partial(attention, window=c.window, soft_cap=c.soft_cap))


def kernel(c: Case):
    return functools.partial(
        decode_pallas.decode_attention, tiles=decode_pallas.Tiles(keys=c.tile), interpret=True
    )


def able(name: str, c: Case) -> bool:
    return name == "pallas" or c.dtype == c.cache_dtype


CASES = [(name, s) for s in SEEDS for name in ("xla", "pallas") if able(name, case(s))]
DEFAULT = [n for n in CASES if case(n[1]).work < 4e6][:30]  # the simulated kernel is slow


@pytest.mark.attention_fuzz
@pytest.mark.parametrize(
    "name, seed",
    [
        pytest.param(n, s, id=f"{n}-{case(s)}", marks=[pytest.mark.slow] * ((n, s) not in DEFAULT))
        for n, s in CASES
    ],
)
def test_decode_is_the_reference(name, seed):
    """float32: sums of up to 2,200 terms of size 1 in another order (about 1e-5 of the largest).
    bfloat16: probabilities and result rounded to 2**-9, 1 %. Of float8 the rounded numbers are
    read, exact in either.
    """
    c = case(seed)
    x = inputs(c)
    if name == "xla":  # what it may not read must be finite
        got = x.call(jitted(decode.decode_attention, c), 1e9)
    else:
        got = x.call(jitted(kernel(c), c), np.nan)
    assert got.dtype == c.dtype
    want, tolerance = truth(c, x), 2e-5 if c.dtype == "float32" else 1e-2
    scale = max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=tolerance * scale)


@pytest.mark.parametrize("cache_dtype", ["float32", "float8_e4m3fn"])
@pytest.mark.parametrize("window", [None, 37])
def test_what_lies_beyond_the_lengths_is_never_read(window, cache_dtype):
    """Bit for bit the same output whatever is there: nan, infinity (float8 has none), 300."""
    c = Case(0, 6, 2, 2, 64, 150, 2, 90, window, None, "float32", cache_dtype, 64)
    x = dataclasses.replace(
        inputs(c),
        lengths_B=np.array([0, 1, 63, 64, 65, 150], np.int32),
        before_P=np.array([0, 70], np.int32),
    )
    attention = jitted(kernel(c), c)
    want = x.call(attention, 0.0)
    assert np.isfinite(want).all() and np.abs(want[1:]).max() > 0.1
    for beyond in (np.nan, 300.0, *([np.inf] if cache_dtype == "float32" else [])):
        np.testing.assert_array_equal(x.call(attention, beyond), want)


def test_the_cases_cover_what_they_should():
    cases = [case(s) for s in SEEDS]
    for field, values in dict(
        group=[1, 2, 4, 8], head_dim=[64, 80, 128, 256], prefixes=[None, 1, 2, 3],
        cache_dtype=["float32", "bfloat16", "float8_e4m3fn"],
    ).items():  # fmt: skip
        assert {getattr(c, field) for c in cases} == set(values)
        assert {getattr(case(s), field) for _, s in DEFAULT} == set(values)
    sizes = [c.size for c in cases]
    assert min(sizes) == 1 and max(sizes) > 1000
