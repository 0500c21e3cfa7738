"""The head without logits equals the head with them: values, gradients, shards, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from jaxreason.kernels import linear_xent, reference

D, V = 24, 1000
# float32 sums of up to 1000 terms of order 1: 1000 ** 0.5 * 6e-8 is 2e-6; 1e-5 leaves room.
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 64 rows, so that 150 rows are two whole chunks and a padded one."""
    monkeypatch.setattr(linear_xent, "_CHUNK_BYTES", 0)


def inputs(T=150, vocab=V, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    h_TD = jax.random.normal(keys[0], (T, D), dtype)
    w_VD = 0.5 * jax.random.normal(keys[1], (vocab, D), dtype)
    targets_T = jax.random.randint(keys[2], (T,), 0, vocab - 100)
    weights_T = jax.random.uniform(keys[3], (T,)) * (jnp.arange(T) % 5 > 0)
    return h_TD, w_VD, targets_T, weights_T


XENT = [{}, dict(temperature=0.6), dict(temperature=0.6, z_loss=1e-2, valid_vocab=V - 100)]


def xent_and_gradients(module, h, w, targets, weights, options):
    def loss(h, w):
        return module.linear_xent(h, w, targets, weights, **options)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h, w)


def assert_close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or TOLERANCE)),
        jax.tree.leaves(got), jax.tree.leaves(want),
    )  # fmt: skip


@pytest.mark.parametrize("options", XENT)
def test_xent_equals_reference(options):
    args = inputs()
    want = xent_and_gradients(reference, *args, options)
    assert_close(xent_and_gradients(linear_xent, *args, options), want)
    assert_close(jax.jit(lambda *a: linear_xent.linear_xent(*a, **options))(*args), want[0])


def test_single_chunk_equals_many(monkeypatch):
    args = inputs()
    many = xent_and_gradients(linear_xent, *args, XENT[-1])
    monkeypatch.setattr(linear_xent, "_CHUNK_BYTES", 1 << 30)
    assert_close(xent_and_gradients(linear_xent, *args, XENT[-1]), many)


def test_xent_bfloat16():
    """bfloat16 inputs, float32 logits: the loss is exact to float32 rounding. Only dlogits (2**-9
    relative) and dh (2**-9) are rounded: 1e-2 of the largest gradient bounds both."""
    args = inputs(dtype=jnp.bfloat16)
    (loss, _), grads = xent_and_gradients(linear_xent, *args, {})
    (want, _), want_grads = xent_and_gradients(
        reference, *(x.astype(jnp.float32) for x in args[:2]), *args[2:], {}
    )
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for got, true in zip(grads, want_grads):
        assert got.dtype == jnp.bfloat16
        assert jnp.abs(got.astype(jnp.float32) - true).max() < 1e-2 * jnp.abs(true).max()


def test_rows_of_weight_zero_change_nothing():
    """Appended rows of weight 0 with any target leave the loss, the sums and the gradients."""
    options = dict(z_loss=1e-2, valid_vocab=V - 100)
    h, w, targets, weights = inputs()
    want, (dh, dw) = xent_and_gradients(linear_xent, h, w, targets, weights, options)
    junk = jnp.resize(jnp.array([-100, V - 1, V, 2**31 - 1]), (70,))
    padded = (
        jnp.pad(h, ((0, 70), (0, 0)), constant_values=3.0), w,
        jnp.concatenate([targets, junk]), jnp.pad(weights, (0, 70)),
    )  # fmt: skip
    got, (dh_padded, dw_padded) = xent_and_gradients(linear_xent, *padded, options)
    assert_close((got, dh_padded[:150], dw_padded), (want, dh, dw))
    assert (dh_padded[150:] == 0).all()


def logprob_loss(module, h, w, targets, options):
    """Uses all three outputs, nonlinearly, so that each cotangent differs from row to row."""
    logp, entropy, lse = module.linear_logprobs(h, w, targets, **options)
    return jnp.sum(jnp.sin(logp) + entropy**2 / 10 + jnp.cos(lse)), (logp, entropy, lse)


@pytest.mark.parametrize(
    "options", [{}, dict(temperature=0.6, valid_vocab=V - 100)], ids=["plain", "all"]
)
def test_logprobs_equal_reference(options):
    h, w, targets = inputs()[:3]

    def run(module):
        def loss(h, w):
            return logprob_loss(module, h, w, targets, options)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h, w)

    assert_close(run(linear_xent), run(reference))


def test_masked_vocabulary_gets_exactly_no_gradient():
    h, w, targets, weights = inputs()
    valid = V - 100
    (_, _), (_, dw) = xent_and_gradients(
        linear_xent, h, w, targets, weights, dict(valid_vocab=valid, z_loss=0.1)
    )
    assert (dw[valid:] == 0).all() and (dw[:valid] != 0).any(-1).all()
    dw = jax.grad(lambda w: logprob_loss(linear_xent, h, w, targets, dict(valid_vocab=valid))[0])(w)
    assert (dw[valid:] == 0).all()


