"""A one-layer teacher that learns sums by heart, its traces, and a student; seconds on two cores.

`:traces` is the stage of traces alone.
"""

from jaxreason.recipes import defaults

MODEL = dict(
    vocab_size=264, num_layers=1, embed_dim=32, mlp_dim=64, num_heads=4, num_kv_heads=2, head_dim=8
)
SUMS = dict(name="a", kind="arithmetic", split="train", prompt_template="{expression}=")


def get_config(arg: str = ""):
    c = defaults.default_config("traces-test", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", **MODEL)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1, max_operations=1, max_operand=6, operators="+", num_train=24, num_test=2
    )
    traces = defaults.traces_config(save_every=5, rows=32)
    traces["data"]["sources"] = {"a": defaults.prompts(**SUMS, path="arithmetic")}
    traces["sampling"].update(max_tokens=8, num_samples=4)
    if arg == "traces":
        c.model = defaults.model_config()  # the teacher's; of a server's student nothing is made
        c.stages = {"traces": traces}
    else:
        traces["init"]["from"] = "@teacher"
        teacher, student = (_training(source) for source in (
            defaults.source(**SUMS, rendering="answer"),
            defaults.source(name="t", path="@traces", prompt_field="question",
                            response_field="response"),
        ))  # fmt: skip
        c.stages = {"teacher": teacher, "traces": traces, "student": student}
    c.run.export = False
    c.log.every = 20
    return c


def _training(source: dict) -> dict:
    stage = defaults.stage_config()
    # Grain's shuffle takes a millisecond a record of so few.
    stage["data"].update(sources={source["name"]: source}, rows=8, length=64, shuffle=False)
    stage["train"]["steps"] = 80
    stage["train"]["optimizer"].update(learning_rate=1e-2, schedule="constant")
    return stage
