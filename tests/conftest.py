"""Shared by all tests: eight CPU devices, the compilation cache, and where the real data lies."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "/tmp/jaxreason-test-cache")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real data (GSM8K, books, the Qwen3 tokenizer); skips where it is absent."""
    path = pathlib.Path(os.environ.get("JAXREASON_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"real data not found at {path} (set JAXREASON_DATA)")
    return path
