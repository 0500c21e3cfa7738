"""Peaks by device name, and the work of a token."""

import types

import jax
import pytest

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


def test_a_compile_target_is_made_for_gpus_alone():
    assert "core_count: 148" in chips.gpu_target("b200")
    assert "major: 9" in chips.gpu_target("h200")
    with pytest.raises(ValueError, match="chip 'v5p' is no GPU"):
        chips.gpu_target("v5p")


def test_flops_by_hand():
    """Two layers, 3 heads of 4, 10 tokens: 12 x 12 x 10 for causal attention; 6 with a window."""
    shape = dict(body_params=100, head_params=50, attention_dim=12)
    assert flops_per_token(**shape, keys_per_query=2 * causal_keys(10)) == 6 * 150 + 1440
    assert flops_per_token(**shape, keys_per_query=10, frozen=True) == 4 * 150 + 1440
    # Queries 0 to 9 read 1, 2, 3, 4, 4, ... keys; the diagonal's half is left out as above.
    assert causal_keys(10, 4) == pytest.approx((1 + 2 + 3 + 4 * 7) / 10 - 0.5 * 4 / 10)
    assert causal_keys(10, 99) == causal_keys(10) == 5
