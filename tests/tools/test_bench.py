"""tools/bench.py on a model of no size: it checks before it times, and keeps its figures."""

import importlib.util
import json
import pathlib

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
    module.ROUND_SECONDS = 1e-9
    module.keep_freed_memory = lambda: False  # this process has other tests to run
    module.DECODE_ROWS, module.PROMPT, module.NEW = 2, 4, 6
    module.REQUESTS, module.PROMPTS, module.LIMITS, module.BATCHES = 4, (3, 6), (2, 9), (2, 4)
    module.GROUP, module.GROUP_PROMPT, module.GROUP_NEW = 3, 8, 4
    config = DecoderConfig(257, 1, 16, 32, 2, 1, 8)
    module.CASES["micro"] = module.Case("micro", config, 2, 8, 0.95, 2.0, {})
    return module


def test_the_small_case_is_the_quickstarts(bench, monkeypatch):
    monkeypatch.chdir(ROOT)
    case, config = bench.CASES["tiny"], load_config("quickstart")
    data = config.stages.sft_cot.data
    assert (case.rows, case.length) == (data.rows, data.length)
    assert config.model.preset == "qwen3-tiny"
    assert case.config.vocab_size == config.model.vocab_size


def test_beside_transformers(bench, tmp_path):
    pytest.importorskip("torch", reason="torch is installed for Python 3.11 only")
    out = tmp_path / "bench.json"
    suites = ["train", "decode", "rollout"]
    bench.main([*suites, "--models=micro", "--rounds=2", "--no-compile", f"--json={out}"])
    content = json.loads(out.read_text())
    assert {"date", "commit", "device", "versions", "load_before"} <= set(content["machine"])
    train, decode, rollout, sharing = content["results"]
    for result in (train, decode, rollout, sharing):
        assert len(result["ours"]) == len(result["theirs"]) == 2
        assert result["ratio"] > 0 and result["cpu_ratio"] > 0
    assert train["peer"] in ("eager fused", "eager foreach")
    assert decode["peer"].endswith("same tokens in 2 of 2 rows")
    assert rollout["peer"].endswith("same tokens in 2 of 2 rows")
    assert rollout["shape"] == "4 x (3-6 + 2-9)" and sharing["shape"] == "3 samples of 8 + 4"


def test_without_a_peer_the_reason_stands_in_its_place(bench, monkeypatch):
    monkeypatch.setattr(bench.peers, "missing", lambda: "torch is not installed")
    settings = bench.Settings(rounds=1, deadline=0.0, compiled=False)
    (result,) = bench.bench_train(bench.CASES["micro"], settings)
    assert (result.theirs, result.ratio, result.peer) == ([], None, "torch is not installed")
    assert np.all(np.array(result.ours) > 0)


def test_a_model_that_computes_something_else_is_not_timed(bench):
    with pytest.raises(SystemExit, match="the first losses are"):
        bench._check_losses([5.6, 5.5, 5.4], lambda: 5.7)


def test_unknown_suite(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["trian"])
    assert (
        "unknown suite 'trian'; there are train, decode, rollout, data" in capsys.readouterr().err
    )
