"""Reinforcement learning from verifiable rewards.

  python -m jaxreason.launch --config=rl              arithmetic, from the quickstart's sft_cot
  python -m jaxreason.launch --config=rl:countdown    three numbers, one target: SFT, then RL
  python -m jaxreason.launch --config=rl:gsm8k        GSM8K, Qwen3's tokenizer: SFT, then RL
  python -m jaxreason.launch --config=rl:hf --config.init.from=DIR     GSM8K, any checkpoint
  python -m jaxreason.launch --config=rl:smoke        random weights, under a minute

The algorithm is --config.train.algorithm (stages.rl.train.algorithm where there are stages): grpo,
dr_grpo, dapo, gspo, cispo, rloo, reinforce_pp, reinforce_pp_baseline or ppo; each switch of its
loss and its advantages can be set beside it, as --config.train.policy.epsilon_high=0.28. Those that
learn from a teacher (opd, gkd, minillm) are in configs/distill.py.

Arithmetic: the expressions of the quickstart, whose workdir must exist (runs/quickstart, or
--config.init.from=WORKDIR@STAGE); reward 1 for the right answer, the same expressions held out.
Countdown: TinyZero's problems of three numbers under $JAXREASON_DATA; the warm-up learns traces of
an exact solver's search. GSM8K: 0.1 for the format and 1.0 for the right answer; the 15M-parameter
default shows the real tokenizer and data end to end and learns the format only, as configs/sft.py
says. :hf has not been run yet (no GPU so far).
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

ARGUMENTS = ("", "arithmetic", "countdown", "gsm8k", "hf", "smoke")


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ARGUMENTS:
        known = ", ".join(ARGUMENTS[1:])
        raise ValueError(f"--config=rl:{arg}: the argument is nothing or one of {known}")
    return {"countdown": _countdown, "gsm8k": _gsm8k, "hf": _hugging_face}.get(arg, _arithmetic)(
        arg == "smoke"
    )


def _arithmetic(smoke: bool) -> ConfigDict:
    c = defaults.default_config("rl-smoke" if smoke else "rl", "rl")
    c.update(defaults.rl_config())
    c.init["from"] = "random" if smoke else "runs/quickstart@sft_cot"
    c.tokenizer.kind = "bytes" if smoke else "checkpoint"
    c.chat.template = "plain"
    c.arithmetic = defaults.arithmetic_config(  # the quickstart's
        min_operations=2,
        max_operations=4,
        max_operand=12,
        cap=200,
        num_train=3_000 if smoke else 51_200,
        num_test=30 if smoke else 400,
        recheck_share=0.2,
        mistake_share=0.1,
    )
    c.data.sources = {
        "arithmetic": defaults.prompts(
            name="arithmetic",
            kind="arithmetic",
            path="arithmetic",
            split="train",
            prompt_template="{expression}=",
        )
    }
    c.rollout.update(num_prompts=32, num_generations=8, max_tokens=128)
    c.train.update(steps=60, length=160, rows_multiple=8, algorithm="dapo", updates=4)
    c.train.mask_truncated_completions = False  # no right chain has 128 tokens: it lost its way
    c.train.optimizer.learning_rate = 3e-4
    c.run.save_every, c.log.every = 20, 1
    c.eval.rows = 640
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template="{expression}=", max_tokens=128, limit=30 if smoke else 400
        )
    }
    if smoke:
        c.model = defaults.model_config("qwen3-tiny", vocab_size=261)
        c.rollout.update(num_prompts=4, num_generations=4, max_tokens=32, filter_zero_std=False)
        c.train.update(steps=4, updates=2)
        c.run.save_every = 2
    return c


def _gsm8k(_: bool) -> ConfigDict:
    """configs/sft.py's model and warm-up, then RL: 50 steps of 4 problems x 4 completions."""
    c = defaults.default_config("rl-gsm8k", "pipeline")
    c.tokenizer.update(kind="hf", path="tokenizer_qwen3")
    c.model = defaults.model_config(
        "qwen3-tiny", vocab_size=151_936, embed_dim=96, mlp_dim=256, num_layers=2, head_dim=32
    )
    warm_up = defaults.stage_config()
    warm_up["data"].update(
        sources={
            "gsm8k": defaults.source(
                name="gsm8k",
                path="gsm8k/train.jsonl.gz",
                prompt_field="question",
                response_field="answer",
                reasoning="split_hashes",
                strip_calculator=True,
            )
        },
        rows=8,
        length=512,
    )
    warm_up["train"]["steps"] = 50
    warm_up["train"]["optimizer"].update(learning_rate=3e-3, warmup_steps=10)
    rl = _gsm8k_rl()
    rl["init"]["from"] = "@sft"
    rl["rollout"].update(num_prompts=4, num_generations=4, max_tokens=128, slots=32)
    rl["train"].update(steps=50, length=512, updates=1, rows_multiple=4)
    rl["train"]["mask_truncated_completions"] = False  # the format is to end in time
    rl["train"]["optimizer"]["learning_rate"] = 1e-4
    c.stages = {"sft": warm_up, "rl": rl}
    c.run.save_every, c.log.every = 25, 1
    c.eval.rows = 100
    c.eval.sets = {
        "gsm8k": defaults.jsonl_eval(
            "gsm8k/test.jsonl.gz", limit=50, num_samples=1, temperature=0.0, top_p=1.0,
            max_tokens=160,
        )
    }  # fmt: skip
    return c


