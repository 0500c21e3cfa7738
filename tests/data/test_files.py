"""Files of records: what is read, what is quarantined, what a user is told."""

import gzip
import json
import os
import pickle
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxreason.data import files
from jaxreason.data.files import JsonlSource

GOOD = [{"q": "one é", "a": "1"}, {"q": "two", "a": 2}, {"q": "three", "a": 3.5, "more": [1]}]
BAD = [
    (b'{"q": "cut', "not JSON"),
    (b'["q", "a"]', "not a JSON object but list"),
    (b'{"q": "no answer"}', "field 'a' is missing"),
    (b'{"q": "x", "a": ["1"]}', "field 'a' is list"),
    (b'{"q": "x", "a": true}', "field 'a' is bool"),
    (b'{"q": "x", "a": null}', "field 'a' is NoneType"),
    (b'{"q": "\\ud800", "a": "1"}', "half of a surrogate pair"),
    (b'{"q": "\xff", "a": "1"}', "not JSON"),
    (b'{"a":' * 100_000, "not JSON"),
]
FIELDS = {"q": "", "a": ""}
KEY = "data.sources.x.path"


def mixed_lines():
    """Good, bad, good, bad, ... with a blank line, and the 1-based numbers of the good ones."""
    lines, good_at = [b"   "], []
    good = [json.dumps(record, ensure_ascii=False).encode() for record in GOOD]
    for number, (line, _) in enumerate(BAD):
        lines.append(line)
        if number < len(good):
            lines.append(good[number])
            good_at.append(len(lines))
    return lines, good_at


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_malformed_lines_are_quarantined_counted_and_skipped(tmp_path, suffix):
    lines, good_at = mixed_lines()
    path, data_dir = tmp_path / f"a{suffix}", tmp_path / "data"
    with (gzip.open if suffix.endswith("gz") else open)(path, "wb") as out:
        out.write(b"\n".join(lines))  # without a last line break
    for _ in range(2):  # the second time from the cached index, and nothing is listed twice
        source = JsonlSource(str(path), fields=FIELDS, data_dir=data_dir)
        assert [source[i] for i in range(len(source))] == GOOD
        assert [source.line(i) for i in range(3)] == [f"{path} line {n}" for n in good_at]
        assert source.num_quarantined == len(BAD)
        entries = [json.loads(line) for line in open(data_dir / "quarantine.jsonl")]
        assert len(entries) == len(BAD)
        for entry, (line, reason) in zip(entries, BAD):
            assert entry["file"] == str(path)
            assert lines[entry["line"] - 1] == line
            assert reason in entry["reason"]
            assert entry["text"] == line.decode(errors="replace")[:200]
    assert source[-1] == GOOD[-1]
    with pytest.raises(IndexError):
        source[3]


def test_index_is_read_again_only_when_the_file_or_the_fields_change(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "one", "a": "1"}\n')
    read = []
    find = files._examine
    monkeypatch.setattr(files, "_examine", lambda *a: read.append(a) or find(*a))

    def num_read(fields):
        read.clear()
        JsonlSource(str(path), fields=fields, data_dir=tmp_path)
        return len(read)

    assert num_read(FIELDS) == 1
    assert num_read(FIELDS) == 0
    assert num_read({"q": ""}) == 1
    path.write_text('{"q": "one", "a": "1"}\n{"q": "two", "a": "2"}\n')
    assert num_read(FIELDS) == 2
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert num_read(FIELDS) == 2


def test_several_files_patterns_and_pickle(tmp_path, monkeypatch):
    for name, values in (("a-1", [0, 1]), ("a-2", [2]), ("b", [3, 4])):
        text = "".join(json.dumps({"q": n}) + "\n" for n in values)
        (tmp_path / f"{name}.jsonl").write_text(text)
    paths = [str(tmp_path / "b.jsonl"), str(tmp_path / "a-*.jsonl")]
    source = JsonlSource(paths, fields={"q": ""}, data_dir=tmp_path / "data")
    values = [source[i]["q"] for i in range(len(source))]
    assert values == [3, 4, 0, 1, 2]
    copy = pickle.loads(pickle.dumps(source))
    assert [record["q"] for record in copy] == values
    # A relative path is looked for here first, then in the data root.
    monkeypatch.setenv("JAXREASON_DATA", str(tmp_path))
    assert len(JsonlSource("a-*.jsonl", fields={"q": ""}, data_dir=tmp_path / "data")) == 3
    elsewhere = tmp_path / "here"
    elsewhere.mkdir()
    (elsewhere / "b.jsonl").write_text('{"q": "here"}\n')
    monkeypatch.chdir(elsewhere)
    assert JsonlSource("b.jsonl", fields={"q": ""}, data_dir=tmp_path / "data")[0]["q"] == "here"


