"""Distillation losses of the head equal their formulas in float64; shards, padding, memory.

The formulas are written here in numpy, of probabilities. Their gradients are by complex steps,
Im f(z + i * 1e-30) / 1e-30, exact to float64's digits, so that no derivative is written twice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxreason.kernels import linear_distill, linear_xent
from jaxreason.kernels.linear_distill import Mix

T, D, E, V, VALID = 40, 24, 12, 60, 50
MIXES = {
    "forward": Mix(),
    "reverse": Mix(beta=1.0, temperature=0.6),
    "jsd": Mix(beta=0.3, temperature=1.7, nll_coef=0.4),
    "skew": Mix(skew=0.1, temperature=0.6, kl_coef=0.7),
    "skew reverse": Mix(beta=1.0, skew=0.1, kl_coef=0.5, nll_coef=1.0),
}
# float32 sums of up to 150 terms of order 1 in another order; as in test_linear_xent.py
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@functools.cache
def inputs(teacher_rows: int = V, rows: int = T, vocab: int = V):
    """h, w, teacher's h and w, targets, weights.

    The teacher's logits are of order 1: of a tail below 1e-4 float32's 1 - sum(p) has too few
    digits for a reverse divergence, whatever it is compared with.
    """
    random = np.random.default_rng(0)
    draw = lambda *shape: random.normal(size=shape).astype(np.float32)
    weights_T = random.random(rows).astype(np.float32) * (np.arange(rows) % 5 > 0)
    targets_T = random.integers(0, VALID, rows).astype(np.int32)
    h_TD, w_VD = draw(rows, D), 0.5 * draw(vocab, D)
    return h_TD, w_VD, draw(rows, E), 0.2 * draw(teacher_rows, E), targets_T, weights_T


# --- the formulas ---------------------------------------------------------------------------------


def softmax(z):
    """Of complex numbers too; logits here are below 100."""
    e = np.exp(z)
    return e / e.sum(-1, keepdims=True)


def divergence(p, q, mix: Mix):
    """methods.md, 9.1 and 9.5, of probabilities [T, events]."""
    a, b = mix.skew, mix.beta
    kl = lambda x, y: (x * np.log(x / y)).sum(-1)
    if a:
        return kl(p, a * p + (1 - a) * q) if b == 0 else kl(q, (1 - a) * p + a * q)
    if b in (0, 1):
        return kl(p, q) if b == 0 else kl(q, p)
    m = b * p + (1 - b) * q
    return b * kl(p, m) + (1 - b) * kl(q, m)


def events(p, ids_TK, tail: bool):
    """Probabilities of these ids and, as the last event, of all others; or given these ids."""
    picked = np.take_along_axis(p, ids_TK, -1)
    if not tail:
        return picked / picked.sum(-1, keepdims=True)
    others = np.ones(p.shape, bool)
    np.put_along_axis(others, ids_TK, False, -1)
    return np.concatenate([picked, (p * others).sum(-1, keepdims=True)], -1)


def expected(args, mix: Mix, ids_TK=None, valid: int = VALID):
    """(loss, its gradients in h and w, the sums), float64."""
    h, w, teacher_h, teacher_w = (np.asarray(x, np.float64) for x in args[:4])
    targets, weights = args[4], np.asarray(args[5], np.float64)
    z, known = h @ w[:valid].T, teacher_h @ teacher_w[:valid].T
    p = softmax(known / mix.temperature)
    if ids_TK is not None:
        p = events(p, ids_TK, mix.tail)

    def kl(z):
        q = softmax(z / mix.temperature)
        return divergence(p, q if ids_TK is None else events(q, ids_TK, mix.tail), mix)

    nll = lambda z: -np.log(softmax(z)[np.arange(len(z)), targets])
    loss = lambda z: weights * (mix.kl_coef * kl(z) + mix.nll_coef * nll(z))
    dz = np.stack([loss(z + 1e-30j * (np.arange(valid) == v)).imag for v in range(valid)], -1)
    dz /= 1e-30
    dw = np.zeros(w.shape)
    dw[:valid] = dz.T @ h
    q, best = softmax(z), z.max(-1)
    at = lambda ids: z[np.arange(len(z)), ids]
    sums = (
        kl(z),
        nll(z),
        -(q * np.log(q)).sum(-1),
        at(targets) == best,
        at(known.argmax(-1)) == best,
    )
    return loss(z).sum(), (dz @ w[:valid], dw), tuple((weights * x).sum() for x in sums)


def run(loss, h, w, *others):
    """(loss, gradients, sums) of a loss that gives (loss, sums)."""
    value_and_grad = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (total, sums), gradients = value_and_grad(h, w, *others)
    return total, gradients, tuple(sums)


def assert_close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE)), got, want
    )


def stored(args, ids_TK, temperature=1.0, valid=VALID):
    """The teacher's log-probs of these ids, float32."""
    known = np.asarray(args[2], np.float64) @ np.asarray(args[3], np.float64)[:valid].T
    return np.log(np.take_along_axis(softmax(known / temperature), ids_TK, -1)).astype(np.float32)


