"""The parts that a benchmark consists of, what is known of each, and a slot of time spent on them.

A part is a case of a suite. What is found is written as soon as a part is finished, so that another
call with the same file goes on with what is left. In `all` the parts run in processes of their own:
a kernel that ends its process, or hangs, or takes the device down with it, is left out from then
on, with that reason, and the rest goes on.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import bench_timing as timing
from bench_timing import DeviceLostError, Settings, WrongResultError

Found = tuple[list[dict], list[str]]  # rows, what was wrong

# A slot on an accelerator, by worth, and the seconds that each part takes at most on an H100 (by
# judgement: none has run there yet). A part begins only where so much is left.
SLOT = {
    "attention/4k": 110,
    "linear_xent/0.6b": 70,
    "decode_attention/256x1k": 50,
    "attention/4k-packed": 110,
    "attention/8k": 110,
    "linear_xent/1.7b": 80,
    "decode_attention/256-prefix": 40,
    "startup/1.7b": 300,
    "train/0.6b": 240,
    "attention/4k-hd64": 100,
    "decode_attention/256x1k-mixed": 40,
    "decode_attention/1x4k": 40,
    "decode_attention/64x4k": 40,
    "linear_xent/0.6b-4k": 50,
    "attention/4k-window": 90,
    "attention/2k": 100,
    "attention/16k": 110,
    "decode/0.6b": 200,
    "rollout/0.6b": 450,
    "data/0.6b": 90,
}
_ALONE = ("startup",)  # its processes want the whole device
_PATIENCE = 3.0  # times the seconds of a part, then it hangs
_GRACE = 20.0  # seconds after the end of the slot, for what is being written


@dataclasses.dataclass(frozen=True)
class Suite:
    cases: dict[str, Any]
    run: Callable[[Any, Settings], Found]


@dataclasses.dataclass(frozen=True)
class Part:
    suite: str
    case: str

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.case}"

    @property
    def for_cpu(self) -> bool:
        return self.case.split("-")[0] in ("tiny", "10m")

    @property
    def seconds(self) -> float:
        return SLOT.get(self.name, 0.0)


def choose(
    asked: Sequence[str], cases: Sequence[str], suites: dict[str, Suite], cpu: bool
) -> list[Part]:
    """Of suites ("all", "train", "train/tiny") those cases; without any, those for the device.

    On accelerators in the order of SLOT. Raises ValueError for what there is not.
    """
    parts = {}
    for name in itertools.chain(*(suites if a == "all" else [a] for a in asked)):
        suite, _, case = name.partition("/")
        if suite not in suites:
            known = ", ".join(suites)
            raise ValueError(f"unknown suite {suite!r}; there are {known} and all")
        if case and case not in suites[suite].cases:
            known = ", ".join(suites[suite].cases)
            raise ValueError(f"unknown case {case!r} of {suite}; it has {known}")
        for part in [Part(suite, case)] if case else _of(suite, suites[suite], cases, cpu):
            parts[part.name] = part
    known = {case for part in asked for case in _known(part, suites)}
    for case in cases:
        if case not in known:
            raise ValueError(
                f"--case has {case!r}; what was asked for has {', '.join(sorted(known))}"
            )
    rank = {name: i for i, name in enumerate(SLOT)}
    return sorted(parts.values(), key=lambda part: rank.get(part.name, -1))


def _of(name: str, suite: Suite, cases: Sequence[str], cpu: bool) -> list[Part]:
    every = [Part(name, case) for case in suite.cases]
    if cases:
        return [part for part in every if part.case in cases]
    return [part for part in every if (part.for_cpu if cpu else part.name in SLOT)]


def _known(asked: str, suites: dict[str, Suite]) -> list[str]:
    return [c for n, s in suites.items() if asked in ("all", n) for c in s.cases]


# ------------------------------------------------------------------------- what is known


class Store:
    """{"runs": [machine, ...], "parts": {name: {"state", "run", "rows", "errors", ...}}}.

    States: running, done, failed (with "why"), left (to be tried again). Raises ValueError for a
    file that is something else. Without a path nothing is kept.
    """

    def __init__(self, path: pathlib.Path | None):
        self.path = path
        self.content = {"runs": [], "parts": {}}
        if path is None:
            return
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"--json is {path}; it must be a file in a folder that exists")
        if path.exists():
            self.read()

    def read(self) -> None:
        try:
            content = json.loads(self.path.read_text())
            content["runs"], content["parts"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"--json is {self.path}, which holds something else; name a new file, or one "
                "that this tool wrote, to go on with it"
            ) from error
        self.content = content

    def check_device(self, device: str) -> None:
        """Figures of two devices do not belong in one file."""
        for run in self.content["runs"]:
            if run["device"] != device:
                raise ValueError(
                    f"--json is {self.path}, with figures of {run['device']}; this is {device}: "
                    "name another file"
                )

    def begin_run(self, machine: dict) -> None:
        self.content["runs"].append(machine)
        self._write()

    def part(self, name: str) -> dict:
        return self.content["parts"].get(name, {})

    def state(self, name: str) -> str:
        return self.part(name).get("state", "left")

    def update(self, name: str, **fields) -> None:
        self.content["parts"][name] = self.part(name) | fields
        self._write()

    def break_off(self, name: str, why: str) -> None:
        """What ran in that part is left out from now on; without such the part has failed."""
        entrant = self.part(name).get("entrant")
        if not entrant:
            self.update(name, state="failed", why=why)
            return
        broken = self.part(name).get("broken", {}) | {entrant: why}
        self.update(name, state="left", entrant=None, broken=broken)

    def _write(self) -> None:
        if self.path is not None:
            beside = self.path.with_name(self.path.name + ".new")
            beside.write_text(json.dumps(self.content, indent=1) + "\n")
            os.replace(beside, self.path)


def measure(
    parts: list[Part],
    suites: dict[str, Suite],
    settings: Settings,
    store: Store,
    show: Callable[[str, dict], None],
    say: Callable[[str], None],
) -> None:
    """Those that are not done yet and that there is time for, one after the other, here."""
    store.begin_run(timing.machine())
    for part in parts:
        before = store.part(part.name)
        if before.get("state") == "done" or part.seconds > settings.deadline - time.monotonic():
            continue
        began, name = time.time(), part.name
        say(f"{name} ... ({settings.deadline - time.monotonic():.0f} s left)")
        run = len(store.content["runs"]) - 1
        store.update(name, state="running", since=began, run=run, entrant=None)
        own = dataclasses.replace(
            settings,
            note=lambda entrant, name=name: store.update(name, entrant=entrant),
            broken=before.get("broken", {}),
        )
        suite = suites[part.suite]
        try:
            rows, errors = suite.run(suite.cases[part.case], own)
        except WrongResultError as error:
            rows, errors = [], [f"{name}: {error}"]
        except DeviceLostError as error:
            store.break_off(name, str(error))
            raise
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            store.update(name, state="failed", why=why)
            raise
        seconds = time.time() - began
        store.update(
            name, state="done", entrant=None, rows=rows, errors=errors, seconds=seconds,
            load_after=os.getloadavg(),
        )  # fmt: skip
        show(name, store.part(name))


# ----------------------------------------------------------------------------- the slot


def device() -> tuple[str, str]:
    """(platform, kind) of the devices, found by another process: this one leaves them alone."""
    code = "import jax; print(jax.default_backend()); print(jax.devices()[0].device_kind)"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        raise ValueError(f"JAX finds no device: {asked.stderr.strip().splitlines()[-1]}")
    platform, kind = asked.stdout.strip().splitlines()[-2:]
    return platform, kind


def spend(
    parts: list[Part],
    store: Store,
    end: float,
    start: Callable[[list[Part], float], subprocess.Popen],
) -> None:
    """Every part that fits before `end`, in processes that `start(parts, seconds)` begins.

    Each is the first of its process group.
    """
    tried = set()
    while True:
        left = [p for p in parts if p.name not in tried and store.state(p.name) != "done"]
        left = [p for p in left if p.seconds <= end - time.monotonic()]
        if not left:
            return
        alone = left[0].suite in _ALONE
        batch = list(itertools.takewhile(lambda p: (p.suite in _ALONE) == alone, left))
        before = _known_of(batch, store)
        why = _watch(start(batch, end - time.monotonic()), store, end)
        with contextlib.suppress(FileNotFoundError):
            store.read()
        for part in batch:
            if store.state(part.name) == "running" and why:
                store.break_off(part.name, why)
            elif store.state(part.name) == "running":
                store.update(part.name, state="left", entrant=None)
                tried.add(part.name)
            elif store.state(part.name) in ("done", "failed"):
                tried.add(part.name)
        if _known_of(batch, store) == before:
            tried |= {part.name for part in batch}  # it began none, and would not the next time


def _known_of(parts: list[Part], store: Store) -> list[tuple]:
    return [(store.state(p.name), len(store.part(p.name).get("broken", {}))) for p in parts]


def _watch(process: subprocess.Popen, store: Store, end: float) -> str:
    """Waits for it; why it ended what it was at, or "" where the time was up."""
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return f"ended its process with exit code {process.wait(timeout=1.0)}"
            late = _late(store)
            if late or time.monotonic() > end + _GRACE:
                return late
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.wait()


def _late(store: Store) -> str:
    """Says so where a part has run for much longer than it should."""
    with contextlib.suppress(FileNotFoundError):
        store.read()
    for name, part in store.content["parts"].items():
        limit = _PATIENCE * SLOT.get(name, 0.0)
        if part["state"] == "running" and limit and time.time() - part["since"] > limit:
            return f"did not end within {limit:.0f} s"
    return ""
