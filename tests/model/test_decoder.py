"""The decoder: what may influence what; and no way of executing it changes what it computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    QUICK,
    VOCAB,
    assert_trees_close,
    loss_and_gradients,
    mean_loss,
    packed_batch,
    tiny_model,
    tiny_params,
)

from jaxreason.model.cache import empty
from jaxreason.model.execution import Execution

ATTENTION = ("blockwise", "reference")

# float32 sums of a few hundred terms in another order: 1e-6 of the largest entry; 1e-5 leaves room.
ROUNDING = 1e-5


@pytest.mark.parametrize("attention", ATTENTION)
def test_each_position_reads_its_own_document_up_to_itself(attention):
    """Gradient of position t's hidden state in position s's embedding: not 0 iff s is readable."""
    batch = packed_batch([[5, 6, 1]], length=14)
    T = batch.tokens_BT.shape[1]
    tokens_BT = jnp.arange(T)[None]  # all different: row s of the table is position s
    model = tiny_model(execution=Execution(attention=attention, scan_layers=True))

    def totals(embedding):
        p = {**tiny_params(), "embedding": embedding}
        return model.hidden(p, tokens_BT, batch.segments_BT, batch.positions_BT)[0].sum(-1)

    influence_TV = jnp.abs(jax.jit(jax.jacrev(totals))(tiny_params()["embedding"])).sum(-1)
    s = batch.segments_BT[0]
    readable = np.tril((s[:, None] == s[None]) & (s[:, None] != 0)) | np.eye(T, dtype=bool)
    np.testing.assert_array_equal(influence_TV[:, :T] != 0, readable)
    assert (influence_TV[:, T:] == 0).all()


def test_positions_are_read_and_only_their_distances_matter():
    """Rotary embeddings: a shift of all positions changes nothing, a stretch does."""
    batch = packed_batch([[20]], length=20)
    run = jax.jit(tiny_model().hidden)
    h_BTD, shifted_BTD, stretched_BTD = (
        run(tiny_params(), batch.tokens_BT, batch.segments_BT, positions_BT)
        for positions_BT in (batch.positions_BT, batch.positions_BT + 7, batch.positions_BT * 2)
    )
    # cos and sin of an angle of 27 radians are off by 27 ulp, 3e-6; twice that in the scores.
    np.testing.assert_allclose(shifted_BTD, h_BTD, atol=1e-4)
    assert jnp.abs(stretched_BTD - h_BTD).max() > 0.1


@pytest.mark.parametrize(
    "execution",
    [
        Execution(),
        Execution(scan_layers=True),
        Execution(scan_layers=True, remat="full"),
        Execution(scan_layers=True, remat="save_attention"),
        Execution(remat="save_projections"),
        Execution(scan_layers=True, remat="qkv+attention", offload=("gate_up",)),
    ],
    ids=str,
)
def test_execution_changes_nothing(execution):
    """Against scanned layers, no remat, reference attention: 80 positions are two blocks."""
    batch = packed_batch([[30, 45], [80]], length=80, loss_share=0.7)
    want = loss_and_gradients(tiny_model(), tiny_params(), batch)
    got = loss_and_gradients(tiny_model(execution=execution), tiny_params(), batch)
    assert_trees_close(got, want, ROUNDING)


@functools.cache
def kept_floats(remat: str) -> int:
    """What the backward pass of eight layers of 256 tokens is handed, weights included."""
    batch = packed_batch([[64]] * 4, length=64)
    execution = dataclasses.replace(QUICK, attention="blockwise", remat=remat)
    model = tiny_model(execution=execution, num_layers=8, mlp_dim=256)
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: mean_loss(model, p, batch), p)[1],
                              model.shapes)  # fmt: skip
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


@pytest.mark.parametrize(
    "more, less, floats_a_token",
    [
        ("save_attention", "full", 32 + 4),  # out of 4 heads of 8, and their log-sum-exp
        ("save_projections", "save_attention", 64 + 32 + 2 * 256),  # qkv, projection, gate and up
        ("attention+gate_up", "attention", 2 * 256),
    ],
)
def test_a_policy_keeps_what_it_names_and_no_more(more, less, floats_a_token):
    assert kept_floats(more) - kept_floats(less) == 8 * 256 * floats_a_token
    assert kept_floats("full") + 8 * 256 * 2 * 256 < kept_floats("none")


@pytest.mark.parametrize(
    "offload, shapes",
    [
        ((), []),
        (("gate_up",), [(48,), (48,)]),
        (("qkv", "attention"), [(4,), (4, 8), (8, 8)]),  # log-sum-exp, out; 4 + 2 + 2 heads of 8
    ],
)
def test_what_is_offloaded_waits_in_the_hosts_memory(offload, shapes):
    """Of both layers of 32 tokens, from the forward pass to the backward pass."""
    batch = packed_batch([[20, 12]], length=32)
    execution = Execution(
        scan_layers=True, attention="blockwise", remat="qkv+attention+gate_up", offload=offload
    )
    model = tiny_model(execution=execution)
    backward = jax.make_jaxpr(lambda p: jax.vjp(lambda p: mean_loss(model, p, batch), p)[1])
    kept = [aval for aval in backward(model.shapes).out_avals if aval.shape[:3] == (2, 1, 32)]
    on_host = [a.shape[3:] for a in kept if a.memory_space == jax.memory.Space.Host]
    assert sorted(on_host) == shapes and len(kept) > len(shapes)


def test_remat_keeps_no_layer_activations():
    """Temp memory of the gradient falls by (nearly) all that the layers kept of their MLPs."""
    batch, layers, mlp = packed_batch([[64]] * 4, length=64), 8, 256

    def temp(remat):
        execution = dataclasses.replace(QUICK, remat=remat)
        model = tiny_model(execution=execution, num_layers=layers, mlp_dim=mlp)
        fn = jax.jit(jax.grad(lambda p: mean_loss(model, p, batch)))
        return fn.lower(model.shapes).compile().memory_analysis().temp_size_in_bytes

    gate_and_up = 2 * batch.tokens_BT.size * mlp * 4  # bytes a layer
    assert temp("none") - temp("full") > (layers - 1) * gate_and_up


def test_bfloat16_computes_close_to_float32():
    """bf16 rounds to 2**-9; a few dozen roundings on the way to the loss: 3 % bounds them."""
    batch = packed_batch([[20, 12]], length=32)
    model = tiny_model(execution=dataclasses.replace(QUICK, dtype="bfloat16"))
    hidden = jax.eval_shape(
        model.hidden, model.shapes, batch.tokens_BT, batch.segments_BT, batch.positions_BT
    )
    assert hidden.dtype == jnp.bfloat16
    got, want = (
        jax.jit(functools.partial(mean_loss, m))(tiny_params(), batch)
        for m in (model, tiny_model())
    )
    assert got != want and got == pytest.approx(float(want), rel=0.03)


def test_padded_vocabulary_gets_no_probability_and_no_gradient():
    """With an untied head, which is a weight of its own; the table is only looked up in."""
    batch = packed_batch([[20, 12]], length=32, vocab=50)
    model = tiny_model(tie_embeddings=False, valid_vocab=50)
    params = jax.jit(model.init)(jax.random.key(0))

    def outputs(p):
        h_BTD = model.hidden(p, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        logp_BT, entropy_BT, _ = model.logprobs(p, h_BTD, batch.targets_BT)
        cache = empty(model.config, 1, 16, jnp.float32)
        logits_BV, _ = model.decode(model.decode_weights(p), batch.tokens_BT[:, 0], cache)
        return mean_loss(model, p, batch), (h_BTD, logp_BT, entropy_BT, logits_BV)

    run = jax.jit(jax.value_and_grad(outputs, has_aux=True))
    (loss, (h_BTD, got_BT, entropy_BT, logits_BV)), grads = run(params)
    logp_BTV = jax.nn.log_softmax(h_BTD @ params["lm_head"][:50].T)  # the truth: a shorter table
    logp_BT = np.take_along_axis(logp_BTV, batch.targets_BT[..., None], -1)[..., 0]
    want = -(logp_BT * batch.weights_BT).sum() / batch.weights_BT.sum()
    np.testing.assert_allclose(loss, want, rtol=ROUNDING)
    np.testing.assert_allclose(got_BT, logp_BT, atol=ROUNDING)
    np.testing.assert_allclose(entropy_BT, -(np.exp(logp_BTV) * logp_BTV).sum(-1), atol=ROUNDING)
    assert (grads["lm_head"][50:] == 0).all() and (grads["lm_head"][:50] != 0).any(-1).all()
    looked_up = np.isin(np.arange(VOCAB), batch.tokens_BT[batch.weights_BT > 0])
    np.testing.assert_array_equal((grads["embedding"] != 0).any(-1), looked_up)
    assert (logits_BV[:, 50:] == -jnp.inf).all() and jnp.isfinite(logits_BV[:, :50]).all()


def test_unknown_names_are_refused_when_the_model_is_built():
    with pytest.raises(
        ValueError, match=r"mesh.attention is 'flash3'; known implementations: auto"
    ):
        tiny_model(execution=Execution(attention="flash3"))
    with pytest.raises(ValueError, match=r"mesh.remat has 'some'; it must be none, full, .* qkv"):
        Execution(remat="some")
    with pytest.raises(ValueError, match=r"mesh.dtype is 'float16'"):
        Execution(dtype="float16")
