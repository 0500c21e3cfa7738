"""The tuner: what is legal, what fits, what is compiled, what it leaves behind."""

import dataclasses
import itertools
import json
import subprocess
import sys

import jax
import pytest

from jaxreason import launch
from jaxreason.model.config import preset
from jaxreason.parallel import chips
from jaxreason.parallel.mesh import AXES
from jaxreason.recipes import assemble, tune, tune_files, tune_step, tune_tables
from jaxreason.recipes.tune import Compiler, Request

ASKED = dict(
    chip="b200", hosts=1, model="qwen3-1.5b", sequence=4096, tokens_per_step=2_097_152, tokens=100e9
)
TINY = dict(chip="cpu", hosts=1, model="qwen3-tiny", sequence=64, tokens_per_step=1024)


def first_fitting(request: Request) -> tune.Candidate:
    return next(tune.best(request, tune.candidates(request)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(chip="b300"), r"chip is 'b300'; known chips: b200, .*, cpu"),
        (dict(tokens=0), "--tokens is 0; it must be at least 1"),
        (dict(tokens_per_step=0), "--tokens-per-step is 0; it must be at least 1"),
        (dict(hosts=0), "--hosts is 0; it must be at least 1"),
        (dict(tokens_per_step=10_000), r"not a multiple of --sequence = 4096; 8192 or 12288 would"),
        (dict(recipe="distil"), "--recipe is 'distil'; it must be pretrain, sft, rl"),
        (dict(chip="v5p", hosts=3), "hosts is 3; slices of v5p have 1, 2, 4"),
        (dict(fixed=(("fsdp", 9),)), "8 devices are not a multiple of 9"),
        (dict(fixed=(("model", 2),)), "mesh.shape has axis 'model'; axes are data, fsdp"),
    ],
)
def test_a_request_that_cannot_be_is_refused_with_what_could(changes, message):
    with pytest.raises(ValueError, match=message):
        Request(**{**ASKED, **changes})


def test_an_axis_that_nothing_divides_over_says_what_would():
    """One key-value head over two devices."""
    request = Request(**{**ASKED, "model": "gemma-3-1b"}, fixed=(("tensor", 2),))
    with pytest.raises(ValueError, match=r"kv_heads\) = 1 .* tensor = 2; tensor may be 1$"):
        tune.candidates(request)


def test_a_model_that_fits_nowhere_says_where_it_would():
    request = Request(**{**ASKED, "chip": "v5e", "model": "qwen3-32b"})
    with pytest.raises(ValueError, match=r"does not fit 4 x v5e: .* GiB a device of 14.7; --hosts"):
        next(tune.best(request, tune.candidates(request)))


def test_all_that_is_considered_is_legal_and_there_is_much_of_it():
    request = Request(**ASKED)
    found = tune.candidates(request)
    shapes = {tuple(c.layout.shape.items()) for c in found}
    assert len(found) >= 20 and len(shapes) >= 8
    assert [c.estimate.step_seconds for c in found] == sorted(
        c.estimate.step_seconds for c in found
    )
    for candidate in found:
        assert tuple(candidate.layout.shape) == AXES and candidate.layout.num_devices == 8
        assert candidate.layout.shape["expert"] == 1  # no experts to split
        rows = request.rows / candidate.layout.ways("batch") / candidate.layout.microbatches
        assert rows == int(rows) >= 1
    promising = list(itertools.islice(tune.best(request, found), 12))
    assert all(c.estimate.total_bytes < 1.15 * request.usable for c in promising)
    by_mesh = [tuple(c.layout.shape.items()) for c in promising]
    assert max(map(by_mesh.count, by_mesh)) <= 3


def test_experts_are_split_where_there_are_experts():
    found = tune.candidates(Request(**{**ASKED, "model": "qwen3-30b-a3b"}))
    assert {c.layout.shape["expert"] for c in found} == {1, 2, 4, 8}


def test_samples_of_reinforcement_learning_take_time_and_room():
    plain, rl = (
        {(str(c.layout.shape), c.layout.microbatches, c.remat): c.estimate for c in found}
        for found in (tune.candidates(Request(**ASKED, recipe=r)) for r in ("sft", "rl"))
    )
    for key, estimate in rl.items():
        assert estimate.seconds["rollout"] > 0
        assert estimate.step_seconds > plain[key].step_seconds
        assert estimate.total_bytes >= plain[key].total_bytes


