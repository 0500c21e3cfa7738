"""The tuner: what is legal, what fits, what is compiled, what it leaves behind."""

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys

import jax
import pytest
from tuned_steps import TINY, figures_of, simulated_compiler, tiny_step

from jaxreason import launch
from jaxreason.checkpoint.hf_config import config_to_hf
from jaxreason.model.config import preset
from jaxreason.parallel import chips
from jaxreason.parallel.mesh import AXES
from jaxreason.recipes import assemble, tune, tune_files, tune_kept, tune_step, tune_tables
from jaxreason.recipes.tune import Compiler
from jaxreason.recipes.tune_request import Request

ASKED = dict(
    chip="b200", hosts=1, model="qwen3-1.5b", sequence=4096, tokens_per_step=2_097_152, tokens=100e9
)


def first_fitting(request: Request) -> tune.Candidate:
    return next(tune.best(request, tune.candidates(request)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(chip="b300"), r"chip is 'b300'; known chips: b200, .*, cpu"),
        (dict(chip="h200-nvl"), r"chip is 'h200-nvl'; known chips: b200, h200, h100, v5e"),
        (dict(tokens=0), "--tokens is 0; it must be at least 1"),
        (dict(tokens=float("inf")), "--tokens is inf; it must be a finite number"),
        (dict(tokens=float("nan")), "--tokens is nan; it must be a finite number"),
        (dict(tokens_per_step=0), "--tokens-per-step is 0; it must be at least 1"),
        (dict(hosts=0), "--hosts is 0; it must be at least 1"),
        (dict(tokens_per_step=10_000), r"not a multiple of --sequence = 4096; 8192 or 12288 would"),
        (dict(recipe="distil"), "--recipe is 'distil'; it must be pretrain, sft, rl"),
        (dict(chip="v5p", hosts=3), "hosts is 3; slices of v5p have 1, 2, 4"),
        (dict(chip="v5p", devices_per_host=8), "is 8; hosts of v5p have 4 chips"),
        (dict(recipe="rl", tokens_per_step=4096), "one completion; .* compares them: 8192 or more"),
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


def test_hosts_that_nothing_divides_over_name_those_that_do():
    with pytest.raises(ValueError, match=r"^--hosts is 7: .*; --hosts=4 or 8 would do$"):
        tune.candidates(Request(**{**ASKED, "hosts": 7}))


def test_axes_that_are_given_leave_the_others_to_be_tried():
    request = Request(**ASKED, fixed=(("data", 2), ("fsdp", 2)))
    shapes = tune.legal_shapes(request, tune.workload(request))
    assert {(s["data"], s["fsdp"]) for s in shapes} == {(2, 2)}
    assert {(s["context"], s["tensor"]) for s in shapes} == {(1, 2), (2, 1)}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(attention="flash3"), "'flash3'; known implementations: auto, splash, .*blockwise"),
        (
            dict(attention="splash"),
            r"^--attention on b200: mesh.attention is 'splash', which cannot do this "
            r"\(splash: runs on tpu, not cuda; cudnn: cannot keep .*\); use flash, flash_sm100, bl",
        ),
        (
            dict(chip="v5p", attention="flash"),
            r"flash: runs on gpu, not tpu.*; use splash, blockwi",
        ),
        (
            dict(attention="flash_sm90"),
            r"flash_sm90: is for compute capability 9\.0, not 10\.0.*; use flash, flash_sm100, ",
        ),
        (
            dict(chip="v5p", hosts=2, attention="splash", fixed=(("context", 2),)),
            r"^--attention=splash cannot merge parts of a row .*devices; context may be 1$",
        ),
    ],
)
def test_an_attention_that_cannot_run_there_is_refused_with_every_reason(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        tune.candidates(Request(**{**ASKED, **changes}))
    assert "\n" not in str(refused.value)


def test_the_attention_decides_time_and_memory():
    """`auto` is blockwise on a GPU; a kernel's scores stay on the chip, the reference's are all in
    memory. Splash cannot merge parts of a row, so its meshes split none."""
    request = Request(**ASKED)
    found = {name: tune.candidates(dataclasses.replace(request, attention=name))
             for name in ("auto", "blockwise", "flash", "reference")}  # fmt: skip
    assert found["auto"] == found["blockwise"]
    assert {c.layout.attention for c in found["flash"]} == {"flash"}
    by_label = {name: {c.label: c.estimate for c in some} for name, some in found.items()}
    for label, auto in by_label["auto"].items():
        flash, reference = by_label["flash"][label], by_label["reference"][label]
        seconds = [e.seconds["attention"] for e in (flash, auto, reference)]
        assert seconds == sorted(set(seconds)) and flash.total_bytes <= auto.total_bytes
        assert auto.total_bytes <= reference.total_bytes
    splash = tune.candidates(Request(**{**ASKED, "chip": "v5p", "hosts": 2}, attention="splash"))
    assert {c.layout.shape["context"] for c in splash} == {1}
    other, one = tune.with_attention(request, found["auto"][0], "flash")
    assert one.estimate == by_label["flash"][found["auto"][0].label]
    assert tune.step_of(other, one).attention == "flash"
    assert tune.step_of(request, found["auto"][0]).attention == "auto"


def test_fast_links_end_with_the_host():
    """The same mesh of eight GPUs, slower the fewer of them share a host."""
    machines = ((1, 8), (2, 4), (8, 1))
    seconds = []
    for hosts, per_host in machines:
        request = Request(**{**ASKED, "chip": "h100", "hosts": hosts}, devices_per_host=per_host)
        found = tune.candidates(dataclasses.replace(request, fixed=(("fsdp", 8),)))
        seconds.append(next(c for c in found if c.remat == "full").estimate.step_seconds)
    assert seconds == sorted(set(seconds))


def test_by_arithmetic_alone_only_what_fits_is_left():
    request = Request(**{**ASKED, "chip": "h100", "model": "qwen3-8b"})
    found, _ = tune.search(request, None, 0)
    assert found and all(tune.fits(request, c) for c in found)
    with pytest.raises(ValueError, match=r"qwen3-32b .* does not fit 8 x h100: .*--hosts=2 would"):
        tune.search(dataclasses.replace(request, model="qwen3-32b"), None, 0)


def test_a_model_of_hugging_face_is_tuned_by_its_config_alone(tmp_path):
    """And its config file is taken; its weights may follow."""
    shape = preset("qwen3-0.6b")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_to_hf(shape, eos_id=1, pad_id=0)))
    request = Request(**{**ASKED, "model": str(folder)})
    assert request.architecture == shape
    tune_files.write_config(request, first_fitting(request), tmp_path / "tuned.py")
    assert "596,049,920 parameters" in tune_files.resolved([f"--config={tmp_path / 'tuned.py'}"])


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


