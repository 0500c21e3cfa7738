"""A small model learns from the rationales of a large one.

  python -m jaxreason.launch --config=rationales               a 15M-parameter model, on CPU
  python -m jaxreason.launch --config=rationales:step_by_step  two tasks: answers, and rationales
  python -m jaxreason.launch --config=rationales:hf            Qwen3-0.6B learns them
  python -m jaxreason.launch --config=rationales:smoke         the first in under 3 minutes

The rationales are of Mistral-Small-3.1-24B on generated arithmetic tasks, three an example,
each with a score: teacher_rationales/*.jsonl.gz under $JAXREASON_DATA (default ../shared/data);
fields question, full_model_response, model_answer, expected_answer, score.

The default keeps every rationale of score 1 of at least 20 tokens (half of the responses are an
answer and nothing else) and trains on "question -> rationale, answer", as SCoTD does (arXiv
2306.14050). :step_by_step is Distilling Step-by-Step (arXiv 2305.02301): "predict: question" is
followed by the right answer, "explain: question" by a rationale of score 1, in one loss of half
and half; at inference one asks for the prediction alone. What has no answer, as where the teacher
ran into its limit (197 of 3,600 records), is quarantined and counted.

The held-out set is generated: sums and products in the words of one of the tasks, "Calculate ...".
Expect next to no right answers of the default: 14.6M of its parameters are an embedding, and a few
dozen updates teach the format alone. :hf (2e-5, batch 32, 3 epochs) has not been run: no GPU.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

PATH = "teacher_rationales/*.jsonl.gz"
KEPT = 762  # rationales that the default keeps: the 3 epochs of :hf are counted by it


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "step_by_step", "hf"):
        raise ValueError(
            f"--config=rationales:{arg}: the argument is nothing, smoke, step_by_step or hf"
        )
    c = defaults.default_config(f"rationales-{arg}" if arg else "rationales", "pipeline")
    c.tokenizer.update(kind="hf", path="tokenizer_qwen3")
    c.model = defaults.model_config(
        "qwen3-tiny", vocab_size=151_936, embed_dim=96, mlp_dim=256, num_layers=2, head_dim=32
    )
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1, max_operations=4, max_operand=100, num_train=1, num_test=200
    )
    prompt = "Calculate {expression}."
    if arg == "step_by_step":
        c.stages = {"student": _step_by_step()}
        prompt = "predict: " + prompt
    else:
        c.stages = {"chosen": _chosen(), "student": _student(_kept())}
    c.run.save_every, c.log.every = 25, 5
    c.eval.rows = 50
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template=prompt, limit=50, num_samples=1, temperature=0.0, max_tokens=128
        )
    }
    if arg == "smoke":
        c.stages.chosen.data.limit = 300
        c.stages.student.train.steps = 8
        c.stages.student.train.optimizer.warmup_steps = 2
        c.stages.student.data.update(rows=2, length=512)
        c.log.every, c.run.save_every = 1, 4
        c.eval.rows = 8
        c.eval.sets.arithmetic.update(limit=8, max_tokens=16)
    if arg == "hf":
        _from_hugging_face(c)
    return c


def _chosen() -> dict:
    """Right rationales, and more than an answer."""
    stage = defaults.curate_config(keep="correct", correct_field="score", domain_field="dataset")
    stage["data"]["sources"] = {
        "teacher": defaults.source(
            name="teacher",
            path=PATH,
            prompt_field="question",
            reasoning_field="full_model_response",
            response_field="model_answer",
        )
    }
    stage["quality"]["min_tokens"] = 20
    return stage


def _kept() -> dict:
    return {"chosen": defaults.kept_source("chosen", "chosen")}


def _student(sources: dict) -> dict:
    stage = defaults.stage_config()
    stage["data"].update(sources=sources, rows=4, length=768, packing="best_fit", truncation="drop")
    stage["train"]["steps"] = 50
    stage["train"]["optimizer"].update(learning_rate=3e-3, warmup_steps=10)
    return stage


def _step_by_step() -> dict:
    task = lambda name, prompt, response, **more: defaults.source(
        name=name, path=PATH, prompt_template=prompt, response_field=response, task=name, **more
    )
    stage = _student(
        {
            "label": task("label", "predict: {question}", "expected_answer"),
            # Right ones: the code of the paper takes whatever the teacher wrote.
            "rationale": task(
                "rationale", "explain: {question}", "full_model_response", correct_fields=("score",)
            ),
        }
    )
    stage["data"]["weights"] = {"label": 1.0, "rationale": 1.0}  # each question in both, as there
    stage["train"].update(objective="step_by_step", alpha=0.5)
    return stage


def _from_hugging_face(c: ConfigDict) -> None:
    c.tokenizer.update(kind="checkpoint", path="")
    c.chat.template = "checkpoint"
    c.model = defaults.model_config()
    c.mesh.remat = "full"
    c.run.export_dtype = "bfloat16"
    student = c.stages.student
    student.init["from"] = "hf://Qwen/Qwen3-0.6B-Base"
    student.data.update(packing="per_batch", examples_per_batch=32, rows=16, length=2048)
    student.train.steps = defaults.updates(KEPT, 3, 32)
    student.train.optimizer.update(learning_rate=2e-5, warmup_steps=3, weight_decay=0.0)
    c.eval.rows = 256
    c.eval.sets.arithmetic.update(limit=200, max_tokens=1024)