def _hugging_face(_: bool) -> ConfigDict:
    """GSM8K from a checkpoint: 64 prompts x 16 completions of at most 1,024 tokens a step."""
    c = defaults.default_config("rl-hf", "rl")
    c.update(_gsm8k_rl())
    c.init["from"] = ""
    c.tokenizer.kind = c.chat.template = "checkpoint"
    c.mesh.remat = "full"
    c.rollout.update(num_prompts=64, num_generations=16, max_tokens=1024, slots=1024)
    c.train.update(steps=100, length=2048, updates=4, algorithm="dapo")
    c.train.optimizer.update(learning_rate=3e-6, warmup_steps=20)
    c.run.save_every, c.log.every = 25, 1
    c.run.export_dtype = "bfloat16"
    c.eval.rows = 1024
    c.eval.sets = {"gsm8k": defaults.jsonl_eval("gsm8k/test.jsonl.gz", limit=1319, num_samples=4)}
    return c


def _gsm8k_rl() -> dict:
    rl = defaults.rl_config()
    rl["data"]["sources"] = {
        "gsm8k": defaults.prompts(
            name="gsm8k",
            path="gsm8k/train.jsonl.gz",
            prompt_field="question",
            answer_field="answer",
            answer_kind="hashes",
        )
    }
    rl["rewards"] = {
        "accuracy": defaults.reward("math", weight=1.0),
        "format": defaults.reward("format", weight=0.1),
    }
    return rl


def _countdown(_: bool) -> ConfigDict:
    """Three numbers up to 99: a warm-up on generated search traces, then RL on TinyZero's problems.

    The warm-up is cut short on purpose: after 110 updates the model knows the form of a search and
    solves one problem in thirty; the rest is for RL.
    """
    c = defaults.default_config("rl-countdown", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261)
    prompt = "{numbers}->{target}:"
    warm_up = defaults.stage_config()
    warm_up["data"].update(
        sources={
            "countdown": defaults.source(
                name="countdown",
                kind="countdown",
                rendering="search_cot",
                split="train",
                prompt_template=prompt,
                countdown={"num_numbers": 3, "num_train": 1_000_000},
            )
        },
        rows=72,
        length=160,
        packing="per_batch",
        examples_per_batch=96,
    )
    warm_up["train"]["steps"] = 110
    warm_up["train"]["optimizer"].update(
        name="muon", learning_rate=6e-3, weight_decay=0.05, warmup_steps=40
    )

    def problems(split: str) -> dict:
        return defaults.prompts(
            name="countdown",
            kind="countdown",
            path="countdown/train.jsonl.gz",
            split=split,
            prompt_template=prompt,
            countdown={"num_numbers": 3},
        )

    rl = defaults.rl_config()
    rl["init"]["from"] = "@sft"
    rl["data"]["sources"] = {"countdown": problems("train")}
    rl["rewards"] = {"accuracy": defaults.reward("countdown")}
    rl["rollout"].update(num_prompts=48, num_generations=8, max_tokens=160, slots=512)
    rl["train"].update(steps=60, algorithm="dapo", updates=4, length=192, rows_multiple=16)
    rl["train"]["mask_truncated_completions"] = False  # to search within 160 tokens is the task
    rl["train"]["optimizer"].update(learning_rate=2e-4, warmup_steps=10)
    c.stages = {"sft": warm_up, "rl": rl}
    c.run.save_every, c.log.every = 40, 1
    c.eval.rows = 512
    c.eval.sets = {
        "countdown": defaults.prompts_eval(
            problems("test"), defaults.reward("countdown"), num_samples=4, max_tokens=160,
            temperature=1.0, top_p=1.0, limit=400,
        )
    }  # fmt: skip
    return c