def test_a_step_that_takes_too_long_is_given_up():
    step = tune.step_of(Request(**TINY), first_fitting(Request(**TINY)))
    assert tune.run_step(step, "compile", 0.05) == {"error": "not done in 0 s"}


def test_nothing_that_fits_when_compiled_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "run_step", lambda *_: figures_of(2**50, 0))
    with pytest.raises(ValueError, match=r"none of the 2 layouts .* fits: the least takes 10485"):
        tune.search(Request(**TINY), Compiler(tmp_path), 2)


def test_after_what_does_not_fit_only_what_may_is_compiled():
    """The compiler wants twice what the arithmetic says, of everything: the fastest do not fit."""
    request, rounds = Request(**TINY), []
    first = tune.candidates(request)[0]
    factor = 1.01 * request.usable / first.estimate.total_bytes

    class Twice:
        def run(self, request, chosen, on_done):
            rounds.append(list(chosen))
            figures = lambda c: dict(argument_bytes=factor * c.estimate.total_bytes, temp_bytes=0)
            return [dataclasses.replace(c, figures=figures(c)) for c in rounds[-1]]

    found, _ = tune.search(request, Twice(), 1)
    assert len(rounds) == 2 and rounds[0][0].label == first.label
    assert tune.fits(request, found[0]) and found[0].label == rounds[1][0].label
    skipped = tune.candidates(request)[1 : tune.candidates(request).index(rounds[1][0])]
    assert all(factor * c.estimate.total_bytes > 0.99 * request.usable for c in skipped)


