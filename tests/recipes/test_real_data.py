"""Real records through the recipes: GSM8K, a large model's rationales, with Qwen3's tokenizer.

A model of two narrow layers with the real vocabulary; one to three minutes each on two cores. They
show that real records arrive, that the loss falls, and that what was trained is evaluated and
exported.
"""

import gzip
import itertools
import json

import pyarrow as pa
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from pyarrow import parquet

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


def test_lfm_goes_on_from_a_checkpoint(checkpoint, shared_data, tmp_path, monkeypatch):
    """Not the smoke: as a user starts it, with the checkpoint's template, tokenizer and shape.

    GSM8K's solutions stand for OpenThoughts' traces.
    """
    (tmp_path / "data/openthoughts").mkdir(parents=True)
    (tmp_path / "data/gsm8k").symlink_to(shared_data / "gsm8k")
    monkeypatch.setenv("JAXREASON_DATA", str(tmp_path / "data"))
    with gzip.open(shared_data / "gsm8k/train.jsonl.gz", "rt") as lines:
        records = [json.loads(line) for line in itertools.islice(lines, 64)]
    parquet.write_table(
        pa.Table.from_pylist([openthoughts(**record) for record in records]),
        tmp_path / "data/openthoughts/part.parquet",
    )
    c = launch.load_config("lfm")
    short(c, c.stages.sft, rows=8)
    c.stages.sft.init["from"] = str(checkpoint)
    c.stages.sft.data.update(length=1024, num_shards=1)
    c.mesh.microbatches, c.eval.rows = 1, 4
    rl = c.stages.rl
    rl.data.band_min_samples = 4
    rl.rewards.length.update(max_tokens=16, buffer_tokens=8)
    rl.rollout.update(
        num_prompts=2, num_generations=4, max_tokens=16, slots=8, filter_zero_std=False
    )
    rl.train.update(steps=2, updates=1, length=2048, rows_multiple=2)
    rl.train.optimizer.warmup_steps = 0
    pipeline.run(c, tmp_path / "run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert list(summary["stages"]) == ["sft", "rl"] and list(summary["evals"]) == ["sft", "rl"]
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["stage"] == "sft"]
    assert len(losses) == 8 and losses[-1] < losses[0]
    template = (checkpoint / "chat_template.jinja").read_text()
    assert (tmp_path / "run/hf/rl/chat_template.jinja").read_text() == template


def openthoughts(question: str, answer: str) -> dict:
    reasoning, _, number = answer.partition("####")
    said = (
        f"<|begin_of_thought|>\n\n{reasoning}\n\n<|end_of_thought|>\n\n"
        f"<|begin_of_solution|>\n\n\\boxed{{{number.strip()}}}\n\n<|end_of_solution|>"
    )
    turns = [{"from": "user", "value": question}, {"from": "assistant", "value": said}]
    return {"system": "Think.", "conversations": turns}