def top_ids(args, K: int, seed: int = 0):
    """The teacher's K likeliest tokens of each row, shuffled."""
    ids_TK = np.argsort(-(args[2] @ args[3][:VALID].T), axis=-1)[:, :K]
    return np.random.default_rng(seed).permuted(ids_TK, axis=1).astype(np.int32)


# --- values and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXES)
def test_a_teachers_head(name):
    args = inputs()
    loss = functools.partial(linear_distill.linear_distill, mix=MIXES[name], valid_vocab=VALID)
    want, got = expected(args, MIXES[name]), run(loss, *args)
    assert_close(got, want)
    assert (got[1][1][VALID:] == 0).all() and (got[1][1][:VALID] != 0).any(-1).all()


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("name", MIXES)
def test_stored_log_probs(name, tail):
    mix = dataclasses.replace(MIXES[name], tail=tail)
    args = inputs()
    ids_TK = top_ids(args, 5)
    logprobs_TK = stored(args, ids_TK, mix.temperature)
    loss = functools.partial(linear_distill.linear_topk_distill, mix=mix, valid_vocab=VALID)
    got = run(loss, *args[:2], ids_TK, logprobs_TK, *args[4:])
    assert_close(got, expected(args, mix, ids_TK))
    assert (got[1][1][VALID:] == 0).all()


@pytest.mark.parametrize("teacher_rows", [57, 66])
def test_tables_of_other_lengths_and_many_chunks(teacher_rows, monkeypatch):
    """150 rows in chunks of 64 at most; of the teacher's table 50 rows are tokens too."""
    monkeypatch.setattr(linear_xent, "_CHUNK_BYTES", 0)
    args, mix = inputs(teacher_rows, rows=150), MIXES["jsd"]
    loss = functools.partial(linear_distill.linear_distill, mix=mix, valid_vocab=VALID)
    want = expected(args, mix)
    assert_close(run(loss, *args), want)
    total, sums = jax.jit(loss)(*args)  # as an evaluation does
    assert_close((total, tuple(sums)), (want[0], want[2]))


PRINTED = {
    Mix(): 0.1838, Mix(beta=0.1): 0.0165, Mix(beta=0.5): 0.0462, Mix(beta=0.9): 0.0171,
    Mix(beta=1.0): 0.1920, Mix(skew=0.1): 0.1486, Mix(beta=1.0, skew=0.1): 0.1524,
}  # fmt: skip


def test_printed_numbers():
    """methods.md, 9.1 and 9.5: P = [.7, .2, .1], Q = [.4, .4, .2], four digits."""
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.4, 0.4, 0.2]])
    rows = np.zeros(1, np.int32), np.ones(1, np.float32)
    ids = np.array([[2, 0, 1]])

    @jax.jit
    def both(log_p, log_q):
        one = jnp.ones((1, 1))
        dense = lambda mix: linear_distill.linear_distill(one, log_q.T, one, log_p.T, *rows, mix)[0]
        topk = lambda mix: linear_distill.linear_topk_distill(
            one, log_q.T, ids, log_p[:, ids[0]], *rows, mix
        )[0]
        return [(dense(mix), topk(mix)) for mix in PRINTED]

    found = both(np.log(p).astype(np.float32), np.log(q).astype(np.float32))
    for (mix, value), (dense, topk) in zip(PRINTED.items(), found):
        for got in (divergence(p, q, mix)[0], dense, topk):
            assert float(got) == pytest.approx(value, abs=5e-5), mix