def test_that_nothing_compiled_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "run_step", lambda *_: {"error": "no compiler"})
    with pytest.raises(ValueError, match=r"of the 6 layouts tried none compiled: no compiler$"):
        tune.search(Request(**TINY), Compiler(tmp_path), 2)


def test_why_a_step_failed_is_the_error_itself():
    """Not the note that JAX ends with where it shortens a traceback."""
    note = "--------------------\nFor simplicity, JAX has removed its internal frames from the ..."
    said = "Traceback:\n  File x\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: memory\n" + note
    assert tune._why(said) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: memory"
    assert tune._why("AssertionError\n" + note) == "AssertionError"
    assert tune._why("ValueError: first\n\nValueError: last\n") == "last"
    assert tune._why("killed\n") == "killed" and tune._why("") == "no output"


@pytest.mark.parametrize(
    "there, changes, message",
    [
        ("h100", {"chip": "h200"}, r"the devices here are h100 \(.*\), not h200"),
        (None, {"chip": "h200"}, r"the devices here are cpu \(.*\), not h200"),
        (None, {"shape": {"data": 16}}, "16 x cpu are asked for, but there are 8 here"),
    ],
)
def test_a_step_is_measured_on_its_own_devices_only(there, changes, message, monkeypatch):
    monkeypatch.setattr(chips, "detect", lambda device: chips.CHIPS.get(there))
    with pytest.raises(ValueError, match=message):
        tune_step.measured(tiny_step(**changes))


@pytest.mark.slow
def test_a_step_is_compiled_and_measured_here():
    """On the eight virtual CPU devices: as the recipe would make it, sharded, state aliased."""
    step = tiny_step()
    figures = tune_step.compiled(step)
    weights = tune.workload_of(preset("qwen3-tiny"), 8, 32).weights
    share = 3 * 4 * sum(w.size for w in weights) / 8  # of weights and two moments, fp32
    assert share < figures["argument_bytes"] < 1.05 * share  # norms are whole; and the batch
    assert figures["alias_bytes"] > 0.9 * figures["argument_bytes"]
    assert any(line["kind"] == "all-gather" for line in figures["collectives"])
    assert json.loads(json.dumps(figures)) == figures
    assert figures.keys() == {*tune_kept.FIGURES, "key"} - {"involuntary_rematerializations"}
    assert 0 < tune_step.measured(step)["step_seconds"] < 60


def test_a_step_of_reinforcement_learning_is_compiled_too():
    """Rows are cut into microbatches as recipes/rl.py does, without shards of data."""
    figures = tune_step.compiled(tiny_step(recipe="rl", microbatches=2))
    assert figures["alias_bytes"] > 0.9 * figures["argument_bytes"]


# --- what is left behind --------------------------------------------------------------------------


def test_the_config_is_what_was_found(tmp_path):
    """At full size on eight devices, and at smoke size on the same mesh, both resolved."""
    request, path = Request(**ASKED), tmp_path / "tuned.py"
    candidate = first_fitting(request)
    tune_files.write_config(request, candidate, path)
    config = launch.load_config(str(path))
    assert config.mesh.shape.to_dict() == candidate.layout.shape
    assert (config.data.rows, config.data.length, config.train.steps) == (512, 4096, 47_684)
    assert config.mesh.remat == candidate.remat and config.model.preset == "qwen3-1.5b"
    assert config.tokenizer.path == "tokenizer_qwen3"
    assert "1,519,230,976 parameters" in tune_files.resolved([f"--config={path}"])
    small = launch.load_config(f"{path}:smoke")
    assert small.mesh.shape.to_dict() == candidate.layout.shape and small.data.length == 128
    assert tune_files.resolved([f"--config={path}:smoke"])
    assert config.data.rows * config.data.length == request.tokens_per_step


