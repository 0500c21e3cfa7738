"""Reward of answers that are formulas: sets, intervals, tuples, expressions, by math-verify.

Numbers are compared by rewards/math.py and never leave this process. All else goes to worker
processes (rewards/latex_worker.py), which are killed when an answer keeps them too long.
"""

import dataclasses
import functools
import json
import os
import queue
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from jaxreason import types
from jaxreason.rewards import math as numbers
from jaxreason.rewards import numerals

_MAX_CHARACTERS = 1_000  # of a formula; a longer one is no answer
_PATIENCE = 5.0  # wall seconds per CPU second: code in C does not see the worker's own limit
_START_SECONDS = 120.0  # to import sympy, on a busy machine
_FORMULA = re.compile(
    r"\$\$([^$]+)\$\$|\\\[(.{1,1000}?)\\\]|\\\((.{1,1000}?)\\\)"
    r"|(?<![\\$])\$(?![\s$])([^$\n]*)(?<![\s\\])\$(?![0-9$])",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A worker's answer; False with `timeout` where it kept the worker too long or killed it."""

    value: bool
    timeout: bool = False


class Pool:
    """Worker processes for requests {"gold", "answer"} (equivalent?) and {"gold"} (readable?).

    A context manager. Workers start with the first requests and are new interpreters, not forks
    (JAX's threads do not survive a fork). The limit is `timeout_seconds` of CPU time, seen by the
    worker itself, and five times as many wall seconds, after which it is killed and replaced.
    """

    def __init__(self, workers: int, timeout_seconds: float):
        self._workers = [_Worker(timeout_seconds) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers; a later request starts new ones."""
        for worker in self._workers:
            worker.kill()

    def run(self, requests: Sequence[dict[str, str]]) -> list[Verdict]:
        """One verdict a request, in order. Raises RuntimeError where a worker does not start."""
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self._ask, requests))

    def _ask(self, request: dict[str, str]) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.ask(request)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started when first asked and after each kill; asked by one thread at a time."""

    def __init__(self, timeout_seconds: float):
        self._timeout_seconds = timeout_seconds
        self._process: subprocess.Popen | None = None

    def ask(self, request: dict[str, str]) -> Verdict:
        process = self._process or self._start()
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            reply = _read(process, self._timeout_seconds * _PATIENCE)
        except BrokenPipeError:  # it died after its last answer
            reply = None
        if reply is None:
            self.kill()
        return Verdict(**reply) if reply else Verdict(False, timeout=True)

    def _start(self) -> subprocess.Popen:
        # Not multiprocessing: its children import the parent's main module, and with it jax.
        # -P: the folder the run was started in may hold a math.py of its own.
        command = [sys.executable, "-P", "-m", "jaxreason.rewards.latex_worker"]
        self._process = subprocess.Popen(
            [*command, str(self._timeout_seconds)],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
        )
        if _read(self._process, _START_SECONDS) is None:
            self.kill()
            raise RuntimeError(f"{' '.join(command)} did not start (its error is on stderr)")
        return self._process

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # reaps it and closes the pipes
            self._process = None


def _read(process: subprocess.Popen, seconds: float) -> dict | None:
    """The next reply, None where none comes in time or the process is dead."""
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    line = process.stdout.readline() if ready else b""
    return json.loads(line) if line else None


@dataclasses.dataclass(frozen=True)
class MathVerify:
    """1 for an equivalent answer and 0 otherwise: numbers exactly, formulas by math-verify.

    The answer is the last \\boxed{}, else the last `#### ` line, else the last formula between
    dollars or \\(..\\) or the last number, whichever is later. A formula that takes more than
    `timeout_seconds` of CPU time is wrong.
    """

    split: numbers.Split
    workers: int = 2
    timeout_seconds: float = 2.0

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}; it must be at least 1")
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; it must be above 0")

    @functools.cached_property
    def pool(self) -> Pool:
        return Pool(self.workers, self.timeout_seconds)

    def close(self) -> None:
        self.pool.close()

    def __call__(
        self, completions: Sequence[types.Completion], answers: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The breakdown has `answered` and `timeouts`, 0 or 1 each."""
        written = [written_formula(self.split(c.text)[1]) for c in completions]
        pairs = list(zip(written, answers, strict=True))
        distinct = list(dict.fromkeys(pairs))  # a group often agrees: ask once
        asked = [pair for pair in distinct if _needs_worker(*pair)]
        requests = [{"gold": _formula(gold), "answer": answer} for answer, gold in asked]
        verdicts = {pair: Verdict(_plainly_equal(*pair)) for pair in distinct}
        verdicts |= zip(asked, self.pool.run(requests), strict=True)
        return [float(verdicts[pair].value) for pair in pairs], {
            "answered": [float(answer is not None) for answer in written],
            "timeouts": [float(verdicts[pair].timeout) for pair in pairs],
        }

    def complaints(self, answers: Sequence[str]) -> list[str | None]:
        """For each gold answer what is wrong with it, None where it is a number or a formula."""
        formulas = sorted({a for a in answers if numerals.read(a) is None and _balanced(a)})
        verdicts = self.pool.run([{"gold": _formula(formula)} for formula in formulas])
        readable = {f for f, verdict in zip(formulas, verdicts, strict=True) if verdict.value}
        return [
            None
            if numerals.read(answer) or answer in readable
            else f"is {answer!r}; it must be a number or LaTeX that math-verify reads"
            for answer in answers
        ]


def written_formula(text: str) -> str | None:
    """The final answer as it was written, without its dollars; None where there is none."""
    if numbers.last_boxed(text) is not None or numbers.HASHES in text:
        return numbers.written_answer(text)
    formulas = [match for match in _FORMULA.finditer(text) if match[0].strip("$\\[]() ")]
    number = numbers.written_answer(text)
    if not formulas or (number and number in text[formulas[-1].end() :]):
        return number
    return next(inner for inner in formulas[-1].groups() if inner is not None)


def _needs_worker(answer: str | None, gold: str) -> bool:
    """Whether text and exact numbers leave it open if they are equal."""
    if answer is None or len(answer) > _MAX_CHARACTERS or not _balanced(answer):
        return False
    if numerals.read(answer) and numerals.read(gold):
        return False
    return not numbers.answers_equal(answer, gold)


def _plainly_equal(answer: str | None, gold: str) -> bool:
    return answer is not None and numbers.answers_equal(answer, gold)


def _balanced(text: str) -> bool:
    """Whether its braces are: then it cannot leave the box that it is sent in."""
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0:
            return False
    return depth == 0


def _formula(gold: str) -> str:
    """A gold answer without the dollars or the box around it."""
    boxed = numbers.last_boxed(gold)
    return gold.strip().strip("$") if boxed is None else boxed
