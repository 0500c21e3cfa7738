"""How long until the first update is made: cold, with no compilation cache, and warm, with one.

Each start is a process of its own, as a training job is, and prints its figures:

  python tools/bench_startup.py jaxreason CASE | torch CASE
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed

import bench_models as models
import bench_peers as peers
import numpy as np
from bench_timing import Settings

from jaxreason.checkpoint.hf_config import config_to_hf

_CACHES = {  # the variables that name the folder of what was compiled
    "jaxreason": ("JAX_COMPILATION_CACHE_DIR",),
    "torch.compile": ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"),
}
STARTS = 3  # of each kind at most: they are long


def bench_startup(case: models.Case, settings: Settings) -> tuple[list[dict], list[str]]:
    """Seconds of the first update, which is traced and compiled, and since the process began.

    The two do not compute the same, their weights being drawn by themselves: each is asked for a
    finite loss, and warm for the same loss as cold.
    """
    starts = {"jaxreason": lambda caches: _start("jaxreason", case, caches)}
    reasons = {"torch.compile": "left out (--no-compile)" if not settings.compiled else ""}
    reasons["torch.compile"] = reasons["torch.compile"] or peers.missing() or peers.no_compiler()
    if not reasons["torch.compile"]:
        starts["torch.compile"] = lambda caches: _start("torch", case, caches)
    found = {name: {"cold": [], "warm": []} for name in starts}
    for number in range(min(settings.rounds, STARTS)):
        if number and time.monotonic() > settings.deadline:
            break
        with tempfile.TemporaryDirectory() as folder:
            for kind in ("cold", "warm"):
                for name, start in starts.items():
                    settings.note(f"{kind} {name}")
                    caches = {key: f"{folder}/{key}" for key in _CACHES[name]}
                    found[name][kind].append(start(caches))
    return _rows(case, found, reasons), _errors(case, found)


def _start(which: str, case: models.Case, caches: dict[str, str]) -> dict[str, float]:
    command = [sys.executable, __file__, which, case.name]
    own = {"BENCH_STARTED": repr(time.time()), **caches}
    if which == "torch":
        own["JAX_PLATFORMS"] = "cpu"  # torch has the accelerator to itself
    process = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or [""]
        raise RuntimeError(f"{which} of {case.name} ended with {process.returncode}: {last[0]}")
    return json.loads(process.stdout.splitlines()[-1])


def _rows(case: models.Case, found: dict, reasons: dict[str, str]) -> list[dict]:
    rows = []
    same = dict(
        suite="startup", case=case.name, shape=f"{case.rows} x {case.length}", unit="s",
        baseline="", ratio=None, error=None, percent=None, rate=None, temporaries=None,
    )  # fmt: skip
    for kind in ("cold", "warm"):
        for name in _CACHES:
            for what, key in (("first update", "update"), ("from the command on", "total")):
                if name != "jaxreason" and key == "total":
                    continue  # its process imports ours, too
                row = dict(same, mode=f"{kind}, {what}", name=name, reason=reasons.get(name, ""))
                row["seconds"] = [start[key] for start in found.get(name, {}).get(kind, [])]
                rows.append(row)
    return rows


def _errors(case: models.Case, found: dict) -> list[str]:
    errors = []
    for name, kinds in found.items():
        losses = [start["loss"] for starts in kinds.values() for start in starts]
        if not np.ptp(losses) <= 1e-3 * np.abs(losses).max():  # NaN is an error, too
            errors.append(f"startup/{case.name} {name}: first losses differ: {losses}")
    return errors


# --------------------------------------------------------------------- inside of a process


def main() -> None:
    which, name = sys.argv[1:]
    case, began = models.CASES[name], float(os.environ["BENCH_STARTED"])
    step = {"jaxreason": _our_step, "torch": _torch_step}[which](case)
    ready = time.time()
    loss = step()
    now = time.time()
    print(json.dumps({"loss": loss, "update": now - ready, "total": now - began}))


def _our_step(case: models.Case) -> Callable[[], float]:
    model, batch = models.language_model(case), models.random_batch(case)
    step, _ = models.train_step(model, batch, keep=False)
    return lambda: float(step())


def _torch_step(case: models.Case) -> Callable[[], float]:
    import torch
    import transformers

    torch.manual_seed(0)
    described = config_to_hf(case.config, eos_id=None, pad_id=None)
    config = transformers.AutoConfig.for_model(**described)
    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    steps, _ = peers.train_steps(
        model, models.random_batch(case), models.OPTIMIZER, autocast=cuda, compiled=True
    )
    return lambda: float(steps["compile fused"]())


if __name__ == "__main__":
    main()
