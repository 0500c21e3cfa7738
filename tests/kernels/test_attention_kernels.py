"""Attention: the reference against numpy loops, blockwise and decode against the reference."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.kernels import blockwise, decode, decode_pallas, reference
from jaxreason.types import AttentionMask

B, T, S, N, K, H = 2, 19, 27, 6, 2, 8
# float32 sums of at most 27 terms of order 1, in another order: some 1e-6.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)

SEGMENTS = dict(
    q_segments_BT=jnp.repeat(jnp.array([[1, 2, 0], [0, 3, 1]]), jnp.array([7, 8, 4]), axis=1),
    kv_segments_BS=jnp.repeat(jnp.array([[1, 2, 0], [2, 3, 0]]), jnp.array([6, 12, 9]), axis=1),
)
OFFSET = dict(q_offset_B=jnp.array([-3, 8]))  # three queries of row 0 see no key
MASKS = {
    "causal": AttentionMask(),
    "full": AttentionMask(causal=False),
    "segments": AttentionMask(**SEGMENTS, causal=False),
    "causal segments": AttentionMask(**SEGMENTS),
    "window": AttentionMask(window=5),
    "window ahead": AttentionMask(causal=False, window=3),
    "soft cap": AttentionMask(soft_cap=0.7, scale=0.5),
    "offset": AttentionMask(**OFFSET),
    "all": AttentionMask(**SEGMENTS, **OFFSET, window=9, soft_cap=2.0, scale=0.9),
}


def inputs(q_len=T, kv_len=S, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 5)
    q, dout = (jax.random.normal(key, (B, q_len, N, H), dtype) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, kv_len, K, H), dtype) for key in keys[2:4])
    return q, k, v, dout, jax.random.normal(keys[4], (B, q_len, N))


def outputs_and_gradients(attention, mask, q, k, v, dout, dlse):
    """Both outputs, and the gradients when both have a cotangent (nan for the lse of dead rows)."""

    def run(q, k, v, mask):
        (out, lse), vjp = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
        return out, lse, vjp((dout, jnp.where(lse == -jnp.inf, jnp.nan, dlse)))

    return jax.jit(run)(q, k, v, mask)


def assert_close(got, want, **tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE))


def loops(q, k, v, mask):
    """AttentionMask's definition, word by word."""
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        at = t + (0 if mask.q_offset_B is None else int(mask.q_offset_B[b]))
        keys = [
            s
            for s in range(S)
            if (not mask.causal or s <= at)
            and (mask.window is None or s > at - mask.window)
            and (
                mask.q_segments_BT is None
                or mask.q_segments_BT[b, t] == mask.kv_segments_BS[b, s] != 0
            )
        ]
        if not keys:
            continue
        head = n // (N // K)
        x = k[b, keys, head] @ q[b, t, n] * (mask.scale or H**-0.5)
        x = mask.soft_cap * np.tanh(x / mask.soft_cap) if mask.soft_cap else x
        lse[b, t, n] = np.log(np.exp(x).sum())
        out[b, t, n] = np.exp(x - lse[b, t, n]) @ v[b, keys, head]
    return out, lse


@pytest.mark.parametrize("name", MASKS)
def test_reference_equals_loops(name):
    q, k, v, *_ = inputs()
    want = loops(*(np.asarray(x, np.float64) for x in (q, k, v)), jax.device_get(MASKS[name]))
    assert_close(reference.attention(q, k, v, MASKS[name]), want)


@functools.cache
def reference_results(name):
    return outputs_and_gradients(reference.attention, MASKS[name], *inputs())


def check_blockwise(name, block_q):
    def attention(*args):
        return blockwise.attention(*args, block_q=block_q)

    got = outputs_and_gradients(attention, MASKS[name], *inputs())
    assert_close(got, reference_results(name))
    assert all(jnp.isfinite(g).all() for g in got[2])


@pytest.mark.parametrize("name", MASKS)
def test_blockwise_equals_reference(name, monkeypatch):
    """Values and gradients, 19 queries in blocks of 4: two bands of 3 and 2 blocks, the last one
    padded, each a scan."""
    monkeypatch.setattr(blockwise, "_MAX_BANDS", 2)
    check_blockwise(name, 4)


@pytest.mark.parametrize(
    ("name", "block_q"), [("causal segments", 8), ("window", 8), ("all", 8), ("segments", 64)]
)
def test_bands_of_one_block_equal_reference(name, block_q):
    check_blockwise(name, block_q)


