"""One student, one teacher, the same questions: what each way of distilling buys, and costs.

  python -m jaxreason.launch --config=study_distill          2 CPU cores, 108 minutes, tests beside
  python -m jaxreason.launch --config=study_distill:smoke    the same grid in little

The teacher is a model of 3.2M parameters that was taught arithmetic (2 to 4 operations) by short
chains. The student has 0.8M, and was pretrained on expressions and values, as in study_valley; it
has seen no chain. All learn from the same 2,048 expressions, which neither has seen, and answer
the same 400: 320 updates of 32 texts for whatever learns from texts, at the rate of study_valley's
stages, and 20 steps of 64 prompts for whatever samples, which starts from `SCoTD N=1`. (A first
grid had 1,024 expressions and 96 updates of 64 texts, which left Fine-tune-CoT at 0.096, below the
student, and LFM's student knew its questions by heart, which left RL nothing to compare.)

  label only      expression -> value
  step by step    the same, beside the teacher's rationales as a second task (arXiv 2305.02301);
                  asked for the value alone, as `label only` is
  SCoTD N=1,8,30  N chains of the teacher a question at temperature 1, the right ones kept
                  (2306.14050); what is not said to have its own learns from those of N=8
  Fine-tune-CoT   N=8 at temperature 0.7 (2212.10071)
  curated, random 128 of the chains of `SCoTD N=8`: by s1's rules (what `SCoTD N=1` or the student
                  solves is dropped, long ones first), or drawn
  gated           one chain a question: each token is the teacher's where the student gives it 1 %
                  at least and else the student's own (2509.22230); ungated is `SCoTD N=1`
  gated, knowing  the gate is `SCoTD N=1`, which knows what a chain is (added when `gated` was in)
  logit KD        the teacher's distributions on its chains, forward KL
  GKD             those on the student's own samples in half of the steps, JSD (2306.13649)
  MiniLLM         reverse KL of whole samples (2306.08543)
  OPD             the teacher's log-probs of the student's own tokens as advantages
  RL              no teacher: right or wrong, DAPO's loss, at 1e-4 where OPD, GKD and MiniLLM have
                  3e-4, and with 8 samples a prompt where they have 4
  RL 3e-4         at their rate
  OPD 1e-4, 3e-5  at RL's rate and below (added when `OPD` had done harm)
  LFM             all chains of N=30 once, in batches of 256 at twice the rate, then RL on what is
                  solved 20 to 80 % of the time, shorter answers first

Three seeds of SCoTD N=1, SCoTD N=8, logit KD, OPD (at both rates) and RL.
"""

import re

from ml_collections import ConfigDict

from jaxreason.launch import load_config
from jaxreason.recipes import defaults

