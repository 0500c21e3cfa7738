"""Mistakes in what was asked: one clear line, exit code 2, before anything is compiled."""

import dataclasses
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from jaxreason import launch

# A fine-tuning run of 20,000 parameters on question and answer records.
CONFIG = """
from jaxreason.recipes import defaults

def get_config(arg=""):
    c = defaults.default_config("tiny", "fit")
    c.update(defaults.stage_config())
    c.model = defaults.model_config(
        "qwen3-tiny", vocab_size=261, num_layers=1, embed_dim=32, mlp_dim=32, num_heads=2,
        num_kv_heads=1, head_dim=16,
    )
    c.data.sources = {"pairs": defaults.source(
        name="pairs", path="pairs.jsonl", prompt_field="question", response_field="answer",
    )}
    c.data.update(rows=8, length=64)
    c.train.steps = 2
    c.log.every = 1
    c.run.export = False
    return c
"""
LINES = [
    '{"question": "1+1", "answer": "2"}',
    '{"question": "2+2", "answer": 4}',
    '{"question": "3+3", "answer": "6"',  # line 3: the brace is missing
    '{"question": "4+4"}',  # line 4: no answer
    '{"question": "5+5", "answer": "10"}',
]


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder with the tiny config, its records, and a run that was made there."""

    path: pathlib.Path

    def command(self, *flags: str, workdir: str = "new") -> list[str]:
        return [f"--config={self.path / 'tiny.py'}", f"--workdir={self.path / workdir}", *flags]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Place:
    path = tmp_path_factory.mktemp("mistakes")
    (path / "tiny.py").write_text(CONFIG)
    misspelt = CONFIG.replace(
        "    return c", "    c.data.sources.pairs.promt_field = 'q'\n    return c"
    )
    (path / "misspelt.py").write_text(misspelt)
    beat = "    c.run.processes = {**c.run.processes.to_dict(), 'heartbeet': 9}\n    return c"
    (path / "heartbeet.py").write_text(CONFIG.replace("    return c", beat))
    (path / "pairs.jsonl").write_text("\n".join(LINES) + "\n")
    (path / "a_file").write_text("")
    place = Place(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        assert launch.main(place.command(workdir="trained")) == 0
    return place


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch):
    monkeypatch.chdir(place.path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass(frozen=True)
class Mistake:
    flags: Callable[[Place], list[str]]
    says: tuple[str, ...]  # the thing, the value, what would be right


MISTAKES = {
    "unknown key": Mistake(
        lambda p: p.command("--config.train.stepz=3"),
        ("--config.train.stepz", "did you mean 'steps'?"),
    ),
    "a key of the config file that nothing reads": Mistake(
        lambda p: [f"--config={p.path / 'misspelt.py'}"],
        ("config.data.sources.pairs has a key 'promt_field'", "did you mean 'prompt_field'?"),
    ),
    "a key that only several processes would read": Mistake(
        lambda p: [f"--config={p.path / 'heartbeet.py'}"],
        ("config.run.processes has a key 'heartbeet'", "did you mean 'heartbeat'?"),
    ),
    "a heartbeat that would end healthy processes": Mistake(
        lambda p: p.command("--config.run.processes.heartbeat=-5"),
        ("run.processes.heartbeat is -5", "at least 1"),
    ),
    "wrong type": Mistake(
        lambda p: p.command("--config.train.steps=many"),
        ("--config.train.steps=many", "it must be a whole number"),
    ),
    "missing data file": Mistake(
        lambda p: p.command("--config.data.sources.pairs.path=nowhere.jsonl"),
        ("data.sources.pairs.path", "'nowhere.jsonl'", "no such file", "JAXREASON_DATA"),
    ),
    "batch not divisible": Mistake(
        lambda p: p.command("--config.data.num_shards=3"),
        ("data.rows = 8", "not a multiple of data.num_shards = 3"),
    ),
    "vocabulary smaller than the tokenizer": Mistake(
        lambda p: p.command("--config.model.vocab_size=256"),
        ("model.vocab_size = 256", "the tokenizer's 261 entries"),
    ),
    "too long example": Mistake(
        lambda p: p.command("--config.data.length=16"),
        ("data.sources.pairs", "pairs.jsonl line 1", "data.length is 16", "keep_start"),
    ),
    "unknown preset": Mistake(
        lambda p: p.command("--config.model.preset=qwen3-9b"),
        ("model.preset", "'qwen3-9b'", "qwen3-8b"),
    ),
    "workdir of another config": Mistake(
        lambda p: p.command("--config.seed=7", workdir="trained"),
        ("trained", "seed = 0", "now it is 7", "another workdir"),
    ),
    "workdir below a regular file": Mistake(
        lambda p: p.command(workdir="a_file/run"),
        ("--workdir=", "a_file/run", "is a file, not a folder"),
    ),
}


def assert_one_line(stderr: str, says: tuple[str, ...]) -> None:
    lines = stderr.splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    for part in says:
        assert part in lines[0]


def launched(flags: list[str], **environ: str) -> tuple[subprocess.CompletedProcess, float]:
    """What a process of its own says, and its CPU seconds."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"} | environ
    env["PYTHONPATH"] = str(pathlib.Path(launch.__file__).parent.parent)
    command = [sys.executable, "-m", "jaxreason.launch", *flags]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def mesh_flags(**sizes: int) -> list[str]:
    return [f"--config.mesh.shape.{axis}={size}" for axis, size in sizes.items()]


