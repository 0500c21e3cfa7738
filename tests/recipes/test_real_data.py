"""Real records through the recipes: GSM8K, a large model's rationales, with Qwen3's tokenizer.

A model of two narrow layers with the real vocabulary; one to three minutes each on two cores. They
show that real records arrive, that the loss falls, and that what was trained is evaluated and
exported.
"""

import json

import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from jaxreason import launch
from jaxreason.checkpoint import hf
from jaxreason.recipes import pipeline
from jaxreason.report.summary import read_lines, read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def scene(monkeypatch, shared_data):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAXREASON_DATA", str(shared_data))
    monkeypatch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)


def short(config: ConfigDict, stage: ConfigDict, rows: int = 2) -> None:
    """Eight small updates, and four short answers."""
    stage.train.steps = 8
    stage.train.optimizer.warmup_steps = 2
    stage.data.update(rows=rows, length=512)
    config.log.every, config.run.save_every, config.eval.rows = 1, 8, 4
    for one in config.eval.sets.values():
        one.update(limit=4, max_tokens=8)


def checked(workdir, stage: str, name: str) -> dict:
    """The stage's entry of the summary, after what holds of every such run."""
    losses = [line["loss"] for line in read_metrics(workdir) if line["stage"] == stage]
    assert len(losses) == 8 and losses[-1] < losses[0] - 1  # of about 12 at first
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["evals"][stage][name]["truncated"] is not None
    config = hf.checked_config(workdir / "hf" / stage)
    assert config.vocab_size == 151_936
    for file in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (workdir / "hf" / stage / file).stat().st_size > 0
    return summary["stages"][stage]


def test_gsm8k_is_fine_tuned_on(tmp_path):
    c = launch.load_config("sft:smoke")
    short(c, c)
    pipeline.run(c, tmp_path / "run")
    found = checked(tmp_path / "run", "sft", "gsm8k")
    assert found["quarantined"] == found["dropped"] == 0 and found["examples"] > 16


def test_right_rationales_are_chosen_and_learnt(tmp_path):
    c = launch.load_config("rationales:smoke")
    short(c, c.stages.student)
    c.stages.chosen.data.limit = 0
    pipeline.run(c, tmp_path / "run")
    found = checked(tmp_path / "run", "student", "arithmetic")
    assert found["quarantined"] == found["filtered"] == 0
    marker = json.loads((tmp_path / "run/stages/chosen.json").read_text())
    # 3,600 records, in 197 of which the teacher ran into its limit and has no answer.
    assert (marker["traces"], marker["quarantined"], marker["kept"]) == (3_403, 197, 762)
    kept, dropped = (
        read_lines(tmp_path / f"run/data/chosen{end}.jsonl") for end in ("", ".dropped")
    )
    assert len(dropped) == 3_403 - 762 == sum(marker["dropped"].values())
    assert all(one["num_tokens"] >= 20 and one["response"] for one in kept)


def test_answers_and_rationales_are_learnt_as_two_tasks(tmp_path):
    c = launch.load_config("rationales:step_by_step")
    short(c, c.stages.student)
    pipeline.run(c, tmp_path / "run")
    found = checked(tmp_path / "run", "student", "arithmetic")
    assert found["filtered"] == 2_229  # rationales of a score below 1; of labels none is left out
