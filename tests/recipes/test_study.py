"""The grid: what runs again and what does not, in which order, and what the report says."""

import fcntl
import json
import pathlib
import threading
import time

import pytest
from conftest import ROOT

from jaxreason import launch
from jaxreason.recipes import assemble, checkpoints, defaults, pipeline, study, study_report
from jaxreason.report.summary import read_metrics

LAYOUT = dict(x="expressions", panel="model", compare=(("long", "short"),))


def cell_config(rendering="short_cot", start="base@pretrain", seed=0):
    """Two updates of a tiny model on a few expressions."""
    c = launch.load_config("quickstart:smoke")
    c.arithmetic.update(num_train=40, num_test=4)
    c.seed, c.name = seed, "cell"
    stage = c.stages.pretrain.copy_and_resolve_references()
    stage.data.update(rows=8, examples_per_batch=8, length=256)
    stage.data.sources.arithmetic.update(rendering=rendering, prompt_template="{expression}=")
    stage.train.steps, stage.train.optimizer.warmup_steps = 2, 1
    stage.init["from"] = start
    c.model = defaults.model_config()
    if start == "random":
        c.model.update(vocab_size=261, num_layers=1)
    c.stages = {"pretrain" if start == "random" else "sft": stage}
    c.eval.rows = 32
    c.eval.sets.arithmetic.update(max_tokens=8, limit=4)
    c.run.export = False
    return c


def grid(folder):
    c = defaults.study_config("grid", str(folder), **LAYOUT)
    c.cells = {
        "base": defaults.cell(cell_config(start="random"), arm="start", model="one"),
        "a-long": defaults.cell(
            cell_config("long_cot"), arm="long", expressions=40, model="one"
        ),
        "short-0": defaults.cell(cell_config(), arm="short", expressions=40, model="one"),
        "short-1": defaults.cell(cell_config(seed=1), arm="short", expressions=40, model="one"),
    }  # fmt: skip
    return c


@pytest.fixture(autouse=True)
def scene(monkeypatch):
    monkeypatch.chdir(ROOT)


class Pretended:
    """pipeline.run, in an instant: the files that a run leaves, and who asked for it."""

    def __init__(self):
        self.ran, self.fails = [], None

    def __call__(self, config, folder):
        self.ran.append(folder.name)
        if (folder / "summary.json").exists():
            return
        (folder / "data").mkdir(parents=True, exist_ok=True)
        stage = list(config.stages)[-1]
        starts = config.stages[stage].init["from"]
        assert starts == "random" or pathlib.Path(starts.partition("@")[0], "summary.json").exists()
        if config.seed == self.fails:
            raise ValueError("not one trace is kept")
        right = [config.seed % 2 == 0, True]
        line = {
            "stage": stage, "set": "arithmetic", "prompt": "1+2=", "answer": "3", "group": "2",
            "completions": [
                {"text": "1+2=3", "num_tokens": 5, "truncated": False, "correct": c} for c in right
            ],
        }  # fmt: skip
        metrics = {"avg@4": sum(right) / 2, "mean_tokens": 5.0, "truncated": 0.0}
        summary = {
            "stages": {stage: {"steps": 2, "tokens": 7}}, "evals": {stage: {"arithmetic": metrics}}
        }  # fmt: skip
        (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "config.json").write_text(json.dumps({"parameters": 1}))


def test_the_grid_goes_on_where_it_was(tmp_path, monkeypatch):
    pretended = Pretended()
    monkeypatch.setattr(pipeline, "run", pretended)
    kept, config = tmp_path / "kept", grid(tmp_path / "kept")
    study.run(config, tmp_path / "w")
    assert pretended.ran == ["base", "a-long", "short-0", "short-1"]  # each after what it needs
    report = (kept / "report.md").read_text()
    assert "4 of 4 cells" in report
    assert "| short | one | 40 | 2 | 0.750 ± 0.354 | 5 ± 0 |" in report
    assert "| long | short | expressions 40, model one | +0.250 | +0.250 to +0.250 |" in report
    assert (kept / "accuracy.svg").read_text().count("expressions")

    # Again: nothing. On another machine: only what is missing, and what it builds on.
    pretended.ran.clear()
    study.run(config, tmp_path / "w")
    assert pretended.ran == []
    (kept / "short-1.json").unlink()
    study.run(config, tmp_path / "elsewhere")
    assert pretended.ran == ["base", "short-1"] and (kept / "short-1.json").exists()

    # Another config of a cell is another cell, and so is all that builds on it.
    pretended.ran.clear()
    config.cells["short-1"].config.log.every = 7  # not what it finds
    config.cells["a-long"].config.stages.sft.train.optimizer.learning_rate = 0.125
    study.run(config, tmp_path / "another")
    assert pretended.ran == ["base", "a-long"]
    config.cells.base.config.seed = 4
    digests = {json.loads((kept / f"{name}.json").read_text())["asked"] for name in config.cells}
    cells = study.plan(config)
    assert not digests & {study.asked(cells, name) for name in cells}


