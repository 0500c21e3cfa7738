"""The base of a stage of LoRA adapters: recorded when the stage starts, held to ever after.

Adapters make sense beside the weights that they were trained on alone. `bases` in config.json says
which those were, by stage: of a run its stage and step, which is loaded however far the run trained
since; of a Hugging Face directory a digest of its weights, and the commit of one from a hub.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

from jaxreason.checkpoint import hub, peft
from jaxreason.checkpoint.safetensors_files import Tensor, open_file, open_tensors, read_json
from jaxreason.checkpoint.store import when_saved
from jaxreason.parallel import hosts
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.workdir import Workdir

Folders = Callable[[str], pathlib.Path]  # a run's stage -> folder of its checkpoints
_SAMPLE = 4096  # bytes of each tensor in a digest: training moves them, and a digest costs no read


def begun(workdir: Workdir, stage: str, start: Checkpoint) -> Checkpoint:
    """What the stage's adapters are added to, recorded unless the stage has a checkpoint.

    Raises ValueError as `recorded` does.
    """
    saved = lambda: any(step.name.isdigit() for step in workdir.checkpoints(stage).glob("*"))
    if not hosts.told(saved):
        known = read_json(workdir.config).get("bases", {})
        workdir.describe(bases={**known, stage: _identity(start, workdir.checkpoints)})
    return recorded(workdir.path, stage, start, workdir.checkpoints)


def recorded(workdir: pathlib.Path, stage: str, start: Checkpoint, folders: Folders) -> Checkpoint:
    """`start` as it was when the stage began: that very step, that very commit.

    Args:
      folders: of the run whose stages `start` names by @STAGE.
    Raises ValueError, one line, where it is gone or other weights lie there now.
    """
    whose = f"{workdir}@{stage} holds adapters to {start.text!r}"
    was = read_json(workdir / "config.json").get("bases", {}).get(stage)
    if was is None:
        raise ValueError(f"{whose}; config.json does not say which weights those were")
    try:
        pinned = _pinned(start, was)
        now = _identity(pinned, folders)
    except ValueError as error:
        raise ValueError(f"{whose} as it was at {_shown(was)}: {error}") from error
    if now != was:
        raise ValueError(
            f"{whose} as it was at {_shown(was)}; there now is {_shown(now)}, to which they do not "
            "belong: put the old weights back"
        )
    return pinned


def _pinned(start: Checkpoint, was: dict[str, Any]) -> Checkpoint:
    if start.kind == "run" and "step" in was:
        return dataclasses.replace(start, stage=was["stage"], step=was["step"])
    if hub.is_address(start.text) and "commit" in was:
        text = f"{start.text.split('@')[0]}@{was['commit']}"
        start = dataclasses.replace(start, text=text, directory=hub.resolve(text))
    if start.base is not None and "base" in was:
        start = dataclasses.replace(start, base=_pinned(start.base, was["base"]))
    return start


def _identity(start: Checkpoint, folders: Folders) -> dict[str, Any]:
    """Which weights it is, in JSON. Raises ValueError where there are none."""
    if start.kind == "run":
        inside = start.directory and start.directory / "checkpoints" / start.stage
        step, saved = when_saved(inside or folders(start.stage), start.step)
        return {"stage": start.stage, "step": step, "saved": saved}
    commit = {"commit": start.directory.name} if hub.is_address(start.text) else {}
    if start.kind == "hf":
        return {"sha256": _digest(open_tensors(start.directory)[0]), **commit}
    settings = peft.settings_of(start.directory)
    digest = _digest(open_file(start.directory / peft.WEIGHTS)[0], settings)
    return {"sha256": digest, **commit, "base": _identity(start.base, folders)}


def _digest(tensors: list[Tensor], settings: dict[str, Any] | None = None) -> str:
    """The same wherever the weights lie and however they are divided into files."""
    sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        sha.update(f"{tensor.name} {tensor.kind} {tensor.shape}".encode())
        sha.update(tensor.data[:_SAMPLE].tobytes())
    return sha.hexdigest()


def _shown(identity: dict[str, Any]) -> str:
    shown = lambda value: f"({_shown(value)})" if isinstance(value, dict) else value
    return ", ".join(f"{key} {shown(value)}" for key, value in identity.items())
