"""A one-layer teacher, its stored top k, and students of it: stored and online; seconds."""

from traces_config import MODEL, SUMS

from jaxreason.recipes import defaults

TEMPERATURE = 1.3


def get_config(arg: str = ""):
    c = defaults.default_config("topk-test", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", **MODEL)
    c.arithmetic = defaults.arithmetic_config(
        min_operations=1, max_operations=1, max_operand=6, operators="+", num_train=24, num_test=2
    )
    topk = defaults.topk_config(k=261, temperature=TEMPERATURE, part_documents=5, rows=4)
    topk["data"].update(_data())
    topk["init"]["from"] = "@teacher"
    start, teacher = (_training(steps, "random") for steps in (1, 60))
    stored, online = (_training(20, "@start", temperature=TEMPERATURE) for _ in range(2))
    stored["train"]["objective"] = "distill_topk"
    stored["data"]["teacher"] = "@topk"
    online["train"]["objective"] = "distill"
    online["train"]["teacher"]["from"] = "@teacher"
    # The student is named before what it reads: the run puts them in order.
    c.stages = {"start": start, "stored": stored, "online": online, "teacher": teacher,
                "topk": topk}  # fmt: skip
    if arg == "topk":
        c.stages = {"topk": topk}
        c.model = defaults.model_config()  # the teacher brings its shape
    c.run.export = False
    c.log.every = 1
    return c


def _data() -> dict:
    return dict(sources={"a": defaults.source(**SUMS, rendering="answer")}, rows=8, length=64)


def _training(steps: int, start: str, **distill) -> dict:
    stage = defaults.stage_config()
    stage["data"].update(_data())
    stage["init"]["from"] = start
    stage["train"]["steps"] = steps
    stage["train"]["distill"].update(distill)
    stage["train"]["optimizer"].update(learning_rate=1e-2, schedule="constant")
    return stage
