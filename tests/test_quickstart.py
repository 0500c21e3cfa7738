"""The quickstart: its two arms are twins, no stage sees a held-out expression, its files serve."""

import json

import numpy as np
import pytest

from jaxreason.data import pipeline as pipeline_lib
from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic, records
from jaxreason.launch import load_config
from jaxreason.recipes import assemble
from jaxreason.text.tokenizer import ByteTokenizer

FITTED = ("pretrain", "sft_answer", "sft_cot")
STAGES = (*FITTED, "rl")


def data_of(config, stage: str) -> pipeline_lib.DataConfig:
    return assemble.data_config(config, config.stages[stage])


def test_no_stage_sees_a_held_out_expression():
    config = load_config("quickstart")
    made = records(ArithmeticConfig(**config.arithmetic.to_dict()))
    held_out = {record["expression"] for record in made["test"]}
    assert len(held_out) == config.eval.sets.arithmetic.limit == 400
    for record in made["train"]:
        assert record["expression"] not in held_out
    for stage in FITTED:
        assert [s.split for s in data_of(config, stage).sources.values()] == ["train"]
    assert [s.split for s in config.stages.rl.data.sources.values()] == ["train"]


def test_pretraining_text_holds_no_chain():
    config = load_config("quickstart:smoke")
    sources = data_of(config, "pretrain").sources
    assert [source.rendering for source in sources.values()] == ["text"]


def test_both_arms_see_the_same_expressions_update_by_update(tmp_path):
    config = load_config("quickstart:smoke")
    prepare_arithmetic(ArithmeticConfig(**config.arithmetic.to_dict()), tmp_path / "arithmetic")
    assert config.stages.sft_answer.train.steps == config.stages.sft_cot.train.steps
    answer, cot = data_of(config, "sft_answer"), data_of(config, "sft_cot")
    assert answer.rows < cot.rows
    tokenizer = ByteTokenizer()
    arms = [pipeline_lib.build(data, tokenizer, tmp_path) for data in (answer, cot)]
    for _ in range(5):
        first, second = (_expressions(next(arm), tokenizer) for arm in arms)
        assert len(first) == cot.examples_per_batch
        assert first == second
    for arm in arms:
        arm.close()


def _expressions(batch, tokenizer) -> list[str]:
    """The prompts of a packed batch, sorted: inside an update the packer may reorder them."""
    found = []
    for tokens_T, segments_T in zip(batch.tokens_BT, batch.segments_BT, strict=True):
        for segment in range(1, segments_T.max() + 1):
            text = tokenizer.decode(tokens_T[segments_T == segment].tolist())
            found.append(text.split("=")[0])
    return sorted(found)


@pytest.mark.slow
def test_the_workdir_holds_every_file_of_the_contract(smoke_run):
    names = ("config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html",
             "tokenizer/tokenizer.json", "tensorboard", "data", "checkpoints", "hf")  # fmt: skip
    for name in (*names, *(f"stages/{stage}.json" for stage in (*STAGES, "scaling"))):
        assert (smoke_run / name).exists(), name
    summary = json.loads((smoke_run / "summary.json").read_text())
    assert summary.keys() >= {"status", "wall_seconds", "stages", "evals", "scaling"}
    assert summary["evals"]["rl"]["arithmetic"]["gain"]["over"] == "sft_cot"
    points = summary["scaling"]
    assert {"method", "n", "budget", "accuracy", "mean_tokens"} <= points[0].keys()
    assert {p["method"] for p in points} == {"majority", "best_of_n", "budget", "waits"}
    groups = [json.loads(line) for line in (smoke_run / "samples.jsonl").open()]
    assert any(line["stage"] == "rl" and "step" in line for line in groups)
    for stage in STAGES:
        assert summary["stages"][stage].keys() >= {"steps", "tokens", "final_loss"}
        wanted = {"avg@4", "pass@4", "maj@8", "mean_tokens", "truncated"}
        assert summary["evals"][stage]["arithmetic"].keys() >= wanted
    assert "http://" not in (smoke_run / "report.html").read_text().replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_export_loads_with_transformers(smoke_run, stage):
    """The same ids for 2,000 strings both ways, the same greedy tokens on 50 prompts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = smoke_run / "hf" / stage
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours, rng = ByteTokenizer(), np.random.default_rng(0)
    alphabet = [*"0123456789+-*/()= \n\t<>|aé漢🙂", "<think>", "</think>", "<|im_end|>"]
    for _ in range(2000):
        text = "".join(rng.choice(alphabet, rng.integers(1, 40)))
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    made = records(ArithmeticConfig(min_operations=2, max_operations=4, num_train=1, num_test=50))
    prompts = [ours.encode(record["expression"] + "=") for record in made["test"]]
    for prompt, ids in zip(prompts, _greedy(smoke_run, stage, prompts), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + list(ids)])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2).values
        clear = (best[:, 0] - best[:, 1] >= 1e-3).numpy()
        until = len(ids) if clear.all() else int(np.argmin(clear))
        assert logits.argmax(-1).tolist()[:until] == list(ids)[:until]


def _greedy(workdir, stage: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    import jax

    from jaxreason.checkpoint.store import restore_params
    from jaxreason.model.config import DecoderConfig
    from jaxreason.model.decoder import LanguageModel
    from jaxreason.rollout.engine import EngineConfig
    from jaxreason.rollout.generate import build_generate
    from jaxreason.types import Sampling

    shape = json.loads((workdir / "config.json").read_text())["architecture"]
    model, tokenizer = LanguageModel(DecoderConfig(**shape)), ByteTokenizer()
    params = restore_params(workdir / "checkpoints" / stage, model.abstract())
    generate = build_generate(
        model, list, tokenizer.decode, tokenizer.eos_id, EngineConfig(slots=len(prompts))
    )
    sampling = Sampling(max_tokens=60, temperature=0.0)
    return [row[0].ids for row in generate(params, prompts, sampling, jax.random.key(0))]
