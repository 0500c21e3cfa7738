"""LoRA adapters: what they compute, what is differentiated, how they merge and lie on a mesh."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    CONFIG,
    QUICK,
    assert_gradients_close,
    assert_trees_close,
    assert_trees_equal,
    mean_loss,
    moved_by_an_ulp,
    packed_batch,
    tiny_model,
    tiny_params,
)

from jaxreason.model import lora as lora_lib
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.model.layer import multiplier
from jaxreason.model.lora import LoraConfig
from jaxreason.parallel import hosts
from jaxreason.parallel.mesh import make_mesh

LORA = LoraConfig(rank=3, alpha=6.0)
BATCH = packed_batch([[20, 12], [32], [5, 6, 7], [30], [3, 3], [16, 16], [9], [31]], length=32)
PLAIN = tiny_model()


def lora_model(mesh=None, lora=LORA, execution=QUICK, value_head=False, **changes) -> LanguageModel:
    config = DecoderConfig(**{**CONFIG, **changes})
    return LanguageModel(config, execution, mesh, value_head=value_head, lora=lora)


MODEL = lora_model()


@functools.cache
def adapters():
    """None of them zero, so that everything they touch shows."""
    draw = lambda leaf, key: 0.3 * jax.random.normal(key, leaf.shape)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(MODEL.shapes)))
    leaves, structure = jax.tree.flatten(MODEL.shapes)
    return jax.tree.unflatten(structure, [draw(s, k) for s, k in zip(leaves, keys)])


def hidden(model, params):
    return model.hidden(params, BATCH.tokens_BT, BATCH.segments_BT, BATCH.positions_BT)


def loss_of(model, trained, base):
    return mean_loss(model, model.complete(trained, base), BATCH)


loss_and_gradients_of = jax.jit(jax.value_and_grad(functools.partial(loss_of, MODEL)))


@functools.cache
def loss_and_gradients():
    return loss_and_gradients_of(adapters(), tiny_params())


def test_fresh_adapters_change_nothing():
    fresh = MODEL.init(jax.random.key(0))
    got = jax.jit(hidden, static_argnums=0)(MODEL, MODEL.complete(fresh, tiny_params()))
    want = jax.jit(hidden, static_argnums=0)(PLAIN, tiny_params())
    # Queries, keys and values are three products here and one there: sums in another order.
    assert_trees_close(got, want, 1e-5)
    for name, pair in fresh["lora"]["layers"].items():
        bound = 1 / math.sqrt(math.prod(pair["a"].shape[1:-1]))
        assert 0.8 * bound < np.abs(pair["a"]).max() <= bound, name
        assert not pair["b"].any() and pair["a"].dtype == jnp.float32


def test_merged_weights_compute_what_adapters_do():
    """A plain model reads the complete tree too, and its sampler merges by itself."""
    complete = MODEL.complete(adapters(), tiny_params())
    merged = MODEL.merge(complete)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny_params())
    run = jax.jit(hidden, static_argnums=0)
    want = run(MODEL, complete)
    assert np.abs(want - run(PLAIN, tiny_params())).max() > 0.1
    assert_trees_close(run(PLAIN, complete), want, 1e-5)
    assert_trees_close(run(PLAIN, merged), want, 1e-5)
    decode = jax.jit(PLAIN.decode_weights)
    assert_trees_equal(decode(complete), decode(merged))


def test_gradients_are_those_of_the_product():
    """With G the gradient of W + s A B: dA = s G B^T, dB = s A^T G; and the base has none."""
    _, got = loss_and_gradients()
    merged = MODEL.merge(MODEL.complete(adapters(), tiny_params()))
    plain = jax.jit(jax.grad(functools.partial(mean_loss, PLAIN)))(merged, BATCH)["layers"]
    want = {}
    for name, pair in adapters()["lora"]["layers"].items():
        L, rank = plain[name].shape[0], LORA.rank
        a_LIR, b_LRO = pair["a"].reshape(L, -1, rank), pair["b"].reshape(L, rank, -1)
        g_LIO = plain[name].reshape(L, a_LIR.shape[1], -1)
        a = LORA.scale * jnp.einsum("LIO,LRO->LIR", g_LIO, b_LRO)
        b = LORA.scale * jnp.einsum("LIR,LIO->LRO", a_LIR, g_LIO)
        want[name] = {"a": a.reshape(pair["a"].shape), "b": b.reshape(pair["b"].shape)}
    assert jax.tree.structure(got) == jax.tree.structure(adapters())
    assert_trees_close(got, {"lora": {"layers": want}}, 1e-4)  # sums over tokens and over ranks


def test_eight_devices_compute_what_one_does():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = lora_model(mesh, execution=Execution(scan_layers=True))
    places = tiny_model(mesh).shardings()
    base = jax.device_put(tiny_params(), places)
    trained = jax.device_put(adapters(), model.shardings())

    def run(trained, base, batch):
        whole = lambda trained: model.complete(trained, base)
        loss = jax.value_and_grad(lambda trained: mean_loss(model, whole(trained), batch))
        return loss(trained), model.merge(whole(trained))

    found, merged = jax.jit(run)(trained, base, hosts.to_global(mesh, BATCH))
    # float32 sums in another order: 4e-6 (jax 0.10.2) and 1.1e-5 (0.12) of the largest entry, where
    # an ulp in every weight moves it by 1.2e-5 and 2.4e-5: adapters see sums that largely cancel.
    moved = [
        loss_and_gradients_of(moved_by_an_ulp(adapters(), i), moved_by_an_ulp(tiny_params(), 9 + i))
        for i in range(4)
    ]
    assert_gradients_close(found, loss_and_gradients(), moved)
    alone = MODEL.merge(MODEL.complete(adapters(), tiny_params()))
    assert_trees_close(merged, alone, 1e-6)
    local = lambda x: x.sharding.shard_shape(x.shape)
    assert local(trained["lora"]["layers"]["wq"]["a"]) == (2, 16, 3)
    assert local(trained["lora"]["layers"]["wq"]["b"]) == (2, 3, 2, 8)


def test_a_base_in_bf16_multiplies_as_the_same_numbers_in_float32():
    """Norms too: Gemma's 1 + w of a w in bf16 has more digits than bf16."""
    changes = dict(family="gemma3_text", window=8, sliding_layers=(0,), local_rope_theta=1e4)
    model = lora_model(**changes)
    plain = tiny_model(**changes)
    params = jax.jit(plain.init)(jax.random.key(0))
    jitter = lambda p: p + 0.2 * jax.random.normal(jax.random.key(2), p.shape)
    half = jax.tree.map(lambda p: jitter(p).astype(lora_lib.BASE_DTYPE), params)
    full = jax.tree.map(lambda p: p.astype(jnp.float32), half)
    # By itself, because XLA may leave a rounding out where it fuses the sum with what follows.
    norm = multiplier(model.config, half["final_norm"])
    np.testing.assert_array_equal(norm, 1 + np.asarray(full["final_norm"]))
    run = jax.jit(lambda base: hidden(model, model.complete(adapters(), base)))
    assert_trees_close(run(half), run(full), 1e-6)
    merged = model.merge(model.complete(adapters(), half))
    assert merged["layers"]["wq"].dtype == jnp.float32
    assert_trees_equal(merged["layers"]["wq"],
                       model.merge(model.complete(adapters(), full))["layers"]["wq"])  # fmt: skip


