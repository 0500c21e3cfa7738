"""How the benchmarks measure: in turn, beside what the device at hand can do, and where it was."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.parallel import chips

ROOT = pathlib.Path(__file__).resolve().parents[1]
Run = Callable[[], int]  # does the work, returns the tokens it made
ROUND_SECONDS = 0.5  # at least, for each side of a round of whole models
KERNEL_SECONDS = 0.1  # the same for kernels, which differ less from call to call
VERSIONS = (
    "jax", "jaxlib", "flax", "optax", "numpy", "grain", "tokamax", "torch", "transformers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int
    deadline: float  # time.monotonic() after which no round begins
    compiled: bool  # try torch.compile
    # Told the name of what is about to run for the first time, in case the process ends there.
    note: Callable[[str], None] = lambda name: None
    # name -> what became of the process that ran it; left out from then on
    broken: dict[str, str] = dataclasses.field(default_factory=dict)


class WrongResultError(Exception):
    """What should be timed computes something else than the other side."""


class DeviceLostError(Exception):
    """Nothing can run in this process any more."""


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


# ---------------------------------------------------------------------------- whole models


def in_turn(
    settings: Settings, ours: Run, theirs: Run | None, long: bool = False
) -> dict[str, list[float]]:
    """Tokens a second and CPU seconds a token of every round, of both sides.

    Both have run before; each side of a round lasts ROUND_SECONDS. A `long` run lasts them by
    itself, and is not repeated to find that out.
    """
    runs = {"ours": ours} if theirs is None else {"ours": ours, "theirs": theirs}
    needed = lambda run: 1 if long else math.ceil(ROUND_SECONDS / _fastest(run, 2))
    repeats = {name: needed(run) for name, run in runs.items()}
    found = {"ours": [], "ours_cpu": [], "theirs": [], "theirs_cpu": []}
    for number in range(settings.rounds):
        if number and time.monotonic() > settings.deadline:
            break
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(run() for _ in range(repeats[name]))
            found[name].append(tokens / (time.perf_counter() - wall))
            found[f"{name}_cpu"].append((time.process_time() - cpu) / tokens)
    return found


def best_variant(variants: dict[str, Run]) -> tuple[str, Run]:
    """The fastest by its best of three runs, after one that warms it."""
    seconds = {}
    for name, run in variants.items():
        run()
        seconds[name] = _fastest(run, 3)
    name = min(seconds, key=seconds.get)
    return name, variants[name]


def _fastest(run: Run, times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# ---------------------------------------------------------------------------------- kernels


@dataclasses.dataclass(frozen=True)
class Timed:
    """Work that is given to the device and not waited for; many calls hide what a call costs."""

    start: Callable[[], Any]  # returns what it makes
    wait: Callable[[Any], Any]  # until that is made
    temporaries: int | None = None  # bytes, where the compiler says so

    def once(self) -> Any:
        made = self.start()
        self.wait(made)
        return made

    def seconds(self, times: int) -> float:
        """Of one call, by the clock."""
        start = time.perf_counter()
        for _ in range(times):
            made = self.start()
        self.wait(made)
        return (time.perf_counter() - start) / times


def compiled(function: Callable, *operands) -> Timed:
    program = jax.jit(function).lower(*operands).compile()
    memory = program.memory_analysis()
    return Timed(
        lambda: program(*operands),
        jax.block_until_ready,
        getattr(memory, "temp_size_in_bytes", None),
    )


def seconds_in_turn(runs: dict[str, Timed], settings: Settings) -> dict[str, list[float]]:
    """{name: seconds of a call, of every round}, A B C A B C; all have run before.

    Each side of a round lasts KERNEL_SECONDS.
    """
    repeats = {n: max(1, math.ceil(KERNEL_SECONDS / run.seconds(2))) for n, run in runs.items()}
    found = {name: [] for name in runs}
    for number in range(settings.rounds):
        if number and time.monotonic() > settings.deadline:
            break
        for name, run in runs.items():
            found[name].append(run.seconds(repeats[name]))
    return found


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What the device reaches: FLOP/s of a large matmul, bytes a second of a large copy."""

    flops: float
    bandwidth: float
    matmul: str  # what was multiplied
    datasheet_flops: float | None  # bf16, where the chip is known

    def of(self, unit: str) -> float:
        return {"TFLOP/s": self.flops, "GB/s": self.bandwidth}[unit]


@functools.cache
def peaks() -> Peaks:
    """Measured once in a process, on random normal data: bf16 on accelerators, fp32 on CPU."""
    size, dtype = (1024, jnp.float32) if on_cpu() else (8192, jnp.bfloat16)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    product = compiled(lambda a, b: a @ b, a, b)
    x = jax.random.normal(jax.random.key(2), (2**24 if on_cpu() else 2**30,), dtype)
    copy = compiled(lambda x: -x, x)  # reads and writes each byte once; a plain copy may be elided
    runs = {"matmul": product, "copy": copy}
    for run in runs.values():
        run.once()
    found = seconds_in_turn(runs, Settings(5, math.inf, False))
    seconds = {name: statistics.median(values) for name, values in found.items()}
    chip = chips.detect(jax.devices()[0])
    return Peaks(
        flops=2 * size**3 / seconds["matmul"],
        bandwidth=2 * x.nbytes / seconds["copy"],
        matmul=f"{size}^3 {jnp.dtype(dtype).name}",
        datasheet_flops=chip and chip.flops,
    )


# ---------------------------------------------------------------------------------- machine


def machine() -> dict:
    """Where, when and with what: a figure without these is none."""
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "commit": _ask("git", "describe", "--always", "--dirty"),
        "source": source(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in VERSIONS if name in installed},
        "load_before": os.getloadavg(),
    }
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,power.limit,clocks.sm,clocks.mem"
        about["gpu"] = _ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return about


def source() -> str:
    """Of the measured code; where it was copied without git, this says which it was."""
    files = [*(ROOT / "jaxreason").rglob("*.py"), *(ROOT / "tools").glob("bench*.py")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _ask(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
