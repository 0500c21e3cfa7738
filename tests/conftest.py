"""Shared by all tests: eight CPU devices, the compilation cache, and where the real data lies."""

import os
import pathlib
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/jaxreason-test-cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most of a cold run is compiling, of which LLVM's optimisation is half. Eight devices on two
    # cores may wait for each other longer than the 40 s after which XLA gives up.
    _FLAGS = (
        "--xla_backend_optimization_level=0",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS]).strip()

import pytest
from counting_model import counting  # noqa: F401  (a fixture)
from simulated_kernels import simulated_kernels  # noqa: F401  (a fixture)
from untrained import checkpoint  # noqa: F401  (a fixture)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data (GSM8K, books, the Qwen3 tokenizer); skips where it is absent."""
    path = pathlib.Path(os.environ.get("JAXREASON_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path} (set JAXREASON_DATA)")
    return path


def launch_env() -> dict[str, str]:
    """The environment of a user's own run: this suite's devices and flags are not theirs."""
    ours = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    return {k: v for k, v in os.environ.items() if k not in ours}


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> pathlib.Path:
    """The workdir of an uninterrupted smoke quickstart (a minute or two; for slow tests)."""
    workdir = tmp_path_factory.mktemp("smoke") / "run"
    launch = [sys.executable, "-m", "jaxreason.launch", "--config=quickstart:smoke"]
    subprocess.run([*launch, f"--workdir={workdir}"], cwd=ROOT, env=launch_env(), check=True)
    return workdir
