"""The prompt stream: order, resume, the difficulty band, and gold answers that are refused."""

import itertools
import json
import time

import pytest

from jaxreason.data import prompts
from jaxreason.data.arithmetic import ArithmeticConfig, open_arithmetic, prepare_arithmetic
from jaxreason.data.prompts import PromptConfig, PromptSource, PromptStream
from jaxreason.types import Prompt


class Numbers:
    """`size` prompts made on demand."""

    def __init__(self, size, name="n"):
        self.size, self.name = size, name

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Prompt(id=f"{self.name}/{index}", text=str(index), answer="0", source=self.name)


def stream(sizes=(40,), said=None, **fields):
    opened = {name: Numbers(size, name) for name, size in zip("abc", sizes)}
    sources = {
        name: {"path": "x.jsonl", "prompt_field": "q", "answer_field": "a"} for name in opened
    }
    config = PromptConfig(sources=sources, **fields)
    return PromptStream(config, opened, say=(said if said is not None else []).append)


def ids(found):
    return [prompt.id for prompt in found]


def test_every_epoch_is_a_new_order_of_all_prompts_by_the_seed():
    a, b, other = stream((40, 7), seed=1), stream((40, 7), seed=1), stream((40, 7), seed=2)
    epochs = [ids(a.next(47)) for _ in range(3)]
    everything = sorted([f"a/{i}" for i in range(40)] + [f"b/{i}" for i in range(7)])
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    in_fives = [prompt_id for _ in range(28) for prompt_id in ids(b.next(5))]
    assert in_fives == list(itertools.chain(*epochs))[:140]  # however it is asked for
    assert ids(other.next(47)) != epochs[0]
    assert ids(stream((3,), shuffle=False).next(5)) == ["a/0", "a/1", "a/2", "a/0", "a/1"]


def drive(s, steps):
    """Draws and records like a trainer whose success depends on the prompt alone."""
    drawn = []
    for _ in range(steps):
        found = s.next(6)
        drawn.append(ids(found))
        for prompt in found:
            s.record(prompt.id, solved=int(prompt.text) % 5 / 7, samples=3)
    return drawn


@pytest.mark.parametrize("steps", [0, 3, 11, 29])
def test_resumed_in_the_middle_of_an_epoch_it_continues_bit_exactly(steps):
    fields = dict(sizes=(20, 25), seed=3, band=(0.2, 0.5), band_min_samples=6)
    whole, first, second = stream(**fields), stream(**fields), stream(**fields)
    drive(whole, steps)
    drive(first, steps)
    state = json.loads(json.dumps(first.get_state()))
    drive(second, 5)  # whatever it did before is gone
    second.set_state(state)
    assert second.get_state() == first.get_state()
    assert len(state["table"]) == len(set(itertools.chain(*drive(stream(**fields), steps))))
    assert drive(second, 40) == drive(whole, 40)
    assert second.get_state() == whole.get_state()
    assert second.stats() == whole.stats()


def test_state_of_other_prompts_is_refused():
    with pytest.raises(ValueError, match=r"of 40 prompts, data\.sources now hold 41"):
        stream((41,)).set_state(stream((40,)).get_state())


def test_prompts_outside_the_band_are_passed_over_and_revisited():
    s = stream((10,), band=(0.2, 0.8), band_min_samples=8, revisit_epochs=3, seed=5)
    solved = {"a/1": 0.0, "a/2": 0.19, "a/3": 0.2, "a/4": 0.8, "a/5": 0.81, "a/6": 1.0}
    outside = {"a/1", "a/2", "a/5", "a/6"}
    for prompt in s.next(10):  # epoch 0: half of what it takes to know
        s.record(prompt.id, solved.get(prompt.id, 0.5), samples=4)
    assert s.stats()["known"] == 0.0
    for prompt in s.next(10):  # epoch 1
        s.record(prompt.id, solved.get(prompt.id, 0.5), samples=4)
    assert s.stats() == {
        "epoch": 2.0,
        "seen": 1.0,
        "known": 1.0,
        "in_band": 0.6,
        "solve_rate": pytest.approx(0.5),
        "passed_over": 0.0,
    }
    inside = {f"a/{i}" for i in range(10)} - outside
    for _ in range(2):  # epochs 2 and 3
        assert set(ids(s.next(6))) == inside
    again = set(ids(s.next(10)))  # epoch 4 = 1 + revisit_epochs
    assert again == inside | outside
    for prompt_id in outside:  # in epoch 4 the policy has got better at these
        s.record(prompt_id, 0.5, samples=100)
    assert set(ids(s.next(10))) == inside | outside
    assert s.stats()["in_band"] == 1.0
    assert s.stats()["passed_over"] == 8.0