# --- compiling ------------------------------------------------------------------------------------


def test_figures_are_kept_and_failures_too(tmp_path, monkeypatch):
    asked = []

    def run_step(step, mode, limit):
        asked.append((step.microbatches, mode, limit))
        if step.microbatches == 2:
            return {"error": "not done in 7 s"}
        return {"argument_bytes": 10, "temp_bytes": 5 * step.microbatches, "compile_seconds": 0.1}

    monkeypatch.setattr(tune, "run_step", run_step)
    request = Request(**TINY)
    chosen = [c for c in tune.candidates(request) if c.layout.shape["fsdp"] == 8]
    chosen = [c for c in chosen if c.remat == "full"][:2]
    compiler, heard = Compiler(tmp_path, processes=2, limit_seconds=7), []
    for kept in (False, True):
        done = compiler.run(request, chosen, lambda candidate, kept: heard.append(kept))
        assert [c.layout.microbatches for c in done] == [c.layout.microbatches for c in chosen]
        assert heard == [kept, kept]
        heard.clear()
    assert len(asked) == 2 and {call[1:] for call in asked} == {("compile", 7)}
    bytes_of = {c.layout.microbatches: c.bytes for c in done if c.compiled}
    assert bytes_of == {1: 15}
    assert [tune.fits(request, c) for c in tune.ranked(request, done)] == [True, False]


def test_a_step_that_takes_too_long_is_given_up():
    step = tune.step_of(Request(**TINY), first_fitting(Request(**TINY)))
    assert tune.run_step(step, "compile", 0.05) == {"error": "not done in 0 s"}


def test_nothing_that_fits_when_compiled_is_said(tmp_path, monkeypatch):
    huge = {"argument_bytes": 2**50, "temp_bytes": 0, "compile_seconds": 1.0}
    monkeypatch.setattr(tune, "run_step", lambda *_: huge)
    with pytest.raises(ValueError, match=r"none of the 6 layouts .* fits: the least takes 10485"):
        tune.search(Request(**TINY), Compiler(tmp_path), 2)


def tiny_step(**changes) -> tune_step.Step:
    shape = dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2}
    return tune_step.Step(
        chip="cpu", hosts=1, devices_per_host=8, model=dataclasses.asdict(preset("qwen3-tiny")),
        recipe="fit", rows=8, length=32, shape=shape, microbatches=1, remat="full", **changes,
    )  # fmt: skip


def test_a_step_is_compiled_and_measured_here():
    """On the eight virtual CPU devices: as the recipe would make it, sharded, state aliased."""
    step = tiny_step()
    figures = tune_step.compiled(step)
    held = 3 * 4 * sum(
        w.size / 1 for w in tune.workload_of(preset("qwen3-tiny"), 8, 32).weights if not w.of_layers
    )  # fmt: skip
    assert figures["argument_bytes"] > held / 8
    assert figures["alias_bytes"] > 0.9 * figures["argument_bytes"]
    assert any(line["kind"] == "all-gather" for line in figures["collectives"])
    assert json.loads(json.dumps(figures)) == figures
    assert 0 < tune_step.measured(step)["step_seconds"] < 60


# --- what is left behind --------------------------------------------------------------------------


def test_the_config_is_what_was_found(tmp_path, monkeypatch):
    """At full size on eight devices, and at smoke size on the same mesh."""
    request, path = Request(**ASKED), tmp_path / "tuned.py"
    candidate = first_fitting(request)
    tune_files.write_config(request, candidate, path)
    config = launch.load_config(str(path))
    assert config.mesh.shape.to_dict() == candidate.layout.shape
    assert (config.data.rows, config.data.length, config.train.steps) == (512, 4096, 47_684)
    assert config.mesh.remat == candidate.remat and config.model.preset == "qwen3-1.5b"
    assert "1,519,230,976 parameters" in tune_files.resolved([f"--config={path}"])
    small = launch.load_config(f"{path}:smoke")
    assert small.mesh.shape.to_dict() == candidate.layout.shape and small.data.length == 128
    assert tune_files.resolved([f"--config={path}:smoke"])
    assert config.data.rows * config.data.length == request.tokens_per_step


