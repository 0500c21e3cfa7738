"""summary.json is whole and strict; report.html shows a workdir on one page and escapes it."""

import html.parser
import json
import math

import pytest

from jaxreason.report import plots
from jaxreason.report.html import duration, write_report
from jaxreason.report.summary import read_metrics, write_summary

STAGES = ("pretrain", "sft_answer", "sft_cot")
HOSTILE = "<script>alert(1)</script>&\"'"


def evals(avg, tokens):
    return {
        "avg@4": avg,
        "avg@4_ci": [avg - 0.04, avg + 0.03],
        "pass@4": min(1.0, avg + 0.1),
        "maj@8": avg + 0.02,
        "mean_tokens": tokens,
        "truncated": 0.01,
        "token_efficiency": avg / tokens,
        "by_operations": {
            str(n): {"avg@4": max(avg - 0.1 * i, 0), "count": 134, "mean_tokens": tokens}
            for i, n in enumerate((2, 3, 4))
        },
    }


def sample(stage, prompt, correct):
    completions = [
        {"text": HOSTILE, "num_tokens": 5, "truncated": False, "correct": right}
        for right in correct
    ]
    return {
        "stage": stage,
        "set": "arithmetic",
        "prompt": prompt,
        "answer": "7",
        "group": "2",
        "completions": completions,
    }


def fill(workdir, stages=STAGES):
    """A workdir like the quickstart's."""
    config = {"config": {"name": "quickstart", "note": HOSTILE}, "parameters": 812_345}
    (workdir / "config.json").write_text(json.dumps(config))
    write_summary(
        workdir,
        "done",
        564.2,
        {s: {"steps": 1200, "tokens": 3_456_789.0, "final_loss": 0.4321} for s in stages},
        {
            s: {"arithmetic": evals(0.1 + 0.3 * i, 4 + 15 * i), "books": {"bits_per_byte": 2.5}}
            for i, s in enumerate(stages)
        },
        [],
    )
    with (workdir / "metrics.jsonl").open("w") as file:
        for stage in stages:
            for step in range(20, 1201, 20):
                loss = 2.5 * math.exp(-step / 300) + 0.3 + 0.05 * math.sin(step)
                record = {"stage": stage, "step": step, "time": 1.0, "loss": loss}
                file.write(json.dumps(record) + "\n")
        record = {"stage": f"{stages[0]}.validation", "step": 600, "time": 1.0, "loss": 0.7}
        file.write(json.dumps(record) + "\n")
        file.write('{"stage": "pretrain", "st')  # killed here
    with (workdir / "samples.jsonl").open("w") as file:
        for stage in stages:
            for prompt, correct in (("3+4", [True, False]), ("<b>", [False]), ("8-1", [True])):
                file.write(json.dumps(sample(stage, prompt, correct)) + "\n")
    return workdir


def scaling_record(method, n=1, budget=None, **fields):
    tokens = 40.0 * n if method in ("majority", "best_of_n") else 10.0 + (budget or 40.0)
    return {
        "stage": "rl", "set": "arithmetic", "method": method, "n": n, "budget": budget,
        "accuracy": 0.7, "ci": [0.66, 0.75], "mean_tokens": tokens, "mean_thinking": tokens - 6,
        "truncated": 0.0, **fields,
    }  # fmt: skip


SCALING = [
    *(scaling_record(method, n) for method in ("best_of_n", "majority") for n in (1, 2, 4, 8, 16)),
    *(scaling_record("budget", budget=b, wording=w) for w in ("s1", "qwen3") for b in (0, 16, 32)),
    *(scaling_record("waits", n) for n in (0, 1, 2)),
]


def group(step, prompt, rewards):
    completions = [
        {
            "text": f"{HOSTILE}{reward}",
            "reward": reward,
            "num_tokens": 9,
            "truncated": reward < 0,
            "rewards": {"accuracy": float(reward > 0), "format": 1.0},
        }
        for reward in rewards
    ]
    head = {"stage": "rl", "step": step, "prompt": prompt, "answer": "5"}
    return {**head, "completions": completions}


