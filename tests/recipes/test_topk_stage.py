"""The stage that writes a teacher's top k: killed, resumed, and learnt from as from the teacher."""

import json
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict

from jaxreason import launch
from jaxreason.data import logits
from jaxreason.recipes import defaults, topk
from jaxreason.recipes.pipeline import stages_of
from jaxreason.report.summary import read_metrics

CONFIG = pathlib.Path(__file__).with_name("topk_config.py")


@pytest.fixture(scope="module", autouse=True)
def scene():
    """One device, as a user's machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(CONFIG.parent))
        patch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)
        yield


def run(workdir, *flags: str, arg: str = "") -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return launch.main([f"--config={CONFIG}:{arg}", f"--workdir={workdir}", *flags])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("topk") / "run"
    assert run(workdir) == 0
    return workdir


def files(workdir) -> dict[str, bytes]:
    folder = workdir / "data/topk/a"
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npz"}


@pytest.mark.slow
def test_a_student_of_all_stored_tokens_learns_as_beside_the_teacher(learnt):
    """k is the whole vocabulary: the same losses, but for log-probs kept in bfloat16 (0.2 %)."""
    marker = json.loads((learnt / "stages/topk.json").read_text())
    assert (marker["documents"], marker["k"], marker["teacher"]) == (24, 261, "@teacher@60")
    records = read_metrics(learnt)
    of = lambda name: [r["loss"] for r in records if r["stage"] == name and "loss" in r]
    stored, online = of("stored"), of("online")
    assert len(stored) == len(online) == 20 and stored[-1] < 0.5 * stored[0]
    assert stored[0] == pytest.approx(online[0], rel=2e-3)
    np.testing.assert_allclose(stored, online, rtol=0.03)  # each goes its own way from there
    summary = json.loads((learnt / "summary.json").read_text())
    assert list(summary["stages"]) == ["start", "teacher", "online", "topk", "stored"]


@pytest.mark.slow
def test_a_store_is_of_the_size_that_was_said(learnt):
    store = logits.Store(
        learnt / "data/topk/a", vocabulary=header(learnt)["vocabulary"], num_documents=24
    )
    places = [len(store.read(i)[0]) for i in range(24)]
    size = sum(path.stat().st_size for path in (learnt / "data/topk/a").iterdir())
    assert logits.estimate_bytes(store.header, places) == pytest.approx(size, rel=0.05)
    ids_TK, logprobs_TK = store.read(3)
    assert (np.sort(ids_TK, -1) == np.arange(261)).all()
    assert np.exp(np.float32(logprobs_TK)).sum(-1) == pytest.approx(1, rel=0.01)


def header(workdir) -> dict:
    return json.loads((workdir / "data/topk/a/header.json").read_text())


@pytest.mark.slow
def test_a_killed_stage_goes_on_without_gaps_or_duplicates(learnt, tmp_path, monkeypatch):
    """It dies in its third part, with a hidden file left; what is there is not written again."""
    teacher = f"--config.stages.topk.init.from={learnt}@teacher"
    written, write_part = [], logits._write_part

    def dying(directory, part, *rest):
        written.append(part)
        if len(written) == 3:
            (directory / f".part-{part:05d}.array_record").write_bytes(b"cut off")
            raise KeyboardInterrupt
        write_part(directory, part, *rest)

    monkeypatch.setattr(logits, "_write_part", dying)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", teacher, arg="topk")
    assert len(list((tmp_path / "run/data/topk/a").glob("part-*.array_record"))) == 2
    assert run(tmp_path / "run", teacher, arg="topk") == 0
    assert written == [0, 1, 2, 2, 3, 4]
    found, wanted = files(tmp_path / "run"), files(learnt)
    assert found.keys() == wanted.keys()
    for name in found.keys() - {"header.json"}:
        assert found[name] == wanted[name], name
    monkeypatch.setattr(logits, "_write_part", lambda *_: pytest.fail("written again"))
    assert run(tmp_path / "run", teacher, arg="topk") == 0


@pytest.mark.parametrize(
    "flag, says",
    [
        (
            "train.distill.temperature=1.0",
            r"temperature is 1\.0, and stages\.topk\.temperature 1\.3",
        ),
        ("data.truncation=drop", r"data\.truncation is 'drop', not 'error': stages\.topk"),
        ("data.sources.a.rendering=short_cot", r"data\.sources differ: stages\.topk"),
    ],
)
def test_a_store_that_will_be_of_something_else_is_refused_at_once(flag, says, tmp_path, capsys):
    assert run(tmp_path / "run", f"--config.stages.stored.{flag}") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(rf"stages\.stored\.\S*{says}", said), said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_store_at_another_temperature_is_refused(learnt, tmp_path, capsys):
    """One of another run, too, before anything is trained."""
    flags = [f"--config.stages.stored.data.teacher={learnt}/data/topk",
             "--config.stages.stored.train.distill.temperature=1.0"]  # fmt: skip
    assert run(tmp_path / "run", *flags) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"stages\.stored: train\.distill\.temperature is 1\.0 and .* at 1\.3", said)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_teacher_of_other_tokens_is_refused(learnt, tmp_path, capsys):
    """By what its ids say; where no tokenizer lies beside it, by how many its head has."""
    words = "\n".join(json.dumps({"text": f"{n} plus {n * 7} is {n * 8}"}) for n in range(200))
    (tmp_path / "words.jsonl").write_text(words)
    teacher = "--config.stages.online.train.teacher.from="
    other = ["--config.tokenizer.kind=sentencepiece", "--config.tokenizer.vocab_size=284",
             "--config.model.vocab_size=288",
             f"--config.tokenizer.path={tmp_path / 'words.jsonl'}"]  # fmt: skip
    small = shutil.copytree(learnt, tmp_path / "small")
    shutil.rmtree(small / "tokenizer")
    saved = json.loads((small / "config.json").read_text())
    saved["architecture"]["vocab_size"] = 200
    (small / "config.json").write_text(json.dumps(saved))
    for start, flags, says in (
        (learnt, other, r"other tokens than this run's \(id 0 is '.*' there and '.*' here\)"),
        (small, [], r"whose head has 200 tokens and this run's tokenizer 261"),
    ):
        assert run(tmp_path / "run", f"{teacher}{start}@teacher", *flags) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(rf"train\.teacher\.from is .*{says}", said), said
        assert not (tmp_path / "run/checkpoints").exists()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)


@pytest.mark.slow
def test_ids_that_are_no_tokens_are_refused(learnt):
    store = logits.Store(
        learnt / "data/topk/a", vocabulary=header(learnt)["vocabulary"], num_documents=24,
        num_tokens=200,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has ids from 0 to 260; the vocabulary has 200 tokens"):
        store.read(0)


# --- the plan -------------------------------------------------------------------------------------


def plan(**changes):
    config = launch.load_config(f"{CONFIG}:")
    for key, value in changes.items():
        launch.override(config, f"stages.topk.{key}", value)
    return topk.plan(config, "topk", config.stages.topk)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("k", "0", "k is 0; it must be 1 or more"),
        ("rows", "0", "rows is 0; it must be 1"),
        ("temperature", "0.0", "temperature is 0.0; it must be above 0"),
        ("init.from", "", r"init\.from is ''; it must name the teacher"),
        ("init.from", "random", r"init\.from is 'random'; a teacher is a model that was trained"),
        ("data.teacher", "@x", r"data\.teacher is '@x'; this stage writes a store"),
    ],
)
def test_what_cannot_run_is_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        plan(**{key: value})


def test_a_store_is_ordered_before_its_student_and_looked_for_among_its_kind():
    config = launch.load_config(f"{CONFIG}:")
    assert [s.name for s in stages_of(config)].index("topk") == 3
    launch.override(config, "stages.stored.data.teacher", "@teacher")
    with pytest.raises(ValueError, match=r"stages\.stored\.data\.teacher is '@teacher'; .*: topk"):
        stages_of(config)


def test_every_key_has_a_default():
    section = ConfigDict(defaults.topk_config())
    assert section.k == 64 and section.data.truncation == "error"
