"""Experts on eight devices: the output, the gradients and the balance of one, at any load."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import packed_batch, tiny_model

from jaxreason.model import moe
from jaxreason.parallel.mesh import make_mesh

EXPERTS = dict(family="qwen3_moe", num_experts=8, experts_per_token=2)
ROWS = [[20, 12], [32], [5, 6, 7], [30], [3, 3], [16, 16], [9], [31]]
BATCH = packed_batch(ROWS, length=32)
MESHES = [
    {"expert": 4, "fsdp": 2},
    {"expert": 2, "tensor": 2, "fsdp": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


def assert_near(got, want, relative: float = 1e-5):
    """Every tensor within `relative` of its own L2 norm."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        norm = np.linalg.norm(b)
        assert norm > 0, f"{jax.tree_util.keystr(path)} is zero"
        assert np.linalg.norm(a - b) <= relative * norm, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(check, got, want)


def loss_and_gradients(model, params):
    """Of the mean loss and a balance loss that is not drowned by it."""

    def loss(params, batch):
        inputs = (batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        h_BTD, balance = model.hidden_and_balance(params, *inputs)
        total, _ = model.xent(params, h_BTD, batch.targets_BT, batch.weights_BT)
        return (total + 0.1 * balance) / batch.weights_BT.sum()

    return jax.jit(jax.value_and_grad(loss))(params, BATCH)


@functools.cache
def of_one_device():
    model = tiny_model(**EXPERTS)
    params = jax.jit(model.init)(jax.random.key(0))
    return params, loss_and_gradients(model, params)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_gradients_are_those_of_one_device(shape):
    params, want = of_one_device()
    model = tiny_model(make_mesh(shape), **EXPERTS)
    assert_near(loss_and_gradients(model, jax.device_put(params, model.shardings())), want)


def test_experts_lie_apart():
    """32 x 48 each: a device has a quarter of the eight and half of their width of 32."""
    shardings = tiny_model(make_mesh(MESHES[0]), **EXPERTS).shardings()["layers"]
    assert shardings["w_gate"].shard_shape((2, 8, 32, 48)) == (2, 2, 16, 48)
    assert shardings["w_down"].shard_shape((2, 8, 48, 32)) == (2, 2, 48, 16)
    message = (
        r"weight layers/w_down: dim 1 \(expert\) = 6 is not a multiple of mesh axis expert = 4"
    )
    with pytest.raises(ValueError, match=message):
        tiny_model(make_mesh(MESHES[0]), **{**EXPERTS, "num_experts": 6})


# --- the mixture alone ----------------------------------------------------------------------------

B, T, D, F, E = 8, 16, 24, 20, 8


def mixture_and_gradients(experts: moe.Experts, h_BTD, router_DE, weights):
    """(routing, output, gradients of all three operands)."""
    real_BT = jnp.arange(T) < jnp.array([16, 9, 16, 1, 0, 16, 3, 16])[:, None]

    def run(*operands):
        h_BTD, router_DE, weights = operands
        out_BTD, routing = experts(
            h_BTD, real_BT, router_DE, weights, num_chosen=2, normalised=True,
            activation=jax.nn.silu,
        )  # fmt: skip
        return (out_BTD * jnp.cos(jnp.arange(D))).sum() + (routing.probs_E**2).sum(), (
            routing, out_BTD,
        )  # fmt: skip

    (_, seen), gradients = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)(
        h_BTD, router_DE, weights
    )
    return *seen, gradients


def operands(rows: int = B, length: int = T):
    keys = jax.random.split(jax.random.key(0), 5)
    h_BTD = jax.random.uniform(keys[0], (rows, length, D), minval=0.1)
    router_DE = jax.random.normal(keys[1], (D, E))
    into, out = jax.random.normal(keys[2], (2, E, D, F)), jax.random.normal(keys[3], (E, F, D))
    return h_BTD, router_DE, (into[0], into[1], out)


def test_any_load():
    """Choices at random; all of one device's experts; and of one device's and a single other."""
    on_mesh, alone = moe.Experts(make_mesh({"expert": 4, "fsdp": 2})), moe.Experts()
    sharded = jax.jit(functools.partial(mixture_and_gradients, on_mesh))
    single = jax.jit(functools.partial(mixture_and_gradients, alone))
    h_BTD, random_DE, weights = operands()
    favour = lambda *experts: random_DE.at[:, jnp.array(experts)].add(3.0)  # h is positive
    for router_DE, chosen in [(random_DE, None), (favour(0, 1), 2), (favour(2, 7), 2)]:
        want = single(h_BTD, router_DE, weights)
        assert chosen is None or (np.asarray(want[0].counts_E) > 0).sum() == chosen
        got = sharded(h_BTD, router_DE, weights)
        np.testing.assert_array_equal(got[0].counts_E, want[0].counts_E)
        assert_near((got[0].probs_E, got[1:]), (want[0].probs_E, want[1:]))


def largest_array(text: str) -> int:
    """Elements of the largest array of a compiled program."""
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]+)\]", text)
    return max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


@pytest.mark.parametrize("shape", [None, {"expert": 4, "fsdp": 2}], ids=str)
def test_nothing_is_held_of_every_token_and_expert(shape):
    """Arrays are at most the rows, twice the tokens here: eight experts times them are not held."""
    experts = moe.Experts(shape and make_mesh(shape))
    h_BTD, router_DE, weights = operands(64, 64)

    def loss(h_BTD, router_DE, weights):
        out_BTD, _ = experts(
            h_BTD, jnp.ones((64, 64), bool), router_DE, weights, num_chosen=2, normalised=True,
            activation=jax.nn.silu,
        )  # fmt: skip
        return (out_BTD**2).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(h_BTD, router_DE, weights).compile()
    tokens = 64 * 64  # on the mesh the arguments are whole before they are split
    assert largest_array(compiled.as_text()) < 3 * tokens * D


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"mesh.experts is 'triton'; it must be one of auto, loop"):
        moe.build("triton", None)
    with pytest.raises(ValueError, match=r"mesh.experts is 'pallas', .* but the devices are cpu;"):
        moe.build("pallas", make_mesh({"expert": 8}))
    with pytest.raises(ValueError, match=r"mesh.experts is 'megablox', kernels for TPUs, but the"):
        moe.build("megablox", None)
