"""Fine-tuning on long chains of thought: how many does a small model need?

  python -m jaxreason.launch --config=long_cot:32k    and 8k, 16k, 64k, 128k, 220k, 8k-large-batch
  python -m jaxreason.launch --config=long_cot:s1k    and s1k-1.1, curated
  python -m jaxreason.launch --config=long_cot:smoke  generated arithmetic, a minute on 2 CPU cores

8k to 220k (nothing: 32k) are the arms of "Through the Valley" (arXiv 2506.07712, Table 2): that
many problems of OpenR1-Math-220k at random, one correct trace each, those above 16,384 tokens
dropped and counted, AdamW at 5e-5, cosine, 5 % warm-up. There the batch grows with the data (8 to
128), so that every arm has 3,000 to 4,000 updates and "8k" is also "batch 8". 8k-large-batch takes
them apart: 8k problems, four epochs, at the batch of 128k: 250 updates. At 3B and below the paper's
arms of 8k to 16k end worse than they started.

s1k and s1k-1.1 are s1's thousand (arXiv 2501.19393): 5 epochs of batch 16 at 1e-5, rows of 32,768.
curated makes such a thousand of OpenR1: what two models of Qwen2.5 solve is dropped, and of each
problem type long traces come first. --config.stages.subset.method=random with
--config.stages.subset.solvers="()" is its baseline.

Data: Parquet or JSONL files as they are published, under $JAXREASON_DATA (default ../shared/data)
or anywhere: openr1/*.parquet is --config.stages.subset.data.sources.openr1.path, s1k/*.parquet and
s1k-1.1/*.parquet are --config.stages.sft.data.sources.s1k.path; of evaluation math500/test.jsonl
(problem, answer) is --config.eval.sets.math500.prompts.path. A file that is not there is one line
before anything is loaded. 220k takes all that there are.

The start is hf://Qwen/Qwen2.5-1.5B-Instruct; --config.stages.sft.init.from takes another, as
hf://Qwen/Qwen2.5-0.5B-Instruct or hf://Qwen/Qwen3-0.6B-Base. An update has exactly `batch` traces,
packed by best fit into rows: as many as traces up to a batch of 32, fewer above, where too many
long ones at once do not happen (a mean of 8,000 tokens would). One row a device of eight; on one
GPU set --config.mesh.microbatches to the rows, for 3B --config.mesh.shape.fsdp=8 and shape.data=1.

Not run at these sizes yet (no GPU, no copy of OpenR1 here). :smoke has been: it shows that the
stages fit together and that the loss falls, nothing about the question.
"""

from ml_collections import ConfigDict

from jaxreason.recipes import defaults

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
LENGTH = 16_384
# arm: problems, epochs, batch, rows of LENGTH
ARMS = {
    "8k": (8_000, 4, 8, 8),
    "16k": (16_000, 4, 16, 16),
    "32k": (32_000, 4, 32, 32),
    "64k": (64_000, 3, 64, 48),
    "128k": (128_000, 3, 128, 80),
    "220k": (220_000, 2, 128, 80),
    "8k-large-batch": (8_000, 4, 128, 80),
}
S1K = ("s1k", "s1k-1.1")
S1_TRAINING = (1_000, 5, 16)  # problems, epochs, batch


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "smoke", "curated", *ARMS, *S1K):
        known = ", ".join(("smoke", *ARMS, *S1K))
        raise ValueError(f"--config=long_cot:{arg}: the argument is nothing, {known} or curated")
    if arg == "smoke":
        return _smoke()
    arg = arg or "32k"
    c = defaults.default_config(f"long_cot-{arg}", "pipeline")
    c.tokenizer.kind = "checkpoint"
    c.chat.template = "checkpoint"
    c.model = defaults.model_config()
    c.mesh.remat = "full"
    c.run.export_dtype = "bfloat16"
    c.run.save_every = 250
    _evaluated(c)
    if arg in ARMS:
        _arm(c, *ARMS[arg], all_there_are=arg == "220k")
    elif arg == "curated":
        _arm(c, *S1_TRAINING, rows=16)  # of long traces two may not fit into a row
        _curated(c.stages["subset"])
        _at_s1s_rate(c.stages["sft"])
    else:
        source = defaults.source(
            name="s1k", kind=arg, path=f"{arg}/*.parquet", prompt_template="{question}" + BOXED
        )
        c.stages = {"sft": _training(source, *S1_TRAINING, rows=8, length=2 * LENGTH)}
        _at_s1s_rate(c.stages["sft"])
    c.mesh.microbatches = c.stages.sft.data.rows // 8
    return c


