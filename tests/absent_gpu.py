"""Mosaic GPU kernels compiled for a chip that is not here, a process for each chip.

JAX asks for a kernel's target once a process: after one for B200, one for Hopper is compiled for
B200 too, and fails.
"""

import concurrent.futures
import functools
import importlib
import multiprocessing

import jax
import jax.numpy as jnp

from jaxreason.parallel import chips
from jaxreason.types import AttentionMask


@functools.cache
def _process_of(chip: str) -> concurrent.futures.Executor:
    return concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def compiled_gradients(kernels, chip, head_dim, group, config, length=2048, **mask) -> str:
    """The gradients of packed rows by a module of jaxreason.kernels, as compiled text."""
    asked = (kernels.__name__, chip, head_dim, group, config, length, mask)
    return _process_of(chip).submit(_compiled, *asked).result()


def _compiled(module, chip, head_dim, group, config, length, mask) -> str:
    kernels = importlib.import_module(module)
    place = jax.sharding.SingleDeviceSharding(chips.absent_gpus(chip)[0])
    abstract = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    B, T, K, H = 4, length, 2, head_dim
    q_BTNH, ids_BT = abstract(jnp.bfloat16, B, T, K * group, H), abstract(jnp.int32, B, T)
    k_BTKH = abstract(jnp.bfloat16, B, T, K, H)

    def loss(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        packed = AttentionMask(q_segments_BT=ids_BT, kv_segments_BS=ids_BT, **mask)
        out_BTNH, _ = kernels.attention(q_BTNH, k_BTKH, v_BTKH, packed, config=config)
        return out_BTNH.astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q_BTNH, k_BTKH, k_BTKH, ids_BT)
    return step.compile().as_text()


def num_kernels(text: str) -> int:
    return text.count('custom_call_target="mosaic_gpu')
