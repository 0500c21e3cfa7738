"""What the tuner has compiled: figures of a program, kept by the program itself.

A step is lowered in the process that would compile it, and the text of what it was lowered to is
its key, with the compiler, its options and the machine. So an edit that changes no program compiles
nothing anew, wherever the checkout lies.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Iterable

import jax

from jaxreason.parallel import chips, hlo
from jaxreason.report.summary import write_whole

FIGURES = ("compile_seconds", "argument_bytes", "temp_bytes", "alias_bytes", "host_temp_bytes",
           "collective_bytes", "collectives", "involuntary_rematerializations")  # fmt: skip
_COMPILERS = {  # of a platform: their packages
    "cpu": ("jaxlib",),
    "cuda": ("jaxlib", "jax-cuda12-pjrt", "jax-cuda12-plugin", "jax-cuda13-pjrt",
             "jax-cuda13-plugin"),
    "tpu": ("jaxlib", "libtpu"),
}  # fmt: skip
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # a compiler reads them, too


def without_locations() -> None:
    """From here on lowered programs name no files and lines: Pallas' kernels are bytes in them, out
    of which nothing could be cut."""
    jax.config.update("jax_traceback_in_locations_limit", 0)


def key(text: str, chip: str, machine: Iterable, options: dict[str, object]) -> str:
    """Of a lowered program and all else that decides its figures.

    Args:
      text: StableHLO, lowered after `without_locations`.
      machine: how the devices are connected, and their order in the mesh.
      options: of the compiler.
    """
    compilers = _versions(_COMPILERS[chips.chip(chip).platform])
    target = chips.gpu_target(chip) if chips.chip(chip).gpu else chip
    flags = {name: os.environ.get(name, "") for name in _FLAGS}
    parts = [text, target, list(machine), options, jax.__version__, compilers, flags, _reader()]
    content = json.dumps(parts, sort_keys=True)
    return f"{chip}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    return {
        name: importlib.metadata.version(name)
        for name in packages
        if any(importlib.metadata.distributions(name=name))
    }


@functools.cache
def _reader() -> str:
    """A digest of the code that reads the figures of what was compiled."""
    files = (pathlib.Path(hlo.__file__), pathlib.Path(__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def figures(program: jax.stages.Compiled, seconds: float) -> dict:
    """Seconds of compilation, bytes of one device, and the collectives of the optimized program:
    all of FIGURES but what the compiler warned of."""
    memory = program.memory_analysis()
    found = hlo.collectives(program.as_text())
    return {
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "host_temp_bytes": memory.host_temp_size_in_bytes,
        "collective_bytes": hlo.total_bytes(found),
        "collectives": hlo.summary(found),
    }


def read(folder: pathlib.Path, name: str) -> dict | None:
    """The figures under a key; None where there are none, or a file that is not whole."""
    try:
        found = json.loads((folder / f"{name}.json").read_text())["figures"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) and found.keys() >= set(FIGURES) else None


def write(folder: pathlib.Path, name: str, step: dict, found: dict) -> None:
    """Keeps them, whole or not at all, beside the step that they were asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "figures": found}
    write_whole(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
