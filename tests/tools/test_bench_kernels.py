"""The kernels' benchmarks: held against the truth; every implementation has figures or a reason."""

import dataclasses
import importlib.util
import json
import math
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.kernels import flash, flash_sm90, flash_sm100, reference
from jaxreason.kernels.flash import Config, Tiles
from jaxreason.kernels.ring import Kernel
from jaxreason.model.attention import IMPLEMENTATIONS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools/bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.keep_freed_memory = lambda: False
    module.bench_timing.KERNEL_SECONDS = 1e-9
    peaks = module.bench_timing.Peaks(1e11, 1e10, "nothing", None)
    module.bench_kernels.peaks = module.bench_timing.peaks = lambda: peaks
    attention = module.bench_attention
    rows = attention.RowsCase("micro", 2, 40, 4, 2, 16, documents=2)
    queries = attention.QueryCase("micro", 4, 16, 4, 2, 16, full=False, prefixes=2, prefix_size=8)
    attention.ROWS_CASES["micro"], attention.QUERY_CASES["micro"] = rows, queries
    head = module.bench_kernels.HeadCase("micro", 48, 16, 97)
    module.bench_kernels.HEAD_CASES["micro"] = head
    return module


def test_every_implementation_has_figures_or_a_reason(bench, tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.json"
    suites = ["attention", "linear_xent", "decode_attention"]
    asked = [*suites, "--case=micro", "--rounds=3", f"--json={out}"]
    assert bench.main(asked) == 0
    parts = json.loads(out.read_text())["parts"]
    rows = [row for suite in suites for row in parts[f"{suite}/micro"]["rows"]]
    for row in rows:
        assert (len(row["seconds"]) == 3) != bool(row["reason"])
        if row["seconds"]:
            assert row["error"] < 1e-4 and row["rate"] > 0
            assert row["percent"] == pytest.approx(100 * row["rate"] / row["peak"])
    names = lambda suite, mode: {
        r["name"]: r["reason"] for r in rows if (r["suite"], r["mode"]) == (suite, mode)
    }
    for mode in ("forward", "forward + backward"):
        said = names("attention", mode)
        assert set(said) >= {*IMPLEMENTATIONS, "jax.nn xla", "jax.nn cudnn", "tokamax", "torch"}
        assert said["blockwise"] == said["jax.nn xla"] == ""
        assert said["splash"] == "runs on tpu, not cpu"
        assert "cannot keep packed documents apart" in said["cudnn"]
        assert names("linear_xent", mode)["linear_xent"] == ""
    said = names("decode_attention", "forward")
    assert said["decode"] == "" and said["decode_pallas"] == "runs on gpu, not cpu"
    assert said["jax.nn xla"] == "takes no shared prefix"
    baselines = [row for row in rows if row["name"] == row["baseline"] and row["seconds"]]
    assert [row["ratio"] for row in baselines] == [1.0] * 5

    def again(case, settings):
        raise AssertionError("measured once more")

    for suite in suites:
        monkeypatch.setitem(
            bench.SUITES, suite, dataclasses.replace(bench.SUITES[suite], run=again)
        )
    capsys.readouterr()
    assert bench.main(asked) == 0
    assert "3 of 3 parts done" in capsys.readouterr().out


def test_a_wrong_result_is_an_error_and_no_row(bench, tmp_path, capsys, monkeypatch):
    there = IMPLEMENTATIONS["blockwise"]

    def late(q_BTNH, k_BSKH, v_BSKH, mask):  # one row of the last sequence is off
        out_BTNH, lse_BTN = there.kernel.attention(q_BTNH, k_BSKH, v_BSKH, mask)
        return out_BTNH.at[-1, -1, -1].multiply(1.01), lse_BTN

    wrong = dataclasses.replace(there, kernel=Kernel(late, None))
    monkeypatch.setitem(IMPLEMENTATIONS, "blockwise", wrong)
    out = tmp_path / "bench.json"
    assert bench.main(["attention/micro", "--rounds=1", f"--json={out}"]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 2  # forward; forward + backward
    assert "attention/micro forward blockwise is off by" in errors[0]
    rows = json.loads(out.read_text())["parts"]["attention/micro"]["rows"]
    assert "blockwise" not in {row["name"] for row in rows}
    assert any(row["seconds"] for row in rows)  # the others were measured


@pytest.mark.usefixtures("simulated_kernels")
def test_kernels_that_are_simulated_take_part(bench, monkeypatch):
    case = dataclasses.replace(bench.bench_attention.ROWS_CASES["micro"], name="simulated")
    settings = bench.bench_timing.Settings(1, math.inf, False)
    monkeypatch.setattr(bench.bench_attention, "_theirs", lambda *_: [])
    rows, errors = bench.bench_attention.bench_rows(case, settings)
    assert errors == []
    measured = [(row["name"], row["mode"]) for row in rows if row["seconds"]]
    for name in ("splash", "flash", "blockwise"):
        assert (name, "forward") in measured and (name, "forward + backward") in measured


def test_what_broke_a_process_before_is_a_row_with_that_reason(bench):
    noted, broken = [], {"forward decode": "ended its process with exit code -11"}
    settings = bench.bench_timing.Settings(1, math.inf, False, noted.append, broken)
    case = bench.bench_attention.QUERY_CASES["micro"]
    rows, _ = bench.bench_attention.bench_queries(case, settings)
    assert rows[0]["reason"] == "ended its process with exit code -11"
    assert "forward decode" not in noted


@pytest.mark.parametrize("rows, full", [pytest.param(1, True, marks=pytest.mark.slow), (3, False)])
def test_single_queries_of_few_rows_without_a_prefix(bench, rows, full):
    case = bench.bench_attention.QueryCase("few", rows, 16, 4, 2, 16, full)
    settings = bench.bench_timing.Settings(1, math.inf, False)
    found, errors = bench.bench_attention.bench_queries(case, settings)
    assert errors == []
    assert {row["name"] for row in found if row["seconds"]} >= {"decode", "jax.nn xla"}


def test_a_lost_device_ends_the_process_and_other_failures_are_reasons(bench):
    kernels = bench.bench_kernels

    def entrant(text):
        def build():
            raise RuntimeError(text)

        return kernels.Entrant("flash", build)

    work = kernels.Work("attention", "4k", "forward", "", 1.0, "TFLOP/s", (), lambda made: 0.0)
    settings = bench.bench_timing.Settings(1, math.inf, False)
    rows, _ = kernels.contest(work, [entrant("out of\nshared memory")], settings)
    assert rows[0]["reason"] == "out of shared memory"
    with pytest.raises(bench.bench_timing.DeviceLostError):
        kernels.contest(work, [entrant("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal access")], settings)


def test_one_row_of_many_that_is_off_is_seen(bench):
    wanted = np.random.default_rng(0).normal(size=(1, 4096, 2, 64)).astype(np.float32)
    found = wanted.copy()
    found[0, 4000, 1] *= 1.2
    error = bench.bench_kernels.row_error(found, wanted)
    assert error == pytest.approx(0.2, rel=0.3)
    found[0, 7, 0, 3] = np.nan
    assert not bench.bench_kernels.row_error(found, wanted) <= 1.0


@pytest.mark.parametrize("documents, window", [(1, None), (3, None), (1, 7), (3, 7)])
def test_flops_are_of_the_pairs_that_meet(bench, documents, window):
    attention = bench.bench_attention
    case = attention.RowsCase("", 3, 50, 2, 1, 8, documents, window)
    operands = attention.rows_operands(case)
    seen = int(np.broadcast_to(reference.visible(operands.mask, 50, 50), (3, 50, 50)).sum())
    # A key is counted half where it is the first or the last that a query reads.
    diagonal = 3 * 50 / 2
    assert attention.num_pairs(operands) == pytest.approx(seen - diagonal, rel=0.15)
    if window is None:
        assert attention.num_pairs(operands) == seen - diagonal


# --------------------------------------------------------------------------------- tuning


def test_tiles_are_changed_one_field_at_a_time_until_none_helps(bench):
    best, tried = Tiles(64, 128, 8, 4), []

    def seconds(tiles):
        tried.append(tiles)
        if tiles.num_warps == 2:
            return math.inf  # does not run
        fields = dataclasses.astuple(tiles)
        return 1 + sum(abs(math.log(a / b)) for a, b in zip(fields, dataclasses.astuple(best)))

    descend, far = bench.bench_tune.descend, time.monotonic() + 60
    assert descend(Tiles(128, 32, 4, 2), seconds, far) == best
    assert len(tried) == len(set(tried)) < 40
    assert descend(Tiles(128, 32, 4, 2), seconds, 0.0) == Tiles(128, 32, 4, 2)  # no time


@pytest.mark.parametrize("kernel", ["forward", "of_queries", "of_keys"])
def test_each_kernel_alone_is_right(bench, kernel):
    attention, tiles = bench.bench_attention, Tiles(16, 32, 4, 2)
    operands = attention.rows_operands(attention.ROWS_CASES["micro"])
    config = Config(tiles, tiles, tiles, interpret=True)
    made = bench.bench_tune.build("flash", operands, config, kernel).once()
    assert set(made) == {"forward": {"out"}, "of_queries": {"dq"}, "of_keys": {"dk", "dv"}}[kernel]
    assert attention.rows_error(attention.rows_truth(operands), made) < 1e-4


@pytest.mark.parametrize("module", [flash, flash_sm90, flash_sm100])
def test_the_table_is_that_of_the_kernels(bench, module):
    tune, name = bench.bench_tune, module.__name__.rpartition(".")[2]
    tuned = [tune.Tuned(name, "", h, c, {}) for h, c in reversed(module.CONFIGS.items())]
    tuned = json.loads(json.dumps([dataclasses.asdict(one) for one in tuned]))
    names = {"Config": module.Config, "Tiles": module.Tiles}
    exec(tune.table(tuned), names)
    assert names["CONFIGS"] == module.CONFIGS
    assert set(tune.CASES) == set(module.CONFIGS) and name in tune.MODULES


def test_tiles_of_any_kernel_have_neighbours_that_may_be(bench):
    near = bench.bench_tune.neighbours
    tiles = flash_sm90.Tiles(128, 128, 2, 1)
    assert near(tiles, "keys") == [dataclasses.replace(tiles, keys=64)]  # 256 is refused
    assert near(tiles, "value_stages") == [dataclasses.replace(tiles, value_stages=2)]


def test_the_kernel_that_is_tuned_is_of_this_gpus_generation(bench, monkeypatch):
    tune = bench.bench_tune
    monkeypatch.setattr(tune.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(tune, "dtype", lambda: jnp.dtype("bfloat16"))
    for capability, name in (("9.0", "flash_sm90"), ("10.0", "flash_sm100"), ("8.9", "flash")):
        monkeypatch.setattr(tune, "capability", lambda _, c=capability: c)
        assert tune.module_for(None) == name and tune.module_for("flash") == "flash"
    with pytest.raises(ValueError, match="is 'flash_sm90'; tiles on this GPU are"):
        tune.module_for("flash_sm90")


def test_the_reference_of_the_head_is_that_of_all_rows_at_once(bench):
    kernels = bench.bench_kernels
    h_TD, w_VD = kernels.normal(0, 48, 16), kernels.normal(1, 97, 16)
    targets_T = jnp.arange(48)
    truth = kernels._head_truth(h_TD, w_VD, targets_T)
    loss = lambda h, w: reference.linear_xent(h, w, targets_T, jnp.full(48, 1 / 48))[0]
    value, (dh_TD, dw_VD) = jax.value_and_grad(loss, (0, 1))(h_TD, w_VD)
    made = {"loss": value, "dh": dh_TD, "dw": dw_VD}
    assert kernels._head_error(truth, made) < 1e-5
    assert kernels._head_error(truth, made | {"loss": 1.01 * value}) > 5e-3


@pytest.mark.slow
def test_tuning_one_head_dim(bench, monkeypatch):
    """Simulated: what is slower here is not what is slower on a GPU, but it goes through."""
    tune, tiles = bench.bench_tune, Tiles(16, 32, 4, 2)
    monkeypatch.setattr(tune, "CASES", {16: "micro", 64: "other"})
    monkeypatch.setattr(tune, "_STEPS", {"queries": (16,), "keys": (32, 64), "num_stages": (1, 2)})
    monkeypatch.setitem(flash.CONFIGS, 16, Config(tiles, tiles, tiles, interpret=True))
    said = []
    (tuned,) = tune.tune("flash", ["micro"], time.monotonic() + 60, said.append)
    assert tuned.head_dim == 16 and set(tuned.milliseconds) == set(tune.KERNELS)
    assert all(best <= first for first, best in tuned.milliseconds.values())
    assert len(said) == 3  # nothing failed
    assert tune.cases([]) == ["micro", "other"]
    with pytest.raises(ValueError, match="--case has '2k'; tiles are for micro, other"):
        tune.cases(["micro", "2k"])


def test_tiles_that_do_not_run_or_are_wrong_are_not_the_best(bench, monkeypatch):
    tune, tiles = bench.bench_tune, Tiles(16, 32, 4, 2)
    operands = bench.bench_attention.rows_operands(bench.bench_attention.ROWS_CASES["micro"])
    truth, said = bench.bench_attention.rows_truth(operands), []
    config = Config(tiles, tiles, tiles, interpret=True)
    seconds = lambda: tune._seconds(
        "flash", operands, truth, config, "forward", {}, said.append, tiles
    )
    assert seconds() < math.inf
    truth[0][-1]["out"] = 1.1 * truth[0][-1]["out"]
    assert seconds() == math.inf and "wrong, off by" in said[-1]

    def refused(*_):
        raise RuntimeError("too much shared memory")

    monkeypatch.setattr(tune, "build", refused)
    assert seconds() == math.inf and "too much shared memory" in said[-1]
