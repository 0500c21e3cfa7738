"""Traces of a teacher, and a student that learns them: SCoTD in one config.

  python -m jaxreason.launch --config=traces          arithmetic: 30 traces a question
  python -m jaxreason.launch --config=traces:smoke    the same in under 3 minutes on 2 CPU cores
  python -m jaxreason.launch --config=traces:url \\
      --config.stages.traces.server.url=http://localhost:8000/v1 \\
      --config.stages.traces.server.model_name=Qwen/Qwen3-8B --config.stages.student.init.from=DIR

`teacher` learns long chains of thought from random weights. `traces` has it answer questions,
keeps what is right, and `student`, random again, learns these alone: the text is the teacher's own,
slips and corrections included. :url asks a server for GSM8K and fine-tunes a checkpoint on the
answers; an API key is read from the environment's variable that stages.traces.server.key_variable
names.

Sampled at temperature 1, as SCoTD (arXiv 2306.14050) does; of its N = 30 a question all that are
right are kept. Only :smoke has been run; :url's stage has been run against a local server of the
protocol (tests/recipes/test_traces_stage.py), not yet against a real model.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

PROMPT = "{expression}="
GSM8K = "{question}\nPut the final answer within \\boxed{{}}."


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "url"):
        raise ValueError(f"--config=traces:{arg}: the argument is nothing, smoke or url")
    return _url() if arg == "url" else _arithmetic(arg == "smoke")


def _arithmetic(smoke: bool) -> ConfigDict:
    c = defaults.default_config("traces-smoke" if smoke else "traces", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1 if smoke else 2,  # one operation is learnt in a hundred updates
        max_operations=1 if smoke else 4,
        max_operand=9 if smoke else 12,
        cap=200,
        num_train=120 if smoke else 51_200,
        num_test=24 if smoke else 400,
        recheck_share=0.0 if smoke else 0.2,
        mistake_share=0.0 if smoke else 0.1,
    )
    expressions = {"name": "arithmetic", "kind": "arithmetic", "split": "train"}
    written = defaults.source(**expressions, rendering="long_cot", prompt_template=PROMPT)
    traces = defaults.traces_config(save_every=16 if smoke else 100, rows=256 if smoke else 640)
    traces["init"]["from"] = "@teacher"
    traces["data"].update(
        sources={
            "arithmetic": defaults.prompts(**expressions, path="arithmetic", prompt_template=PROMPT)
        },
        shuffle=True,
        num_questions=48 if smoke else 1_000,
    )
    traces["sampling"].update(max_tokens=32 if smoke else 128, num_samples=8 if smoke else 30)
    c.stages = {
        "teacher": _student(smoke, written),
        "traces": traces,
        "student": _student(smoke, _kept()),
    }
    c.run.save_every = 50 if smoke else 200
    c.log.every = 20
    c.eval.rows = 240 if smoke else 640
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template=PROMPT, max_tokens=32 if smoke else 128, limit=24 if smoke else 400
        )
    }
    return c


def _kept() -> dict:
    """What the stage `traces` kept, as a source."""
    return defaults.kept_source("traces", "traces")


def _student(smoke: bool, source: dict) -> dict:
    """The quickstart's fine-tuning, from random weights."""
    stage = defaults.stage_config()
    stage["data"].update(
        sources={source["name"]: source},
        rows=8 if smoke else 48,
        length=64 if smoke else 160,
        packing="per_batch",
        examples_per_batch=16 if smoke else 128,
    )
    steps = stage["train"]["steps"] = 80 if smoke else 400
    stage["train"]["optimizer"].update(
        name="muon", learning_rate=6e-3, weight_decay=0.05, warmup_steps=min(50, steps // 4)
    )
    return stage


def _url() -> ConfigDict:
    """GSM8K's questions to a server; a checkpoint learns the right answers with their reasoning."""
    c = defaults.default_config("traces-url", "pipeline")
    c.tokenizer.kind = "checkpoint"  # the student's; the base models of Qwen3 have the template too
    c.chat.template = "qwen3"
    c.model = defaults.model_config()
    traces = defaults.traces_config()
    traces["server"].update(url="http://localhost:8000/v1", model_name="Qwen/Qwen3-8B")
    traces["data"]["sources"] = {
        "gsm8k": defaults.prompts(
            name="gsm8k",
            path="gsm8k/train.jsonl.gz",
            prompt_template=GSM8K,
            answer_field="answer",
            answer_kind="hashes",
        )
    }
    traces["sampling"].update(max_tokens=4096, temperature=0.6, top_p=0.95, num_samples=8)
    student = defaults.stage_config()
    student["init"]["from"] = "hf://Qwen/Qwen3-0.6B-Base"
    student["data"].update(sources={"traces": _kept()}, rows=32, length=4096)
    student["train"]["steps"] = 1_000
    student["train"]["optimizer"].update(learning_rate=2e-5, warmup_steps=50)  # SCoTD's rate
    c.stages = {"student": student, "traces": traces}
    c.eval.sets = {
        "gsm8k": defaults.jsonl_eval("gsm8k/test.jsonl.gz", prompt_template=GSM8K, num_samples=4)
    }
    return c
