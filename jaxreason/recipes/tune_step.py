"""One candidate of the tuner, in a process of its own: its train step, compiled or measured.

  python -m jaxreason.recipes.tune_step compile|devices|measure [FOLDER] < STEP.json > FIGURES.json

`compile` needs no accelerator: the plugin of the chip's compiler is enough. What the folder has of
the lowered program is not compiled again. `measure` runs the step on the devices that there are,
`devices` only sees that they are those of the step.
"""

import dataclasses
import json
import math
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.objectives.policy import PRESETS
from jaxreason.parallel import chips, rules
from jaxreason.parallel.mesh import make_mesh
from jaxreason.recipes import tune_kept
from jaxreason.train import optim
from jaxreason.train import state as state_lib
from jaxreason.train.step import TrainStep, make_train_step
from jaxreason.types import Batch, PolicyBatch

_TIMED = 5  # steps, after one that is not


@dataclasses.dataclass(frozen=True)
class Step:
    """All that decides what is compiled."""

    chip: str
    hosts: int
    devices_per_host: int
    model: dict  # fields of DecoderConfig
    recipe: str  # fit | rl
    rows: int
    length: int
    shape: dict[str, int]  # of the mesh
    microbatches: int
    remat: str
    attention: str = "auto"

    @property
    def num_shards(self) -> int:
        """A data shard for each block of rows, so that microbatches are cut within devices.

        Reinforcement learning has no shards of data (recipes/rl.py).
        """
        return 1 if self.recipe == "rl" else rules.axis_size(_Sizes(self.shape), "batch")


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """As much of a mesh as the rules read."""

    shape: dict[str, int]


def execution(chip: str, remat: str, attention: str = "auto") -> Execution:
    """As recipes.assemble.execution chooses on that chip where the config says `auto`."""
    if chip == "cpu":
        return Execution("float32", attention, remat=remat, scan_layers=False)
    return Execution("bfloat16", attention, remat=remat, scan_layers=True)


def build(step: Step, mesh: Mesh) -> tuple[LanguageModel, object, TrainStep]:
    """(model, optimizer, train step) as the recipe makes them."""
    how = execution(step.chip, step.remat, step.attention)
    model = LanguageModel(DecoderConfig(**step.model), how, mesh)
    settings = optim.OptimizerConfig(schedule="constant")
    optimizer = optim.make_optimizer(settings, model.axes)
    objective = PRESETS["dapo"].policy if step.recipe == "rl" else LanguageModeling()  # as rl:hf
    train_step = make_train_step(
        model,
        objective,
        optimizer,
        optim.make_schedule(settings, 100),
        clip_norm=settings.clip_norm,
        microbatches=step.microbatches,
        num_shards=step.num_shards,
        xla_options=chips.xla_options(chips.chip(step.chip), mesh.size),
    )
    return model, optimizer, train_step


def abstract_batch(step: Step, mesh: Mesh) -> Batch | PolicyBatch:
    place = NamedSharding(mesh, rules.spec(("batch",)))
    of = lambda dtype: jax.ShapeDtypeStruct((step.rows, step.length), dtype, sharding=place)
    ints, floats = of(jnp.int32), of(jnp.float32)
    rows = dict(tokens_BT=ints, targets_BT=ints, weights_BT=floats, segments_BT=ints,
                positions_BT=ints)  # fmt: skip
    if step.recipe != "rl":
        return Batch(**rows)
    return PolicyBatch(
        **rows, advantages_BT=floats, old_logprobs_BT=floats, rollout_logprobs_BT=floats
    )


def lowered(step: Step) -> tuple[jax.stages.Lowered, str]:
    """(the train step as the compiler gets it, the key under which its figures are kept)."""
    mesh = make_mesh(step.shape, _devices(step))
    model, optimizer, train_step = build(step, mesh)
    state = state_lib.abstract(model, optimizer)
    program = train_step.lower(state, abstract_batch(step, mesh), None)
    machine = [step.hosts, step.devices_per_host, *(device.id for device in mesh.devices.flat)]
    options = chips.xla_options(chips.chip(step.chip), mesh.size)
    return program, tune_kept.key(program.as_text(), step.chip, machine, options)


def compiled(step: Step, folder: pathlib.Path | None = None) -> dict:
    """tune_kept.figures of the step and its key; those in the folder where it has them, `kept`."""
    program, key = lowered(step)
    found = folder and tune_kept.read(folder, key)
    if found:
        return {**found, "kept": True}
    began = time.monotonic()
    done = program.compile()
    return {**tune_kept.figures(done, time.monotonic() - began), "key": key}


def _devices(step: Step) -> list[jax.Device]:
    platform = chips.chip(step.chip).platform
    if platform == "cuda":
        return chips.absent_gpus(step.chip, step.hosts, step.devices_per_host)
    return chips.absent_tpus(step.chip, step.hosts) if platform == "tpu" else jax.devices()


def check_devices(step: Step) -> list[jax.Device]:
    """The devices of this machine for the step; raises ValueError where they are not its."""
    here, wanted = jax.devices(), math.prod(step.shape.values())
    known = chips.detect(here[0])
    name = known.name if known else here[0].platform
    if name != step.chip:
        raise ValueError(f"the devices here are {name} ({here[0].device_kind}), not {step.chip}")
    if len(here) < wanted:
        raise ValueError(f"{wanted} x {step.chip} are asked for, but there are {len(here)} here")
    return here[:wanted]


def measured(step: Step) -> dict:
    """Seconds of a step on the devices of this machine, random tokens, after the first."""
    mesh = make_mesh(step.shape, check_devices(step))
    model, optimizer, train_step = build(step, mesh)
    state = state_lib.create(model, optimizer, jax.random.key(0))
    batch = _random_batch(step, mesh)
    state, metrics = train_step(state, batch, None)
    jax.block_until_ready(metrics)
    began = time.perf_counter()
    for _ in range(_TIMED):
        state, metrics = train_step(state, batch, None)
    jax.block_until_ready((state, metrics))
    return {"step_seconds": (time.perf_counter() - began) / _TIMED}


def _random_batch(step: Step, mesh: Mesh):
    random, vocab = np.random.default_rng(0), step.model["vocab_size"]
    given = {
        "tokens_BT": random.integers(0, vocab, (step.rows, step.length)),
        "targets_BT": random.integers(0, vocab, (step.rows, step.length)),
        "positions_BT": np.broadcast_to(np.arange(step.length), (step.rows, step.length)),
        "segments_BT": np.ones((step.rows, step.length)),
        "weights_BT": np.ones((step.rows, step.length)),
    }
    shapes = abstract_batch(step, mesh)
    zeros = lambda s: np.zeros(s.shape, s.dtype)
    values = {
        f.name: given.get(f.name, shape if shape is None else zeros(shape))
        for f in dataclasses.fields(shapes)
        for shape in [getattr(shapes, f.name)]
    }
    filled = type(shapes)(**values)
    return jax.tree.map(lambda s, x: jax.device_put(x.astype(s.dtype), s.sharding), shapes, filled)


_MODES = {
    "compile": compiled,
    "devices": lambda step: {"devices": len(check_devices(step))},
    "measure": measured,
}


def main() -> int:
    mode, *folder = sys.argv[1:]
    tune_kept.without_locations()
    step = Step(**json.load(sys.stdin))
    print(json.dumps(_MODES[mode](step, *map(pathlib.Path, folder))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
