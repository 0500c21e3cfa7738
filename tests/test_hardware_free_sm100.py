"""The Blackwell kernel without a Blackwell: its schedule simulated, its code compiled for one."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from absent_gpu import compiled_gradients, num_kernels
from simulated_gpu import (
    CASES,
    check_forward,
    check_gradients,
    check_packing,
    float32,
    qkv,
)

from jaxreason.kernels import flash_sm100, reference
from jaxreason.model.config import PRESETS
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.parallel import chips
from jaxreason.parallel.mesh import make_mesh
from jaxreason.types import AttentionMask

CONFIGS, Tiles = flash_sm100.CONFIGS, flash_sm100.Tiles
# Smaller blocks, hence more of them, and fewer programs, hence more items of each.
SMALL = dataclasses.replace(CONFIGS[64], forward=Tiles(256, 64, 2, 3), programs=3)
slow_but = lambda *quick: [
    case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in CASES
]
QUICK = slow_but(*(case for case in CASES if case != "offset"))


@pytest.mark.parametrize("case", QUICK)
def test_the_forward_schedule_gives_the_reference(case):
    check_forward(flash_sm100, case, (4, 2), 64, SMALL)


LARGER = [pytest.param(80, marks=pytest.mark.slow), 128, 256]


@pytest.mark.parametrize("head_dim", LARGER)
@pytest.mark.parametrize("case", slow_but("packed window"))
def test_the_forward_schedules_of_larger_heads_give_the_reference(case, head_dim):
    config = dataclasses.replace(flash_sm100.config_for(head_dim), programs=3)
    check_forward(flash_sm100, case, (2, 1), head_dim, config)


@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("case", QUICK)
def test_the_backward_schedules_give_the_reference(case, ordered):
    config = dataclasses.replace(CONFIGS[64], ordered=ordered)
    check_gradients(flash_sm100, case, (4, 2), 64, config)


@pytest.mark.parametrize("head_dim", LARGER)
@pytest.mark.parametrize("case", slow_but("packed window"))
def test_the_backward_schedules_of_larger_heads_give_the_reference(case, head_dim):
    config = flash_sm100.config_for(head_dim)
    check_gradients(flash_sm100, case, (2, 1), head_dim, config)
    if config.adds:
        config = dataclasses.replace(config, ordered=True)
        check_gradients(flash_sm100, case, (2, 1), head_dim, config)


def test_documents_of_a_row_do_not_touch_each_other():
    check_packing(flash_sm100, dataclasses.replace(SMALL, ordered=True))


def test_shapes_and_dtypes_are_those_of_the_reference():
    for T, head_dim, dtype in [(300, 80, jnp.bfloat16), (37, 256, jnp.float16)]:
        q, k, v, _ = qkv(0, T, T + 5, 4, 2, head_dim, dtype)
        outputs = jax.eval_shape(flash_sm100.attention, q, k, v, AttentionMask())
        wanted = jax.eval_shape(reference.attention, q, k, v, AttentionMask())
        assert outputs == wanted
        loss = lambda *qkv: flash_sm100.attention(*qkv, AttentionMask())[0].sum()
        gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2)), q, k, v)
        assert gradients == jax.eval_shape(lambda *same: same, q, k, v)


def test_what_it_cannot_do_is_refused_with_the_reason():
    q, k, v, _ = qkv(0, 128, 128, 2, 1, 64)
    attention = flash_sm100.attention
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, all alike: not float32"):
        attention(*float32(q, k, v), AttentionMask())
    with pytest.raises(NotImplementedError, match="head_dim 320 is above flash_sm100's 256"):
        attention(*(jnp.tile(x, 5) for x in (q, k, v)), AttentionMask())
    with pytest.raises(NotImplementedError, match="a positive scale, not -1"):
        attention(q, k, v, AttentionMask(scale=-1.0))
    with pytest.raises(ValueError, match=r"Tiles\.keys is 96; it must be 64 or 128"):
        Tiles(128, 96, 2, 2)
    with pytest.raises(ValueError, match=r"Tiles\.queries is 32; it must be 64, 128 or 256"):
        Tiles(32, 64, 2, 2)
    with pytest.raises(ValueError, match=r"Tiles\.value_stages is 0"):
        Tiles(128, 128, 2, 0)
    with pytest.raises(ValueError, match=r"Config\.forward\.queries is 64; it must be 128 or 256"):
        dataclasses.replace(SMALL, forward=Tiles(64, 64, 2, 2))
    with pytest.raises(ValueError, match=r"Config\.of_keys has 128 queries and 64 keys"):
        dataclasses.replace(SMALL, of_keys=Tiles(128, 64, 2, 2))
    with pytest.raises(ValueError, match=r"Config\.of_queries\.stages is 1; it must be at least 2"):
        dataclasses.replace(SMALL, of_queries=Tiles(256, 64, 1, 2))
    with pytest.raises(ValueError, match=r"takes 768 columns .* at head_dim 256; there are 512"):
        wide = jnp.tile(q, 4), jnp.tile(k, 4), jnp.tile(v, 4), AttentionMask()
        jax.eval_shape(lambda: attention(*wide, config=CONFIGS[128]))


# --- the compiler ---------------------------------------------------------------------------------

needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
)
HEADS = sorted({(c.head_dim, c.num_heads // c.num_kv_heads) for c in PRESETS.values()})


@pytest.mark.hardware_free
@needs_cuda_plugin
@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("head_dim, group", HEADS)
def test_blackwell_kernels_compile_for_an_absent_one(head_dim, group, ordered):
    config = dataclasses.replace(flash_sm100.config_for(head_dim), ordered=ordered)
    text = compiled_gradients(flash_sm100, "b200", head_dim, group, config, window=1000)
    assert num_kernels(text) == (2 if config.adds else 3)


@pytest.mark.hardware_free
@needs_cuda_plugin
def test_blackwell_kernels_compile_with_a_cap_and_odd_lengths():
    text = compiled_gradients(flash_sm100, "b200", 128, 2, CONFIGS[128], length=2050, soft_cap=30.0)
    assert num_kernels(text) == 2


@pytest.mark.hardware_free
@needs_cuda_plugin
def test_a_kernel_of_another_generation_is_refused_by_us():
    """When the model is built for an absent GPU, not by its compiler."""
    for chip, name, found in (("b200", "flash_sm90", "10.0"), ("h200", "flash_sm100", "9.0")):
        kernels = importlib.import_module(f"jaxreason.kernels.{name}")
        mesh = make_mesh({"fsdp": 8}, chips.absent_gpus(chip))
        said = f"{name}: is for compute capability {kernels.COMPUTE_CAPABILITY}, not {found}"
        with pytest.raises(ValueError, match=re.escape(said)):
            LanguageModel(PRESETS["qwen3-1.7b"], Execution("bfloat16", attention=name), mesh)
        other = {"flash_sm90": "flash_sm100", "flash_sm100": "flash_sm90"}[name]
        LanguageModel(PRESETS["qwen3-1.7b"], Execution("bfloat16", attention=other), mesh)
