"""Steps and figures for the tuner's tests."""

import dataclasses

from jaxreason.model.config import preset
from jaxreason.parallel.mesh import AXES
from jaxreason.recipes import tune_kept
from jaxreason.recipes.tune_step import Step

TINY = dict(chip="cpu", hosts=1, model="qwen3-tiny", sequence=64, tokens_per_step=1024)


def tiny_step(**changes) -> Step:
    shape = dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2}
    step = Step(
        chip="cpu", hosts=1, devices_per_host=8, model=dataclasses.asdict(preset("qwen3-tiny")),
        recipe="fit", rows=8, length=32, shape=shape, microbatches=1, remat="full",
    )  # fmt: skip
    return dataclasses.replace(step, **changes)


def figures_of(argument_bytes: int, temp_bytes: int) -> dict:
    return {**dict.fromkeys(tune_kept.FIGURES, 0), "collective_bytes": {}, "collectives": [],
            "argument_bytes": argument_bytes, "temp_bytes": temp_bytes}  # fmt: skip


def simulated_compiler(asked: list, figures: dict):
    """As tune.run_step, where a step is a program of its own; `asked` gets those compiled."""

    def run_step(step, mode, limit, cache):
        key = str(abs(hash(str(step))))
        if found := tune_kept.read(cache, key):
            return {**found, "kept": True}
        asked.append(step)
        return {**figures, "key": key}

    return run_step
