"""What must not change the result, in the families that differ most from Qwen3."""

import functools

import jax
import numpy as np
import pytest
from tiny_models import assert_trees_close, loss_and_gradients, packed_batch, tiny_model

from jaxreason.model.execution import Execution
from jaxreason.model.rope import RopeScaling, frequencies, tables
from jaxreason.parallel.mesh import make_mesh
from jaxreason.train import optim

FAMILIES = {
    "qwen2": dict(family="qwen2"),
    "gemma3": dict(
        family="gemma3_text", num_layers=8, window=5, sliding_layers=(0, 1, 3, 4, 6, 7),
        local_rope_theta=50.0, attention_scale=0.3,
        rope_scaling=RopeScaling("linear", 4.0),
    ),
}  # fmt: skip
BATCH = packed_batch([[20, 12], [30], [9, 9, 9], [32]], length=32)
by_family = pytest.mark.parametrize("name", FAMILIES)


@functools.cache
def params_of(name: str):
    model = tiny_model(**FAMILIES[name])
    params = jax.jit(model.init)(jax.random.key(0))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    return jax.tree.map(noise, params)  # biases and norms that are not 0 and 1


@functools.cache
def plain(name: str):
    return loss_and_gradients(tiny_model(**FAMILIES[name]), params_of(name), BATCH)


def test_execution_changes_nothing():
    """Two rounds of sliding, sliding and global layers, and two left over; scanned and unrolled."""
    name = "gemma3"
    for execution in (Execution(attention="reference"), Execution(remat="full", scan_layers=True)):
        model = tiny_model(execution=execution, **FAMILIES[name])
        assert_trees_close(loss_and_gradients(model, params_of(name), BATCH), plain(name), 1e-5)


@by_family
def test_eight_devices_equal_one(name):
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    model = tiny_model(mesh, **FAMILIES[name])
    placed = jax.device_put(params_of(name), model.shardings())
    assert_trees_close(loss_and_gradients(model, placed, BATCH), plain(name), 1e-5)


def test_sliding_layers_read_their_window_alone():
    """Through 2 sliding layers of 5 positions a token reaches back 8; a global one ends that."""
    changes = {**FAMILIES["gemma3"], "num_layers": 2, "sliding_layers": (0, 1)}
    tokens = np.arange(30)[None] % 60
    ones, positions = np.ones_like(tokens), np.arange(30)[None]

    def reach(**more):
        model = tiny_model(**{**changes, **more})
        params = jax.jit(model.init)(jax.random.key(0))
        last = jax.jit(lambda t: model.hidden(params, t, ones, positions)[0, -1])
        moved = [i for i in range(30) if (last(tokens) != last(_other(tokens, i))).any()]
        return 29 - min(moved)

    assert reach() == 8
    assert reach(sliding_layers=(0,)) == 29


def _other(tokens, i):
    changed = tokens.copy()
    changed[0, i] = 61
    return changed


def test_biases_and_norms_do_not_decay_and_experts_are_matrices():
    model = tiny_model(family="qwen2")
    decays = jax.tree.map(optim._is_matrix, model.axes, is_leaf=optim._is_axes)
    kept = {k for k, v in decays["layers"].items() if not v}
    assert kept == {"attention_norm", "mlp_norm", "bq", "bk", "bv"}
    experts = tiny_model(family="qwen3_moe", num_experts=4, experts_per_token=2)
    dims = optim._muon_dims(experts.axes["layers"]["w_gate"])
    assert (dims.reduction_axis, dims.output_axis) == ((2,), (3,))
    dims = optim._muon_dims(experts.axes["layers"]["w_down"])
    assert (dims.reduction_axis, dims.output_axis) == ((2,), (3,))


def test_scaled_frequencies():
    """By the papers' words: fast ones kept, slow ones divided, each in order between them."""
    plain, one = frequencies(128, 1e6, None)
    assert one == 1 and plain[0] == 1
    for scaling in (
        RopeScaling("yarn", 4.0, original_length=32_768),
        RopeScaling("llama3", 8.0, original_length=8192),
    ):
        scaled, amplitude = frequencies(128, 1e6, scaling)
        ratio = plain / scaled
        assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(scaling.factor)
        assert (np.diff(ratio) > -1e-5).all()
        turns = scaling.original_length * plain / (2 * np.pi)
        assert np.allclose(ratio[turns > 40], 1) and np.allclose(ratio[turns < 0.5], scaling.factor)
        assert amplitude == pytest.approx(1.1386294 if scaling.kind == "yarn" else 1.0)
    linear, _ = frequencies(128, 1e6, RopeScaling("linear", 4.0))
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    cos, _ = tables(np.zeros((1, 1), int), 8, 1e4, RopeScaling("yarn", 4.0, original_length=64))
    assert cos[0, 0, 0, 0] == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(kind="ntk", factor=2.0), "rope_scaling.kind is 'ntk'; it must be linear, yarn"),
        (dict(kind="linear", factor=0.5), "rope_scaling.factor is 0.5; it must be at least 1"),
        (dict(kind="yarn", factor=2.0), "rope_scaling.original_length is 0; yarn needs"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(rope_scaling=fields)


def test_sliding_layers_need_a_window():
    with pytest.raises(ValueError, match=r"model.window is None; the sliding layers need"):
        tiny_model(sliding_layers=(1,))
    with pytest.raises(ValueError, match=r"sliding_layers names layer 2; model.num_layers is 2"):
        tiny_model(sliding_layers=(2,), window=4)
    with pytest.raises(ValueError, match=r"model.family is 'bert'; known: qwen3, qwen3_moe, qwen2"):
        tiny_model(family="bert")