def test_with_a_tail_the_top_k_tend_to_the_whole():
    """Events are merged tokens, so no divergence between them exceeds that between tokens; the more
    events the larger it is. With all tokens nothing is merged."""
    args, sizes = inputs(), (1, 6, 48, VALID)
    order_TV = np.argsort(-(args[2] @ args[3][:VALID].T), axis=-1).astype(np.int32)
    chosen = ("forward", "reverse", "jsd")
    mixes = [dataclasses.replace(MIXES[name], nll_coef=0.0) for name in chosen]
    known = {mix.temperature: stored(args, order_TV, mix.temperature) for mix in mixes}

    @jax.jit
    def totals(h, w, teacher_h, teacher_w, targets, weights):
        rows, options = (targets, weights), dict(valid_vocab=VALID)
        whole = [
            linear_distill.linear_distill(h, w, teacher_h, teacher_w, *rows, mix, **options)[0]
            for mix in mixes
        ]
        topk = lambda mix, K: linear_distill.linear_topk_distill(
            h, w, order_TV[:, :K], known[mix.temperature][:, :K], *rows, mix, **options
        )[0]
        return whole, [[topk(mix, K) for K in sizes] for mix in mixes]

    for mix, whole, found in zip(mixes, *totals(*args)):
        assert (np.diff(found) > 0).all(), mix
        assert found[0] < 0.8 * whole and 0.9 * whole < found[-2] < whole, mix
        assert float(found[-1]) == pytest.approx(float(whole), rel=1e-5), mix


def test_log_probs_of_bfloat16_that_add_up_to_more_than_one():
    """Two of log 0.5, rounded up, are 1.003: the tail then has 1e-7, and no logarithm is of less
    than 0."""
    logprobs_TK = jnp.full((1, 2), -0.69, jnp.bfloat16)
    assert jnp.exp(logprobs_TK.astype(jnp.float32)).sum() > 1.001

    @jax.jit
    def run(w):
        rows = jnp.zeros(1, jnp.int32), jnp.ones(1)
        loss = lambda w, mix: linear_distill.linear_topk_distill(
            jnp.ones((1, 1)), w, jnp.array([[0, 2]]), logprobs_TK, *rows, mix
        )[0]
        return [jax.value_and_grad(loss)(w, mix) for mix in (MIXES["reverse"], MIXES["jsd"])]

    for value, gradient in run(jnp.array([[0.3], [0.1], [0.2]])):
        assert 0 < value < 10 and 0 < jnp.abs(gradient).max() < 10


def test_rows_of_weight_zero_change_nothing():
    """With targets and ids beyond the table, and log-probs that are no distribution."""
    args, mix = inputs(), MIXES["jsd"]
    ids_TK = top_ids(args, 5)
    logprobs_TK = stored(args, ids_TK, mix.temperature)
    loss = functools.partial(linear_distill.linear_topk_distill, mix=mix, valid_vocab=VALID)
    want = run(loss, *args[:2], ids_TK, logprobs_TK, *args[4:])
    junk = np.resize(np.array([-100, VALID, V, 2**31 - 1], np.int32), 20)
    more = lambda x, rows: np.concatenate([x, np.asarray(rows, x.dtype)])
    padded = (
        more(args[0], np.full((20, D), 3.0)), args[1], more(ids_TK, np.resize(junk, (20, 5))),
        more(logprobs_TK, np.resize([0.0, 3.0, -np.inf, -1e30], (20, 5))),
        more(args[4], junk), more(args[5], np.zeros(20)),
    )  # fmt: skip
    total, (dh, dw), sums = run(loss, *padded)
    assert_close((total, (dh[:T], dw), sums), want)
    assert (dh[T:] == 0).all()


def test_an_id_that_is_no_token_cannot_be_overlooked():
    args = inputs()
    ids_TK = top_ids(args, 5)
    ids_TK[1, 0] = VALID
    loss = functools.partial(linear_distill.linear_topk_distill, valid_vocab=VALID)
    total, _ = jax.jit(loss)(*args[:2], ids_TK, stored(args, top_ids(args, 5)), *args[4:])
    assert total > 1e20


# --- shards and memory ----------------------------------------------------------------------------


def several(h, w, teacher_h, teacher_w, targets, weights, ids_TK, logprobs_TK, axis_name=None):
    options, rows = dict(valid_vocab=VALID, axis_name=axis_name), (targets, weights)
    dense = lambda mix: linear_distill.linear_distill(
        h, w, teacher_h, teacher_w, *rows, mix, **options
    )
    topk = lambda mix: linear_distill.linear_topk_distill(
        h, w, ids_TK, logprobs_TK, *rows, mix, **options
    )
    found = [
        dense(MIXES["jsd"]),
        dense(MIXES["skew reverse"]),
        topk(MIXES["jsd"]),
        topk(dataclasses.replace(MIXES["forward"], tail=False)),
    ]
    return sum(total for total, _ in found), found