@pytest.mark.parametrize("recipe", ["sft", "rl"])
def test_other_recipes_have_a_config_too(recipe, tmp_path):
    request = Request(**{**ASKED, "sequence": 2048, "recipe": recipe})
    tune_files.write_config(request, first_fitting(request), tmp_path / "tuned.py")
    assert "parameters on" in tune_files.resolved([f"--config={tmp_path / 'tuned.py'}"])


def test_a_config_for_other_devices_is_refused(tmp_path):
    request = Request(**{**ASKED, "hosts": 2})
    tune_files.write_config(request, first_fitting(request), tmp_path / "tuned.py")
    with pytest.raises(ValueError, match="needs 16 devices, but there are 8"):
        tune_files.resolved([f"--config={tmp_path / 'tuned.py'}"])


def test_the_chips_options_reach_the_step_and_the_users_win(monkeypatch):
    config = launch.load_config("pretrain:smoke")
    assert assemble.xla_options(config.mesh) == {}  # a CPU
    monkeypatch.setattr(chips, "detect", lambda device: chips.CHIPS["b200"])
    config.mesh.xla_options = {"xla_gpu_enable_latency_hiding_scheduler": False, "xla_x": 1}
    options = assemble.xla_options(config.mesh)
    assert options.pop("xla_x") == 1
    assert options == {
        **chips.xla_options(chips.CHIPS["b200"], jax.device_count()),
        "xla_gpu_enable_latency_hiding_scheduler": False,
    }


@pytest.mark.slow
def test_512_devices_resolve_and_a_mesh_scaled_down_trains(tmp_path, shared_data):
    """64 hosts: validated at full size on 512 virtual devices; its axes on eight, run."""
    request, path = Request(**{**ASKED, "hosts": 64}), tmp_path / "tuned.py"
    candidate = first_fitting(request)
    tune_files.write_config(request, candidate, path)
    assert "1,519,230,976 parameters" in tune_files.check(path, 512)
    split = [axis for axis in AXES if candidate.layout.shape[axis] > 1][:3]
    sizes = dict.fromkeys(split, 2) | {split[0]: 2 ** (4 - len(split))}  # eight in all
    flags = [f"--config.mesh.shape.{axis}={sizes.get(axis, 1)}" for axis in AXES]
    flags += ["--config.mesh.microbatches=1", "--config.data.rows=8", "--config.data.num_shards=8"]
    done = subprocess.run(
        [sys.executable, "-m", "jaxreason.launch", f"--config={path}:smoke", *flags,
         f"--workdir={tmp_path / 'run'}"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_page_of_tables_is_filled_between_its_marks_and_again(tmp_path, monkeypatch):
    figures = dict(argument_bytes=2**34, temp_bytes=2**34, compile_seconds=1.0, collective_bytes={})
    asked = []
    monkeypatch.setattr(tune, "run_step", lambda step, *_: asked.append(step) or figures)
    page = tmp_path / "scaling.md"
    page.write_text(f"before\n{tune_tables._BEGIN}\nold\n{tune_tables._END}\nafter\n")
    make = lambda: tune_tables.make(
        page, Compiler(tmp_path / "cache"), 2, asked.append, ("qwen3-1.5b", "qwen3-32b"),
        (("8 H200", "h200", 1, 2**21), ("one v5e host", "v5e", 1, 2**21)),
    )  # fmt: skip
    make()
    text, compiled = page.read_text(), sum(not isinstance(a, str) for a in asked)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert text.count("### ") == 3 and "| qwen3-1.5b |" in text and "32.0" in text
    assert "--model=qwen3-32b at --sequence=4096 does not fit 4 x v5e" in text
    assert "hours for 80B | hours for 100B" in text and "compiled layouts" in text
    make()
    assert page.read_text() == text
    assert sum(not isinstance(a, str) for a in asked) == compiled  # figures are kept
    page.write_text("a page without marks")
    with pytest.raises(ValueError, match=r"scaling.md has no part to fill, between"):
        make()