def test_the_gradient_of_a_frozen_head_is_never_formed():
    """Though the loss computes its gradients in the forward pass, where they may be wanted."""
    changes = dict(vocab_size=4096, num_layers=1)
    model, plain = lora_model(**changes), tiny_model(**changes)
    batch = packed_batch([[600]] * 2, length=600)  # several chunks of rows
    compiled = lambda f, *shapes: jax.jit(jax.grad(f)).lower(*shapes).compile().as_text()
    products = lambda text: re.findall(r"= f32\[4096,32\]\S* dot\(", text)
    frozen = lambda trained, base: mean_loss(model, model.complete(trained, base), batch)
    assert not products(compiled(frozen, model.shapes, plain.shapes))
    assert products(compiled(lambda params: mean_loss(plain, params, batch), plain.shapes))


def test_a_value_head_is_trained_beside_the_adapters():
    model = lora_model(value_head=True)
    params = model.init(jax.random.key(0))
    assert sorted(params) == ["lora", "value_head"] == sorted(model.axes)
    complete = model.complete(params, tiny_params())
    assert "value_head" in model.merge(complete) and "lora" not in model.merge(complete)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"train\.lora\.rank is -1; it must be 0 \(off\) or more"):
        LoraConfig(rank=-1)
    with pytest.raises(ValueError, match=r"train\.lora\.alpha is 0"):
        LoraConfig(rank=1, alpha=0)
    with pytest.raises(ValueError, match=r"train\.lora\.targets holds 'wq'; known: q_proj, "):
        LoraConfig(rank=1, targets=("wq",))
    with pytest.raises(ValueError, match=r"targets holds nothing"):
        LoraConfig(rank=1, targets=())
    with pytest.raises(ValueError, match=r"rank is 17; k_proj has at most rank 16 in this model"):
        lora_model(lora=LoraConfig(rank=17))
    experts = dict(family="qwen3_moe", num_experts=4, experts_per_token=2)
    with pytest.raises(ValueError, match=r"holds gate_proj, which is a stack of experts here"):
        lora_model(**experts)
    attention = LoraConfig(rank=2, targets=("q_proj", "o_proj"))
    assert set(lora_model(lora=attention, **experts).shapes["lora"]["layers"]) == {"wq", "wo"}
