"""The valley: what few long chains of thought do to a small model, and what many do.

  python -m jaxreason.launch --config=study_valley          under 90 minutes on 2 CPU cores
  python -m jaxreason.launch --config=study_valley:smoke    the same grid in little

After Luo et al. (EMNLP 2025, arXiv 2506.07712): models below 3B lose accuracy when they are tuned
on 8k long chains, and gain with 128k. There, 8k meant batches of 8 and 128k batches of 128: the
number of updates was held and the batch grew with the data. So there is a second arm here, of one
batch at every scale, where the smallest scale has few updates.

Everything is fixed beforehand. Two models, of 0.3M parameters (mini) and 0.8M (tiny), read bytes
and answer expressions of 2 to 4 operations. Each is first taught by short chains (one step a line)
on 51,200 expressions: the `start` of every arm, drawn as a level line. Then, from that start and on
expressions that it has not seen, 2 epochs (the paper's at its largest scale; 4 at its smallest) on

  long      chains with slips, corrections and checks, and for half of them a review of all steps
  short     the chains of the start, on the same expressions
  pruned    the long chains, each cut to the shortest prefix from which the model that learnt the
            most long chains of that seed answers right (arXiv 2505.18440)
  one batch the long chains, in batches of 32 at every scale: 6 updates at the smallest, 192 at the
            largest
  a tenth of the rate  the long chains as in `long`, more gently
  base      the long chains from the pretrained model, which has seen no chain: another question

at scales of 96 expressions to 3,072, in batches of scale / 48, which is 96 updates at every scale.
Beyond this grid, whose runs take 90 seconds at most, `long` and `one batch` have 6,144 too.
The learning rate is the start's own at every scale; half of it, and AdamW at 1e-3, taught less
(mini, one seed, 4 epochs of 4,096 long chains: 0.53, 0.41 and 0.27). The seeds differ in the
expressions drawn and in their order; the 400 test expressions stay. Then reinforcement learning,
the same for each (mini), from the start and from the long chains of the smallest and of the largest
scale.

`:mini` and `:tiny` are halves of the grid, for two processes side by side: such small products keep
one core busy. Whichever way, the last run of `study_valley` itself writes the report of all.

Finished cells are docs/study/valley/*.json, and the report is beside them.

`:paper` is the same question at the paper's size, on GPUs: Qwen2.5-Instruct of 0.5B, 1.5B and 3B,
the arms of configs/long_cot.py on 8k to 220k problems of OpenR1-Math-220k, 8k in the batch of 128k,
8k and 128k pruned, MATH500 and expressions of 5 to 15 operations, and GRPO (prompts of MATH,
math/train.jsonl, 1,024 a step) from the model itself, from 8k and from 128k at 0.5B. It has
not been run; what it takes is estimated in docs/recipes.md.
"""

from ml_collections import ConfigDict

from jaxreason.launch import load_config
from jaxreason.recipes import defaults

PROMPT = "{expression}="
MODELS = {
    "mini": dict(num_layers=3, embed_dim=96, mlp_dim=288, num_heads=3, num_kv_heads=1),
    "tiny": {},
}
SCALES = (96, 384, 1536, 3072)
BEYOND = 6144
UPDATES, EPOCHS, ONE_BATCH = 96, 2, 32
RL_MODEL = "mini"


