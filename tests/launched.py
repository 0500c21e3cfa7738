"""Runs of tests/process_config.py in processes of their own."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

from conftest import ROOT, launch_env

CONFIG = pathlib.Path(__file__).with_name("process_config.py")


class Processes(list):
    """What was started, by index."""

    def codes(self, seconds: float = 300) -> list[int]:
        deadline = time.monotonic() + seconds
        return [process.wait(deadline - time.monotonic()) for process in self]

    def says(self, index: int) -> str:
        return pathlib.Path(self[index].log).read_text()


@contextlib.contextmanager
def started(
    workdir: pathlib.Path,
    number: int,
    *flags: str,
    recipe: str = "fit",
    devices: int = 2,
    come: int | None = None,
):
    """`number` processes of `devices` each; whatever is left of them at the end is killed.

    Args:
      come: so many of them are really started.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "jaxreason.launch", f"--config={CONFIG}:{recipe}",
               f"--workdir={workdir}", *flags]  # fmt: skip
    processes = Processes()
    try:
        for i in range(number if come is None else come):
            # Several processes on CPU keep no compiled programs: as little to compile as may be.
            flags = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
            environ = launch_env() | flags | {"JAX_NUM_CPU_DEVICES": str(devices)}
            if number > 1:
                environ |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(number)}
                environ |= {"JAX_PROCESS_ID": str(i)}
            log = workdir.with_name(f"{workdir.name}-{len(os.listdir(workdir.parent))}-{i}.log")
            with log.open("w") as out:
                started = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=out, stderr=out)
            started.log = log
            processes.append(started)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(workdir: pathlib.Path, number: int, *flags: str, **kinds) -> pathlib.Path:
    with started(workdir, number, *flags, **kinds) as processes:
        codes = processes.codes()
        assert codes == [0] * number, "\n".join(processes.says(i)[-3000:] for i in range(number))
    return workdir


def metrics(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
