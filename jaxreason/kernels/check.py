"""A kernel's results on this machine's devices, held against those that are known to be right."""

from collections.abc import Callable

import jax
import numpy as np

# Products of 8 bits of mantissa at least (bfloat16; TF32 has 10), sums in float32.
_TOLERANCE = 2e-2  # of the largest entry


def held_against(
    run: Callable[[], dict], truth: Callable[[], dict], *, setting: str, instead: str
) -> None:
    """Raises ValueError with both numbers where a result differs by more than bfloat16 rounds, and
    with the compiler's words where `run` cannot run here.

    Args:
      run: no arguments -> {name: array}.
      truth: the same, in float32.
      setting: what chose the kernel, as in "mesh.experts = pallas".
      instead: the setting that needs no kernel.
    """
    try:
        got = jax.block_until_ready(jax.jit(run)())
    except (RuntimeError, NotImplementedError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{setting} does not run here ({why}); choose {instead}") from error
    with jax.default_matmul_precision("highest"):
        want = jax.jit(truth)()
    for name, true in want.items():
        ours, true = np.asarray(got[name], np.float32), np.asarray(true)
        at = np.unravel_index(np.abs(ours - true).argmax(), true.shape)
        if not np.abs(ours - true).max() <= _TOLERANCE * np.abs(true).max():
            raise ValueError(
                f"{setting}: {name} at {tuple(map(int, at))} is {ours[at]}, but it should be "
                f"{true[at]}; choose {instead}"
            )
