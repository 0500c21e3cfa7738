"""The top-k store: written by several processes, killed, resumed, and read back exactly."""

import json
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from jaxreason.data import logits
from jaxreason.data.logits import Header, Store, estimate_bytes, write

ROOT = pathlib.Path(__file__).resolve().parents[2]
K = 16


def documents(count=100, seed=0):
    """Of 0 to 200 ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 5000, size).astype(np.int32) for size in rng.integers(0, 201, count)]


def score(ids_T):
    """Something that depends on all the ids before a place, as a model's log-probs do."""
    state_T = np.cumsum(ids_T[:-1], dtype=np.int64)[:, None]
    ids_TK = (state_T + np.arange(K)) % 151_936
    return ids_TK, -np.log1p((state_T * 31 + np.arange(K)) % 97).astype(np.float32)


def each(score):
    """As `write` asks: of some documents at once."""
    return lambda found: map(score, found)


def header(**changes):
    shape = dict(vocabulary="v" * 64, source="data.sources.x", k=K, chunk=32, part_documents=16)
    return Header(**{**shape, **changes})


def assert_holds(directory, expected):
    store = Store(directory, vocabulary="v" * 64, num_documents=len(expected))
    order = np.random.default_rng(1).permutation(len(expected))
    for index in order:
        ids_T = expected[index]
        store.check(index, ids_T)
        ids_TK, logprobs_TK = store.read(index)
        want_ids, want_logprobs = score(ids_T) if len(ids_T) > 1 else (np.zeros((0, K)),) * 2
        assert ids_TK.dtype == np.int32 and logprobs_TK.dtype == ml_dtypes.bfloat16
        assert np.array_equal(ids_TK, want_ids)
        assert np.array_equal(logprobs_TK, want_logprobs.astype(ml_dtypes.bfloat16))
    return store


def size_of(directory):
    return sum(path.stat().st_size for path in directory.iterdir())


WRITER = """
import os, sys, time
sys.path[:0] = [{tests!r}]
import test_logits as t
from jaxreason.data.logits import write
process, pause = int(sys.argv[1]), float(sys.argv[2])
def score(ids_T):
    time.sleep(pause)
    return t.score(ids_T)
write({directory!r}, t.documents(), t.each(score), t.header(), process=process, processes=2,
      say=lambda text: print(text, flush=True),
      progress=lambda done, own: print(done, "of", own, flush=True))
"""


def test_two_processes_write_and_one_is_killed(tmp_path):
    directory = tmp_path / "store"
    code = WRITER.format(tests=str(ROOT / "tests" / "data"), directory=str(directory))

    def start(process, pause):
        command = [sys.executable, "-c", code, str(process), str(pause)]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    first, killed = start(0, 0.0), start(1, 0.05)
    said = [killed.stdout.readline() for _ in range(2)]  # the estimate, and a part that is whole
    assert said[1] == "16 of 48\n"
    deadline = time.monotonic() + 120
    while not list(directory.glob(".part-00003.*")):  # hidden until it is whole
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert first.wait() == 0
    names = {path.name for path in directory.glob("part-*.array_record")}
    assert names == {f"part-{part:05d}.array_record" for part in (0, 1, 2, 4, 6)}
    with pytest.raises(ValueError, match=r"lacks 2 of 7 parts \(part 3 is the first\); run its"):
        Store(directory, vocabulary="v" * 64, num_documents=100)
    kept = {path.name: path.stat().st_mtime_ns for path in directory.glob("part-*")}
    again = start(1, 0.0)
    assert again.wait() == 0
    expected = documents()
    store = assert_holds(directory, expected)
    tokens = sum(max(len(ids) - 1, 0) for ids in expected)
    assert (store.header.documents, store.header.tokens) == (100, tokens)
    for name, changed in kept.items():  # what was whole was not written again
        assert (directory / name).stat().st_mtime_ns == changed
    assert not list(directory.glob(".*"))
    # The size that was said first, and the one that came.
    estimate = float(said[0].split(": ")[1].split(" GB")[0]) * 1e9
    exact = estimate_bytes(store.header, [max(len(ids) - 1, 0) for ids in expected])
    assert abs(exact - estimate) < 1e6  # it is said in GB to three places
    assert exact == pytest.approx(size_of(directory), rel=0.05)


