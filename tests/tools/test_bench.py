"""tools/bench.py on models of no size: it checks before it times, keeps its figures, goes on."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxreason.launch import load_config
from jaxreason.model.config import DecoderConfig

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "tools/bench.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.keep_freed_memory = lambda: False  # this process has other tests to run
    module.bench_timing.ROUND_SECONDS = module.bench_timing.KERNEL_SECONDS = 1e-9
    models = module.bench_models
    models.DECODE_ROWS, models.PROMPT, models.NEW = 2, 4, 6
    models.REQUESTS, models.PROMPTS, models.LIMITS, models.BATCHES = 4, (3, 6), (2, 9), (2, 4)
    models.GROUP, models.GROUP_PROMPT, models.GROUP_NEW = 3, 8, 4
    config = DecoderConfig(257, 1, 16, 32, 2, 1, 8)
    models.CASES["micro"] = models.Case("micro", config, 2, 8, 0.95, 2.0, {})
    return module


# ---------------------------------------------------------------------------- whole models


def test_the_small_case_is_the_quickstarts(bench, monkeypatch):
    monkeypatch.chdir(ROOT)
    case, config = bench.bench_models.CASES["tiny"], load_config("quickstart")
    data, shape = config.stages.sft_cot.data, case.config
    assert (case.rows, case.length) == (data.rows, data.length)
    assert config.model.preset == "qwen3-tiny"
    assert shape.vocab_size == config.model.vocab_size
    rows, head = bench.bench_attention.ROWS_CASES["tiny"], bench.bench_kernels.HEAD_CASES["tiny"]
    assert (rows.rows, rows.length) == (data.rows, data.length)
    assert (rows.heads, rows.kv_heads) == (shape.num_heads, shape.num_kv_heads)
    assert rows.head_dim == shape.head_dim
    assert head.tokens == data.rows * data.length
    assert (head.dim, head.vocab) == (shape.embed_dim, shape.vocab_size)


def test_beside_transformers(bench, tmp_path):
    pytest.importorskip("torch", reason="torch is installed for Python 3.11 only")
    out = tmp_path / "bench.json"
    suites = ["train", "decode", "rollout"]
    ended = bench.main([*suites, "--case=micro", "--rounds=2", "--no-compile", f"--json={out}"])
    assert ended == 0
    content = json.loads(out.read_text())
    (machine,) = content["runs"]
    assert {"date", "commit", "source", "device", "versions", "load_before"} <= set(machine)
    parts = content["parts"]
    assert {part["state"] for part in parts.values()} == {"done"}
    rows = [row for suite in suites for row in parts[f"{suite}/micro"]["rows"]]
    for row in rows:
        assert len(row["ours"]) == len(row["theirs"]) == 2
        assert row["ratio"] > 0 and row["cpu_ratio"] > 0
    train, decode, rollout, sharing = rows
    assert train["peer"] in ("eager fused", "eager foreach")
    assert decode["peer"].endswith("same tokens in 2 of 2 rows")
    assert rollout["peer"].endswith("same tokens in 2 of 2 rows")
    assert rollout["shape"] == "4 x (3-6 + 2-9)" and sharing["shape"] == "3 samples of 8 + 4"


def test_without_a_peer_the_reason_stands_in_its_place(bench, monkeypatch):
    models = bench.bench_models
    monkeypatch.setattr(models.peers, "missing", lambda: "torch is not installed")
    settings = models.Settings(rounds=1, deadline=0.0, compiled=False)
    (result,) = models.bench_train(models.CASES["micro"], settings)
    assert (result.theirs, result.ratio, result.peer) == ([], None, "torch is not installed")
    assert np.all(np.array(result.ours) > 0)


def test_a_model_that_computes_something_else_is_not_timed(bench):
    wrong = bench.bench_timing.WrongResultError
    with pytest.raises(wrong, match="the first losses are"):
        bench.bench_models._check_losses([5.6, 5.5, 5.4], lambda: 5.7)


# --------------------------------------------------------------------------------- startup


def _starts(loss: dict[str, float], bench, monkeypatch):
    started = []

    def start(which, case, caches):
        started.append((which, tuple(caches.values())))
        return {"loss": loss[which], "update": float(len(started)), "total": 9.0}

    monkeypatch.setattr(bench.bench_startup, "_start", start)
    monkeypatch.setattr(bench.bench_startup.peers, "missing", lambda: None)
    monkeypatch.setattr(bench.bench_startup.peers, "no_compiler", lambda: "")
    settings = bench.bench_timing.Settings(2, time.monotonic() + 60, True)
    case = bench.bench_models.CASES["micro"]
    return started, bench.bench_startup.bench_startup(case, settings)


def test_starts_in_turn_first_without_then_with_what_was_compiled(bench, monkeypatch):
    losses = {"jaxreason": 5.0, "torch": 6.0}
    started, (rows, errors) = _starts(losses, bench, monkeypatch)
    assert [which for which, _ in started] == ["jaxreason", "torch"] * 4
    ours = [folders for which, folders in started if which == "jaxreason"]
    assert ours[0] == ours[1] != ours[2] == ours[3]  # cold and warm share a folder, rounds do not
    assert errors == []
    found = {(row["mode"], row["name"]): row["seconds"] for row in rows}
    assert found["cold, first update", "jaxreason"] == [1.0, 5.0]
    assert found["warm, first update", "torch.compile"] == [4.0, 8.0]


def test_a_start_without_a_finite_loss_is_an_error(bench, monkeypatch):
    losses = {"jaxreason": float("nan"), "torch": 6.0}
    _, (_, errors) = _starts(losses, bench, monkeypatch)
    assert len(errors) == 1 and "startup/micro jaxreason" in errors[0]


@pytest.mark.slow
def test_two_starts_of_the_quickstarts_model(bench):
    assert bench.main(["startup/tiny", "--rounds=1", "--no-compile"]) == 0


# -------------------------------------------------------------------------- a slot of time

PARTS = ("attention/4k", "linear_xent/0.6b", "startup/1.7b", "train/0.6b")
# A process that is told what to do with each part: find something, break at it, sleep, or nothing.
WORKER = """
import json, os, pathlib, sys, time
path, plan = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
for name in sys.argv[3:]:
    content = json.loads(path.read_text())
    part = content["parts"].setdefault(name, {})
    what = plan[name]
    if what == "nothing":
        continue
    part |= {"state": "running", "since": time.time() - 1e4 * (what == "hang"), "entrant": "flash"}
    if part.get("broken") or what == "find":
        part |= {"state": "done", "rows": [], "errors": []}
    path.write_text(json.dumps(content))
    if part["state"] == "running":
        os.abort() if what == "abort" else time.sleep(60)
