"""LFM-1.3B-Math: much fine-tuning on long chains of thought, then RL for short ones.

  python -m jaxreason.launch --config=lfm --config.stages.sft.init.from=DIR
  python -m jaxreason.launch --config=lfm:smoke    arithmetic, random weights, about a minute

Source: T. Seyde et al., "LFM-1B-Math: Can small models be concise reasoners?", Liquid AI, 2025.
What is known, most of it from others' notes and not from the page itself:
- `sft`: some 4.5M distilled traces (3.2M of them OpenMathReasoning), learning rate 3e-4, 3 epochs,
  about 100B tokens: 12,000 updates of 8.4M tokens here. Small models want such a rate to take in
  hard chains.
- `rl`: a kind of GRPO on prompts that 20 to 80 % of the samples solve, a short response budget and
  a reward that pays for being short. Its numbers are not published: ours are GRPO's, without a KL,
  and 4,096 tokens, of which the last 1,024 cost up to half a right answer.
- Result there: AIME24 from 0.2 to 51.0, by a protocol that is not stated.

Not theirs: the model (any checkpoint; the LFM architecture is not among ours) and the data (here
OpenThoughts-114k's traces and GSM8K's questions under $JAXREASON_DATA: put your own in
stages.sft.data.sources and stages.rl.data.sources). The full form has not been run: it is sized for
32 B200s, 256 rows of 32,768 tokens an update. Only :smoke has.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

PROMPT = "{question}\nPut the final answer within \\boxed{{}}."


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=lfm:{arg}: the argument is nothing or smoke")
    smoke = arg == "smoke"
    c = defaults.default_config("lfm-smoke" if smoke else "lfm", "pipeline")
    budget = 32 if smoke else 4096
    c.stages = {"sft": _sft(smoke), "rl": _rl(smoke, budget)}
    c.run.save_every = 10 if smoke else 200
    if smoke:
        c.chat.template = "plain"
        c.model = defaults.model_config("qwen3-tiny", vocab_size=261, num_layers=2)
        c.arithmetic = defaults.arithmetic_config(
            min_operations=1, max_operations=1, max_operand=9, cap=200, num_train=120, num_test=24
        )
        c.run.export = False
        c.eval.rows = 32
        c.eval.sets = {
            "arithmetic": defaults.arithmetic_eval(
                prompt_template="{expression}=", max_tokens=32, limit=8, num_samples=1
            )
        }
        return c
    c.tokenizer.kind = c.chat.template = "checkpoint"
    c.mesh.remat = "full"
    c.mesh.microbatches = 8
    c.run.export_dtype = "bfloat16"
    c.eval.rows = 1024
    c.eval.sets = {
        "gsm8k": defaults.jsonl_eval(
            "gsm8k/test.jsonl.gz", prompt_template=PROMPT, max_tokens=budget, num_samples=4
        )
    }
    return c


def _sft(smoke: bool) -> dict:
    stage = defaults.stage_config()
    if smoke:
        source = defaults.source(
            name="arithmetic",
            kind="arithmetic",
            rendering="long_cot",
            split="train",
            prompt_template="{expression}=",
        )
        stage["data"].update(sources={"arithmetic": source}, rows=8, length=64)
        stage["train"]["steps"] = 40
        stage["train"]["optimizer"].update(learning_rate=1e-2, warmup_steps=5)
        return stage
    stage["init"]["from"] = ""  # a base or chat model without mathematics of its own, there
    traces = defaults.source(
        name="traces", kind="openthoughts", path="openthoughts/*.parquet", drop_system=True
    )
    stage["data"].update(
        sources={"traces": traces},
        rows=256,
        length=32_768,
        num_shards=32,
        truncation="drop",
        packing="best_fit",
    )
    stage["train"]["steps"] = 12_000  # 3 epochs of their data
    stage["train"]["optimizer"].update(learning_rate=3e-4, warmup_steps=500)
    return stage


def _rl(smoke: bool, budget: int) -> dict:
    stage = defaults.rl_config()
    stage["init"]["from"] = "@sft"
    if smoke:
        asked = defaults.prompts(
            name="arithmetic",
            kind="arithmetic",
            path="arithmetic",
            split="train",
            prompt_template="{expression}=",
        )
    else:
        asked = defaults.prompts(
            name="gsm8k",
            path="gsm8k/train.jsonl.gz",
            prompt_template=PROMPT,
            answer_field="answer",
            answer_kind="hashes",
        )
    stage["data"].update(
        sources={asked["name"]: asked}, band=(0.2, 0.8), band_min_samples=4 if smoke else 16
    )
    # A right answer is worth 1; its last quarter of the budget costs up to a half.
    length = {"max_tokens": budget, "buffer_tokens": budget // 4}
    stage["rewards"] = {
        "accuracy": defaults.reward("math"),
        "length": defaults.reward("length", weight=0.5, **length),
    }
    stage["rollout"].update(
        num_prompts=4 if smoke else 64,
        num_generations=4 if smoke else 16,
        max_tokens=budget,
        filter_zero_std=not smoke,
        slots=16 if smoke else 1024,
    )
    stage["train"].update(
        steps=4 if smoke else 300,
        algorithm="grpo",
        updates=1 if smoke else 4,
        length=64 if smoke else 8192,
        rows_multiple=8 if smoke else 256,
        mask_truncated_completions=False,  # what runs into the limit is to learn not to
    )
    stage["train"]["policy"]["kl"] = "none"
    stage["train"]["optimizer"].update(learning_rate=1e-6, warmup_steps=1 if smoke else 10)
    return stage