def add_rl(workdir):
    """A stage of reinforcement learning and its scaling, as the loop and the recipes log them."""
    summary = json.loads((workdir / "summary.json").read_text())
    stages = summary["stages"] | {"rl": {"steps": 40, "skipped": 1}}
    both = summary["evals"] | {"rl": {"arithmetic": evals(0.88, 41.0)}}
    write_summary(workdir, "done", 700.0, stages, both, SCALING)
    whole = (workdir / "metrics.jsonl").read_text().rsplit("\n", 1)[0] + "\n"
    lines = []
    for step in range(1, 41):
        line = {"stage": "rl", "step": step, "time": 1.0, "loss": -0.01, "reward": 0.5 + step / 99}
        line |= {"completions/mean_length": 60.0 - step, "entropy": 0.3}
        if step % 20 == 0:
            line |= {"eval/arithmetic/avg@4": 0.8, "eval/arithmetic/pass@4": 0.9}
        lines.append(line if step != 7 else {"stage": "rl", "step": 7, "time": 1.0})  # skipped
    (workdir / "metrics.jsonl").write_text(whole + "".join(json.dumps(x) + "\n" for x in lines))
    with (workdir / "samples.jsonl").open("a") as file:
        for step in (1, 10, 20, 30, 40):
            for i in range(6):
                line = group(step, f"{step}+{i}=", [i / 5, i / 5 - 0.2])
                file.write(json.dumps(line) + "\n")
    return workdir