def get_config(arg: str = "") -> ConfigDict:
    if arg == "paper":
        return _paper()
    if arg not in ("", "smoke", *MODELS):
        raise ValueError(
            f"--config=study_valley:{arg}: the argument is nothing, smoke, paper or a model: "
            f"{', '.join(MODELS)}"
        )
    smoke = arg == "smoke"
    scales, updates = ((8, 32), 2) if smoke else (SCALES, UPDATES)
    has_rl = arg in ("", "smoke", RL_MODEL)
    rl_arms = tuple(f"RL from long {scale}" for scale in (scales[0], scales[-1]))
    of_rl = (("RL from start", "start"), *((arm, "RL from start") for arm in rl_arms))
    c = defaults.study_config(
        "study_valley" + ("_smoke" if smoke else ""),
        folder="runs/study_valley_smoke" if smoke else "docs/study/valley",
        title="Through the valley, on arithmetic",
        x="expressions",
        panel="model",
        line="arm",
        compare=(
            ("one batch", "long"),
            ("a tenth of the rate", "long"),
            ("pruned", "long"),
            *(of_rl if has_rl else ()),
        ),
    )
    one_batch = 8 if smoke else ONE_BATCH
    for model in (arg,) if arg in MODELS else MODELS:
        start = f"{model}-start"
        c.cells[start] = defaults.cell(_start(model, smoke), model=model, arm="start")
        for scale in scales if smoke else (*scales, BEYOND):
            ends = scale in (scales[0], scales[-1], BEYOND)
            for seed in range(3 if ends and not smoke else 1):
                facts = dict(model=model, expressions=scale)
                name = f"{model}-%s-{scale}-{seed}"
                batch = scale * EPOCHS // updates
                short, in_grid = f"{start}@short", scale != BEYOND
                arms = {"long": {"sft": _sft("long_cot", short, scale, batch)}}
                if in_grid:
                    arms["short"] = {"sft": _sft("short_cot", short, scale, batch)}
                if ends:
                    arms["one batch"] = {"sft": _sft("long_cot", short, scale, one_batch)}
                if ends and in_grid:
                    gentle = _sft("long_cot", short, scale, batch, rate=0.1)
                    arms["a tenth of the rate"] = {"sft": gentle}
                    arms["base"] = {"sft": _sft("long_cot", f"{start}@pretrain", scale, batch)}
                    arms["pruned"] = {
                        "prune": _prune(f"{model}-long-{scales[-1]}-{seed}@sft"),
                        "sft": _sft("pruned", short, scale, batch),
                    }
                for arm, stages in arms.items():
                    config = _cell(scale, seed, seed + 1, smoke, stages)
                    cell = defaults.cell(config, arm=arm, **facts)
                    c.cells[name % arm.replace(" ", "_")] = cell
    starts = ["start@short", *(f"long-{scale}-0@sft" for scale in (scales[0], scales[-1]))]
    for arm, source in zip(("RL from start", *rl_arms), starts) if has_rl else ():
        stages = {"rl": _rl(f"{RL_MODEL}-{source}", smoke)}
        name = f"{RL_MODEL}-{arm.replace(' ', '-')}"
        config = _cell(8192, 0, 4, smoke, stages)
        c.cells[name] = defaults.cell(config, model=RL_MODEL, arm=arm)
    return c


def _cell(num_train: int, seed: int, train_seed: int, smoke: bool, stages: dict) -> ConfigDict:
    """A pipeline on `num_train` expressions; the start has learnt those of train_seed 0."""
    c = defaults.default_config("cell", "pipeline")
    c.seed = seed
    c.chat.template = "plain"
    c.arithmetic = defaults.arithmetic_config(
        min_operations=2,
        max_operations=4,
        max_operand=12,
        cap=200,
        num_train=num_train,
        num_test=40 if smoke else 400,
        train_seed=train_seed,
        recheck_share=0.3,
        mistake_share=0.1,
        review_share=0.5,
    )
    c.stages = stages
    c.run.update(export=False, keep=1, save_every=10_000)
    c.log.every = 100
    c.eval.rows = 640
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template=PROMPT, num_samples=4, max_tokens=224
        )
    }
    return c


def _start(model: str, smoke: bool) -> ConfigDict:
    """Pretrained on expressions and values, then taught by short chains: quickstart's way."""
    steps = (40, 60) if smoke else (120, 400)
    stages = {
        "pretrain": _stage("text", "random", rows=48, length=160, examples=512),
        "short": _stage("short_cot", "@pretrain", rows=48, length=160, examples=128),
    }
    for stage, number in zip(stages.values(), steps, strict=True):
        stage["train"]["steps"] = number
        stage["train"]["optimizer"].update(
            name="muon", learning_rate=6e-3, weight_decay=0.05, warmup_steps=min(50, number // 4)
        )
    c = _cell(8_000 if smoke else 51_200, 0, 0, smoke, stages)
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261, **MODELS[model])
    return c