def test_dead_rows_give_zeros():
    q, k, v, *_ = inputs()
    mask = MASKS["segments"]
    for attention in (reference.attention, blockwise.attention):
        out, lse = attention(q, k, v, mask)
        assert (out[0, 15:] == 0).all() and (out[1, :7] == 0).all()
        assert (lse[0, 15:] == -jnp.inf).all() and (lse[0, :15] > -jnp.inf).all()


def test_more_queries_than_keys_and_window():
    """Queries so far past the last key that the window holds none: no key is left for them."""
    q, k, v, dout, dlse = inputs(q_len=40, kv_len=10)
    args = (AttentionMask(window=4), q, k, v, dout, dlse)
    want = outputs_and_gradients(reference.attention, *args)

    def attention(*args):
        return blockwise.attention(*args, block_q=8)

    assert_close(outputs_and_gradients(attention, *args), want)


def test_bfloat16():
    """Against the float32 truth of the same bfloat16 inputs: probabilities, scores' gradients and
    results are each rounded to 2**-9 relative; 2 % of the largest entry bounds their sum."""
    args = inputs(dtype=jnp.bfloat16)
    want = outputs_and_gradients(
        reference.attention, MASKS["all"], *(x.astype(jnp.float32) for x in args)
    )
    got = outputs_and_gradients(
        blockwise.attention, MASKS["all"], *args[:4], args[4].astype(jnp.float32)
    )
    assert got[0].dtype == jnp.bfloat16 and got[1].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves((got[0], got[2])), jax.tree.leaves((want[0], want[2]))):
        assert jnp.abs(a.astype(jnp.float32) - b).max() < 0.02 * jnp.abs(b).max()


def test_unreachable_keys_are_not_computed():
    """Columns of scores computed for four blocks of 8 queries and 32 keys, by mask."""

    def columns(mask):
        q, k, v, *_ = inputs(q_len=32, kv_len=32)
        jaxpr = jax.make_jaxpr(lambda *x: blockwise.attention(*x, mask, block_q=8))(q, k, v)
        products = re.findall(
            rf"f32\[{B},{K},{N // K},8,(\d+)\] = dot_general", jaxpr.pretty_print(use_color=False)
        )
        return [int(s) for s in products[::2]]  # q.k, then p.v of H columns

    assert columns(AttentionMask()) == [8, 16, 24, 32]
    assert columns(AttentionMask(window=2)) == [8, 9, 9, 9]
    assert columns(AttentionMask(causal=False)) == [32]  # one scan over the four blocks


def test_memory_grows_with_length_times_block():
    """Four times the length takes at most about four times the temporary memory, forward and
    backward; and at T = 4096 less than one float32 score array, 134 MB."""

    def temp_bytes(length):
        x = jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32)

        def loss(q, k, v):
            out, lse = blockwise.attention(q, k, v, AttentionMask())
            return out.sum() + lse.sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temp_bytes(1024), temp_bytes(4096)
    assert long < 67e6
    assert long < 5 * short


def test_blockwise_inside_shard_map():
    """Batch over one axis, heads over another, as model/attention.py will call it."""
    q, k, v, dout, dlse = inputs()
    mask = MASKS["causal segments"]
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )  # fmt: skip
    heads, rows = jax.P("data", None, "tensor"), jax.P("data")
    specs = dataclasses.replace(mask, q_segments_BT=rows, kv_segments_BS=rows)
    attention = jax.shard_map(
        blockwise.attention,
        mesh=mesh,
        in_specs=(heads, heads, heads, specs),
        out_specs=(heads, heads),
    )
    want = outputs_and_gradients(reference.attention, mask, q, k, v, dout, dlse)
    assert_close(outputs_and_gradients(attention, mask, q, k, v, dout, dlse), want)


