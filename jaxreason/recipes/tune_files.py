"""What the tuner leaves behind: a config that `launch` accepts, and is shown to accept.

python -m jaxreason.recipes.tune_files FILE [KEY=VALUE ...]    resolves it, and says what it is
"""

import json
import os
import pathlib
import subprocess
import sys

from jaxreason import launch
from jaxreason.model.config import PRESETS
from jaxreason.recipes import assemble, defaults, pipeline, tune
from jaxreason.recipes.tune import Candidate, Request

_BASES = {"pretrain": "pretrain:b200", "sft": "sft:hf", "rl": "rl:hf"}  # shipped, at full size
_TEXT = '''"""{title}

Made by tools/tune_mesh.py: predicted, not measured.

  python -m jaxreason.launch --config={path}          on {devices} devices
  python -m jaxreason.launch --config={path}:smoke    {base}:smoke on the same mesh
"""

from jaxreason.launch import load_config

MESH = {mesh}
RUN = {run}
# With an argument: its own model and data, in as many rows as the mesh needs.
SMALL = {small}


def get_config(arg: str = ""):
    c = load_config(f"{base}:{{arg or {full!r}}}")
    c.update_from_flattened_dict(MESH | (SMALL if arg else RUN))
    return c
'''


def write_config(request: Request, candidate: Candidate, path: pathlib.Path) -> None:
    """A shipped config of the recipe with this model, batch and mesh."""
    base, _, full = _BASES[request.recipe].partition(":")
    layout = candidate.layout
    mesh = {f"mesh.shape.{axis}": size for axis, size in layout.shape.items()}
    mesh |= {"mesh.microbatches": layout.microbatches, "mesh.remat": candidate.remat}
    text = _TEXT.format(
        title=headline(request, candidate),
        path=path,
        devices=request.num_devices,
        base=base,
        full=full,
        mesh=_text(mesh),
        run=_text(_model(request) | _batch(request, candidate)),
        small=_text(_small(request, candidate)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def headline(request: Request, candidate: Candidate) -> str:
    """One line: what, on what, how fast."""
    per_host = request.num_devices // request.hosts
    hours = tune.hours(request, candidate)
    pace = f"{candidate.estimate.tokens_per_second:,.0f} tokens/s, {candidate.estimate.mfu:.0%} MFU"
    if hours is not None:
        pace += f", {request.tokens / 1e9:g}B tokens in {hours:.1f} h"
    return (
        f"{request.model} on {request.hosts} x {per_host} {request.chip}, "
        f"{request.tokens_per_step:,} tokens a step: {pace}."
    )


def _text(keys: dict) -> str:
    return "".join(
        ["{\n", *(f"    {json.dumps(k)}: {json.dumps(v)},\n" for k, v in keys.items()), "}"]
    )


def _model(request: Request) -> dict:
    if request.model not in PRESETS:
        return {"init.from": str(pathlib.Path(request.model).resolve())}
    if request.recipe == "pretrain":
        return {"model.preset": request.model}
    return {  # from random weights: a checkpoint's own tokenizer and template are not there
        "model.preset": request.model,
        "init.from": "random",
        "tokenizer.kind": "hf",
        "tokenizer.path": "tokenizer_qwen3",
        "chat.template": "qwen3",
    }


def _batch(request: Request, candidate: Candidate) -> dict:
    ways = candidate.layout.ways("batch")
    if request.recipe == "rl":
        multiple = ways * candidate.layout.microbatches
        return {"train.length": request.sequence, "train.rows_multiple": multiple}
    keys = {"data.rows": request.rows, "data.length": request.sequence, "data.num_shards": ways}
    if request.tokens is not None:
        steps = -(-int(request.tokens) // request.tokens_per_step)
        keys["train.steps"] = steps
        keys["train.optimizer.warmup_steps"] = min(2_000, steps // 20)
        if request.recipe == "pretrain":  # WSD: the last 15 % in decay, as in pretrain:b200
            keys["train.optimizer.decay_steps"] = steps * 15 // 100
    return keys


def _small(request: Request, candidate: Candidate) -> dict:
    ways = candidate.layout.ways("batch")
    rows = ways * candidate.layout.microbatches
    if request.recipe == "rl":
        return {"train.rows_multiple": rows}
    return {"data.rows": rows, "data.num_shards": ways}


# --- would launch take it? ------------------------------------------------------------------------


def check(path: pathlib.Path, num_devices: int) -> str:
    """What `launch` makes of the file on so many devices, nothing run; they are virtual.

    Raises ValueError with launch's own words where it would refuse.
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(num_devices))
    root = str(pathlib.Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "jaxreason.recipes.tune_files", str(path)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{path}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return done.stdout.strip()


def resolved(argv: list[str]) -> str:
    """The run that a command line of `launch` asks for, resolved and validated at full size."""
    config, _ = launch.read_command(argv)
    defaults.check_keys(config)
    stages = pipeline.stages_of(config)
    shape = assemble.architecture(config, stages[0].start)
    model = assemble.language_model(config, shape, _AllRows(shape.vocab_size))
    mesh = {} if model.mesh is None else dict(model.mesh.shape)
    return f"{config.name}: {model.num_params:,} parameters on {mesh}, {config.mesh.remat}"


class _AllRows:
    """A tokenizer as far as the model asks: how many entries it has."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size


def main() -> int:
    overrides = [f"--config.{pair}" for pair in sys.argv[2:]]
    try:
        print(resolved([f"--config={sys.argv[1]}", *overrides]))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