def test_a_cell_that_fails_is_named_when_the_others_are_done(tmp_path, monkeypatch):
    pretended = Pretended()
    monkeypatch.setattr(pipeline, "run", pretended)
    config, pretended.fails = grid(tmp_path / "kept"), 3
    config.cells["a-long"].config.seed = 3
    config.cells["short-1"].config.stages.sft.init["from"] = "a-long@sft"
    with pytest.raises(ValueError, match=r"cells\.a-long: not one trace is kept; 1 other cell"):
        study.run(config, tmp_path / "w")
    assert pretended.ran == ["base", "a-long", "short-0"]
    assert "2 of 4 cells" in (tmp_path / "kept" / "report.md").read_text()
    pretended.fails = None
    study.run(config, tmp_path / "w")
    assert "4 of 4 cells" in (tmp_path / "kept" / "report.md").read_text()


@pytest.mark.slow
def test_a_cell_learns_from_what_another_left(tmp_path):
    """Two real runs: the second starts from the first's stage, and its file tells what it found."""
    config = grid(tmp_path / "kept")
    del config.cells["a-long"], config.cells["short-0"]
    study.run(config, tmp_path / "w")
    found = json.loads((tmp_path / "kept" / "short-1.json").read_text())
    assert found["updates"] == 2 and found["tokens"] > 0 and len(found["correct"]) == 4
    assert found["facts"] == {"arm": "short", "expressions": 40, "model": "one"}
    assert 0 <= found["metrics"]["avg@4"] <= 1 and found["metrics_samples"] == 8
    assert set(found["traces"]["by_operations"]) == {"2", "3", "4"}
    first, second = (read_metrics(tmp_path / "w" / name)[0]["loss"] for name in ("base", "short-1"))
    assert second < first


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda c: c.study.update(set="gsm8k"),
            r"study\.set is 'gsm8k'; the sampled sets of ",
        ),
        (
            lambda c: c.cells["short-0"].config.stages.sft.init.update({"from": "absent@sft"}),
            r"init\.from is 'absent@sft'; absent holds no config\.json",
        ),
        (
            lambda c: c.cells.base.config.stages.pretrain.init.update({"from": "a-long@sft"}),
            r"cells\.a-long needs 'base', which needs it",
        ),
        (lambda c: c.study.layout.update(line=""), r"study\.layout\.line is ''"),
        (
            lambda c: c.study.layout.update(metric="avg@8"),
            r"metric is 'avg@8'; of 8 samples .* there are avg@4, pass@4, maj@8",
        ),
        (
            lambda c: c.cells["short-0"].config.stages.sft.init.update({"from": "@nope"}),
            r"cells\.short-0\.config\.stages\.sft\.init\.from is '@nope'; the cell has sft",
        ),
        (
            lambda c: c.cells["short-0"].config.stages.sft.data.sources.arithmetic.update(
                kind="jsonl", path="nope@prune", rendering="", split=""
            ),
            r"path is 'nope@prune'; there is no such cell among a-long, base",
        ),
        (
            lambda c: c.study.layout.update(compare=(("long", "shrot"),)),
            r"study\.layout\.compare has 'shrot'; as 'arm' the cells have long, short, start",
        ),
    ],
)
def test_a_grid_that_cannot_run_is_refused_at_once(tmp_path, change, says, monkeypatch):
    monkeypatch.setattr(pipeline, "run", lambda *_: pytest.fail("a cell was run"))
    config = grid(tmp_path / "kept")
    change(config)
    with pytest.raises(ValueError, match=says):
        study.run(config, tmp_path / "w")