# What the cache may hold beyond the lengths: of the kernel anything, as it is never read.
DECODERS = {
    "xla": (decode.decode_attention, 1e9),
    "pallas": (
        functools.partial(
            decode_pallas.decode_attention, tiles=decode_pallas.Tiles(keys=16), interpret=True
        ),
        jnp.nan,
    ),
}


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "options", [{}, dict(window=4), dict(scale=0.5, soft_cap=0.7)], ids=["plain", "window", "cap"]
)
def test_decode_equals_reference(options, decoder):
    """Rows of length 0, 1, middle and full."""
    decode_attention, beyond = DECODERS[decoder]
    lengths = jnp.array([0, 1, 13, 27])
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (4, N, H))
    k, v = (jax.random.normal(key, (4, K, S, H)) for key in keys[1:])
    want = reference.decode_attention(q, k, v, lengths, **options)
    junk = (jnp.arange(S) >= lengths[:, None])[:, None, :, None]
    got = decode_attention(
        q, jnp.where(junk, beyond, k), jnp.where(junk, beyond, v), lengths, **options
    )
    assert_close(got, want)
    assert (got[0] == 0).all() and jnp.isfinite(got).all()


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    "options", [{}, dict(window=6), dict(scale=0.5, soft_cap=0.7)], ids=["plain", "window", "cap"]
)
def test_decode_with_a_prefix_equals_one_cache_of_both(options, decoder):
    """Two prefixes of two rows each, one of them empty."""
    decode_attention, beyond = DECODERS[decoder]
    before, lengths = jnp.array([0, 9]), jnp.array([1, 13, 4, 27])
    keys = jax.random.split(jax.random.key(1), 5)
    q = jax.random.normal(keys[0], (4, N, H))
    own = [jax.random.normal(key, (4, K, S, H)) for key in keys[1:3]]
    shared = [jax.random.normal(key, (2, K, 12, H)) for key in keys[3:]]

    def joined(prefix, rows):
        parts = [(prefix[b // 2, :, : before[b // 2]], rows[b, :, : lengths[b]]) for b in range(4)]
        whole = [jnp.concatenate(part, axis=1) for part in parts]
        return jnp.stack([jnp.pad(x, ((0, 0), (0, 40 - x.shape[1]), (0, 0))) for x in whole])

    k, v = (joined(prefix, rows) for prefix, rows in zip(shared, own))
    want = reference.decode_attention(q, k, v, before.repeat(2) + lengths, **options)
    after = lambda x, n: (jnp.arange(x.shape[2]) >= n[:, None])[:, None, :, None]
    junk = lambda x, n: jnp.where(after(x, n), beyond, x)
    prefix = (*(junk(x, before) for x in shared), before)
    got = decode_attention(q, *(junk(x, lengths) for x in own), lengths, prefix=prefix, **options)
    assert_close(got, want)


@pytest.mark.parametrize("decoder", DECODERS)
def test_decode_bfloat16(decoder):
    """Probabilities and the result are rounded to 2**-9 relative: 1 % of the largest entry."""
    decode_attention, _ = DECODERS[decoder]
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, N, H), jnp.bfloat16)
    k, v = (jax.random.normal(key, (2, K, S, H), jnp.bfloat16) for key in keys[1:])
    got = decode_attention(q, k, v, jnp.array([5, 27]))
    want = reference.decode_attention(
        *(x.astype(jnp.float32) for x in (q, k, v)), jnp.array([5, 27])
    )
    assert got.dtype == jnp.bfloat16
    assert jnp.abs(got.astype(jnp.float32) - want).max() < 0.01 * jnp.abs(want).max()


def test_decode_reads_fp8_as_it_is():
    """A cache in float8: the attention of the rounded numbers."""
    decode_attention, _ = DECODERS["pallas"]
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (2, N, H))
    k, v = (jax.random.normal(key, (2, K, S, H)).astype(jnp.float8_e4m3fn) for key in keys[1:])
    lengths = jnp.array([5, 27])
    want = reference.decode_attention(q, k.astype(jnp.float32), v.astype(jnp.float32), lengths)
    assert_close(decode_attention(q, k, v, lengths), want)


def test_decode_splits_long_caches_and_tiles_many_rows():
    """One long row over many programs; a prefix of 40 rows times 3 heads, two tiles of queries."""
    decode_attention, _ = DECODERS["pallas"]
    keys = jax.random.split(jax.random.key(1), 5)
    q = jax.random.normal(keys[0], (40, N, H))
    own = [jax.random.normal(key, (40, K, 8, H)) for key in keys[1:3]]
    shared = [jax.random.normal(key, (1, K, 700, H)) for key in keys[3:]]
    lengths, before = jnp.arange(40) % 9, jnp.array([651])
    options = dict(prefix=(*shared, before), window=640)
    want = decode.decode_attention(q, *own, lengths, **options)
    assert_close(decode_attention(q, *own, lengths, **options), want)
