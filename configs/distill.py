"""Distillation: one teacher and one student on arithmetic, seven ways to learn from it.

  python -m jaxreason.launch --config=distill            gkd
  python -m jaxreason.launch --config=distill:METHOD     gkd, minillm, opd, logit, topk, sequence
                                                         or rewarded
  python -m jaxreason.launch --config=distill:smoke      gkd; METHOD-smoke: any, about a minute

`teacher` learns long chains of thought; `start`, the same model from other random weights, has a
short taste of them (all on-policy methods want a student that answers at all); `student` goes on
from there by METHOD:

  gkd       JSD over the whole vocabulary, half of the steps on its own samples, half on the data's
            answers (arXiv 2306.13649; lmbda and beta 0.5 as in TRL)
  rewarded  the same divergence on samples alone, beside the task's reward: GKD's mixture with RL
  minillm   reverse KL of sequences: each step's exactly, the rest by policy gradient (2306.08543)
  opd       reverse KL of sampled tokens as advantages (Thinking Machines Lab, 2025)
  logit     forward KL on the data's answers, the teacher in the same step
  topk      the same from the teacher's stored top 16 tokens: it need not be in memory
  sequence  fine-tuning on what the teacher wrote and got right (SCoTD, 2306.14050)

A teacher of another shape: --config.stages.student.train.teacher.from=WORKDIR@STAGE (of topk and
sequence stages.topk.init.from, stages.traces.init.from), with this run's tokens. The quickstart's
expressions and, for `teacher`, its 400 updates. Run so far: smoke forms, on CPU; no figures of the
full ones yet.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

PROMPT = "{expression}="
ON_POLICY = ("gkd", "rewarded", "minillm", "opd")
METHODS = (*ON_POLICY, "logit", "topk", "sequence")


def get_config(arg: str = "") -> ConfigDict:
    method, _, size = (arg or "gkd").rpartition("-")
    method, smoke = (method or "gkd", True) if size == "smoke" else (arg or "gkd", False)
    if method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(
            f"--config=distill:{arg}: the argument is nothing, smoke, or one of {known}, with "
            "-smoke behind it or not"
        )
    c = defaults.default_config("distill" if not arg else f"distill-{arg}", "pipeline")
    c.chat.template = "plain"
    layers = {"num_layers": 2} if smoke else {}  # half of what there is to compile
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261, **layers)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1 if smoke else 2,
        max_operations=1 if smoke else 4,
        max_operand=9 if smoke else 12,
        cap=200,
        num_train=120 if smoke else 51_200,
        num_test=24 if smoke else 400,
        recheck_share=0.0 if smoke else 0.2,
        mistake_share=0.0 if smoke else 0.1,
    )
    steps = {"teacher": 30, "start": 10} if smoke else {"teacher": 400, "start": 60}
    c.stages = {name: _trained("random", smoke, number) for name, number in steps.items()}
    if method in ON_POLICY:
        c.stages["student"] = _on_policy(method, smoke)
    else:
        c.stages.update(_off_policy(method, smoke))
    c.run.save_every = 10 if smoke else 100
    c.log.every = 10 if smoke else 20
    c.run.export = not smoke
    c.eval.rows = 32 if smoke else 640
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template=PROMPT,
            max_tokens=32 if smoke else 128,
            limit=8 if smoke else 400,
            num_samples=1 if smoke else 8,
        )
    }
    return c


def _expressions(**fields) -> dict:
    return dict(
        name="arithmetic", kind="arithmetic", split="train", prompt_template=PROMPT, **fields
    )


def _data(smoke: bool, source: dict) -> dict:
    return dict(
        sources={source["name"]: source},
        rows=8 if smoke else 48,
        length=64 if smoke else 160,
        packing="per_batch",
        examples_per_batch=16 if smoke else 128,
    )


def _trained(start: str, smoke: bool, steps: int, source: dict | None = None) -> dict:
    """The quickstart's fine-tuning."""
    stage = defaults.stage_config()
    stage["init"]["from"] = start
    written = source or defaults.source(**_expressions(rendering="long_cot"))
    stage["data"].update(_data(smoke, written))
    stage["train"]["steps"] = steps
    stage["train"]["optimizer"].update(
        name="muon", learning_rate=6e-3, weight_decay=0.05, warmup_steps=min(50, steps // 4)
    )
    return stage


def _on_policy(method: str, smoke: bool) -> dict:
    stage = defaults.rl_config()
    stage["init"]["from"] = "@start"
    stage["data"]["sources"] = {
        "arithmetic": defaults.prompts(**_expressions(path="arithmetic", rendering="long_cot"))
    }
    groups = method == "rewarded"  # rewards are compared within a group
    stage["rollout"].update(
        num_prompts=8 if smoke else (64 if groups else 256),
        num_generations=(2 if smoke else 4) if groups else 1,
        max_tokens=32 if smoke else 128,
        filter_zero_std=False,
        slots=16 if smoke else 512,
    )
    stage["train"].update(
        steps=4 if smoke else 100,
        updates=1 if smoke else 2,
        length=64 if smoke else 192,
        rows_multiple=8 if smoke else 16,
        algorithm="dapo" if groups else method,
        mask_truncated_completions=False,  # where a chain has lost its way the teacher says so
    )
    stage["train"]["teacher"]["from"] = "@teacher"
    if groups:
        stage["train"]["distill"].update(divergence="jsd", kd_coef=1.0)
    stage["train"]["optimizer"].update(learning_rate=3e-4, warmup_steps=1 if smoke else 10)
    return stage


def _off_policy(method: str, smoke: bool) -> dict:
    """The student, and the stage that writes what it reads, where there is one."""
    steps = 20 if smoke else 300
    if method == "sequence":
        traces = defaults.traces_config(save_every=16 if smoke else 100, rows=64 if smoke else 640)
        traces["init"]["from"] = "@teacher"
        asked = defaults.prompts(**_expressions(path="arithmetic"))
        traces["data"].update(
            sources={"arithmetic": asked}, shuffle=True, num_questions=16 if smoke else 1_000
        )
        traces["sampling"].update(max_tokens=32 if smoke else 128, num_samples=4 if smoke else 30)
        if smoke:
            traces["keep"] = "all"  # thirty updates make no teacher that is often right
        kept = defaults.kept_source("traces", "traces")
        student = _trained("@start", smoke, steps, kept)
        if smoke:
            student["data"].update(packing="first_fit", examples_per_batch=None)
        return {"traces": traces, "student": student}
    student = _trained("@start", smoke, steps)
    student["train"]["objective"] = "distill" if method == "logit" else "distill_topk"
    if method == "logit":
        student["train"]["teacher"]["from"] = "@teacher"
        return {"student": student}
    topk = defaults.topk_config(k=16, rows=student["data"]["rows"])
    topk["init"]["from"] = "@teacher"
    topk["data"].update({**student["data"]})
    student["data"]["teacher"] = "@topk"
    return {"topk": topk, "student": student}