def test_without_a_band_nothing_is_passed_over():
    s = stream((10,))
    for _ in range(5):
        found = ids(s.next(10))
        assert len(set(found)) == 10
        for prompt_id in found:
            s.record(prompt_id, 0.0, samples=8)


def test_when_nothing_is_in_the_band_it_is_lifted_for_an_epoch_and_said_once():
    said = []
    s = stream((10,), said, band=(0.2, 0.8), band_min_samples=1, revisit_epochs=10**6)
    for _ in range(6):  # every other epoch would give nothing
        found = ids(s.next(10))
        assert len(found) == 10
        for prompt_id in found:
            s.record(prompt_id, 1.0, samples=8)
    (line,) = said
    assert "not one of 10 has a solve rate within the band (0.2, 0.8)" in line
    again = stream((10,), said, band=(0.2, 0.8), band_min_samples=1, revisit_epochs=10**6)
    again.set_state(s.get_state())
    again.next(30)
    assert len(said) == 1  # a resumed run does not repeat it


def test_solve_rate_forgets_by_halves():
    s = stream((2,))
    assert s.solve_rate("a/1") is None
    s.record("a/1", 0.25, samples=8)
    assert s.solve_rate("a/1") == 0.25
    s.record("a/1", 1.0, samples=4)  # weights 8 / 2 and 4
    assert s.solve_rate("a/1") == pytest.approx(0.625)
    s.record("a/1", 0.0, samples=4)  # weights (4 + 4) / 2 and 4
    assert s.solve_rate("a/1") == pytest.approx(0.3125)
    assert s.get_state()["table"]["a/1"][0] == 16


@pytest.mark.parametrize("prompt_id", ["a/40", "a/-1", "b/0", "a", "/0", "a/x"])
def test_unknown_prompts_and_impossible_rates_are_refused(prompt_id):
    s = stream()
    with pytest.raises(ValueError, match="is unknown; ids are SOURCE/INDEX"):
        s.record(prompt_id, 0.5, samples=1)
    for solved, samples in ((1.1, 8), (-0.1, 8), (0.5, 0), (float("nan"), 8)):
        with pytest.raises(ValueError, match="it must be a share"):
            s.record("a/0", solved, samples)


def test_a_million_prompts_cost_nothing_per_step():
    s = stream((1_000_000,), band=(0.2, 0.8), band_min_samples=8)
    for prompt in s.next(2_000):
        s.record(prompt.id, 0.0, samples=8)
    start = time.process_time()
    for _ in range(100):
        for prompt in s.next(64):
            s.record(prompt.id, 0.5, samples=8)
    assert time.process_time() - start < 1.0  # 0.05 s; looking at every prompt would take minutes
    assert len(s.get_state()["table"]) == 2_000 + 6_400
    assert len({prompt.id for prompt in s.next(50_000)}) == 50_000


# ---------------------------------------------------------------------------------- sources


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def needs_a_number(found):
    for prompt in found:
        if not prompt.answer.isdecimal():
            raise ValueError(f"{prompt.id}: answer {prompt.answer!r} is no number")


def test_jsonl_prompts_and_answers(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"q": "2+2?", "a": "Two and two.\n#### 4"}, {"q": "3?", "a": "as #### 1\n####  3 "}],
    )
    hashes = {
        "path": path, "prompt_template": "Q: {q}", "answer_field": "a", "answer_kind": "hashes",
    }  # fmt: skip
    text = {"path": path, "prompt_field": "q", "answer_field": "a"}
    config = PromptConfig(sources={"h": hashes, "t": text}, shuffle=False)
    found = prompts.build(config, tmp_path, say=print).next(4)
    assert found[0] == Prompt(id="h/0", text="Q: 2+2?", answer="4", source="h")
    assert found[1].answer == "3"
    assert found[2] == Prompt(id="t/0", text="2+2?", answer="Two and two.\n#### 4", source="t")
    prompts.build(PromptConfig(sources={"h": hashes}), tmp_path, say=print, check=needs_a_number)


