"""tools/tune_mesh.py: a table, a config, JSON; one line and exit code 2 for what cannot be."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("tune_mesh", ROOT / "tools" / "tune_mesh.py")
tune_mesh = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tune_mesh)

ASKED = ["--chip=b200", "--model=qwen3-1.5b", "--sequence=4096", "--tokens-per-step=2097152",
         "--tokens=100e9"]  # fmt: skip
TINY = ["--chip=cpu", "--model=qwen3-tiny", "--sequence=64", "--tokens-per-step=1024"]


def test_by_arithmetic_alone(tmp_path, capsys):
    out, record = tmp_path / "tuned.py", tmp_path / "tuned.json"
    assert tune_mesh.main([*ASKED, "--compile=0", f"--out={out}", f"--json={record}"]) == 0
    said = capsys.readouterr()
    assert str(out) in said.out and "parameters" not in said.out
    assert "1,519,230,976 parameters" in said.err  # launch has taken the config
    assert "pretrain: 722,304 parameters" in said.err  # and its smoke size
    content = json.loads(record.read_text())
    assert content["considered"] >= 20 and content["request"]["tokens"] == 100e9
    best = content["candidates"][0]
    assert best["fits"] and best["binds"] in best["seconds"]
    assert best["hours"] == pytest.approx(100e9 / best["tokens_per_second"] / 3600)
    for column in ("fits", "GiB", "tokens/s", "MFU", "binds", "hours"):
        assert column in said.out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--chip=b300"], "chip is 'b300'; known chips: b200"),
        (["--tokens=0"], "--tokens is 0; it must be at least 1"),
        (["--tokens=inf"], "--tokens is inf; it must be a finite number"),
        (["--json=no_such_folder/x.json"], "no_such_folder is no folder"),
        (["--out=/proc/no/x.py"], "--out: nothing can be written to /proc/no"),
        (["--chip=h100", "--measure"], "--measure: the devices here are cpu (cpu), not h100"),
        (["--processes=0"], "--processes is 0; it must be at least 1"),
        (["--compile=-1"], "--compile is -1; it must be at least 0"),
        (["--limit=0"], "--limit is 0; it must be seconds, above 0"),
        (["--hosts=7"], "--hosts=4 or 8 would do"),
        (["--mesh=fsdp=9"], "8 devices are not a multiple of 9"),
        (["--mesh=tensor=16", "--hosts=2"], "mesh of 16 devices"),
        (["--model=gemma-3-1b", "--mesh=tensor=2"], "(kv_heads) = 1 is not a multiple of mesh"),
        (["--chip=v5e", "--model=qwen3-32b", "--hosts=1"], "does not fit 4 x v5e"),
        (["--model=gpt-9"], "--model is 'gpt-9', neither a preset nor a folder; presets: qwen3-"),
        (["--mesh=tensor"], "--mesh=tensor: write AXIS=N"),
        (["--tables=no_such_page.md"], "no_such_page.md"),
        (["--attention=splash"], "splash: runs on tpu, not cuda; cudnn: cannot keep packed"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_2(flags, message, tmp_path, capsys):
    asked = [*ASKED, "--compile=0", f"--out={tmp_path / 'x.py'}", *flags]
    assert tune_mesh.main(asked) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("error: ") and message in said.err
    assert not (tmp_path / "x.py").exists()


@pytest.mark.slow
def test_compiled_and_measured_on_virtual_devices(tmp_path):
    """The whole command on eight CPU devices; predicted beside measured. A second run is kept."""
    record = tmp_path / "t.json"
    command = [sys.executable, "tools/tune_mesh.py", *TINY, "--compile=3",
               f"--out={tmp_path / 'tuned.py'}", f"--json={record}",
               f"--cache={tmp_path / 'cache'}"]  # fmt: skip
    for kept, more in ((0, []), (3, ["--measure"])):
        done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(", kept") == kept
    rows = json.loads(record.read_text())["candidates"]
    assert all(row["compiled"]["argument_bytes"] > 0 for row in rows)
    assert rows[0]["measured"]["step_seconds"] > 0 and rows[0]["step_seconds"] > 0
    assert "measured tokens/s" in done.stdout


@pytest.mark.hardware_free
@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
)
def test_the_arithmetic_of_memory_is_the_compilers(tmp_path):
    """Two layouts of qwen3-0.6b on eight H200 that are not here, within 15 %."""
    record = tmp_path / "t.json"
    asked = ["--chip=h200", "--model=qwen3-0.6b", "--sequence=4096", "--tokens-per-step=262144"]
    flags = ["--compile=2", f"--out={tmp_path / 'tuned.py'}", f"--json={record}"]
    assert tune_mesh.main([*asked, *flags, f"--cache={tmp_path / 'cache'}"]) == 0
    for row in json.loads(record.read_text())["candidates"]:
        assert row["compiled"]["involuntary_rematerializations"] == 0
        assert sum(row["arithmetic_bytes"].values()) == pytest.approx(row["bytes"], rel=0.15)
