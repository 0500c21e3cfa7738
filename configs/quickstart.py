"""Quickstart: from random weights to a small model that reasons, beside a twin that does not.

  python -m jaxreason.launch                           10 to 20 minutes on 2 CPU cores
  python -m jaxreason.launch --config=quickstart:smoke --workdir=/tmp/smoke       under 3 minutes

A Qwen3 of 0.8M parameters reads bytes. It is pretrained on arithmetic text (expressions and their
values, never a step), then fine-tuned twice from that base, for the same number of updates on the
same expressions in the same order: once on answers alone, once on long chains of thought. From
the chains it goes on by reinforcement learning, and is then asked to vote, to hurry and to wait.

What was chosen, and why:
- 2 to 4 operations over operands to 12, every intermediate result within 200: the times table and
  two-digit sums are learnt in minutes, while the answer alone stays out of reach, because a model
  of four layers cannot do four operations between two tokens.
- 128 expressions an update, 400 updates. The answer arm's rows are fewer, not its examples.
- Muon at 6e-3: on an easier set it had after 200 updates the loss that AdamW at 4e-3 had after 700
  (docs/benchmarks.md, Tried).
- A tenth of the steps of a chain is first wrong and then corrected, a fifth is re-checked by the
  inverse operation: the model learns to slip at that rate too, which costs tokens, not answers.
- Rows of 160 bytes: the longest chain has 130. 48 rows leave room for the unluckiest update, and
  divide over eight devices.

- RL samples at 0.7, near the evaluation's 0.6: at 1 most of what is learnt is to sharpen. Adam at
  1e-4 in two updates of 256 completions a step: 3e-4 from the first update on ruined the policy.

Result on 2 cores: avg@4 0.86 for rl, 0.78 for sft_cot, 0.34 for sft_answer, in 10 min 9 s
(docs/benchmarks.md).
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

PROMPT = "{expression}="


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=quickstart:{arg}: the argument is nothing or smoke")
    smoke = arg == "smoke"
    c = defaults.default_config("quickstart", "pipeline")
    c.chat.template = "plain"
    c.chat.wait = "\nwait "  # what these chains say where they correct a step
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=2,
        max_operations=4,
        max_operand=12,
        cap=200,
        num_train=3_000 if smoke else 51_200,
        num_test=30 if smoke else 400,
        recheck_share=0.2,
        mistake_share=0.1,
    )
    steps = 60 if smoke else 400
    c.stages = {
        "pretrain": _stage("text", "random", steps=60 if smoke else 120, rows=48, examples=512),
        "sft_answer": _stage("answer", "@pretrain", steps=steps, rows=16, examples=128),
        "sft_cot": _stage("long_cot", "@pretrain", steps=steps, rows=48, examples=128),
        "rl": _rl(smoke),
        "scaling": defaults.scaling_config(
            votes=(1, 2, 4, 8) if smoke else (1, 2, 4, 8, 16),
            budgets=(16, 32) if smoke else (8, 16, 24, 32, 48, 64),
            wordings=("tag",),
            waits=(0, 1) if smoke else (0, 1, 2),
            num_samples=1 if smoke else 4,
        ),
    }
    c.stages["scaling"]["init"]["from"] = "@rl"
    c.run.save_every = 20 if smoke else 200
    c.log.every = 5 if smoke else 20
    c.eval.rows = 240 if smoke else 640
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template=PROMPT, max_tokens=128, limit=30 if smoke else 400
        )
    }
    return c


def _stage(rendering: str, start: str, steps: int, rows: int, examples: int) -> dict:
    stage = defaults.stage_config()
    stage["init"]["from"] = start
    prompt = "" if rendering == "text" else PROMPT
    stage["data"].update(
        sources={
            "arithmetic": defaults.source(
                name="arithmetic",
                kind="arithmetic",
                rendering=rendering,
                split="train",
                prompt_template=prompt,
            )
        },
        rows=rows,
        length=160,
        packing="per_batch",
        examples_per_batch=examples,
    )
    stage["train"]["steps"] = steps
    stage["train"]["optimizer"].update(
        name="muon", learning_rate=6e-3, weight_decay=0.05, warmup_steps=min(50, steps // 4)
    )
    return stage


def _rl(smoke: bool) -> dict:
    stage = defaults.rl_config()
    stage["init"]["from"] = "@sft_cot"
    stage["data"]["sources"] = {
        "arithmetic": defaults.prompts(
            name="arithmetic",
            kind="arithmetic",
            path="arithmetic",
            split="train",
            prompt_template=PROMPT,
        )
    }
    stage["rollout"].update(num_prompts=64, num_generations=8, max_tokens=128, slots=512)
    # At the temperature of the evaluation, nearly: at 1 most of what is learnt is to sharpen.
    stage["rollout"]["temperature"] = 0.7
    stage["train"].update(steps=90, algorithm="dapo", updates=2, length=160, rows_multiple=16)
    # No right chain has 128 tokens: one that runs into the limit has lost its way, and learns so.
    stage["train"]["mask_truncated_completions"] = False
    stage["train"]["optimizer"].update(learning_rate=1e-4, warmup_steps=10)
    if smoke:
        stage["rollout"].update(
            num_prompts=4, num_generations=4, max_tokens=48, filter_zero_std=False
        )
        stage["train"].update(steps=4, updates=2)
        stage["train"]["optimizer"].update(warmup_steps=2)
    return stage
