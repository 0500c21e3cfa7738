"""Peaks by device name, compile targets, compiler options, and the work of a token."""

import importlib.util
import types

import jax
import jax.numpy as jnp
import pytest
from compile_options import options_in_force

from jaxreason.parallel import chips
from jaxreason.parallel.cost import causal_keys, flops_per_token


@pytest.mark.parametrize(
    "kind, name",
    [
        ("NVIDIA B200", "b200"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    assert chips.detect(types.SimpleNamespace(device_kind=kind)).name == name


def test_no_peak_is_claimed_for_a_cpu():
    assert chips.detect(jax.devices()[0]) is None


def test_an_unknown_chip_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"chip is 'b300'; known chips: b200, .*h200.*v5p.*cpu"):
        chips.chip("b300")


def test_a_compile_target_is_made_for_gpus_alone():
    assert "core_count: 148" in chips.gpu_target("b200")
    assert "major: 9" in chips.gpu_target("h200")
    with pytest.raises(ValueError, match="chip 'v5p' is no GPU"):
        chips.gpu_target("v5p")


@pytest.mark.parametrize(
    "name, hosts, topology",
    [
        ("v5p", 1, "v5p:2x2x1"),
        ("v5p", 2, "v5p:2x2x2"),
        ("v5p", 8, "v5p:2x4x4"),
        ("v5p", 16, "v5p:4x4x4"),
        ("v5e", 1, "v5e:2x2"),
        ("v5e", 2, "v5e:2x4"),
        ("v6e", 64, "v6e:16x16"),
    ],
)
def test_a_slice_is_as_square_as_can_be(name, hosts, topology):
    assert chips.slice_topology(name, hosts) == topology


@pytest.mark.parametrize("name, hosts, most", [("v5p", 3, 1024), ("v6e", 128, 64)])
def test_a_slice_that_there_is_not_is_refused(name, hosts, most):
    with pytest.raises(ValueError, match=f"hosts is {hosts}; slices of {name} .* {most} hosts"):
        chips.slice_topology(name, hosts)


def test_an_executable_tells_which_options_it_was_compiled_with():
    """On CPU too: XLA has one set of options for all platforms."""
    options = chips.xla_options(chips.CHIPS["b200"], 8)
    step = jax.jit(lambda x: x @ x, compiler_options=options)
    assert options_in_force(step.lower(jnp.ones((2, 2))).compile().runtime_executable()) == options
    plain = jax.jit(lambda x: x @ x).lower(jnp.ones((2, 2))).compile()
    assert options_in_force(plain.runtime_executable()) == {}


def test_options_go_by_generation_and_number():
    of = lambda name, num=8: chips.xla_options(chips.CHIPS[name], num)
    assert of("b200").keys() - of("h200").keys() == {"xla_gpu_enable_command_buffer"}
    assert of("h100") == of("h200") and len(of("h200")) == 4
    assert of("b200", 1) == of("v5p") == of("cpu") == chips.xla_options(None, 8) == {}


@pytest.mark.hardware_free
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
)
@pytest.mark.parametrize("name", ["b200", "h200", "h100"])
def test_the_gpu_compiler_takes_the_options(name):
    place = jax.sharding.SingleDeviceSharding(chips.absent_gpus(name)[0])
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=place)
    options = chips.xla_options(chips.CHIPS[name], 8)
    compiled = jax.jit(lambda x: x @ x, compiler_options=options).lower(x).compile()
    assert options_in_force(compiled.runtime_executable()) == options


def test_flops_by_hand():
    """Two layers, 3 heads of 4, 10 tokens: 12 x 12 x 10 for causal attention; 6 with a window."""
    shape = dict(body_params=100, head_params=50, attention_dim=12)
    assert flops_per_token(**shape, keys_per_query=2 * causal_keys(10)) == 6 * 150 + 1440
    assert flops_per_token(**shape, keys_per_query=10, frozen=True) == 4 * 150 + 1440
    # Queries 0 to 9 read 1, 2, 3, 4, 4, ... keys; the diagonal's half is left out as above.
    assert causal_keys(10, 4) == pytest.approx((1 + 2 + 3 + 4 * 7) / 10 - 0.5 * 4 / 10)
    assert causal_keys(10, 99) == causal_keys(10) == 5
