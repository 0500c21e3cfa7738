"""The promise of resuming: killed at any moment and run again, a run ends bit-equal."""

import json
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, launch_env

STAGES = ("pretrain", "sft_answer", "sft_cot")


def command(workdir: pathlib.Path) -> list[str]:
    launch = [sys.executable, "-m", "jaxreason.launch"]
    return [*launch, "--config=quickstart:smoke", f"--workdir={workdir}"]


def start(workdir: pathlib.Path) -> subprocess.Popen:
    quiet = subprocess.DEVNULL
    env = launch_env()
    return subprocess.Popen(command(workdir), cwd=ROOT, env=env, stdout=quiet, stderr=quiet)


def finish(workdir: pathlib.Path) -> None:
    assert start(workdir).wait() == 0


def saving(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any(workdir.glob("checkpoints/*/*checkpoint-tmp*"))


def kill_when(process: subprocess.Popen, ready, sig: int = signal.SIGKILL) -> int:
    """Waits for `ready()`, then sends the signal; returns the exit code."""
    while process.poll() is None and not ready():
        time.sleep(0.001)
    process.send_signal(sig)
    return process.wait()


def logged_lines(workdir: pathlib.Path) -> list[str]:
    path = workdir / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def logged(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in logged_lines(workdir)]


def weights(workdir: pathlib.Path, stage: str) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(workdir / "hf" / stage / "model.safetensors")


def assert_same_run(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    for stage in STAGES:
        expected, found = weights(whole, stage), weights(workdir, stage)
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{stage} {name}")
    read = lambda folder: json.loads((folder / "summary.json").read_text())["evals"]
    assert read(workdir) == read(whole)
    steps = [(line["stage"], line["step"]) for line in logged(workdir)]
    assert len(steps) == len(set(steps))
    assert steps == [(line["stage"], line["step"]) for line in logged(whole)]


@pytest.mark.slow
def test_killed_five_times_ends_bit_equal(smoke_run, tmp_path):
    workdir, rng = tmp_path / "run", random.Random(0)
    total = len(logged_lines(smoke_run))
    for share in (0.1, 0.35, 0.6, 0.85):
        target, pause = int(share * total), rng.uniform(0, 1.5)

        def reached(target=target, pause=pause) -> bool:
            if len(logged_lines(workdir)) < target:
                return False
            time.sleep(pause)
            return True

        assert kill_when(start(workdir), reached) == -signal.SIGKILL
        if share == 0.35:  # the fifth: while a checkpoint is being written
            assert kill_when(start(workdir), lambda: saving(workdir)) == -signal.SIGKILL
    finish(workdir)
    assert_same_run(workdir, smoke_run)


@pytest.mark.slow
def test_sigterm_saves_and_exits_143(smoke_run, tmp_path):
    workdir = tmp_path / "run"
    code = kill_when(start(workdir), lambda: len(logged_lines(workdir)) >= 2, signal.SIGTERM)
    assert code == 143
    assert any((workdir / "checkpoints" / "pretrain").iterdir())
    finish(workdir)
    assert_same_run(workdir, smoke_run)