def test_the_config_names_the_attention_at_full_size(tmp_path):
    """And launch is asked, on virtual CPUs, whether it would take the rest."""
    request, path = Request(**ASKED, attention="flash"), tmp_path / "tuned.py"
    tune_files.write_config(request, first_fitting(request), path)
    assert ", attention=flash: " in path.read_text()
    assert launch.load_config(str(path)).mesh.attention == "flash"
    assert launch.load_config(f"{path}:smoke").mesh.attention == "auto"
    assert "1,519,230,976 parameters" in tune_files.check(path, request.num_devices)


@pytest.mark.parametrize("recipe", ["sft", "rl"])
def test_other_recipes_have_a_config_too(recipe, tmp_path):
    request = Request(**{**ASKED, "sequence": 2048, "recipe": recipe})
    tune_files.write_config(request, first_fitting(request), tmp_path / "tuned.py")
    assert "parameters on" in tune_files.resolved([f"--config={tmp_path / 'tuned.py'}"])


@pytest.mark.parametrize(
    "model, axis, size",
    [("qwen3-1.5b", "tensor", 8), ("qwen3-1.5b", "context", 8), ("qwen3-30b-a3b", "expert", 8)],
)
@pytest.mark.parametrize("recipe", ["pretrain", "sft", "rl"])
def test_the_smoke_size_divides_over_the_mesh(recipe, model, axis, size, tmp_path):
    request = Request(**{**ASKED, "model": model, "recipe": recipe}, fixed=((axis, size),))
    tune_files.write_config(request, tune.candidates(request)[0], tmp_path / "tuned.py")
    spec = f"{tmp_path / 'tuned.py'}:smoke"
    assert f"'{axis}': {size}" in tune_files.resolved([f"--config={spec}"])
    experts = launch.load_config(spec).model.num_experts or 0
    assert (experts > 0) == (axis == "expert") and experts % size == 0


def test_the_rollout_is_the_one_that_was_weighed(tmp_path):
    """All rows of an update sampled at once; and its microbatches cut as recipes/rl.py does."""
    request = Request(**{**ASKED, "recipe": "rl", "tokens_per_step": 4096 * 96})
    candidate = first_fitting(request)
    tune_files.write_config(request, candidate, tmp_path / "tuned.py")
    config, rollout = launch.load_config(str(tmp_path / "tuned.py")), request.rollout
    completions = config.rollout.num_prompts * config.rollout.num_generations
    assert completions == config.rollout.slots == rollout.slots == 96
    assert config.train.rows_multiple * config.train.length == request.tokens_per_step
    assert config.train.updates == 1 and config.rollout.num_generations == 16
    assert config.rollout.max_tokens == rollout.completion == 3072
    assert tune.step_of(request, candidate).num_shards == 1