def _arm(
    c: ConfigDict,
    problems: int,
    epochs: int,
    batch: int,
    rows: int,
    all_there_are: bool = False,
) -> None:
    """A subset of OpenR1, and the training on it."""
    subset = defaults.curate_config(
        method="s1k" if all_there_are else "random", limit=0 if all_there_are else problems
    )
    subset["data"]["sources"] = {
        "openr1": defaults.source(
            name="openr1",
            kind="openr1",
            path="openr1/*.parquet",
            prompt_template="{problem}" + BOXED,
            choose="random",  # of the correct traces of a problem
        )
    }
    subset["quality"]["max_tokens"] = LENGTH
    training = _training(_subset(), problems, epochs, batch, rows, LENGTH)
    c.stages = {"subset": subset, "sft": training}


def _subset() -> dict:
    return defaults.kept_source("subset", "subset")


def _training(source: dict, problems: int, epochs: int, batch: int, rows: int, length: int) -> dict:
    stage = defaults.stage_config()
    stage["init"]["from"] = "hf://Qwen/Qwen2.5-1.5B-Instruct"
    stage["data"].update(
        sources={source["name"]: source},
        packing="per_batch",
        examples_per_batch=batch,
        rows=rows,
        length=length,
        truncation="drop",
    )
    steps = stage["train"]["steps"] = defaults.updates(problems, epochs, batch)
    stage["train"]["optimizer"].update(
        learning_rate=5e-5,
        warmup_steps=round(0.05 * steps),
        final_scale=0.0,
        b2=0.999,
        weight_decay=0.0,
    )
    return stage


def _at_s1s_rate(stage: ConfigDict) -> None:
    stage["train"]["optimizer"].update(learning_rate=1e-5, b2=0.95, weight_decay=1e-4)


def _curated(subset: ConfigDict) -> None:
    """Too hard for either of two models, and of each type of problem the long traces."""
    subset.update(
        method="s1k",
        domain_field="problem_type",
        answer_field="answer",
        solvers=("hf://Qwen/Qwen2.5-7B-Instruct", "hf://Qwen/Qwen2.5-1.5B-Instruct"),
        max_tokens=4096,
    )
    subset.quality.update(without=("![", "[asy]"))
    subset.held_out.update(path="math500/test.jsonl", field="problem")
    subset.deduplicate.threshold = 0.8
    subset.rewards["accuracy"].kind = "math_verify"


def _evaluated(c: ConfigDict) -> None:
    """MATH500, and the paper's probe of how errors add up, which is generated."""
    sampled = dict(num_samples=4, temperature=0.6, top_p=0.95, max_tokens=LENGTH)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=5, max_operations=15, max_operand=100, num_train=1, num_test=400
    )
    math500 = defaults.prompts(
        name="math500",
        path="math500/test.jsonl",
        prompt_template="{problem}" + BOXED,
        answer_field="answer",
    )
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(**sampled),
        "math500": defaults.prompts_eval(
            math500, defaults.reward("math_verify"), **sampled | {"limit": 500}
        ),
    }


def _smoke() -> ConfigDict:
    """Generated chains, half of them drawn, and a model that learns them by bytes."""
    c = defaults.default_config("long_cot-smoke", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", vocab_size=261)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1, max_operations=2, max_operand=9, cap=100, num_train=400, num_test=20
    )
    subset = defaults.curate_config(method="random", limit=200, domain_field="num_operations")
    subset["data"]["sources"] = {
        "arithmetic": defaults.source(
            name="arithmetic",
            kind="arithmetic",
            rendering="long_cot",
            split="train",
            prompt_template="{expression}=",
        )
    }
    subset["quality"]["max_tokens"] = 100
    training = _training(_subset(), 200, 2, 8, 4, 160)
    training["init"]["from"] = "random"
    training["train"]["optimizer"].update(name="muon", learning_rate=6e-3)
    c.stages = {"subset": subset, "sft": training}
    c.run.save_every, c.log.every = 25, 5
    c.eval.rows = 20
    c.eval.sets = {
        "arithmetic": defaults.arithmetic_eval(
            prompt_template="{expression}=", max_tokens=48, limit=20, num_samples=1
        )
    }
    return c