@pytest.mark.parametrize(
    ("k", "chunk", "part_documents", "count"), [(4, 256, 8, 40), (64, 64, 64, 40), (64, 8, 7, 30)]
)
def test_the_size_is_known_before(tmp_path, k, chunk, part_documents, count):
    own = header(k=k, chunk=chunk, part_documents=part_documents)
    found = documents(count, seed=2)
    few = lambda ids_T: tuple(np.tile(x_TK[:, :1], (1, k)) for x_TK in score(ids_T))
    made = write(tmp_path / "s", found, each(few), own)
    estimate = estimate_bytes(made, [max(len(ids) - 1, 0) for ids in found])
    assert estimate == pytest.approx(size_of(tmp_path / "s"), rel=0.05)


def test_records_are_of_one_size_and_not_compressed(tmp_path):
    from array_record.python import array_record_module

    write(tmp_path / "s", documents(20), each(score), header())
    reader = array_record_module.ArrayRecordReader(str(tmp_path / "s" / "part-00000.array_record"))
    records = reader.read_all()
    assert {len(record) for record in records} == {32 * K * 6}
    first = documents(20)[0]
    data = (tmp_path / "s" / "part-00000.array_record").read_bytes()
    assert score(first)[0].astype(np.int32)[:8].tobytes() in data  # as it is, on the disk


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    said = []
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(logits.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError) as error:
        write(tmp_path / "s", documents(), each(score), header(), say=said.append)
    assert "GB and the disk has 0.000 GB; lower k, take fewer" in str(error.value)
    assert "\n" not in str(error.value) and len(said) == 1
    assert not list((tmp_path / "s").glob("part-*"))
    assert "top 16 for 100 documents" in said[0] and "data.sources.x" in said[0]


def test_what_is_not_the_same_is_one_line(tmp_path):
    found = documents(20)
    write(tmp_path / "s", found, each(score), header())

    def says(action):
        with pytest.raises(ValueError) as error:
            action()
        assert "\n" not in str(error.value)
        return str(error.value)

    opened = lambda **more: Store(
        tmp_path / "s", **{**dict(vocabulary="v" * 64, num_documents=20), **more}
    )
    assert "is of another vocabulary (fingerprint vvvvvvvvvvvv" in says(
        lambda: opened(vocabulary="w" * 64)
    )
    assert "is of 20 documents (data.sources.x), the source has 21" in says(
        lambda: opened(num_documents=21)
    )
    changed = found[3].copy()
    changed[5] += 1
    assert "document 3 has other tokens" in says(lambda: opened().check(3, changed))
    assert "no store in" in says(lambda: Store(tmp_path, vocabulary="v", num_documents=1))
    for change, text in (
        (dict(k=8), "k is 16, not 8"),
        (dict(vocabulary="w"), "vocabulary is 'vvvv"),
        (dict(temperature=2.0), "temperature is 1.0, not 2.0"),
        (dict(source="data.sources.y"), "source is 'data.sources.x', not 'data.sources.y'"),
    ):
        assert text in says(lambda: write(tmp_path / "s", found, each(score), header(**change)))
    assert "documents is 20, not 19" in says(
        lambda: write(tmp_path / "s", found[1:], each(score), header())
    )
    assert "k is 0" in says(lambda: header(k=0))
    bad = {
        "have shapes": lambda ids_T: tuple(x_TK[1:] for x_TK in score(ids_T)),
        "are not all 0 or less": lambda ids_T: (score(ids_T)[0], score(ids_T)[1] * np.nan),
    }
    for text, wrong in bad.items():
        assert text in says(lambda: write(tmp_path / text, found, each(wrong), header()))


def test_a_store_travels_and_closes_what_it_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(logits, "_OPEN", 2)
    write(tmp_path / "s", documents(), each(score), header())
    store = assert_holds(tmp_path / "s", documents())
    assert len(store._readers) == 2
    copy = pickle.loads(pickle.dumps(store))
    assert np.array_equal(copy.read(5)[0], store.read(5)[0])
    assert json.loads((tmp_path / "s" / "header.json").read_text())["k"] == K
