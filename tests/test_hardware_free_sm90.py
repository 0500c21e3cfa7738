"""The Hopper kernel without a Hopper: its schedule simulated here, its code compiled for one."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
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

from jaxreason.kernels import flash_sm90, mosaic_gpu, reference
from jaxreason.model.config import PRESETS
from jaxreason.types import AttentionMask


@pytest.mark.parametrize("case", CASES)
def test_the_forward_schedule_gives_the_reference(case):
    tiles = flash_sm90.Tiles(128, 64, 2, 3)
    config = dataclasses.replace(flash_sm90.CONFIGS[64], forward=tiles, programs=5)
    check_forward(flash_sm90, case, (4, 2), 64, config)


def gradients(case, head_dim, ordered):
    config = dataclasses.replace(flash_sm90.config_for(head_dim), ordered=ordered)
    heads = (4, 2) if head_dim == 64 else (2, 1)
    check_gradients(flash_sm90, case, heads, head_dim, config)


@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("case", CASES)
def test_the_backward_schedules_give_the_reference(case, ordered):
    gradients(case, 64, ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("head_dim", [pytest.param(80, marks=pytest.mark.slow), 256])
def test_the_backward_schedules_of_larger_heads_give_the_reference(head_dim, ordered):
    gradients("packed window", head_dim, ordered)


def test_documents_of_a_row_do_not_touch_each_other():
    config = dataclasses.replace(flash_sm90.CONFIGS[64], ordered=True, programs=5)
    check_packing(flash_sm90, config)


# --- who does what --------------------------------------------------------------------------------


@pytest.mark.parametrize("programs, work", [(1, 5), (4, 4), (4, 6), (5, 23), (132, 1000)])
def test_every_item_is_dealt_to_one_program(programs, work):
    dealt = []
    for program in range(programs):
        mine, item_of = mosaic_gpu.share(jnp.int32(program), programs, work)
        dealt += [int(item_of(r)) for r in range(int(mine))]
    assert sorted(dealt) == list(range(work))


def test_the_longest_blocks_are_first_and_programs_are_balanced():
    lengths_BI = jnp.array([[1, 2, 3, 4], [4, 9, 0, 1]], jnp.int32)
    ranges_BI4 = jnp.stack([lengths_BI * 0, lengths_BI, lengths_BI, lengths_BI], -1)
    order = mosaic_gpu.longest_first(ranges_BI4)
    assert order.tolist() == [5, 3, 4, 2, 1, 0, 7, 6]
    # Causal rows of 8,192 tokens and 16 heads, on the cores of an H200.
    lengths = np.repeat(np.arange(64, 0, -1), 16)
    of_program = []
    for program in range(132):
        mine, item_of = mosaic_gpu.share(jnp.int32(program), 132, lengths.size)
        of_program.append(sum(lengths[int(item_of(r))] for r in range(int(mine))))
    assert max(of_program) < 1.07 * np.mean(of_program)


def test_shapes_and_dtypes_are_those_of_the_reference():
    for T, head_dim, dtype in [(300, 80, jnp.bfloat16), (37, 256, jnp.float16)]:
        q, k, v, _ = qkv(0, T, T + 5, 4, 2, head_dim, dtype)
        outputs = jax.eval_shape(flash_sm90.attention, q, k, v, AttentionMask())
        wanted = jax.eval_shape(reference.attention, q, k, v, AttentionMask())
        assert outputs == wanted
        loss = lambda *qkv: flash_sm90.attention(*qkv, AttentionMask())[0].sum()
        gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2)), q, k, v)
        assert gradients == jax.eval_shape(lambda *same: same, q, k, v)


def test_what_it_cannot_do_is_refused_with_the_reason():
    q, k, v, _ = qkv(0, 128, 128, 2, 1, 64)
    attention = flash_sm90.attention
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, all alike: not float32"):
        attention(*float32(q, k, v), AttentionMask())
    with pytest.raises(NotImplementedError, match="not bfloat16, float16"):
        attention(q, k.astype(jnp.float16), v, AttentionMask())
    with pytest.raises(NotImplementedError, match="head_dim 320 is above flash_sm90's 256"):
        attention(*(jnp.tile(x, 5) for x in (q, k, v)), AttentionMask())
    with pytest.raises(NotImplementedError, match="a positive scale, not -1"):
        attention(q, k, v, AttentionMask(scale=-1.0))
    with pytest.raises(ValueError, match=r"Tiles\.keys is 96; it must be 64 or 128"):
        flash_sm90.Tiles(128, 96, 2, 2)
    with pytest.raises(ValueError, match=r"Tiles\.value_stages is 0"):
        flash_sm90.Tiles(128, 128, 2, 0)
    right = flash_sm90.CONFIGS[64]
    with pytest.raises(ValueError, match=r"Config\.forward\.queries is 64; it must be 128"):
        dataclasses.replace(right, forward=flash_sm90.Tiles(64, 64, 2, 2))
    with pytest.raises(ValueError, match="which head_dim 64 cannot have"):
        wrong = dataclasses.replace(right, of_keys=flash_sm90.CONFIGS[128].of_keys)
        loss = lambda q: attention(q, k, v, AttentionMask(), config=wrong)[0].sum()
        jax.eval_shape(jax.grad(loss), q)


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
def test_hopper_kernels_compile_for_an_absent_one(head_dim, group, ordered):
    config = dataclasses.replace(flash_sm90.config_for(head_dim), ordered=ordered)
    text = compiled_gradients(flash_sm90, "h200", head_dim, group, config, window=1000)
    assert num_kernels(text) == (3 if ordered else 2)


@pytest.mark.hardware_free
@needs_cuda_plugin
def test_hopper_kernels_compile_with_a_cap_and_odd_lengths():
    config = flash_sm90.CONFIGS[128]
    text = compiled_gradients(flash_sm90, "h200", 128, 2, config, length=2050, soft_cap=30.0)
    assert num_kernels(text) == 2