def test_a_cell_that_another_process_is_at_comes_last(tmp_path, monkeypatch):
    """A lock that is held here stands for the other process; what needs the cell waits, too."""
    pretended = Pretended()
    monkeypatch.setattr(pipeline, "run", pretended)
    monkeypatch.setattr(study, "_PAUSE", 0.01)
    config = grid(tmp_path / "kept")
    config.cells["short-1"].config.stages.sft.init["from"] = "a-long@sft"
    (tmp_path / "w").mkdir()
    with (tmp_path / "w/.a-long.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        running = threading.Thread(target=study.run, args=(config, tmp_path / "w"))
        running.start()
        deadline = time.monotonic() + 60
        while not (tmp_path / "kept/short-0.json").exists():
            assert time.monotonic() < deadline and running.is_alive()
            time.sleep(0.01)
        time.sleep(0.2)
        assert running.is_alive() and pretended.ran == ["base", "short-0"]
    running.join(60)
    assert pretended.ran == ["base", "short-0", "a-long", "short-1"]
    assert sorted(path.stem for path in (tmp_path / "kept").glob("*.json")) == sorted(config.cells)


def test_an_unknown_key_of_a_cell_is_named():
    config = grid("kept")
    config.cells.base.config.stages.pretrain.train.step = 3
    with pytest.raises(ValueError, match=r"has a key 'step' that nothing reads; did you mean"):
        defaults.check_keys(config)


def cell(arm, correct, seed=0, tokens=10.0):
    return {
        "name": f"{arm}-{seed}", "facts": {"arm": arm}, "seed": seed, "correct": correct,
        "metrics_samples": 4, "metrics": {"mean_tokens": tokens},
    }  # fmt: skip


def test_comparisons_are_by_problem():
    gain, (low, high), number = study_report.compare(
        [cell("a", "4444", 0), cell("a", "4442", 1)], [cell("b", "4040")]
    )
    assert number == 4 and gain == pytest.approx((0 + 1 + 0 + 0.75) / 4)
    assert low >= 0 and high <= 1
    many = [
        cell(arm, correct) | {"metrics_samples": 16} for arm, correct in (("a", "g3"), ("b", "2b"))
    ]
    gain, _, number = study_report.compare(many[:1], many[1:])  # 16 and 3 of 16, 2 and 11
    assert (gain, number) == ((16 + 3 - 2 - 11) / 32, 2)
    with pytest.raises(ValueError, match=r"a-0, b-0 have \[2, 3\] problems"):
        study_report.compare([cell("a", "44")], [cell("b", "444")])


def test_the_spread_is_over_seeds():
    assert study_report.spread([0.5, 0.7], ".2f") == "0.60 ± 0.14"
    assert study_report.spread([0.5], ".2f") == "0.50"
    assert study_report.spread([None, 1.0], ".2f") == "-"


def test_the_study_at_the_papers_size_can_be_planned(monkeypatch):
    """Without the models, which are the hub's."""
    real = checkpoints.parse
    absent = lambda text: real("random") if text.startswith("hf://") else real(text)
    monkeypatch.setattr(checkpoints, "parse", absent)
    monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)
    config = launch.load_config("study_valley:paper")
    defaults.check_keys(config)
    for entry in config.cells.values():
        entry.config.chat.template = "plain"
    cells = study.plan(config)
    assert len(cells) == 30
    updates = {c.facts["thousands"]: sum(c.updates.values()) for c in cells.values()
               if c.facts["arm"] == "long"}  # fmt: skip
    assert updates == {8: 4000, 16: 4000, 32: 4000, 64: 3000, 128: 3000, 220: 3438}
    assert cells["0_5B-8k-pruned"].needs == cells["0_5B-8k-rl"].needs == ("0_5B-8k",)


def test_the_shipped_study_has_the_arms_that_were_declared(monkeypatch):
    monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)  # not the suite's eight
    config = launch.load_config("study_valley")
    defaults.check_keys(config)
    cells = study.plan(config)
    assert len(cells) == 97
    long = [c for c in cells.values() if c.facts["arm"] == "long"]
    assert {sum(c.updates.values()) for c in long} == {96}  # the paper's rule
    scales = sorted({c.facts["expressions"] for c in long})
    *grid, beyond = scales
    assert len(grid) == 4 and grid[-1] == 32 * grid[0] and beyond == 2 * grid[-1]
    one = {c.facts["expressions"]: sum(c.updates.values()) for c in cells.values()
           if c.facts["arm"] == "one batch"}  # fmt: skip
    assert one == {96: 6, 3072: 192, 6144: 384}