PROMPT = "{expression}="
SEEDS = (0, 1, 2)


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=study_distill:{arg}: the argument is nothing or smoke")
    smoke = arg == "smoke"
    valley = load_config(f"study_valley:{arg}")
    c = defaults.study_config(
        "study_distill" + ("_smoke" if smoke else ""),
        folder="runs/study_distill_smoke" if smoke else "docs/study/distill",
        title="Ways to distil, on arithmetic",
        compare=(
            ("step by step", "label only"), ("SCoTD N=8", "SCoTD N=1"), ("SCoTD N=30", "SCoTD N=8"),
            ("curated", "random"), ("gated", "SCoTD N=1"), ("gated, knowing", "SCoTD N=1"),
            ("OPD", "RL"), ("OPD 1e-4", "RL"), ("OPD", "RL 3e-4"), ("GKD", "OPD 1e-4"),
            ("MiniLLM", "OPD 1e-4"), ("OPD 1e-4", "SCoTD N=1"), ("RL", "SCoTD N=1"),
            ("logit KD", "SCoTD N=8"),
        ),
    )  # fmt: skip
    start = valley.cells["tiny-start"].config
    student = start.copy_and_resolve_references()
    student.stages = {"pretrain": start.stages.pretrain}
    c.cells["student"] = defaults.cell(student, arm="(student)")
    c.cells["teacher"] = defaults.cell(_teacher(start, smoke), arm="(teacher)")

    def add(arm: str, seed: int, stages: dict) -> None:
        config = student.copy_and_resolve_references()
        config.seed, config.model = seed, defaults.model_config()
        config.arithmetic.update(num_train=64 if smoke else 2048, train_seed=1)
        config.stages = stages
        if set(stages) == {"rl"}:
            config.eval.every = 1 if smoke else 5  # how many updates they take
        name = re.sub("[=,]", "", arm).replace(" ", "_")
        c.cells[f"{name}-{seed}"] = defaults.cell(config, arm=arm)

    learn = lambda sources, **changes: _sft(start, sources, smoke, **changes)
    for seed in SEEDS:
        for n in (1, 8):
            add(f"SCoTD N={n}", seed, {"traces": _traces(n, smoke), "sft": learn(_kept())})
        taught = learn(_kept(f"SCoTD_N8-{seed}@traces"), objective="distill")
        taught["train"]["teacher"]["from"] = "teacher@short"
        add("logit KD", seed, {"sft": taught})
        add("OPD", seed, {"rl": _on_policy("opd", seed, smoke, rate=3e-4)})
        add("OPD 1e-4", seed, {"rl": _on_policy("opd", seed, smoke, rate=1e-4)})
        add("RL", seed, {"rl": _on_policy("dapo", seed, smoke, rate=1e-4)})
    add("SCoTD N=30", 0, {"traces": _traces(30, smoke), "sft": learn(_kept())})
    add("Fine-tune-CoT", 0, {"traces": _traces(8, smoke, temperature=0.7), "sft": learn(_kept())})
    add("label only", 0, {"sft": learn({"arithmetic": _written("answer")})})
    add("step by step", 0, {"sft": _step_by_step(learn)})
    for arm, by in (("gated", "student@pretrain"), ("gated, knowing", "SCoTD_N1-0@sft")):
        gated = _traces(1, smoke)
        gated["gate"].update({"from": by, "threshold": 0.01})
        add(arm, 0, {"traces": gated, "sft": learn(_kept())})
    for arm, method, solvers in (
        ("curated", "s1k", ("SCoTD_N1-0@sft", "student@pretrain")),
        ("random", "random", ()),
    ):
        chosen = _curate(method, solvers, smoke)
        taught = learn(_kept("@curate"))
        taught["data"]["rows"] = 22  # the longest chains
        add(arm, 0, {"curate": chosen, "sft": taught})
    add("RL 3e-4", 0, {"rl": _on_policy("dapo", 0, smoke, rate=3e-4)})
    add("OPD 3e-5", 0, {"rl": _on_policy("opd", 0, smoke, rate=3e-5)})
    add("GKD", 0, {"rl": _on_policy("gkd", 0, smoke, rate=3e-4)})
    add("MiniLLM", 0, {"rl": _on_policy("minillm", 0, smoke, rate=3e-4)})
    add("LFM", 0, _lfm(learn, smoke))
    return c


def _teacher(start: ConfigDict, smoke: bool) -> ConfigDict:
    """Short chains from random weights: four times the student's parameters."""
    c = start.copy_and_resolve_references()
    c.model.update(embed_dim=256, mlp_dim=768, num_heads=8, num_kv_heads=4)
    c.stages = {"short": start.stages.short}
    c.stages.short.init["from"] = "random"
    c.stages.short.data.update(rows=36)
    c.stages.short.train.optimizer.learning_rate = 3e-3
    return c


def _sft(start: ConfigDict, sources: dict, smoke: bool, **changes) -> dict:
    """320 updates of 32 texts; a short chain has 36 tokens with its question, 70 at most."""
    stage = start.stages.short.to_dict()
    stage["init"]["from"] = "student@pretrain"
    stage["data"].update(sources=sources, rows=13, length=128, examples_per_batch=32)
    if smoke:
        stage["data"]["truncation"] = "drop"  # its teacher rambles
    stage["train"].update(steps=2 if smoke else 320, **changes)
    stage["train"]["optimizer"].update(weight_decay=0.0, warmup_steps=1 if smoke else 6)
    return stage


