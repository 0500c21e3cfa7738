"""Memory that a step frees is there, already mapped, for the next one."""

import subprocess
import sys

import pytest
from conftest import launch_env

# 36 MB of temporaries a call, which glibc would map and unmap: 9,000 pages of 4 KiB.
PROGRAM = """
import resource, sys
from jaxreason.parallel.allocator import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
import jax, jax.numpy as jnp
step = jax.jit(lambda x: (jnp.tanh(x @ (w := x[:, :64])) @ w.T) @ jnp.sin(x @ w))
x = jnp.ones((3000, 3000))
for _ in range(30):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def fewest_faults(mode: str) -> int:
    """Of one step among the last twenty: the heap needs a few to find its size, and may need them
    again where a thread took another part of it."""
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, env=launch_env(), capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return min(map(int, done.stdout.split()[-20:]))


def test_a_step_faults_in_no_page_again():
    assert fewest_faults("keep") < 500
    assert fewest_faults("leave") > 4_000  # else this guards nothing
