"""The real train steps of real models, compiled for machines that are not here: they fit, copy
nothing that they were given, and exchange what docs/collectives.md says, line by line."""

import dataclasses
import functools
import importlib.metadata
import pathlib

import jax
import pytest

from jaxreason.model.config import PRESETS
from jaxreason.parallel import chips, step_time
from jaxreason.parallel.workload import Layout
from jaxreason.recipes import tune
from jaxreason.recipes.tune_step import Step, execution

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "collectives.md"
PINNED = "0.10.2"  # of jax, whose compilers the page's tables are of

# Heading of the page: (hosts, mesh, rows, length, microbatches, remat).
STEPS = {
    "qwen3-1.5b on 8 b200": (1, {"fsdp": 8}, 512, 4096, 4, "save_projections"),
    "qwen3-1.5b on 64 b200": (8, {"data": 8, "fsdp": 8}, 1024, 4096, 1, "save_projections"),
    "qwen3-1.5b on 8 h200": (1, {"data": 8}, 512, 4096, 8, "save_projections"),
    "qwen3-1.5b on 64 v5p": (16, {"data": 4, "fsdp": 16}, 1024, 4096, 1, "full"),
    "qwen3-8b on 8 b200": (1, {"fsdp": 8}, 512, 4096, 8, "save_attention"),
    "qwen3-8b on 64 b200": (8, {"fsdp": 8, "context": 8}, 64, 32768, 1, "full"),
    "qwen3-8b on 8 h200": (1, {"fsdp": 2, "tensor": 4}, 512, 4096, 8, "full"),
    "qwen3-8b on 64 v5p": (16, {"fsdp": 16, "tensor": 4}, 1024, 4096, 2, "full"),
    "qwen3-30b-a3b on 8 b200": (1, {"expert": 8}, 512, 4096, 8, "full"),
    "qwen3-30b-a3b on 64 b200": (8, {"fsdp": 8, "expert": 8}, 1024, 4096, 2, "full"),
    "qwen3-30b-a3b on 8 h200": (1, {"fsdp": 2, "expert": 4}, 512, 4096, 16, "full"),
    "qwen3-30b-a3b on 64 v5p": (16, {"fsdp": 16, "expert": 4}, 1024, 4096, 2, "full"),
}  # fmt: skip
# Of them, those that are compiled once more with a kernel that is chosen by name.
KERNELS = {
    "qwen3-1.5b on 8 b200": "flash",
    "qwen3-8b on 8 h200": "flash",
    "qwen3-1.5b on 64 v5p": "splash",
}
LIMIT = 1200.0  # seconds of a compilation, on a busy machine

steps = pytest.mark.parametrize("name", STEPS)
compiled_steps = pytest.mark.parametrize(
    "name, attention", [*((name, "auto") for name in STEPS), *KERNELS.items()]
)


def step_of(name: str, attention: str = "auto") -> Step:
    hosts, mesh, rows, length, microbatches, remat = STEPS[name]
    model, _, _, chip = name.split()
    return Step(
        chip, hosts, chips.chip(chip).links.per_host, dataclasses.asdict(PRESETS[model]), "fit",
        rows, length, dict.fromkeys(tune.AXES, 1) | mesh, microbatches, remat,
        attention,
    )  # fmt: skip


@functools.cache
def compiled(name: str, attention: str) -> dict:
    """The figures of its step. Skips where the chip's compiler is not installed."""
    platform = chips.chip(name.split()[-1]).platform
    distribution = {"cuda": "jax-cuda13-plugin", "tpu": "libtpu"}[platform]
    if not any(importlib.metadata.distributions(name=distribution)):
        pytest.skip(f"the compiler of {name.split()[-1]} is not here: pip install .[{platform}]")
    figures = tune.run_step(step_of(name, attention), "compile", LIMIT)
    assert "error" not in figures, figures
    return figures


@pytest.mark.hardware_free
@compiled_steps
def test_it_fits_and_copies_nothing_that_it_was_given(name, attention):
    """Arguments and temporaries under the chip's memory; all of the state is donated and reused;
    XLA never gathered an array for want of a better way."""
    step, figures = step_of(name), compiled(name, attention)
    needed = figures["argument_bytes"] + figures["temp_bytes"]
    assert needed < chips.chip(step.chip).memory
    batch = 20 * step.rows * step.length / step.num_shards  # five numbers a token
    state = figures["argument_bytes"] - batch
    num_params = sum(w.size for w in tune.workload_of(PRESETS[name.split()[0]], 1, 1).weights)
    assert state > 0.99 * 12 * num_params / split(step)
    assert figures["alias_bytes"] > state - 2**20
    assert figures["involuntary_rematerializations"] == 0


def split(step: Step) -> int:
    """The devices that share one copy of the weights."""
    shape = step.shape
    return shape["fsdp"] * shape["expert"] * shape["context"] * shape["tensor"]


@pytest.mark.hardware_free
@compiled_steps
def test_it_exchanges_what_the_page_says(name, attention):
    """With a kernel, too: one more would mean that it was replicated, or its operands gathered."""
    if jax.__version__ != PINNED:
        pytest.skip(f"the tables are of jax {PINNED}, this is {jax.__version__}")
    found = [
        (line["kind"], line["group"], line["times"], line["instructions"],
         round(line["bytes"] * line["times"] / 1e9, 1))
        for line in compiled(name, attention)["collectives"]
    ]  # fmt: skip
    assert sorted(found) == sorted(lines_of_the_page()[name]), "\n".join(map(str, found))


@functools.cache
def lines_of_the_page() -> dict[str, list[tuple]]:
    """Heading -> (kind, devices, times, instructions, GB) of each; every line has its reason."""
    tables, name = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            name = line[3:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 6 and cells[1].isdigit():
            kind, *numbers, size, why = cells
            assert len(why) > 10, line
            tables.setdefault(name, []).append((kind, *map(int, numbers), float(size)))
    return tables


def test_the_page_has_every_step():
    assert set(lines_of_the_page()) == set(STEPS)


# Where XLA does otherwise than the arithmetic says: keys and values go round a ring of eight seven
# times; on one v5p layout the compiler moves a cast behind a sum, so that the gradients of two of
# the experts' three matrices are added up in bfloat16 (all-reduces of bf16[16,32,128,768], where
# the third is a reduce-scatter of float32). And lines of tenths of a GB add up to 12.7 of one
# step's 12.83.
OTHERWISE = {
    "qwen3-8b on 64 b200": 0.12, "qwen3-30b-a3b on 64 v5p": 0.04, "qwen3-1.5b on 64 b200": 0.011,
}  # fmt: skip


@steps
def test_the_time_model_counts_the_bytes_that_are_exchanged(name):
    """Those of the page, within 1 %."""
    step, exchanged = step_of(name), sum(line[-1] for line in lines_of_the_page()[name]) * 1e9
    kept = execution(step.chip, step.remat).kept
    kept = None if kept is None else frozenset(kept)
    work = tune.workload_of(PRESETS[name.split()[0]], step.rows, step.length)
    found = step_time.exchanges(work, Layout(step.shape, step.microbatches, kept))
    counted = sum(one.volume * one.times for one in found)
    assert abs(counted / exchanged - 1) < OTHERWISE.get(name, 0.01)
