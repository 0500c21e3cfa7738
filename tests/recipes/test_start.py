"""What was chosen by name for this machine is tried before a run begins: options and kernels."""

import signal

import process_config
import pytest

from jaxreason import launch
from jaxreason.kernels import grouped, grouped_pallas
from jaxreason.recipes import assemble, checkpoints
from jaxreason.text.tokenizer import ByteTokenizer


@pytest.fixture
def start(tmp_path):
    """Launches tests/process_config.py with one more line; gives the exit code."""
    before = signal.getsignal(signal.SIGTERM)

    def started(recipe: str, line: str) -> int:
        path = tmp_path / "changed.py"
        path.write_text(
            "from process_config import get_config as unchanged\n\n\n"
            f"def get_config(arg):\n    c = unchanged(arg)\n    {line}\n    return c\n"
        )
        return launch.main([f"--config={path}:{recipe}", f"--workdir={tmp_path / 'run'}"])

    yield started
    signal.signal(signal.SIGTERM, before)


def assert_one_line(stderr: str, *parts: str) -> None:
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize(
    "recipe, name, value, wrong",
    [
        ("fit", "xla_gpu_no_such", 1, "No such compile option: 'xla_gpu_no_such'"),
        ("rl", "xla_gpu_enable_latency_hiding_scheduler", "on", "'on' is not a valid bool value"),
        ("fit", "xla_gpu_enable_command_buffer", ("FUSION",), "no bool, number or text"),
        ("fit", "xla_gpu_enable_command_buffer", ["FUSION"], "no bool, number or text"),
    ],
)
def test_an_option_that_xla_does_not_take_is_refused_at_once(
    start, tmp_path, capsys, recipe, name, value, wrong
):
    known = "xla_cpu_enable_fast_math"  # is passed over
    line = f"c.mesh.xla_options = {{{known!r}: False, {name!r}: {value!r}}}"
    rows = "; c.train.rows_multiple = 8" if recipe == "rl" else ""  # eight devices
    assert start(recipe, line + rows) == 2
    said = capsys.readouterr().err
    assert_one_line(said, f"mesh.xla_options.{name} is {value!r}: ", wrong, "xla.proto")
    assert not (tmp_path / "run").exists()


EXPERTS = dict(family="qwen3_moe", num_experts=4, experts_per_token=2)


@pytest.fixture
def gpu_kernels(monkeypatch):
    """`mesh.experts = interpret`, which is for tests alone: the GPU's kernels, simulated."""
    monkeypatch.setattr(grouped, "IMPLEMENTATIONS", (*grouped.IMPLEMENTATIONS, "interpret"))


@pytest.mark.parametrize("recipe", ["fit", "rl"])
def test_a_kernel_that_is_wrong_is_refused_before_the_first_step(
    start, tmp_path, capsys, monkeypatch, gpu_kernels, recipe
):
    outer = grouped_pallas.outer

    def wrong(x_XI, y_XO, sizes_E, **options):
        return outer(x_XI, y_XO, sizes_E, **options).at[0, 5, 7].add(99)

    monkeypatch.setattr(grouped_pallas, "outer", wrong)
    rows = "; c.train.rows_multiple = 8" if recipe == "rl" else ""
    line = f"c.model.update({EXPERTS}); c.mesh.experts = 'interpret'{rows}"
    assert start(recipe, line) == 2
    said = "mesh.experts = interpret: gradient of w at (0, 5, 7) is "
    assert_one_line(capsys.readouterr().err, said, "but it should be", "mesh.experts = loop")
    assert not (tmp_path / "run/data").exists() and not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("sizes, tried", [(EXPERTS, ["interpret"]), ({}, [])])
def test_a_kernel_is_tried_where_the_model_has_a_use_for_it(gpu_kernels, monkeypatch, sizes, tried):
    check, calls = grouped.check, []

    def counted(implementation, dtype):
        calls.append(implementation)
        check(implementation, dtype)

    monkeypatch.setattr(grouped, "check", counted)
    config = process_config.get_config("fit")
    config.model.update(sizes)
    config.mesh.experts = "interpret"
    shape = assemble.architecture(config, checkpoints.parse("random"))
    assemble.language_model(config, shape, ByteTokenizer())
    assert calls == tried