"""


def _spend(bench, path, plan: dict[str, str], seconds: float = 4000.0):
    """(the store, the parts of each process) of a slot in which processes do as planned."""
    modules, batches = bench.bench_parts, []
    store = modules.Store(path)
    if not path.exists():
        path.write_text(json.dumps(store.content))
    parts = [modules.Part(*name.split("/")) for name in PARTS]

    def start(batch, left):
        batches.append([part.name for part in batch])
        command = [sys.executable, "-c", WORKER, str(path), json.dumps(plan), *batches[-1]]
        return subprocess.Popen(command, process_group=0, stderr=subprocess.DEVNULL)

    modules.spend(parts, store, time.monotonic() + seconds, start)
    return store, batches


def test_what_ends_its_process_or_hangs_is_left_out_and_the_rest_goes_on(bench, tmp_path):
    plan = dict(zip(PARTS, ("find", "abort", "find", "hang")))
    store, batches = _spend(bench, tmp_path / "bench.json", plan)
    assert {store.state(name) for name in PARTS} == {"done"}
    assert batches == [
        ["attention/4k", "linear_xent/0.6b"],
        ["linear_xent/0.6b"],
        ["startup/1.7b"],  # alone: its own processes want the device
        ["train/0.6b"],
        ["train/0.6b"],
    ]
    ended = store.part("linear_xent/0.6b")["broken"]
    assert ended == {"flash": "ended its process with exit code -6"}
    assert store.part("train/0.6b")["broken"] == {"flash": "did not end within 720 s"}


def test_processes_that_do_nothing_are_not_begun_for_ever(bench, tmp_path):
    _, batches = _spend(bench, tmp_path / "bench.json", dict.fromkeys(PARTS, "nothing"))
    assert len(batches) == 3


def test_a_part_begins_only_where_there_is_time_for_it_and_the_next_call_goes_on(bench, tmp_path):
    plan = dict.fromkeys(PARTS, "find")
    _, batches = _spend(bench, tmp_path / "bench.json", plan, seconds=150.0)
    assert batches == [["attention/4k", "linear_xent/0.6b"]]
    _, batches = _spend(bench, tmp_path / "bench.json", plan)
    assert batches == [["startup/1.7b"], ["train/0.6b"]]


def test_the_slot_holds_every_kernels_case_that_is_not_for_cpu(bench):
    choose, suites = bench.bench_parts.choose, bench.SUITES
    parts = [part.name for part in choose(["all"], [], suites, cpu=False)]
    assert parts == list(bench.bench_parts.SLOT)
    kernels = ("attention", "linear_xent", "decode_attention")
    for suite in kernels:
        there = {p.case for cpu in (True, False) for p in choose([suite], [], suites, cpu)}
        assert there | {"micro"} == set(suites[suite].cases) | {"micro"}


# --------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "asked, said",
    [
        (["trian"], "unknown suite 'trian'; there are attention, linear_xent, decode_attention, "),
        (["train/huge"], "unknown case 'huge' of train; it has tiny, 10m, "),
        (["attention", "--case=0.6b"], "--case has '0.6b'; what was asked for has 10m, 16k, "),
        (["data", "--rounds=0"], "--rounds is 0; it must be at least 1"),
        (["data", "--minutes=nan"], "--minutes is nan; it must be above 0 and finite"),
        (["data", "--json=/no/such/folder.json"], "--json is /no/such/folder.json; it must be"),
        (["data", "--json=/"], "--json is /; it must be a file in a folder that exists"),
        (["train", "--tune"], "--tune is for attention alone, not train"),
        (["attention", "--kernel=flash"], "--kernel is 'flash'; it says which tiles --tune is for"),
        (["attention", "--tune"], "--tune needs a GPU; JAX's devices here are cpu"),
        (["data", "--rounds=many"], "argument --rounds: invalid int value: 'many'"),
    ],
)
def test_one_line_says_what_was_wrong(bench, capsys, asked, said):
    try:
        code = bench.main(asked)
    except SystemExit as left:
        code = left.code
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and line.startswith(f"error: {said}")


@pytest.mark.parametrize(
    "content, said",
    [
        ("[1, 2]", "holds something else"),
        ('{"steps": 3}', "holds something else"),
        ('{"runs": [{"device": "NVIDIA H100"}], "parts": {}}', "figures of NVIDIA H100; this is"),
    ],
)
def test_figures_of_something_else_are_not_gone_on_with(bench, tmp_path, capsys, content, said):
    path = tmp_path / "bench.json"
    path.write_text(content)
    assert bench.main(["train", f"--json={path}"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert str(path) in line and said in line
    assert path.read_text() == content


def test_the_packages_of_the_data_are_not_needed():
    """GPU images often lack them."""
    absent = ("grain", "tensorflow_datasets", "array_record", "ml_collections", "tokamax")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent}))\n"
        f"sys.path.insert(0, {str(ROOT / 'tools')!r}); import bench"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
