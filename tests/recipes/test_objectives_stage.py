"""Every `train.objective` in a whole run: it learns, and a run that stopped ends bit-equal."""

import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_models import assert_trees_equal

from jaxreason.checkpoint.store import restore_params
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import LoraConfig
from jaxreason.recipes import assemble, defaults, pipeline
from jaxreason.report.summary import read_metrics

SHAPE = dict(
    vocab_size=264, num_layers=1, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8
)  # fmt: skip
LORA = {"rank": 2, "alpha": 4.0}
STEPS = 4
# Of adapters one that reads a reference, whose parameters are the adapters' base too.
CASES = {
    "step_by_step": {}, "distill": {}, "distill_topk": {}, "dpo": {"lora": LORA},
    "ipo": {}, "orpo": {}, "simpo": {}, "pruning": {},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "device_mesh", lambda mesh: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Records of sums, and a teacher of twice the student's width that has learnt two updates."""
    folder = tmp_path_factory.mktemp("objectives")
    records = [
        {"q": f"{n}+{n}=", "a": str(2 * n), "why": f"twice {n} is {2 * n}", "bad": str(n)}
        for n in range(100)
    ]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    teacher = config(folder, "lm")
    teacher.model.update(embed_dim=64)
    teacher.stages = {"base": teacher.stages.base}
    pipeline.run(teacher, folder / "teacher")
    return folder


def config(folder: pathlib.Path, objective: str, **train) -> ConfigDict:
    """Two updates of a language model, then STEPS of the objective from there."""
    c = defaults.default_config("objectives", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", **SHAPE)
    c.log.every = c.run.save_every = 1
    c.run.export = False
    c.stages = {"base": stage(folder, "lm", 2), "tuned": stage(folder, objective, STEPS)}
    c.stages.tuned.init["from"] = "@base"
    c.stages.tuned.train.lora.update(train.pop("lora", {}))
    c.stages.tuned.train.update(train)
    if objective == "distill":
        c.stages.tuned.train.teacher["from"] = f"{folder / 'teacher'}@base"
    if objective == "distill_topk":
        c.stages.topk = defaults.topk_config(k=8, part_documents=16, rows=4)
        c.stages.topk.init["from"] = f"{folder / 'teacher'}@base"
        c.stages.topk.data.update(sources=c.stages.tuned.data.sources, rows=4, length=64)
        c.stages.tuned.data.teacher = "@topk"
    return c


def stage(folder: pathlib.Path, objective: str, steps: int) -> ConfigDict:
    source = lambda name, **fields: defaults.source(
        name=name, path=str(folder / "sums.jsonl"), prompt_field="q", **fields
    )
    if objective == "step_by_step":
        sources = {
            "label": source("label", response_field="a", task="label"),
            "rationale": source("rationale", response_field="why", task="rationale"),
        }
    elif objective in ("lm", "distill", "distill_topk"):
        sources = {"sums": source("sums", response_field="a")}
    else:
        sources = {"pairs": source("pairs", chosen_field="a", rejected_field="bad")}
    section = ConfigDict(defaults.stage_config())
    section.data.update(sources=sources, rows=4, length=64)
    section.train.update(steps=steps, objective=objective)
    section.train.optimizer.update(learning_rate=1e-2, schedule="constant", warmup_steps=0)
    return section


def learnt(workdir: pathlib.Path, lora: dict):
    model = LanguageModel(DecoderConfig(**SHAPE, rope_theta=1e4), valid_vocab=261)
    if lora:
        model = model.adapted(LoraConfig(**lora))
    return restore_params(workdir / "checkpoints" / "tuned", model.abstract())


def losses(workdir: pathlib.Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir) if r["stage"] == "tuned" and "loss" in r]


def check(folder: pathlib.Path, tmp_path: pathlib.Path, objective: str) -> None:
    """Two updates and two more are four, and the first is of what the stage started from."""
    asked = config(folder, objective, **CASES[objective])
    pipeline.run(asked, tmp_path / "whole")
    asked.stages.tuned.train.steps = 2
    pipeline.run(asked, tmp_path / "parts")
    asked.stages.tuned.train.steps = STEPS
    pipeline.run(asked, tmp_path / "parts")
    lora = CASES[objective].get("lora", {})
    assert_trees_equal(learnt(tmp_path / "parts", lora), learnt(tmp_path / "whole", lora))
    found = losses(tmp_path / "whole")
    assert found == losses(tmp_path / "parts")
    assert len(found) == STEPS and np.isfinite(found).all() and found[-1] < found[0]
    if objective == "dpo":  # the policy is its reference at first
        assert found[0] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("objective", CASES)
def test_a_run_that_stopped_ends_bit_equal(folder, tmp_path, objective):
    """`distill` from a teacher of another width."""
    check(folder, tmp_path, objective)