@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_a_tokenizer_that_is_not_known_is_asked_for(recipe, tmp_path):
    """Llama's: Qwen's has more entries than the model."""
    request = Request(**{**ASKED, "model": "llama-3.2-1b", "recipe": recipe})
    path = tmp_path / "tuned.py"
    tune_files.write_config(request, first_fitting(request), path)
    config = launch.load_config(str(path))
    assert config.tokenizer.path == "" and config.tokenizer.kind == "hf"
    command = tune_files.command(request, path)
    assert command.endswith("--config.tokenizer.path=DIR") and command in path.read_text()
    assert "tokenizer.path" not in tune_files.command(Request(**ASKED), path)


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
def test_512_devices_resolve_and_the_mesh_scaled_down_trains(tmp_path, shared_data):
    """64 hosts: validated at full size on 512 virtual devices; its axes halved to eight, run."""
    request, path = Request(**{**ASKED, "hosts": 64}), tmp_path / "tuned.py"
    candidate = first_fitting(request)
    tune_files.write_config(request, candidate, path)
    assert "1,519,230,976 parameters" in tune_files.check(path, 512)
    sizes = dict(candidate.layout.shape)
    while math.prod(sizes.values()) > 8:
        sizes[max(sizes, key=sizes.get)] //= 2
    shorter = ("data.length=32", "eval.sets.books.length=32")  # its rows are as many
    launched(path, tmp_path / "run", *shorter, *(f"mesh.shape.{a}={n}" for a, n in sizes.items()))


@pytest.mark.slow
def test_the_smoke_size_trains_on_the_mesh(tmp_path, shared_data):
    """Four ways over heads that the base has two of, and over experts that it has none of."""
    fixed = (("expert", 2), ("tensor", 4))
    request = Request(**{**ASKED, "model": "qwen3-30b-a3b"}, fixed=fixed)
    tune_files.write_config(request, tune.candidates(request)[0], tmp_path / "tuned.py")
    launched(tmp_path / "tuned.py", tmp_path / "run")


def launched(path, workdir, *overrides) -> None:
    """Two steps of the config's smoke size."""
    short = ("train.steps=2", "train.optimizer.warmup_steps=1", "train.optimizer.decay_steps=1",
             "eval.sets.books.max_batches=1")  # fmt: skip
    flags = [f"--config.{pair}" for pair in (*short, *overrides)]
    done = subprocess.run(
        [sys.executable, "-m", "jaxreason.launch", f"--config={path}:smoke", *flags,
         f"--workdir={workdir}"], capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_page_of_tables_is_filled_between_its_marks_and_again(tmp_path, monkeypatch):
    asked = []
    simulated = simulated_compiler(asked, figures_of(2**34, 2**34))
    monkeypatch.setattr(tune, "run_step", simulated)
    page = tmp_path / "scaling.md"
    page.write_text(f"before\n{tune_tables._BEGIN}\nold\n{tune_tables._END}\nafter\n")
    make = lambda: tune_tables.make(
        page, Compiler(tmp_path / "cache"), 2, asked.append, ("qwen3-1.5b", "qwen3-32b"),
        (("8 H200", "h200", 1, 2**21), ("one v5e host", "v5e", 1, 2**21),
         ("two v5p hosts", "v5p", 2, 2**21)),
    )  # fmt: skip
    make()
    text, compiled = page.read_text(), sum(not isinstance(a, str) for a in asked)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert text.count("### ") == 4 and "| qwen3-1.5b |" in text and "32.0" in text
    assert text.count("| qwen3-1.5b, attention=flash |") == 1  # a table's first winner, once more
    assert text.count("| qwen3-1.5b, attention=splash |") == 1
    named = [a.attention for a in asked if not isinstance(a, str) and a.attention != "auto"]
    assert named == ["flash", "splash"]
    assert "--model=qwen3-32b at --sequence=4096 does not fit 4 x v5e" in text
    assert "hours for 80B | hours for 100B" in text and "compiled layouts" in text
    misses = [line for line in text.splitlines() if line.startswith("- ")]
    reason = r"(arguments|temporaries) are 16\.0 GiB, [\d.]+ by arithmetic"
    assert misses and all(re.search(reason, line) for line in misses)
    make()
    assert page.read_text() == text
    assert sum(not isinstance(a, str) for a in asked) == compiled  # figures are kept
    page.write_text("a page without marks")
    with pytest.raises(ValueError, match=r"scaling.md has no part to fill, between"):
        make()