PROCESS_CONFIG = pathlib.Path(__file__).with_name("process_config.py")


@pytest.mark.parametrize("recipe", ["fit", "rl"])
@pytest.mark.parametrize("number", [0, -1])
def test_microbatches_below_one_are_one_line_and_exit_code_2(recipe, number, capsys):
    flags = [f"--config={PROCESS_CONFIG}:{recipe}", f"--config.mesh.microbatches={number}"]
    assert launch.main([*flags, "--workdir=new"]) == 2
    assert_one_line(capsys.readouterr().err, (f"mesh.microbatches is {number}", "at least 1"))


HEADS = [f"--config.model.{key}" for key in ("num_heads=3", "num_kv_heads=3", "vocab_size=264")]
ON_EIGHT_DEVICES = {
    "more devices than there are": Mistake(
        lambda p: p.command(*mesh_flags(data=9)),
        ("'data': 9", "needs 9 devices, but there are 8", "product is 8", "-1"),
    ),
    "an axis that does not divide the devices": Mistake(
        lambda p: p.command(*mesh_flags(tensor=3)),
        ("8 devices are not a multiple of 3", "data cannot take the rest", "can be 1, 2, 4, 8"),
    ),
    "a tensor axis over three heads": Mistake(
        lambda p: p.command(*mesh_flags(tensor=2), *HEADS),
        ("weight layers/w", "heads) = 3", "mesh axis tensor = 2", "it can be 1, 3"),
    ),
}


@pytest.mark.parametrize("name", ON_EIGHT_DEVICES)
def test_a_mesh_that_cannot_be_is_one_line_and_exit_code_2(name, place, capsys):
    mistake = ON_EIGHT_DEVICES[name]
    assert launch.main(mistake.flags(place)) == 2
    assert_one_line(capsys.readouterr().err, mistake.says)
    assert not (place.path / "new/checkpoints").exists()


def test_nine_devices_for_a_mesh_of_eight(place):
    done, _ = launched(place.command(*mesh_flags(data=4, tensor=2)), JAX_NUM_CPU_DEVICES="9")
    assert done.returncode == 2
    says = ("'tensor': 2", "needs 8 devices, but there are 9", "product is 9", "-1")
    assert_one_line(done.stderr, says)


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_and_exit_code_2(name, place, capsys):
    mistake = MISTAKES[name]
    assert launch.main(mistake.flags(place)) == 2
    assert_one_line(capsys.readouterr().err, mistake.says)


# The first needs no JAX to be found, the second is found last, with data, tokenizer and model made.
QUICK = ("unknown key", "too long example")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MISTAKES]
)
def test_mistake_is_found_within_10_seconds(name, place):
    """As a user meets it: a process of its own. CPU seconds, since the machine may be shared."""
    mistake = MISTAKES[name]
    done, seconds = launched(mistake.flags(place))
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, mistake.says)
    assert seconds < 10


def test_malformed_lines_are_quarantined_counted_and_left_out(place):
    workdir = place.path / "trained"
    quarantined = [json.loads(q) for q in (workdir / "data/quarantine.jsonl").open()]
    assert [(pathlib.Path(q["file"]).name, q["line"]) for q in quarantined] == [
        ("pairs.jsonl", 3),
        ("pairs.jsonl", 4),
    ]
    assert "not JSON" in quarantined[0]["reason"]
    assert "answer" in quarantined[1]["reason"]
    stage = json.loads((workdir / "summary.json").read_text())["stages"]["tiny"]
    assert (stage["quarantined"], stage["steps"]) == (2, 2)


def test_after_a_mistake_the_same_workdir_takes_the_right_command(place, capsys):
    """Nothing was trained yet, so nothing binds the workdir to what was asked first."""
    wrong = place.command("--config.model.vocab_size=256", workdir="second_try")
    assert launch.main(wrong) == 2
    assert launch.main(place.command(workdir="second_try")) == 0
    assert launch.main(wrong) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "model.vocab_size = 261, and now it is 256" in last
