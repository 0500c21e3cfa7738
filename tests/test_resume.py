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

STAGES = ("pretrain", "sft_answer", "sft_cot", "rl")
QUICKSTART = ("--config=quickstart:smoke",)
# Sixteen short steps; the asynchronous ones see how far a step of learning moves the policy.
RL = ("--config=rl:smoke", "--config.train.steps=16", "--config.run.save_every=3",
      "--config.rollout.max_mult_prob_error=2.0")  # fmt: skip
ASYNCHRONOUS = ("--config.rollout.asynchronous=true",
                "--config.train.policy.correction=token_truncate",
                "--config.train.policy.is_max=2.0")  # fmt: skip


def start(workdir: pathlib.Path, flags=QUICKSTART) -> subprocess.Popen:
    command = [sys.executable, "-m", "jaxreason.launch", *flags, f"--workdir={workdir}"]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, env=launch_env(), stdout=quiet, stderr=quiet)


def finish(workdir: pathlib.Path, flags=QUICKSTART) -> None:
    assert start(workdir, flags).wait() == 0


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


# --- reinforcement learning -----------------------------------------------------------------------


def assert_same_rl(workdir: pathlib.Path, whole: pathlib.Path) -> None:
    """Parameters, samples and every logged number but the times."""
    expected, found = weights(whole, "rl-smoke"), weights(workdir, "rl-smoke")
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    timed = lambda name: name == "time" or name.startswith("perf/")
    numbers = lambda folder: [
        {name: value for name, value in line.items() if not timed(name)} for line in logged(folder)
    ]
    assert numbers(workdir) == numbers(whole)
    assert (workdir / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


@pytest.fixture(scope="module", params=[(), ASYNCHRONOUS], ids=["synchronous", "asynchronous"])
def whole_rl(request, tmp_path_factory):
    workdir, flags = tmp_path_factory.mktemp("rl") / "run", (*RL, *request.param)
    finish(workdir, flags)
    return workdir, flags


@pytest.mark.slow
def test_rl_killed_at_four_moments_ends_bit_equal(whole_rl, tmp_path):
    """Moments all over a step: its rollout and its updates take about as long as each other.

    tests/train/test_rl.py dies inside the one and the other on purpose.
    """
    whole, flags = whole_rl
    workdir, rng = tmp_path / "run", random.Random(1)
    for line in range(1, 16, 4):
        pause = rng.uniform(0, 0.4)

        def reached(line=line, pause=pause) -> bool:
            if len(logged_lines(workdir)) < line:
                return False
            time.sleep(pause)
            return True

        assert kill_when(start(workdir, flags), reached) == -signal.SIGKILL
    finish(workdir, flags)
    assert_same_rl(workdir, whole)


@pytest.mark.slow
def test_rl_sigterm_saves_and_exits_143(whole_rl, tmp_path):
    whole, flags = whole_rl
    workdir = tmp_path / "run"
    reached = lambda: len(logged_lines(workdir)) >= 4
    assert kill_when(start(workdir, flags), reached, signal.SIGTERM) == 143
    steps = [int(p.name) for p in (workdir / "checkpoints/rl-smoke").iterdir() if p.name.isdigit()]
    assert max(steps) >= 4  # more than the save_every of 3 had saved
    finish(workdir, flags)
    assert_same_rl(workdir, whole)