def _sft(rendering: str, start: str, scale: int, batch: int, rate: float = 1.0) -> dict:
    """EPOCHS over the data; the learning rate is the same at every scale, as in the paper."""
    # A long chain has 78 tokens on average and 210 at most, a short one 36.
    rows = -(-batch * (40 if rendering == "short_cot" else 85) // 224) + 3
    stage = _stage(rendering, start, rows=rows, length=224, examples=batch)
    updates = stage["train"]["steps"] = scale * EPOCHS // batch
    stage["train"]["optimizer"].update(
        name="muon",
        learning_rate=6e-3 * rate,
        weight_decay=0.0,
        warmup_steps=min(6, updates // 2),
    )
    return stage


def _stage(rendering: str, start: str, rows: int, length: int, examples: int) -> dict:
    stage = defaults.stage_config()
    stage["init"]["from"] = start
    stage["data"].update(
        sources={"arithmetic": _source(rendering)},
        rows=rows,
        length=length,
        packing="per_batch",
        examples_per_batch=examples,
    )
    return stage


def _source(rendering: str) -> dict:
    if rendering == "pruned":
        return defaults.kept_source("pruned", "prune")
    return defaults.source(
        name="arithmetic",
        kind="arithmetic",
        rendering=rendering,
        split="train",
        prompt_template="" if rendering == "text" else PROMPT,
    )


def _prune(student: str) -> dict:
    stage = defaults.prune_config(method="binary", max_tokens=8, rows=640)
    stage["init"]["from"] = student
    stage["data"]["sources"] = {"arithmetic": _source("long_cot")}
    stage["segment"].update(rules=("line",), min_chars=0)
    return stage


def _rl(start: str, smoke: bool) -> dict:
    stage = defaults.rl_config()
    stage["init"]["from"] = start
    stage["data"]["sources"] = {
        "arithmetic": defaults.prompts(
            name="arithmetic",
            kind="arithmetic",
            path="arithmetic",
            split="train",
            prompt_template=PROMPT,
        )
    }
    stage["rollout"].update(
        num_prompts=32, num_generations=8, max_tokens=224, slots=256, temperature=0.7
    )
    stage["train"].update(
        steps=2 if smoke else 12, algorithm="dapo", updates=2, length=256, rows_multiple=16
    )
    # A chain that runs into the limit has lost its way, and learns so.
    stage["train"]["mask_truncated_completions"] = False
    stage["train"]["optimizer"].update(learning_rate=1e-4, warmup_steps=4)
    return stage


# --- at the paper's size --------------------------------------------------------------------------

PAPER_MODELS = ("0.5B", "1.5B", "3B")
PAPER_SCALES = {"8k": 8, "16k": 16, "32k": 32, "64k": 64, "128k": 128, "220k": 220}


def _paper() -> ConfigDict:
    c = defaults.study_config(
        "study_valley_paper",
        folder="runs/study_valley_paper/found",
        title="Through the valley, on mathematics",
        x="thousands",
        panel="model",
    )
    c.study.set = "math500"
    for model in PAPER_MODELS:
        short = model.replace(".", "_")
        for arm, scale in {**PAPER_SCALES, "8k-large-batch": 8}.items():
            config = load_config(f"long_cot:{arm}")
            config.stages.sft.init["from"] = f"hf://Qwen/Qwen2.5-{model}-Instruct"
            name = "one batch" if arm == "8k-large-batch" else "long"
            facts = dict(arm=name, model=model, thousands=scale)
            c.cells[f"{short}-{arm}"] = defaults.cell(config, **facts)
        for arm in ("8k", "128k"):
            config = _paper_pruned(f"{short}-{arm}", arm, model)
            facts = dict(arm="pruned", model=model, thousands=PAPER_SCALES[arm])
            c.cells[f"{short}-{arm}-pruned"] = defaults.cell(config, **facts)
    for start in ("hf://Qwen/Qwen2.5-0.5B-Instruct", "0_5B-8k@sft", "0_5B-128k@sft"):
        name = start.partition("@")[0] if "@" in start else "0_5B-start"
        facts = dict(arm=f"RL from {name.partition('-')[2]}", model="0.5B")
        c.cells[f"{name}-rl"] = defaults.cell(_paper_rl(start), **facts)
    return c


def _paper_pruned(of: str, arm: str, model: str) -> ConfigDict:
    """The traces of a cell, pruned for the model that learnt them, and its training again."""
    config = load_config(f"long_cot:{arm}")
    traces = config.stages.sft.data.sources.subset.to_dict()
    prune = defaults.prune_config(max_tokens=1024)
    prune["init"]["from"] = f"{of}@sft"
    prune["data"]["sources"] = {"subset": {**traces, "path": f"{of}@subset"}}
    prune["rewards"]["accuracy"]["kind"] = "math_verify"
    sft = config.stages.sft
    sft.init["from"] = f"hf://Qwen/Qwen2.5-{model}-Instruct"
    sft.data.sources = {"pruned": {**traces, "name": "pruned", "path": "@prune"}}
    config.stages = {"prune": prune, "sft": sft}
    return config


def _paper_rl(start: str) -> ConfigDict:
    """GRPO as in the paper: right or wrong alone, KL 1e-4, 100 steps of 1,024 prompts."""
    config = load_config("long_cot:8k")
    stage = defaults.rl_config()
    stage["init"]["from"] = start
    problems = defaults.prompts(
        name="math",
        path="math/train.jsonl",
        prompt_template="{problem}\nPlease reason step by step, and put your final answer within "
        "\\boxed{{}}.",
        answer_field="answer",
    )
    stage["data"]["sources"] = {"math": problems}
    stage["rewards"]["accuracy"]["kind"] = "math_verify"
    stage["rollout"].update(
        num_prompts=1024,
        num_generations=8,
        max_tokens=8192,
        slots=1024,
        filter_zero_std=False,
    )
    stage["train"].update(steps=100, algorithm="grpo", updates=4, length=10_240, rows_multiple=64)
    stage["train"]["policy"].update(kl="k3", beta=1e-4)
    stage["train"]["optimizer"].update(learning_rate=5e-7)
    config.stages = {"rl": stage}
    config.mesh.microbatches = 8
    return config
