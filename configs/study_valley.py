"""The valley: what few long chains of thought do to a small model, and what many do.

  python -m jaxreason.launch --config=study_valley          about an hour on 2 CPU cores
  python -m jaxreason.launch --config=study_valley:smoke    the same grid in little, 10 minutes

After Luo et al. (EMNLP 2025, arXiv 2506.07712): models below 3B lose accuracy when they are tuned
on 8k long chains, and gain with 128k. There, 8k meant batches of 8 and 128k batches of 128: the
number of updates was held and the batch grew with the data. So there is a second arm here, of one
batch at every scale, where the smallest scale has few updates.

Everything is fixed beforehand. Two models, of 0.3M parameters (mini) and 0.8M (tiny), read bytes
and answer expressions of 2 to 4 operations. Each is first taught by short chains (one step a line)
on 51,200 expressions: the `start` of every arm, drawn as a level line. Then, from that start, 4
epochs of AdamW at one learning rate on

  long      chains with slips, corrections, checks, and for 7 of 10 one or two reviews of all steps
  short     the chains of the start, on the same expressions
  pruned    the long chains, each cut to the shortest prefix from which the model that learnt the
            long chains of that scale answers right (arXiv 2505.18440)
  one batch the long chains, in batches of 32 at every scale
  base      the long chains from the pretrained model, which has seen no chain: another question

at scales of 64 expressions to 4,096, in batches of scale / 32, which is 128 updates at every scale.
The seeds differ in the expressions drawn and in their order; the 400 test expressions stay. Then
reinforcement learning, the same for each, from the start and from the long chains of the smallest
and of the largest scale.

Finished cells are docs/study/valley/*.json, and the report is beside them.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

PROMPT = "{expression}="
MODELS = {
    "mini": dict(num_layers=3, embed_dim=96, mlp_dim=288, num_heads=3, num_kv_heads=1),
    "tiny": {},
}
SCALES = (64, 256, 1024, 4096)
UPDATES, EPOCHS, ONE_BATCH = 128, 4, 32
RL_MODEL = "tiny"


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke"):
        raise ValueError(f"--config=study_valley:{arg}: the argument is nothing or smoke")
    smoke = arg == "smoke"
    c = defaults.study_config(
        "study_valley" + ("_smoke" if smoke else ""),
        title="Through the valley, on arithmetic",
        x="expressions",
        panel="model",
        line="arm",
    )
    if smoke:
        c.study.folder = "runs/study_valley_smoke"
    scales, updates = ((8, 32), 4) if smoke else (SCALES, UPDATES)
    for model in MODELS:
        start = f"{model}-start"
        c.cells[start] = defaults.cell(_start(model, smoke), model=model, arm="start")
        for scale in scales:
            ends = scale in (scales[0], scales[-1])
            for seed in range(3 if ends and not smoke else 1):
                facts = dict(model=model, expressions=scale)
                name = f"{model}-%s-{scale}-{seed}"
                batch = scale * EPOCHS // updates
                make = lambda *stages, scale=scale, seed=seed, model=model: _cell(
                    model, scale, seed, smoke, dict(stages)
                )
                for arm, rendering in (("long", "long_cot"), ("short", "short_cot")):
                    stage = _sft(rendering, f"{start}@short", scale, batch)
                    c.cells[name % arm] = defaults.cell(make(("sft", stage)), arm=arm, **facts)
                if not ends:
                    continue
                prune = _prune(f"{name % 'long'}@sft")
                pruned = _sft("pruned", f"{start}@short", scale, batch)
                c.cells[name % "pruned"] = defaults.cell(
                    make(("prune", prune), ("sft", pruned)), arm="pruned", **facts
                )
                for arm, source, size in (
                    ("one_batch", f"{start}@short", ONE_BATCH),
                    ("base", f"{start}@pretrain", batch),
                ):
                    stage = _sft("long_cot", source, scale, size)
                    named = arm.replace("_", " ")
                    c.cells[name % arm] = defaults.cell(make(("sft", stage)), arm=named, **facts)
    for arm, source in (
        ("RL from start", f"{RL_MODEL}-start@short"),
        (f"RL from long {scales[0]}", f"{RL_MODEL}-long-{scales[0]}-0@sft"),
        (f"RL from long {scales[-1]}", f"{RL_MODEL}-long-{scales[-1]}-0@sft"),
    ):
        stages = {"rl": _rl(source, smoke)}
        name = f"{RL_MODEL}-{arm.replace(' ', '-')}"
        config = _cell(RL_MODEL, 8192, 0, smoke, stages)
        c.cells[name] = defaults.cell(config, model=RL_MODEL, arm=arm)
    return c


def _cell(model: str, num_train: int, seed: int, smoke: bool, stages: dict) -> ConfigDict:
    """A pipeline on `num_train` expressions, those of the seed."""
    c = defaults.default_config("cell", "pipeline")
    c.seed = seed
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261, **MODELS[model])
    c.arithmetic = defaults.arithmetic_config(
        min_operations=2,
        max_operations=4,
        max_operand=12,
        cap=200,
        num_train=num_train,
        num_test=40 if smoke else 400,
        train_seed=seed,
        recheck_share=0.5,
        mistake_share=0.2,
        review_share=0.7,
        max_reviews=2,
    )
    c.stages = stages
    c.run.update(export=False, keep=1, save_every=10_000)
    c.log.every = 100
    c.eval.rows = 640
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template=PROMPT, num_samples=4, max_tokens=280
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
    return _cell(model, 8_000 if smoke else 51_200, 0, smoke, stages)


def _sft(rendering: str, start: str, scale: int, batch: int) -> dict:
    """EPOCHS over the data; the learning rate is the same at every scale, as in the paper."""
    rows = -(-batch * 150 // 288) + 2  # a long chain has 115 tokens on average, 288 at most
    stage = _stage(rendering, start, rows=rows, length=288, examples=batch)
    updates = stage["train"]["steps"] = scale * EPOCHS // batch
    stage["train"]["optimizer"].update(
        name="adamw", learning_rate=1e-3, weight_decay=0.0, warmup_steps=min(6, updates // 2)
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
        return defaults.source(
            name="pruned",
            path="@prune",
            prompt_field="question",
            reasoning_field="reasoning",
            response_field="response",
        )
    return defaults.source(
        name="arithmetic",
        kind="arithmetic",
        rendering=rendering,
        split="train",
        prompt_template="" if rendering == "text" else PROMPT,
    )


def _prune(student: str) -> dict:
    stage = defaults.prune_config(max_tokens=8, rows=640)
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
        num_prompts=64, num_generations=8, max_tokens=280, slots=512, temperature=0.7
    )
    stage["train"].update(
        steps=2 if smoke else 20, algorithm="dapo", updates=2, length=320, rows_multiple=16
    )
    # A chain that runs into the limit has lost its way, and learns so.
    stage["train"]["mask_truncated_completions"] = False
    stage["train"]["optimizer"].update(learning_rate=1e-4, warmup_steps=4)
    return stage