def _written(rendering: str) -> dict:
    return defaults.source(
        name="arithmetic",
        kind="arithmetic",
        rendering=rendering,
        split="train",
        prompt_template=PROMPT,
    )


def _kept(path: str = "@traces") -> dict:
    return {"kept": {**defaults.kept_source("kept", "traces"), "path": path}}


def _prompts() -> dict:
    return {
        "arithmetic": defaults.prompts(
            name="arithmetic",
            kind="arithmetic",
            path="arithmetic",
            split="train",
            prompt_template=PROMPT,
        )
    }


def _traces(num_samples: int, smoke: bool, temperature: float = 1.0) -> dict:
    stage = defaults.traces_config(rows=512)
    stage["init"]["from"] = "teacher@short"
    stage["data"]["sources"] = _prompts()
    stage["sampling"].update(num_samples=num_samples, temperature=temperature, max_tokens=96)
    if smoke:
        stage["keep"] = "all"  # its teacher is hardly ever right
    stage["save_every"] = 256
    return stage


def _step_by_step(learn) -> dict:
    """Labels from the benchmark, rationales from the teacher; `explain` tells the tasks apart."""
    rationale = defaults.source(
        name="rationale",
        path="SCoTD_N8-0@traces",
        prompt_template="explain {question}",
        response_field="reasoning",
        task="rationale",
    )
    label = {**_written("answer"), "name": "label", "task": "label"}
    stage = learn({"label": label, "rationale": rationale}, objective="step_by_step")
    stage["data"]["weights"] = {"label": 1.0, "rationale": 1.0}
    stage["data"]["examples_per_batch"] = 64  # 32 of each
    stage["data"]["rows"] = 19
    return stage


def _curate(method: str, solvers: tuple[str, ...], smoke: bool) -> dict:
    stage = defaults.curate_config(method=method, solvers=solvers, limit=4 if smoke else 128)
    stage.update(num_samples=1, answer_field="answer")
    stage["data"]["sources"] = _kept("SCoTD_N8-0@traces")
    stage.update(max_tokens=96, rows=512)
    return stage


def _on_policy(algorithm: str, seed: int, smoke: bool, rate: float) -> dict:
    """20 steps of 64 prompts: 8 samples each for RL, which compares them, else 4."""
    stage = defaults.rl_config()
    stage["init"]["from"] = f"SCoTD_N1-{seed}@sft"
    stage["data"]["sources"] = _prompts()
    stage["rollout"].update(
        num_prompts=8 if smoke else 64,
        num_generations=8 if algorithm == "dapo" else 4,
        max_tokens=16 if smoke else 96,
        slots=512,
        temperature=0.7 if algorithm == "dapo" else 1.0,
        filter_zero_std=False,
    )
    stage["train"].update(
        steps=2 if smoke else 20, algorithm=algorithm, updates=2, length=128, rows_multiple=16
    )
    stage["train"]["mask_truncated_completions"] = False
    stage["train"]["optimizer"].update(learning_rate=rate, warmup_steps=2)
    if algorithm != "dapo":
        stage["train"]["teacher"]["from"] = "teacher@short"
    if algorithm == "gkd":
        stage["data"]["sources"]["arithmetic"]["rendering"] = "short_cot"
    return stage


def _lfm(learn, smoke: bool) -> dict:
    """Every right chain of N=30, then reinforcement learning that pays for brevity."""
    sft = learn(_kept("SCoTD_N30-0@traces"))
    sft["train"]["steps"] = 2 if smoke else defaults.updates(54_000, 1, 256)
    sft["data"].update(examples_per_batch=256, rows=88)
    sft["train"]["optimizer"]["learning_rate"] *= 2
    rl = _on_policy("dapo", 0, smoke, rate=1e-4)
    rl["init"]["from"] = "@sft"
    if not smoke:
        rl["data"]["band"] = (0.2, 0.8)
    rl["rewards"]["length"] = defaults.reward(
        "length", 0.2, shape="linear", max_tokens=96, applies_to="right"
    )
    return {"sft": sft, "rl": rl}
