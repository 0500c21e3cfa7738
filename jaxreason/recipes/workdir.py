"""The folder of a run: its configuration and history, and which stages are done."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from jaxreason.parallel import hosts
from jaxreason.report.summary import write_whole

# What may differ when a run resumes: how it is executed and watched, the mixture and the length,
# how a teacher is reached and how much it is asked at a time.
_CHANGEABLE = re.compile(
    r"(mesh|run|log|eval)\..*|(stages\.[^.]+\.)?(data\.weights\..*|train\.steps|save_every|rows"
    r"|server\.(url|key_variable|concurrency|requests_per_minute|samples_per_request|timeout"
    r"|max_retries|backoff))"
)
_SHARED_WITHIN = 30.0  # seconds in which a file of process 0 must be seen by the others
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Workdir:
    """Paths of the contract, config.json and the done markers. Everything is written by rename.

    Several processes share one folder and call everything together; the first writes.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        self.data = self.path / "data"
        self.tokenizer = self.path / "tokenizer"
        self.config = self.path / "config.json"
        self.samples = self.path / "samples.jsonl"

    def checkpoints(self, stage: str) -> pathlib.Path:
        return self.path / "checkpoints" / stage

    def open(self, config: ConfigDict) -> None:
        """Create the folder or resume it. A run that never got to train or score starts anew.

        Raises ValueError when the path cannot be a folder, is another kind of folder, or was made
        by a config that differs in a key that may not change (named with both values), and when
        the processes of a run do not see the same folder.
        """
        hosts.first(lambda: self._open(config))
        self._check_shared()

    def _open(self, config: ConfigDict) -> None:
        for parent in (self.path, *self.path.parents):
            if parent.exists() and not parent.is_dir():
                raise ValueError(f"--workdir={self.path}: {parent} is a file, not a folder")
        new = json.loads(config.to_json())
        content = json.loads(self.config.read_text()) if self.config.exists() else {}
        if "history" in content:
            if self._started() or content["config"] == new:
                self._resume(content, new)
                return
            shutil.rmtree(self.tokenizer, ignore_errors=True)  # prepared for another config
            shutil.rmtree(self.data, ignore_errors=True)
        elif self.path.exists() and any(self.path.iterdir()):
            raise ValueError(f"--workdir={self.path} holds files but no config.json of a run")
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.config, {"config": new, "history": [], **_environment()})

    def describe(self, **facts) -> None:
        """Add to config.json what is known once the model stands (parameters, mesh, devices)."""
        add = lambda: _write(self.config, {**json.loads(self.config.read_text()), **facts})
        hosts.first(add)

    def marker(self, name: str) -> dict | None:
        """What the done marker of a stage says; None when the stage is not done."""
        path = self.path / "stages" / f"{name}.json"
        # Told by one process: a file system may show a new file to the others later.
        return hosts.told(lambda: json.loads(path.read_text()) if path.exists() else None)

    def mark(self, name: str, content: Callable[[], dict]) -> None:
        """`content` is asked for in the process that writes."""

        def write() -> None:
            (self.path / "stages").mkdir(exist_ok=True)
            _write(self.path / "stages" / f"{name}.json", content())

        hosts.first(write)

    def _check_shared(self) -> None:
        text, deadline = hosts.told(self.config.read_text), time.monotonic() + _SHARED_WITHIN
        while not (self.config.exists() and self.config.read_text() == text):
            if time.monotonic() > deadline:
                raise ValueError(
                    f"--workdir={self.path} is another folder in process {hosts.index()} than in "
                    "process 0; give one on a file system that all hosts share"
                )
            time.sleep(0.5)

    def _started(self) -> bool:
        """Whether anything was trained or scored: from then on the config binds the workdir."""
        return (self.path / "metrics.jsonl").exists() or (self.path / "stages").exists()

    def _resume(self, content: dict, new: dict) -> None:
        before, after = flatten(content["config"]), flatten(new)
        changes = {}
        for key in sorted(before.keys() | after.keys()):
            old, now = before.get(key), after.get(key)
            if old == now:
                continue
            if not _CHANGEABLE.fullmatch(key):
                raise ValueError(
                    f"--workdir={self.path} was made with {key} = {old!r}, and now it is {now!r}; "
                    "use another workdir, or the old value"
                )
            changes[key] = [old, now]
        if changes:
            entry = {"time": round(time.time(), 3), "changes": changes}
            content["history"].append(entry)
            _write(self.config, {**content, "config": new, **_environment()})


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty dict stays as a value."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _write(path: pathlib.Path, content: dict) -> None:
    write_whole(path, json.dumps(content, indent=2) + "\n")


def _environment() -> dict:
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"packages": versions, "devices": [str(d) for d in jax.devices()]}