def test_vocabulary_shards_equal_one_device():
    """Losses, sums, dh and dw; of four shards the last is part padding."""
    args = inputs()
    ids_TK = top_ids(args, 5)
    args = (*args, ids_TK, stored(args, ids_TK))
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=auto)
    row, vocab = jax.P("data"), jax.P("tensor")
    local = lambda *args: jax.lax.psum(several(*args, axis_name="tensor"), "data")
    specs = (row, vocab, row, vocab, row, row, row, row)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=jax.P())
    want = jax.jit(jax.value_and_grad(several, (0, 1), has_aux=True))(*args)
    got = jax.jit(jax.value_and_grad(sharded, (0, 1), has_aux=True))(*args)
    assert_close(got, want, rtol=3e-5, atol=3e-5)  # sums of four losses, in two orders


def test_fault_10_no_number_a_token_and_entry(monkeypatch):
    """What has an entry's dim has a chunk's 64 rows at most, forward and in the gradients. The
    table's 61 rows are a prime, so that no other array has a multiple of them."""
    monkeypatch.setattr(linear_xent, "_CHUNK_BYTES", 0)
    vocab = 61
    args = inputs(vocab, 320, vocab)
    ids_TK = top_ids(args, 5)
    loss = lambda h, w: several(h, w, *args[2:], ids_TK, stored(args, ids_TK))[0]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*args[:2])
    assert max(size // vocab for size in sizes(jaxpr.jaxpr) if size % vocab == 0) == 64


def sizes(jaxpr):
    """Elements of every value in a jaxpr and those within it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from sizes(inner)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(beta=1.5), r"beta is 1.5; it must be in \[0, 1\]"),
        (dict(skew=1.0), r"skew is 1.0; it must be in \[0, 1\)"),
        (dict(beta=0.5, skew=0.1), "skew is 0.1 and beta 0.5; a skew needs beta 0 or 1"),
        (dict(temperature=0.0), "temperature is 0.0; it must be above 0"),
    ],
)
def test_divergences_that_there_are_not(options, message):
    with pytest.raises(ValueError, match=message):
        Mix(**options)


def test_tables_that_are_not_of_one_vocabulary():
    with pytest.raises(ValueError, match="has 57 rows and the student's 60, of which 58 are"):
        linear_distill.linear_distill(*inputs(57), valid_vocab=58)
    h, w, _, _, *rows = inputs()
    for K in (0, 51):
        ids_TK = np.zeros((T, K), np.int32)
        with pytest.raises(ValueError, match=rf"k is {K}; it must be in \[1, 50\]"):
            linear_distill.linear_topk_distill(
                h, w, ids_TK, np.zeros((T, K)), *rows, valid_vocab=VALID
            )


# --- the top k ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, VALID])
def test_the_top_k_are_those_of_a_sorted_softmax(k, monkeypatch):
    """On one device in chunks of rows, and on vocabulary shards of 15 rows, 7 and 50 ids of all."""
    monkeypatch.setattr(linear_xent, "_CHUNK_BYTES", 1)
    h_TD, w_VD, *_ = inputs(rows=96)
    z_TV = h_TD.astype(np.float64) @ w_VD[:VALID].astype(np.float64).T / 0.7
    log_p_TV = np.log(softmax(z_TV))
    want_TK = np.argsort(-log_p_TV, axis=-1)[:, :k]
    options = dict(k=k, temperature=0.7, valid_vocab=VALID)
    run = functools.partial(linear_distill.linear_top_k, **options)
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((4,), ("tensor",), auto, devices=jax.devices()[:4])
    local = functools.partial(run, axis_name="tensor")
    specs = (jax.P(), jax.P("tensor"))
    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(jax.P(), jax.P()))
    for found in (run, sharded):
        ids_TK, logprobs_TK = jax.jit(found)(h_TD, w_VD)
        np.testing.assert_array_equal(ids_TK, want_TK)
        want = np.take_along_axis(log_p_TV, want_TK, -1)
        np.testing.assert_allclose(logprobs_TK, want, **TOLERANCE)


def test_more_tokens_than_there_are_cannot_be_asked_for():
    h_TD, w_VD, *_ = inputs()
    with pytest.raises(ValueError, match=r"k is 51; it must be in \[1, 50\]"):
        linear_distill.linear_top_k(h_TD, w_VD, 51, valid_vocab=VALID)