class Page(html.parser.HTMLParser):
    """Counts elements and checks that they nest."""

    def __init__(self, text):
        super().__init__()
        self.count, self.open, self.attributes = {}, [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += [(tag, *attr) for attr in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_summary_is_the_contract_and_strict_json(tmp_path):
    write_summary(tmp_path, "failed", 12.34567, {"a": {"steps": 3, "final_loss": math.nan}}, {}, [])
    text = (tmp_path / "summary.json").read_text()

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse) == {
        "status": "failed",
        "wall_seconds": 12.346,
        "stages": {"a": {"steps": 3, "final_loss": None}},
        "evals": {},
        "scaling": [],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_summary(tmp_path, "done", 1.0, {}, {}, [])
    with pytest.raises(TypeError):
        write_summary(tmp_path, "done", 1.0, {"a": {"steps": object()}}, {}, [])
    assert json.loads((tmp_path / "summary.json").read_text())["stages"] == {}


def test_metrics_without_a_file_and_with_a_cut_line(tmp_path):
    assert read_metrics(tmp_path) == []
    assert len(read_metrics(fill(tmp_path))) == 3 * 60 + 1


def test_report_shows_everything_and_needs_no_network(tmp_path):
    text = write_report(fill(tmp_path)).read_text()
    page = Page(text)
    assert page.count["svg"] == 4  # by stage, by operations, by tokens, losses
    assert page.count["details"] == 3 * (2 + 2) + 1
    assert page.count["tr"] == 3 * (1 + len(STAGES))
    assert "script" not in page.count and "link" not in page.count and "img" not in page.count
    remote = [a for a in page.attributes if str(a[2]).startswith(("http", "//"))]
    assert all(name.startswith("xmlns") for _, name, _ in remote)
    assert "@import" not in text and "url(http" not in text
    for shown in ("9 min 24 s", "done", "70.0%", "66.0 to 73.0", "bits per byte", "10,370,367"):
        assert shown in text, shown
    assert "812,345 parameters" in text and "config.name" in text
    assert "validation" in text


def test_report_shows_rewards_scaling_and_groups(tmp_path):
    before = Page(write_report(fill(tmp_path)).read_text()).count
    text = write_report(add_rl(tmp_path)).read_text()
    count = Page(text).count
    assert count["svg"] == before["svg"] + 3  # learning, more samples, more thinking
    assert count["details"] == before["details"] + 4 + 1  # groups, the table of points
    assert count["tr"] == before["tr"] + 2 + (1 + 3) + (1 + len(SCALING))  # rl twice, s1, points
    assert "script" not in count and "&lt;script&gt;" in text
    names = "response length|held-out arithmetic|entropy|Test-time scaling of rl on arithmetic"
    values = "thinking budget (qwen3)|≤16|+2|66.0 to 75.0|accuracy 1.00"
    for shown in f"{names}|{values}".split("|"):
        assert shown in text, shown
    curves = text[text.index("<h2>Loss</h2>") : text.index("Reinforcement learning")]
    assert "sft_cot" in curves and ">rl<" not in curves  # a policy gradient's loss says nothing


def test_groups_are_the_best_and_the_worst_of_the_last_steps(tmp_path):
    text = write_report(add_rl(fill(tmp_path))).read_text()
    text = text[text.index("Groups of completions") :]
    prompts = [f"{step}+{i}=" for step, i in ((40, 5), (30, 5), (30, 0), (20, 0))]
    places = [text.index(f"</span>\n{prompt}\n") for prompt in prompts]
    assert places == sorted(places)
    assert text.count("2 completions, rewards") == 4
    assert text.index("<strong>1.00</strong>") < text.index("<strong>0.80</strong>")
    assert "9 tokens, cut off" in text


def test_few_groups_are_shown_once(tmp_path):
    fill(tmp_path)
    with (tmp_path / "samples.jsonl").open("a") as file:
        for i in range(3):
            file.write(json.dumps(group(1, f"1+{i}=", [i / 2, 0.0])) + "\n")
    text = write_report(tmp_path).read_text()
    assert all(text.count(f"<pre>1+{i}=</pre>") == 1 for i in range(3))


@pytest.mark.parametrize("method, s1_rows", [("majority", 0), ("budget", 1 + 2), ("waits", 1 + 1)])
def test_one_way_to_spend_tokens_is_enough_for_a_report(tmp_path, method, s1_rows):
    fill(tmp_path)
    records = [record for record in SCALING if record["method"] == method]
    write_summary(tmp_path, "done", 1.0, {}, {}, records)
    (tmp_path / "metrics.jsonl").unlink()
    page = Page(write_report(tmp_path).read_text())
    assert page.count["svg"] == 1
    assert page.count["tr"] == 1 + len(records) + s1_rows


def test_report_escapes_what_a_model_or_a_config_says(tmp_path):
    text = write_report(fill(tmp_path, (HOSTILE, "b"))).read_text()
    page = Page(text)
    assert "script" not in page.count and page.count["b"] == 2  # the cards' own
    assert "<script" not in text and "&lt;script&gt;" in text


def test_report_is_a_function_of_the_workdir(tmp_path):
    first = write_report(fill(tmp_path)).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_report_of_an_evaluation_alone(tmp_path):
    fill(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "samples.jsonl").unlink()
    metrics = {**evals(0.5, 9.0), "by_operations": {"": {"avg@4": 0.5, "count": 9}}}
    write_summary(tmp_path, "done", 3.0, {}, {"eval": {"gsm8k": metrics}}, [])
    page = Page(write_report(tmp_path).read_text())
    assert page.count["svg"] == 2  # one group: nothing to show by operations
    assert page.count["details"] == 1


def test_colors_belong_to_stages_and_are_distinct():
    palette = plots.Palette(STAGES)
    assert len({palette.color(stage) for stage in STAGES}) == len(STAGES)
    assert plots.Palette([*STAGES, "new"]).color("sft_cot") == palette.color("sft_cot")


def test_smoothing_keeps_a_line_and_leaves_out_what_is_not_finite():
    line = [float(i) for i in range(100)]
    assert plots.smooth(plots.np.array(line))[3:-3] == pytest.approx(line[3:-3])
    line[50] = math.nan
    assert math.isfinite(plots.smooth(plots.np.array(line))[50])


@pytest.mark.parametrize(
    "seconds, text",
    [(3.21, "3.2 s"), (564.2, "9 min 24 s"), (59.99, "60.0 s"), (7325, "2 h 02 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
