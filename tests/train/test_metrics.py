"""metrics.jsonl is the truth; TensorBoard follows it; the terminal gets plain lines."""

import io
import json
import struct

import rich.console
from tensorboardX.proto.event_pb2 import Event

from jaxreason.report.summary import read_metrics
from jaxreason.train.metrics import MetricsWriter, Progress


def fill(workdir):
    writer = MetricsWriter(workdir)
    for step in range(1, 5):
        writer.write("pretrain", step, {"loss": 5.0 - step, "grad_norm": 0.5})
    writer.write("pretrain.validation", 4, {"eval/books/bits_per_byte": 2.5})
    writer.write("sft", 1, {"loss": 0.25})
    return writer


def logged(workdir):
    return [(record["stage"], record["step"]) for record in read_metrics(workdir)]


def scalars(workdir):
    """{(tag, step): value} of all event files: length, its checksum, event, its checksum."""
    found = {}
    for path in (workdir / "tensorboard").glob("events*"):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found.update({(v.tag, event.step): v.simple_value for v in event.summary.value})
            at += size + 16
    return found


def test_a_line_holds_stage_step_time_and_the_values(tmp_path):
    fill(tmp_path).close()
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert list(first) == ["stage", "step", "time", "loss", "grad_norm"]
    assert (first["stage"], first["step"], first["loss"]) == ("pretrain", 1, 4.0)


def test_cut_forgets_later_steps_of_one_stage_in_both_places(tmp_path):
    writer = fill(tmp_path)
    writer.cut("pretrain", 2)
    writer.write("pretrain", 3, {"loss": 9.0})
    writer.close()
    want = [("pretrain", 1), ("pretrain", 2), ("pretrain.validation", 4), ("sft", 1),
            ("pretrain", 3)]  # fmt: skip
    assert logged(tmp_path) == want
    board = scalars(tmp_path)
    assert board == {
        ("pretrain/loss", 1): 4.0,
        ("pretrain/loss", 2): 3.0,
        ("pretrain/loss", 3): 9.0,
        ("pretrain/grad_norm", 1): 0.5,
        ("pretrain/grad_norm", 2): 0.5,
        ("pretrain.validation/eval/books/bits_per_byte", 4): 2.5,
        ("sft/loss", 1): 0.25,
    }


def test_a_half_written_last_line_is_dropped(tmp_path):
    fill(tmp_path).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "sft", "step": 2, "lo')
    writer = MetricsWriter(tmp_path)
    writer.write("sft", 2, {"loss": 0.125})
    writer.close()
    assert logged(tmp_path)[-2:] == [("sft", 1), ("sft", 2)]
    assert scalars(tmp_path)["sft/loss", 2] == 0.125


def test_a_writer_that_is_not_closed_loses_nothing(tmp_path):
    """As after kill -9: every line is on the disk when `write` returns."""
    writer = fill(tmp_path)
    assert len(logged(tmp_path)) == 6
    writer.close()


def test_progress_off_a_terminal_is_plain_lines():
    output = io.StringIO()
    progress = Progress(rich.console.Console(file=output, force_terminal=False, width=40))
    progress.start("sft", total=10, done=4)
    progress.update(7, "loss 0.5000  1,000 tokens/s")
    progress.say("[b]sft[/b]: a line longer than the forty columns of this console stays one line")
    progress.stop()
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("sft 7/10  loss 0.5000  1,000 tokens/s") and "s left" in lines[0]
    assert lines[1].startswith("[b]sft[/b]") and len(lines) == 2
