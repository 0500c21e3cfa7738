"""What the tuner leaves behind: a config that `launch` accepts, and is shown to accept.

python -m jaxreason.recipes.tune_files FILE [KEY=VALUE ...]    resolves it, and says what it is
"""

import json
import math
import os
import pathlib
import subprocess
import sys

from jaxreason import launch
from jaxreason.model.config import PRESETS
from jaxreason.recipes import assemble, defaults, pipeline, tune
from jaxreason.recipes.tune import Candidate
from jaxreason.recipes.tune_request import Request, shape_of

_BASES = {"pretrain": "pretrain:b200", "sft": "sft:hf", "rl": "rl:hf"}  # shipped, at full size
_QWEN = ("tokenizer_qwen3", 151_669)  # under the data root; its entries
_TEXT = '''"""{title}

Made by tools/tune_mesh.py: predicted, not measured.

  {command}          on {devices} devices{missing}
  python -m jaxreason.launch --config={path}:smoke    {base}:smoke on the same mesh

:smoke has heads, widths and experts that divide over the mesh, and at most two microbatches.
"""

from jaxreason.launch import load_config

MESH = {mesh}
RUN = {run}
# With an argument: its own data and tokenizer, in as many rows as the mesh needs.
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
        command=command(request, path),
        missing=f"\n\n{_DIR}" if lacks_tokenizer(request) else "",
        devices=request.num_devices,
        base=base,
        full=full,
        mesh=_text(mesh),
        run=_text(_attention(request) | _model(request) | _batch(request, candidate)),
        small=_text(_small(request, candidate)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


_DIR = "DIR is the folder of the model's own tokenizer: tokenizer.path is missing here."


def command(request: Request, path: pathlib.Path) -> str:
    """How to run it; DIR is for the user to say."""
    missing = " --config.tokenizer.path=DIR" if lacks_tokenizer(request) else ""
    return f"python -m jaxreason.launch --config={path}{missing}"


def lacks_tokenizer(request: Request) -> bool:
    """Whether the config cannot name one: a preset comes without, and is not Qwen's."""
    shape = request.architecture
    qwen = shape.family.startswith("qwen") and shape.vocab_size >= _QWEN[1]
    return request.model in PRESETS and not qwen


def headline(request: Request, candidate: Candidate) -> str:
    """One line: what, on what, how fast."""
    per_host = request.num_devices // request.hosts
    hours = tune.hours(request, candidate)
    pace = f"{candidate.estimate.tokens_per_second:,.0f} tokens/s, {candidate.estimate.mfu:.0%} MFU"
    if hours is not None:
        pace += f", {request.tokens / 1e9:g}B tokens in {hours:.1f} h"
    return (
        f"{request.model} on {request.hosts} x {per_host} {request.chip}, "
        f"{request.tokens_per_step:,} tokens a step{request.by_name}: {pace}."
    )


def _text(keys: dict) -> str:
    return "".join(
        ["{\n", *(f"    {json.dumps(k)}: {json.dumps(v)},\n" for k, v in keys.items()), "}"]
    )


def _attention(request: Request) -> dict:
    """At full size: :smoke runs anywhere, and a kernel on its chip alone."""
    return {} if request.attention == "auto" else {"mesh.attention": request.attention}


def _model(request: Request) -> dict:
    if request.model in PRESETS:
        lacks = lacks_tokenizer(request)
        keys = {
            "model.preset": request.model,
            "tokenizer.kind": "hf",
            "tokenizer.path": "" if lacks else _QWEN[0],
            "chat.template": "plain" if lacks else "qwen3",
        }
        return keys if request.recipe == "pretrain" else {**keys, "init.from": "random"}
    keys = {"init.from": str(pathlib.Path(request.model).resolve())}
    if request.recipe == "pretrain":  # the others' bases say so; text has no turns
        keys |= {"tokenizer.kind": "checkpoint", "tokenizer.path": "", "chat.template": "plain"}
    return keys


def _batch(request: Request, candidate: Candidate) -> dict:
    keys = _rows(request, candidate)
    if request.tokens is not None:
        steps = -(-int(request.tokens) // request.tokens_per_step)
        keys["train.steps"] = steps
        keys["train.optimizer.warmup_steps"] = min(2_000, steps // 20)
        if request.recipe == "pretrain":  # WSD: the last 15 % in decay, as in pretrain:b200
            keys["train.optimizer.decay_steps"] = steps * 15 // 100
    return keys


def _rows(request: Request, candidate: Candidate) -> dict:
    """Of a step; of reinforcement learning all of them sampled at once, for one update."""
    rows, rollout = request.rows, request.rollout
    if rollout is None:
        ways = candidate.layout.ways("batch")
        return {"data.rows": rows, "data.length": request.sequence, "data.num_shards": ways}
    group = max((n for n in range(2, 17) if rows % n == 0), default=rows)  # 16 in rl:hf
    return {
        "rollout.num_prompts": rows // group,
        "rollout.num_generations": group,
        "rollout.max_tokens": rollout.completion,
        "rollout.slots": rollout.slots,
        "train.updates": 1,
        "train.length": request.sequence,
        "train.rows_multiple": rows,
    }


def _small(request: Request, candidate: Candidate) -> dict:
    """The base's smoke size, as little larger as the mesh needs."""
    base = launch.load_config(f"{_BASES[request.recipe].partition(':')[0]}:smoke")
    layout = candidate.layout
    ways, microbatches = layout.ways("batch"), min(layout.microbatches, 2)
    up = lambda least, axis: -(-least // layout.ways(axis)) * layout.ways(axis)
    kv_heads = up(2, "kv_heads")
    keys = {
        "mesh.microbatches": microbatches,
        "model.num_heads": 2 * kv_heads,
        "model.num_kv_heads": kv_heads,
        "model.embed_dim": up(128, "embed"),
        "model.mlp_dim": up(256, "mlp"),
        "model.vocab_size": up(base.model.vocab_size, "vocab"),
    }
    if request.architecture.num_experts:
        experts = {"num_experts": up(4, "expert"), "experts_per_token": 2}
        keys |= {"model.family": "qwen3_moe", **{f"model.{k}": n for k, n in experts.items()}}
    if request.recipe == "rl":
        return {**keys, "train.rows_multiple": ways * microbatches}
    # A shard needs a book of its own, and there are 137; 64 suit as many hosts.
    keys |= {"data.rows": ways * microbatches, "data.num_shards": math.gcd(ways, 64)}
    return keys | ({"eval.sets.books.rows": up(8, "batch")} if request.recipe == "pretrain" else {})


# --- would launch take it? ------------------------------------------------------------------------


def check(path: pathlib.Path, num_devices: int) -> str:
    """What `launch` makes of the file and its :smoke on so many devices, nothing run; they are
    virtual, and CPUs: whether its attention runs on the chip is the request's to say.

    Raises ValueError with launch's own words where it would refuse.
    """
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(num_devices))
    root = str(pathlib.Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "jaxreason.recipes.tune_files", str(path), "mesh.attention=auto"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise ValueError(f"{path}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return done.stdout.strip()


def resolved(argv: list[str]) -> str:
    """The run that a command line of `launch` asks for, resolved and validated at full size; of a
    Hugging Face directory without its weights by the config.json."""
    config, _ = launch.read_command(argv)
    defaults.check_keys(config)
    stages = pipeline.stages_of(config)
    start = stages[0].start
    if start.kind == "hf" and not any(start.directory.glob("*.safetensors")):  # they may follow
        shape = shape_of(start)
    else:
        shape = assemble.architecture(config, start)
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
        for arg in ("", ":smoke"):
            print(resolved([f"--config={sys.argv[1]}{arg}", *overrides]))
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