def test_the_data_sets_own_answers_come_along_where_asked_for(tmp_path):
    """A record without its own is left out, though it has a prompt and a gold answer."""
    path = write_jsonl(
        tmp_path / "a.jsonl",
        [{"q": "3?", "a": "3", "r": "Three."}, {"q": "4?", "a": "4"},
         {"q": "2?", "a": "2", "r": "Two.", "t": "hm"}],
    )  # fmt: skip
    own = {"path": path, "prompt_field": "q", "answer_field": "a"}
    drawn = lambda **more: prompts.build(
        PromptConfig(sources={"s": {**own, **more}}, shuffle=False), tmp_path, say=print
    )
    assert [p.response for p in drawn().next(3)] == [None] * 3
    found = drawn(response_field="r").next(2)
    assert [(p.answer, p.response, p.reasoning) for p in found] == [
        ("3", "Three.", None), ("2", "Two.", None),
    ]  # fmt: skip
    (alone,) = drawn(response_field="r", reasoning_field="t").next(1)
    assert (alone.id, alone.response, alone.reasoning) == ("s/0", "Two.", "hm")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(path="x", answer_field="a", reasoning_field="t"), "it is read beside response_field"),
        (dict(path="x", answer_field="a", rendering="answer"), "rendering is 'answer'; kind 'jso"),
        (dict(kind="arithmetic", split="train", rendering="text"), "'text', which answers no"),
        (dict(kind="arithmetic", split="train", response_field="r"), "response_field is 'r'; kind"),
    ],
)
def test_answers_that_cannot_be_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PromptSource(name="s", **({"prompt_field": "q"} if "path" in fields else {}), **fields)


def test_an_answer_that_cannot_be_read_is_refused_when_the_data_is_loaded(tmp_path):
    # Fault 14 of facts/peers.md. The bad one is the last of many: every record of a file is read.
    records = [{"q": "?", "a": str(i)} for i in range(12_345)] + [{"q": "?", "a": "about 7"}]
    source = {
        "path": write_jsonl(tmp_path / "a.jsonl", records),
        "prompt_field": "q",
        "answer_field": "a",
    }
    config = PromptConfig(sources={"s": source})
    prompts.build(config, tmp_path, say=print)
    with pytest.raises(
        ValueError, match=r"data\.sources\.s: s/12345: answer 'about 7' is no number"
    ):
        prompts.build(config, tmp_path, say=print, check=needs_a_number)


def test_arithmetic_prompts(tmp_path):
    prepare_arithmetic(
        ArithmeticConfig(min_operations=2, max_operations=3, num_train=20, num_test=10),
        tmp_path / "arithmetic",
    )
    source = {"kind": "arithmetic", "split": "train", "prompt_template": "{expression}="}
    s = prompts.build(PromptConfig(sources={"arithmetic": source}), tmp_path, say=print)
    records = open_arithmetic(tmp_path / "arithmetic", "train")
    for prompt in s.next(20):
        record = records[int(prompt.id.removeprefix("arithmetic/"))]
        assert prompt.text == record["expression"] + "="
        assert prompt.answer == record["answer"]


def test_gsm8k_prompts(shared_data, tmp_path):
    source = {
        "path": str(shared_data / "gsm8k" / "train.jsonl.gz"),
        "prompt_field": "question",
        "answer_field": "answer",
        "answer_kind": "hashes",
    }
    seen = []
    s = prompts.build(PromptConfig(sources={"g": source}), tmp_path, say=print, check=seen.extend)
    assert len(s) == len(seen) == 7473
    assert seen[0].answer == "72"
    assert all(prompt.answer.replace(",", "").lstrip("-").isdecimal() for prompt in seen)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sources": {}}, "data.sources is empty"),
        ({"band": (0.8, 0.2)}, "data.band is (0.8, 0.2); it must be (lowest, highest)"),
        ({"band": (0.1, 0.2, 0.3)}, "it must be (lowest, highest) within 0 to 1"),
        ({"band_min_samples": 0}, "data.band_min_samples is 0; it must be 1 or more"),
        ({"revisit_epochs": 0}, "data.revisit_epochs is 0; it must be 1 or more"),
        ({"seed": -1}, "data.seed is -1"),
        ({"sources": {"s": {"anser": ""}}}, "data.sources.s.anser is unknown; known: name, kind"),
        ({"sources": {"s": {"path": "a.jsonl"}}}, "data.sources.s.answer_field is ''"),
        (
            {"sources": {"s": {"path": "a", "answer_field": "a", "answer_kind": "box"}}},
            "data.sources.s.answer_kind is 'box'; it must be text or hashes",
        ),
        (
            {"sources": {"s": {"kind": "arithmetic", "split": "validation"}}},
            "data.sources.s.split is 'validation'; it must be train or test",
        ),
    ],
)
def test_mistakes_are_named(fields, says):
    sources = {"s": {"path": "a.jsonl", "prompt_field": "q", "answer_field": "a"}}
    with pytest.raises(ValueError) as error:
        PromptConfig(**{"sources": sources, **fields})
    assert says in str(error.value)
    assert "\n" not in str(error.value)