def both_losses(h, w, targets, weights, axis_name=None):
    options = dict(temperature=0.7, valid_vocab=V - 100, axis_name=axis_name)
    loss, metrics = linear_xent.linear_xent(h, w, targets, weights, z_loss=1e-2, **options)
    per_row, _ = logprob_loss(linear_xent, h, w, targets, options)
    return loss + per_row, (metrics, per_row)


@pytest.mark.parametrize(
    ("batch", "shards", "grad_inside"), [(2, 4, True), (2, 4, False), (1, 8, False)]
)
def test_vocabulary_shards_equal_one_device(batch, shards, grad_inside):
    """Losses, metrics, dh (summed over vocabulary shards) and dw (summed over batch shards).

    Each gradient is a sum over two losses, 4 or 8 shards and two orders of addition: 3e-5.
    """
    args = inputs(T=144)
    mesh = jax.make_mesh(
        (batch, shards), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    row, vocab = jax.P("data"), jax.P("tensor")

    def local(*args):
        loss, sums = both_losses(*args, axis_name="tensor")
        return jax.lax.psum((loss, sums), "data")

    def sharded(f, outs):
        specs = (row, vocab, row, row)
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=outs)

    if grad_inside:
        got_fn = sharded(
            jax.value_and_grad(local, (0, 1), has_aux=True), ((jax.P(), jax.P()), (row, vocab))
        )
    else:
        got_fn = jax.value_and_grad(sharded(local, jax.P()), (0, 1), has_aux=True)
    want = jax.jit(jax.value_and_grad(both_losses, (0, 1), has_aux=True))(*args)
    assert_close(jax.jit(got_fn)(*args), want, rtol=3e-5, atol=3e-5)


def test_unchecked_shard_map_is_refused():
    """Without check_vma the gradients of replicated arguments would silently miss a sum."""
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = jax.shard_map(
        lambda *args: linear_xent.linear_xent(*args, axis_name="tensor")[0],
        mesh=mesh, in_specs=(jax.P(), jax.P("tensor"), jax.P(), jax.P()), out_specs=jax.P(),
        check_vma=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="check_vma=True"):
        loss(*inputs())


def test_evaluation_computes_no_gradients():
    """The undifferentiated loss has one matmul a chunk; the differentiated one has three."""
    args = inputs()

    def loss(*args):
        return linear_xent.linear_xent(*args)[0]

    assert str(jax.make_jaxpr(loss)(*args)).count("dot_general") == 1
    assert str(jax.make_jaxpr(jax.grad(loss))(*args)).count("dot_general") == 3


def test_memory_does_not_grow_with_rows_times_vocab(monkeypatch):
    """From 4,096 to 16,384 rows at V = 32,768 logits grow by 1.6 GB; temporaries may grow by a few
    arrays of h's size ([12288, 64] float32 is 3 MB) and of [T]."""
    monkeypatch.undo()
    vocab, dim = 32_768, 64

    def compiled(rows):
        h, w = (jax.ShapeDtypeStruct((n, dim), jnp.float32) for n in (rows, vocab))
        targets, weights = (jax.ShapeDtypeStruct((rows,), t) for t in (jnp.int32, jnp.float32))

        def xent(h, w, targets, weights):
            return linear_xent.linear_xent(h, w, targets, weights)[0]

        def logprobs(h, w, targets, _):
            return logprob_loss(linear_xent, h, w, targets, {})[0]

        return [
            jax.jit(jax.value_and_grad(f, (0, 1)))
            .lower(h, w, targets, weights)
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
            for f in (xent, logprobs)
        ]

    for small, large in zip(compiled(4096), compiled(16_384)):
        assert large < 120e6
        assert large - small < 4 * (16_384 - 4096) * (dim + 16) * 4


FUNCTIONS = {
    "xent": lambda module, *args: module.linear_xent(*args)[0],
    "logprobs": lambda module, h, w, targets, _: logprob_loss(module, h, w, targets, {})[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fault_10_no_function_of_the_head_holds_a_number_a_token_and_entry(name):
    """No logits, probabilities or one-hot of all rows, of any type, neither forward nor in the
    gradients: what has an entry's dim has a chunk's rows at most. The plain version has them."""
    args, rows = inputs(T=320), 320

    def most(module):
        loss = lambda h, w: FUNCTIONS[name](module, h, w, *args[2:])
        jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*args[:2])
        return max(size // V for size in sizes(jaxpr.jaxpr) if size % V == 0)

    assert most(linear_xent) == 64  # of a chunk; and the head's gradient has D = 24
    assert most(reference) >= rows


def sizes(jaxpr):
    """Elements of every value in a jaxpr and those within it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars)
        for inner in jaxprs_in_params(eqn.params):
            yield from sizes(inner)
