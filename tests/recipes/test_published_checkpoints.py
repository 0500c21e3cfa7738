"""The shipped configs on a checkpoint as others publish it: README's commands, in small."""

import json

import pytest
from family_folders import make, with_weights

from jaxreason import launch
from jaxreason.model.config import preset
from jaxreason.recipes import assemble, evaluate, pipeline
from jaxreason.report.summary import read_metrics
from jaxreason.text.tokenizer import load_tokenizer

SMALL = dict(num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=4, head_dim=8)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)


@pytest.fixture(scope="module")
def llama(tmp_path_factory, shared_data):
    """A decoder of two layers with a tokenizer and a template of Llama 3's structure."""
    folder = make("llama3", tmp_path_factory.mktemp("llama") / "tokenizer", shared_data)
    rows = load_tokenizer(folder).vocab_size
    return with_weights(folder, preset("llama-3.2-1b", vocab_size=rows, **SMALL))


def shipped(name: str, start):
    """The config for a machine that is here: few and short rows, two updates."""
    c = launch.load_config(name)
    c.init["from"] = str(start)
    c.data.update(rows=4, length=1024, num_shards=1)
    c.train.steps = 2
    c.train.optimizer.warmup_steps = 1
    c.mesh.update(attention="reference", scan_layers="true", remat="none")
    c.log.every = 1
    return c


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft:hf", "sft:lora"])
def test_fine_tuning_takes_the_checkpoints_own_template(name, llama, tmp_path):
    c = shipped(name, llama)
    c.eval.sets = {}
    pipeline.run(c, tmp_path / "run")
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert len(losses) == 2
    exported = tmp_path / "run" / "hf" / c.name
    published = json.loads((llama / "tokenizer_config.json").read_text())["chat_template"]
    assert (exported / "chat_template.jinja").read_text() == published


@pytest.mark.slow
def test_pretraining_goes_on_and_scores_text(llama, tmp_path):
    """Text has no turns, so any tokenizer does; its bits per byte are scored too."""
    c = shipped("pretrain:hf", llama)
    c.eval.sets.books.update(max_batches=1, rows=2, length=256)
    c.eval.every = 0
    pipeline.run(c, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    (bits,) = [v["books"]["bits_per_byte"] for v in summary["evals"].values()]
    assert 0 < bits < 10


@pytest.mark.parametrize("template", ["plain", "checkpoint"])
def test_text_is_scored_under_any_template(template, llama, tmp_path):
    c = launch.load_config("eval")
    c.init["from"], c.chat.template = str(llama), template
    c.eval.sets = {"books": launch.load_config("pretrain").eval.sets.books}
    c.eval.sets.books.update(max_batches=1, rows=2, length=256)
    c.mesh.update(attention="reference", scan_layers="true")
    evaluate.run(c, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["evals"]["model"]["books"]["bits_per_byte"] < 10


def test_another_tokenizer_is_refused(llama, tmp_path):
    c = shipped("sft:hf", llama)
    c.tokenizer.kind, c.chat.template = "bytes", "plain"
    with pytest.raises(
        ValueError, match=r"tokenizer.kind is 'bytes', but .* other tokens \(id 0 is"
    ):
        pipeline.run(c, tmp_path / "run")
