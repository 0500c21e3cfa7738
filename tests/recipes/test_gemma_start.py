"""Gemma 3 as published: an added token more than its embedding table has rows."""

import io
import json
import pathlib

import pytest
from family_folders import make, with_weights

from jaxreason import launch
from jaxreason.checkpoint import hf
from jaxreason.data.pipeline import DataConfig, evaluation_batches
from jaxreason.model.config import preset
from jaxreason.recipes import assemble, checkpoints, defaults, pipeline, weights
from jaxreason.report.summary import read_metrics
from jaxreason.text.chat import fitted
from jaxreason.text.tokenizer import load_tokenizer

SMALL = dict(
    num_layers=1,
    sliding_layers=(0,),
    embed_dim=32,
    mlp_dim=32,
    num_heads=4,
    num_kv_heads=1,
    head_dim=8,
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, shared_data):
    """One layer, and a tokenizer whose last entry, <image_soft_token>, has no row."""
    folder = make("gemma3", tmp_path_factory.mktemp("gemma") / "tokenizer", shared_data)
    rows = load_tokenizer(folder).vocab_size - 1
    return with_weights(folder, preset("gemma-3-1b", vocab_size=rows, **SMALL))


def training(gemma: pathlib.Path, folder: pathlib.Path, text: str = "Once upon a time."):
    """Two updates on eight documents."""
    folder.mkdir(exist_ok=True)
    (folder / "texts.jsonl").write_text((json.dumps({"text": text}) + "\n") * 8)
    c = defaults.default_config("x", "fit")
    c.update(defaults.stage_config())
    c.init = {"from": str(gemma)}
    c.tokenizer.kind = c.chat.template = "checkpoint"
    c.data.sources = {
        "a": defaults.source(name="a", path=str(folder / "texts.jsonl"), text_field="text")
    }
    c.data.update(rows=4, length=32, num_shards=1)
    c.train.steps = 2
    c.mesh.update(attention="reference", scan_layers="true", remat="none")
    c.run.compilation_cache = ""
    c.log.every = 1
    return c


def test_it_starts_trains_and_answers(gemma, tmp_path, monkeypatch, capsys):
    config, run = training(gemma, tmp_path), tmp_path / "run"
    pipeline.run(config, run)
    assert [record["step"] for record in read_metrics(run) if "loss" in record][-1] == 2
    kept = load_tokenizer(run / "tokenizer")
    entries, rows = load_tokenizer(gemma).vocab_size, hf.checked_config(gemma).vocab_size
    assert (kept.vocab_size, entries) == (rows, rows + 1)
    for start in (gemma, run):
        monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
        talk = [f"--config={launch.__file__.rsplit('/', 2)[0]}/configs/generate.py"]
        settings = {"init.from": start, "sampling.max_tokens": 3, "run.compilation_cache": ""}
        talk += [f"--config.{key}={value}" for key, value in settings.items()]
        assert launch.main([*talk, f"--workdir={tmp_path}/never"]) == 0, capsys.readouterr().err


def test_the_token_itself_is_refused_in_one_line_unless_it_gets_a_row(gemma, tmp_path):
    config = training(gemma, tmp_path, "see <image_soft_token> here")
    says = r"'<image_soft_token>', which is token \d+, and the embedding table has \d+ rows"
    with pytest.raises(ValueError, match=says):
        pipeline.run(config, tmp_path / "refused")
    config.model.vocab_size = load_tokenizer(gemma).vocab_size
    start, workdir = checkpoints.parse(str(gemma)), assemble.Workdir(tmp_path / "larger")
    workdir.open(config)
    tokens = assemble.tokenizer(config, workdir, start)
    model = assemble.language_model(config, assemble.architecture(config, start), tokens)
    assert tokens.encode("<image_soft_token>") == [tokens.vocab_size - 1]
    assert weights.load(start, model, None)["embedding"].shape[0] == tokens.vocab_size


def test_the_start_of_a_document_is_context_and_no_byte(gemma, tmp_path):
    """Bits per byte count every byte of the text, and no loss of <bos>."""
    source = training(gemma, tmp_path).data.sources.to_dict()
    config = DataConfig(sources=source, rows=4, length=32, chat_template=str(gemma))
    tokens = fitted(load_tokenizer(gemma), str(gemma))
    found = evaluation_batches(config, tokens, tmp_path)
    assert found.num_bytes == 8 * len("Once upon a time.")
    bos = tokens.encode("<bos>")[0]
    for batch in found.batches:
        assert bos in batch.tokens_BT and bos not in batch.targets_BT
