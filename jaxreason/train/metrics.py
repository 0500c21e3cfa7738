"""Where numbers go: metrics.jsonl, TensorBoard from the same calls, and the terminal."""

import json
import pathlib
import shutil
import time

import jax
import rich.console
import rich.progress

from jaxreason.parallel import hosts
from jaxreason.report.summary import read_lines, write_whole


class MetricsWriter:
    """Appends to WORKDIR/metrics.jsonl and mirrors it under WORKDIR/tensorboard/.

    metrics.jsonl is the truth: opening the writer drops a half-written last line and rebuilds the
    TensorBoard events from the file, so that both can be cut back when a run resumes. Of several
    processes the first writes.
    """

    def __init__(self, workdir: pathlib.Path):
        self._path = workdir / "metrics.jsonl"
        self._events = workdir / "tensorboard"
        self._file = self._board = None
        self._reopen(lambda record: True)

    def cut(self, stage: str, step: int) -> None:
        """Forget what `stage` logged after `step`: those steps will be taken again."""
        self._reopen(lambda record: record["stage"] != stage or record["step"] <= step)

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not hosts.is_first():
            return
        record = {"stage": stage, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        self._mirror(record)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = self._board = None

    def _reopen(self, keep) -> None:
        if not hosts.is_first():
            return
        from tensorboardX import SummaryWriter  # 2 s of imports: not for a run that fails at once

        self.close()
        records = [record for record in read_lines(self._path) if keep(record)]
        write_whole(self._path, "".join(json.dumps(record) + "\n" for record in records))
        shutil.rmtree(self._events, ignore_errors=True)
        self._file = self._path.open("a")
        self._board = SummaryWriter(str(self._events), write_to_disk=True)
        for record in records:
            self._mirror(record)

    def _mirror(self, record: dict) -> None:
        for name, value in record.items():
            if name not in ("stage", "step", "time"):
                tag = f"{record['stage']}/{name}"
                self._board.add_scalar(tag, value, record["step"], walltime=record["time"])


class Progress:
    """Stage, step, loss, tokens/s and time left; one plain line a report when not a terminal.

    Of several processes the first speaks.
    """

    def __init__(self, console: rich.console.Console | None = None):
        self.console = console or rich.console.Console(highlight=False, quiet=not hosts.is_first())
        self._bar = self._task = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def start(self, stage: str, total: int, done: int = 0) -> None:
        self.stop()
        self._stage, self._total = stage, total
        self._began, self._done_before = time.monotonic(), done
        if self.console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[detail]}"),
                rich.progress.TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(stage, total=total, completed=done, detail="")
            self._bar.start()

    def update(self, done: int, detail: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=detail)
            return
        elapsed = time.monotonic() - self._began
        rate = (done - self._done_before) / max(elapsed, 1e-9)
        left = (self._total - done) / rate if rate else 0.0
        self.say(f"{self._stage} {done}/{self._total}  {detail}  {left:.0f} s left")

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def peak_memory_gib() -> float | None:
    """High-water mark of the first local device; None where the backend does not count (CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 2**30 if stats else None
