"""What samples is chosen before a run begins: what cannot be is one line and exit code 2."""

import dataclasses
import json
import pathlib
import signal

import jax
import pytest

from jaxreason import launch
from jaxreason.model import decode_choice

PROCESS_CONFIG = pathlib.Path(__file__).parent.with_name("process_config.py")


@pytest.fixture
def start(tmp_path):
    """Launches tests/process_config.py with some keys of `mesh`; gives the exit code."""
    before = signal.getsignal(signal.SIGTERM)

    def started(recipe: str, **mesh: str) -> int:
        flags = [f"--config.mesh.{key}={value}" for key, value in mesh.items()]
        rows = ["--config.train.rows_multiple=8"] * (recipe == "rl")  # eight devices
        config = [f"--config={PROCESS_CONFIG}:{recipe}", f"--workdir={tmp_path / 'run'}"]
        return launch.main([*config, *flags, *rows])

    yield started
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def compiled():
    """The names of what was compiled so far."""
    found = []
    note = lambda event, seconds, fun_name="", **_: (
        found.append(fun_name) if event.endswith("backend_compile_duration") else None
    )
    jax.monitoring.register_event_duration_secs_listener(note)
    jax.jit(lambda x: x + 1)(0)
    assert found, "the listener hears nothing"
    found.clear()
    yield found
    jax.monitoring.unregister_event_duration_listener(note)


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize("recipe", ["fit", "rl"])
@pytest.mark.parametrize("name", ["auto", "xla", "pallas"])
def test_an_fp8_cache_on_cpu_is_refused_with_every_reason(start, capsys, compiled, recipe, name):
    assert start(recipe, kv_cache_dtype="fp8_e4m3", decode_attention=name) == 2
    assert_one_line(
        capsys.readouterr().err,
        f"mesh.decode_attention is '{name}' and the cache float8_e4m3fn, which cannot be (",
        "pallas: runs on gpu, not cpu",
        "xla: reads a cache of float32, not float8_e4m3fn",
        "set mesh.kv_cache_dtype = auto",
    )
    assert not compiled


@pytest.mark.parametrize(
    "mesh, says",
    [
        (dict(kv_cache_dtype="fp8"), "mesh.kv_cache_dtype is 'fp8'; it must be auto or fp8_e4m3"),
        (dict(decode_attention="flash"), "is 'flash'; known implementations: auto, pallas, xla"),
        (dict(decode_attention="pallas"), "set mesh.decode_attention = xla"),
    ],
)
def test_other_mistakes(start, capsys, compiled, mesh, says):
    assert start("rl", **mesh) == 2
    assert_one_line(capsys.readouterr().err, says)
    assert not compiled


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_a_kernel_that_is_wrong_is_refused_before_the_first_step(
    start, tmp_path, capsys, monkeypatch, cache
):
    right = decode_choice.IMPLEMENTATIONS["pallas"]
    wrong = lambda *operands, **options: right.kernel(*operands, **options).at[3, 2, 1].add(9)
    broken = dataclasses.replace(right, kernel=wrong)
    monkeypatch.setitem(decode_choice.IMPLEMENTATIONS, "pallas", broken)
    assert start("rl", decode_attention="pallas", kv_cache_dtype=cache) == 2
    said = "mesh.decode_attention = pallas: output at (3, 2, 1) is "
    assert_one_line(capsys.readouterr().err, said, "but it should be", "mesh.kv_cache_dtype = auto")
    assert not (tmp_path / "run/data").exists() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("simulated_kernels")
def test_reinforcement_learning_with_an_fp8_cache(start, tmp_path):
    """On eight devices: rollouts, updates, an evaluation; and resumed with the other cache."""
    mesh = {"shape.data": "4", "shape.tensor": "2", "decode_attention": "pallas"}
    assert start("rl", **mesh, kv_cache_dtype="fp8_e4m3") == 0
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][-1] == 2
    execution = json.loads((tmp_path / "run/config.json").read_text())["execution"]
    assert execution["kv_cache_dtype"] == "fp8_e4m3"
    assert start("rl", **mesh) == 0  # `mesh` may change
