"""Figures of a compiled step are kept by the program that they are of."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from tuned_steps import TINY, figures_of, tiny_step

from jaxreason.model.config import preset
from jaxreason.parallel import chips
from jaxreason.recipes import tune, tune_kept, tune_step
from jaxreason.recipes.tune import Compiler
from jaxreason.recipes.tune_request import Request


def test_figures_are_kept_and_what_failed_is_tried_again(tmp_path, monkeypatch):
    """Here a program is its number of microbatches. What is not whole is compiled again."""
    asked = []

    def run_step(step, mode, limit, cache):
        if found := tune_kept.read(cache, key := f"key-{step.microbatches}"):
            return {**found, "kept": True}
        asked.append((step.microbatches, mode, limit))
        if step.microbatches == 2 and limit < 10:
            return {"error": "not done in 7 s"}
        return {**figures_of(10, 5 * step.microbatches), "key": key}

    monkeypatch.setattr(tune, "run_step", run_step)
    request = Request(**TINY)
    chosen = [c for c in tune.candidates(request) if c.layout.shape["fsdp"] == 8]
    chosen = [c for c in chosen if c.remat == "full"][:2]
    outcomes = []
    for limit in (7, 7, 20, 20):
        heard = {}
        on_done = lambda c, kept, heard=heard: heard.update({c.layout.microbatches: kept})
        done = Compiler(tmp_path, processes=2, limit_seconds=limit).run(request, chosen, on_done)
        assert [c.layout.microbatches for c in done] == [c.layout.microbatches for c in chosen]
        assert not any({"key", "kept"} & c.figures.keys() for c in done)
        bytes_of = {c.layout.microbatches: c.bytes for c in done if c.compiled}
        outcomes.append((heard, bytes_of))
        fit = [tune.fits(request, c) for c in tune.ranked(request, done)]
        assert fit == [True, limit > 10]
    assert outcomes == [
        ({1: False, 2: False}, {1: 15}),
        ({1: True, 2: False}, {1: 15}),
        ({1: True, 2: False}, {1: 15, 2: 20}),
        ({1: True, 2: True}, {1: 15, 2: 20}),
    ]
    assert {call[1] for call in asked} == {"compile"} and len(asked) == 4
    record = json.loads((tmp_path / "key-1.json").read_text())
    assert record["step"]["microbatches"] == 1 and not list(tmp_path.glob(".*"))
    whole = (tmp_path / "key-1.json").read_text()
    for broken in (whole[:-9], "[]", "{}", json.dumps({"figures": {"argument_bytes": 1}})):
        (tmp_path / "key-1.json").write_text(broken)
        Compiler(tmp_path, limit_seconds=20).run(request, chosen)
        assert (tmp_path / "key-1.json").read_text() == whole
    assert len(asked) == 8


def test_a_program_that_was_compiled_is_only_lowered(tmp_path, monkeypatch):
    """In processes of their own, one of them in a checkout elsewhere whose lines are shifted; and
    another program, compiler, option or reader has another key."""
    step = tiny_step()
    first = tune.run_step(step, "compile", 300, tmp_path)
    name = first.pop("key")
    tune_kept.write(tmp_path, name, dataclasses.asdict(step), first)
    monkeypatch.setattr(tune, "_PACKAGE", elsewhere(tmp_path / "a checkout"))
    monkeypatch.chdir(tmp_path)
    assert tune.run_step(step, "compile", 300, tmp_path) == {**first, "kept": True}
    assert tune_step.lowered(step)[1] == name
    assert tune_step.lowered(dataclasses.replace(step, microbatches=2))[1] != name

    key = lambda text="f", chip="b200", machine=(1, 8), options={}: tune_kept.key(
        text, chip, machine, options
    )
    keys = {key(), key(text="g"), key(chip="h200"), key(machine=(2, 4)), key(options={"xla_x": 1})}
    monkeypatch.setenv("XLA_FLAGS", "--xla_y=2")
    keys.add(key())
    monkeypatch.setattr(tune_kept.importlib.metadata, "version", lambda name: f"another {name}")
    keys.add(key())
    monkeypatch.setattr(tune_kept, "_reader", lambda: "another")
    assert len(keys | {key()}) == 8


def elsewhere(folder) -> pathlib.Path:
    """A copy of the package, every line further down of what is lowered."""
    package = shutil.copytree(tune._PACKAGE, folder / "jaxreason")
    for path in package.rglob("*.py"):
        if path.name not in ("tune_kept.py", "hlo.py"):  # they read figures: they are in the key
            path.write_text("# A line.\n\n" + path.read_text())
    return package


@pytest.mark.hardware_free
@pytest.mark.parametrize(
    "chip, compiler, model, attention",
    [
        ("b200", "jax-cuda13-plugin", "qwen3-1.5b", "flash"),
        ("v5p", "libtpu", "qwen3-30b-a3b", "auto"),  # Megablox
    ],
)
def test_a_kernel_has_one_key_wherever_its_file_lies(chip, compiler, model, attention, tmp_path):
    """Lowered in two processes, from two folders, the lines of one shifted."""
    if not any(importlib.metadata.distributions(name=compiler)):
        pytest.skip(f"the compiler of {chip} is not here: {compiler}")
    step = tiny_step(
        chip=chip, hosts=chips.CHIPS["b200"].links.per_host // chips.CHIPS[chip].links.per_host,
        devices_per_host=chips.CHIPS[chip].links.per_host, attention=attention, rows=16,
        length=1024, model=dataclasses.asdict(preset(model, num_layers=2)),
    )  # fmt: skip
    program = """if True:
        import json, sys
        from jaxreason.recipes import tune_kept, tune_step
        tune_kept.without_locations()
        lowered, key = tune_step.lowered(tune_step.Step(**json.loads(sys.argv[1])))
        print(key, "custom_call @tpu_custom_call" in lowered.as_text() or "triton" in
              lowered.as_text(), tune_step.__file__)
    """
    said = []
    for package in (tune._PACKAGE, elsewhere(tmp_path / "another folder")):
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(dataclasses.asdict(step))], text=True,
            env={**os.environ, "PYTHONPATH": str(package.parent), "PYTHONHASHSEED": str(len(said)),
                 "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}, capture_output=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        key, kernels, file = done.stdout.split(maxsplit=2)
        assert kernels == "True" and file.strip().startswith(str(package))
        said.append(key)
    assert said[0] == said[1]
