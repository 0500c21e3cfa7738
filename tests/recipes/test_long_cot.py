"""The arms of configs/long_cot.py: the paper's numbers, and one of them on OpenR1 in small."""

import json

import pyarrow as pa
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from pyarrow import parquet
from traces_config import MODEL

from jaxreason import launch
from jaxreason.recipes import defaults, pipeline
from jaxreason.report.summary import read_lines


@pytest.fixture(autouse=True)
def scene(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("JAXREASON_DATA", str(tmp_path))
    monkeypatch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)


@pytest.mark.parametrize(
    "num, epochs, batch, steps",
    [(8_000, 4, 8, 4_000), (220_000, 2, 128, 3_438), (1_000, 5, 16, 313), (3, 0.5, 8, 1)],
)
def test_updates_show_every_example_as_often_as_asked(num, epochs, batch, steps):
    assert defaults.updates(num, epochs, batch) == steps
    assert (steps - 1) * batch < num * epochs <= steps * batch


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, -8)])
def test_updates_of_nothing_are_refused(numbers):
    with pytest.raises(ValueError, match=r"is (0|-8); it must be above 0"):
        defaults.updates(*numbers)


@pytest.mark.parametrize(
    "arm, limit, batch, steps",
    [
        ("8k", 8_000, 8, 4_000), ("16k", 16_000, 16, 4_000), ("", 32_000, 32, 4_000),
        ("64k", 64_000, 64, 3_000), ("128k", 128_000, 128, 3_000), ("220k", 0, 128, 3_438),
        ("8k-large-batch", 8_000, 128, 250), ("curated", 1_000, 16, 313),
    ],
)  # fmt: skip
def test_an_arm_has_the_numbers_of_its_paper(arm, limit, batch, steps):
    c = launch.load_config(f"long_cot:{arm}")
    sft, subset = c.stages.sft, c.stages.subset
    assert (subset.limit, sft.data.examples_per_batch, sft.train.steps) == (limit, batch, steps)
    assert subset.quality.max_tokens == sft.data.length == 16_384
    optimizer = sft.train.optimizer
    assert optimizer.learning_rate == (1e-5 if arm == "curated" else 5e-5)
    assert optimizer.warmup_steps == round(0.05 * steps) and optimizer.final_scale == 0
    # Rows take any update of small batches, and divide over eight devices.
    assert sft.data.rows >= min(batch, 32) and sft.data.rows % (8 * c.mesh.microbatches) == 0


def think(reasoning):
    return f"<think>\n{reasoning}\n</think>\n\nIt is \\boxed{{7}}."


def openr1(folder) -> None:
    """Problem i has a wrong trace and a right one of i words; of the last both are cut off."""
    columns = {
        "problem": [f"Problem {i}" for i in range(20)],
        "answer": ["7"] * 20,
        "problem_type": ["Algebra" if i % 2 else "Geometry" for i in range(20)],
        "generations": [[think("no"), think("so " * (i + 1))] for i in range(20)],
        "correctness_math_verify": [[False, True]] * 20,
        "correctness_llama": [None] * 20,
        "is_reasoning_complete": [[True, i < 19] for i in range(20)],
    }
    columns["generations"][18][1] = "<think>\nwithout an end"
    folder.mkdir()
    parquet.write_table(pa.table(columns), folder / "train-00000.parquet")


def small(arm: str) -> ConfigDict:
    """The arm with a model of one layer that reads bytes; two updates."""
    c = launch.load_config(f"long_cot:{arm}")
    c.tokenizer.kind, c.chat.template = "bytes", "qwen3"
    c.model = defaults.model_config("qwen3-tiny", **MODEL)
    c.arithmetic.num_test = 1
    c.mesh.update(microbatches=1, remat="none")
    c.stages.sft.init["from"] = "random"
    c.stages.sft.data.update(rows=8, examples_per_batch=8, length=320)
    c.stages.sft.train.steps = 2
    c.stages.sft.train.optimizer.warmup_steps = 1
    c.eval.sets, c.run.export = {}, False
    return c


def test_an_arm_trains_on_one_right_trace_a_problem_and_counts_the_rest(tmp_path):
    openr1(tmp_path / "openr1")
    c = small("8k")
    c.stages.subset.limit, c.stages.subset.quality.max_tokens = 10, 42  # 14 words and "\n"s
    pipeline.run(c, tmp_path / "run")
    marker = json.loads((tmp_path / "run/stages/subset.json").read_text())
    assert marker["traces"] == 18 and marker["kept"] == 10
    assert marker["dropped"] == {"not drawn": 18 - 10 - 4, "too long": 4}
    # Of every problem its wrong trace is filtered, of the last the one that was cut off too.
    assert marker["filtered"] == 21 and marker["quarantined"] == 1
    (quarantined,) = read_lines(tmp_path / "run/data/quarantine.jsonl")
    assert quarantined["row"] == 19
    kept = read_lines(tmp_path / "run/data/subset.jsonl")
    assert all(one["reasoning"].split() == ["so"] * len(one["reasoning"].split()) for one in kept)
    assert kept[0]["question"].startswith("Problem ") and "\\boxed{}." in kept[0]["question"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["stages"]["sft"]["examples"] == 16  # 8 an update, exactly


def test_a_curated_thousand_reads_what_parquet_has_beside_the_trace(tmp_path):
    openr1(tmp_path / "openr1")
    (tmp_path / "math500").mkdir()
    (tmp_path / "math500/test.jsonl").write_text('{"problem": "Another problem altogether"}\n')
    c = small("curated")
    c.stages = {"subset": c.stages.subset}
    c.stages.subset.update(limit=6, solvers=())
    c.stages.subset.deduplicate.threshold = 0.0  # these are alike on purpose
    pipeline.run(c, tmp_path / "run")
    kept = read_lines(tmp_path / "run/data/subset.jsonl")
    assert len(kept) == 6 and {one["domain"] for one in kept} == {"Algebra", "Geometry"}
    assert {one["answer"] for one in kept} == {"7"}


@pytest.mark.parametrize(
    "arm, says",
    [
        (
            "8k",
            r"stages\.subset: data\.sources\.openr1\.path is 'openr1/\*\.parquet'; no such file",
        ),
        ("s1k", r"stages\.sft: data\.sources\.s1k\.path is 's1k/\*\.parquet'; no such file"),
    ],
)
def test_a_file_that_is_not_there_is_one_line(tmp_path, arm, says):
    with pytest.raises(ValueError, match=says) as error:
        pipeline.run(small(arm), tmp_path / "run")
    assert "\n" not in str(error.value) and not (tmp_path / "run/metrics.jsonl").exists()