def write(path, content):
    path.write_bytes(content)
    return path.name


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda d: "missing.jsonl", "data.sources.x.path is 'missing.jsonl'; no such file"),
        (lambda d: write(d / "a.json", b"{}"), "it must be .jsonl, .jsonl.gz, .parquet files"),
        (lambda d: write(d / "bad.jsonl", b"{\n[1]\n"), "no valid record (2 malformed"),
        (lambda d: write(d / "z.jsonl.gz", b"no gzip"), "no complete gzip file"),
        (
            lambda d: write(d / "y.jsonl.gz", gzip.compress(b'{"q": 1}\n' * 9)[:-9]),
            "no complete gzip file",
        ),
        (
            lambda d: write(d / "s.jsonl", b'{"a": 1, "b": 2}\n{"q": 1}'),
            "s.jsonl; its records have no field 'q', the first has a, b",
        ),
        (lambda d: write(d / "p.parquet", b"PAR1"), "p.parquet; it cannot be read as Parquet"),
        (lambda d: "@pruned", "'@pruned'; no file {d}/d/pruned.jsonl: an earlier stage"),
    ],
)
def test_mistakes_in_files_are_one_line(tmp_path, monkeypatch, make, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        JsonlSource(make(tmp_path), fields={"q": "x"}, data_dir=tmp_path / "d", key=KEY)
    assert says.replace("{d}", str(tmp_path)) in str(error.value)
    assert KEY in str(error.value)
    assert "\n" not in str(error.value)


def test_a_stage_of_the_run_names_its_file(tmp_path):
    (tmp_path / "pruned.jsonl").write_text('{"q": "made"}\n')
    assert JsonlSource("@pruned", fields={"q": ""}, data_dir=tmp_path)[0] == {"q": "made"}


# --------------------------------------------------------------------------------------- Parquet


def parquet_file(path, rows=10, group=3, **columns):
    """Rows q, t, l = [structs] and one that nothing needs; row 4's text is null."""
    table = {
        "q": [None if n == 4 else f"é{n}" for n in range(rows)],
        "n": list(range(rows)),
        "l": [[{"a": f"{n}.{i}"} for i in range(n % 3)] for n in range(rows)],
        "bytes": [b"\xff"] * rows,
        **columns,
    }
    parquet.write_table(pa.table(table), path, row_group_size=group)
    return str(path)


class Rule(files.Fields):
    """Fields, and lists of structs beside them."""

    def columns(self):
        return [name for name, _ in self.fields], ["l", "absent"]


def test_parquet_rows_come_as_the_records_they_are(tmp_path):
    path = parquet_file(tmp_path / "a.parquet")
    rule = Rule((("q", ""), ("n", "")))
    for _ in range(2):  # written, then read again
        source = JsonlSource(path, fields=rule, data_dir=tmp_path / "d")
        rows = [n for n in range(10) if n != 4]
        expected = [
            {"q": f"é{n}", "n": n, "l": [{"a": f"{n}.{i}"} for i in range(n % 3)]} for n in rows
        ]
        assert [source[i] for i in range(len(source))] == expected  # no column it does not need
        assert source.line(4) == f"{path} row 6" and source.num_quarantined == 1
    (entry,) = [json.loads(line) for line in open(tmp_path / "d" / "quarantine.jsonl")]
    assert (entry["file"], entry["row"]) == (path, 5) and "NoneType" in entry["reason"]


def test_parquet_is_read_a_batch_at_a_time(tmp_path, monkeypatch):
    """Nothing is loaded whole: no more than a batch is in memory."""
    path = parquet_file(tmp_path / "a.parquet", rows=50, group=50)
    monkeypatch.setattr(files, "_BATCH", 7)
    sizes, to_pylist = [], pa.RecordBatch.to_pylist
    iter_batches = parquet.ParquetFile.iter_batches

    def watched(self, *args, **kwargs):
        for batch in iter_batches(self, *args, **kwargs):
            sizes.append((len(to_pylist(batch)), batch.schema.names))
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", watched)
    monkeypatch.delattr(parquet.ParquetFile, "read")
    assert len(JsonlSource(path, fields={"q": "", "n": ""}, data_dir=tmp_path / "d")) == 49
    assert sizes == [(7, ["q", "n"])] * 7 + [(1, ["q", "n"])]


def test_mistakes_in_parquet_are_one_line(tmp_path, monkeypatch):
    path = parquet_file(tmp_path / "a.parquet")

    def says(fields):
        with pytest.raises(ValueError) as error:
            JsonlSource(path, fields=fields, data_dir=tmp_path / "d", key=KEY)
        assert "\n" not in str(error.value)
        return str(error.value)

    missing = f"{KEY} matches {path}; it has no column 'problem', its columns are q, n, l, bytes"
    assert says({"q": "", "problem": ""}) == missing
    assert "a needed column holds bytes" in says({"bytes": ""})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in says({"n": ""})
    assert not list((tmp_path / "d").glob(".*"))  # nothing half-written is left
