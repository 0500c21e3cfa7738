"""From files to batches: order, shards, resume, mixing, and what a user is told."""

import collections
import dataclasses
import itertools
import json
import threading
import time

import numpy as np
import pytest

from jaxreason.data import documents, logits, packing, pipeline
from jaxreason.data.pipeline import DataConfig, build, evaluation_batches
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.types import Batch, DistillBatch, TaskBatch

TOKENIZER = ByteTokenizer()
PACKINGS = [
    dict(packing="first_fit"),
    dict(packing="concat"),
    dict(packing="per_batch", examples_per_batch=8),
]
BEST_FIT = dict(packing="best_fit")  # first_fit but for the filling of a window


def text_of(number):
    return f"<{number}>" + "abcdefghij"[: number % 11]


@pytest.fixture
def folder(tmp_path):
    """400 and 230 records, numbered from 0 and from 1,000. (Grain shuffles few slowly.)"""
    for name, first, count in (("a", 0, 400), ("b", 1000, 230)):
        lines = [json.dumps({"q": text_of(n), "a": str(n)}) for n in range(first, first + count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def text_source(folder, name="a"):
    return dict(path=str(folder / f"{name}.jsonl"), text_field="q")


def config_of(folder, names="a", **changes):
    shape = dict(rows=8, length=32, num_shards=4, seed=3)
    sources = {name: text_source(folder, name) for name in names}
    return DataConfig(sources=sources, **{**shape, **changes})


def take(config, folder, count, **kwargs):
    made = build(config, TOKENIZER, folder, **kwargs)
    batches = list(itertools.islice(made, count))
    made.close()
    return batches


def texts(batches):
    """The text of every segment, in order, without the end of sequence."""
    found = []
    for batch in batches:
        for row, segments_T in enumerate(batch.segments_BT):
            for segment in range(1, segments_T.max() + 1):
                tokens = batch.tokens_BT[row, segments_T == segment].tolist()
                found.append(TOKENIZER.decode(tokens, skip_special=True))
    return found


def numbers(batches):
    return [int(text[1:].split(">")[0]) for text in texts(batches)]


def stack(batches):
    fields = [f.name for f in dataclasses.fields(Batch)]
    return {name: np.stack([getattr(batch, name) for batch in batches]) for name in fields}


def assert_same(first, second):
    assert len(first) == len(second) > 0
    first, second = stack(first), stack(second)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# ------------------------------------------------------------------------------------ shards


@pytest.mark.parametrize("way", PACKINGS, ids=lambda way: way["packing"])
def test_rows_do_not_depend_on_which_host_owns_which_shards(folder, way):
    config = config_of(folder, "ab", **way)
    together = take(config, folder, 12)
    halves = [take(config, folder, 12, shards=shards) for shards in ((0, 1), (2, 3))]
    names = [f.name for f in dataclasses.fields(Batch)]
    joined = [
        Batch(**{n: np.concatenate([getattr(one, n), getattr(two, n)]) for n in names})
        for one, two in zip(*halves)
    ]
    assert_same(together, joined)
    # Shard s reads the records s, s + 4, ..., and its rows are 2 s and 2 s + 1.
    for shard in range(4):
        own = [
            dataclasses.replace(b, **{n: getattr(b, n)[2 * shard : 2 * shard + 2] for n in names})
            for b in take(config_of(folder, "a", length=64), folder, 6)
        ]
        assert {number % 4 for number in numbers(own)} == {shard}


def test_each_epoch_holds_every_record_once_and_is_shuffled_anew(folder):
    way = dict(packing="per_batch", examples_per_batch=80, rows=80, num_shards=1)
    config = config_of(folder, **way)
    seen = numbers(take(config, folder, 10))
    first, second = seen[:400], seen[400:]
    assert sorted(first) == sorted(second) == list(range(400))
    assert first != second and first != sorted(first)
    assert numbers(take(dataclasses.replace(config, seed=4), folder, 5)) != first
    plain = dataclasses.replace(config, shuffle=False)
    for number, batch in enumerate(take(plain, folder, 5)):
        assert sorted(numbers([batch])) == list(range(80 * number, 80 * number + 80))


def test_order_is_the_same_in_every_process_and_release(folder):
    """Golden: neither hash seeds nor a new Grain may change what a resumed run reads next."""
    config = config_of(folder, "ab", num_shards=1, packing="concat", rows=1, length=64)
    assert numbers(take(config, folder, 1)) == [208, 1073, 163, 83, 1150]


def test_arms_of_other_names_and_fields_see_the_same_records(folder):
    """The quickstart's two arms: the same expressions, in the same order, as many an update."""
    arms = {}
    for name, response, rows in (("answer", "a", 4), ("cot", "q", 8)):
        path = str(folder / "a.jsonl")
        source = dict(path=path, prompt_template="{q}|", response_field=response)
        config = DataConfig(
            sources={name: source},
            rows=rows,
            length=48,
            packing="per_batch",
            examples_per_batch=8,
            chat_template="plain",
        )
        arms[name] = take(config, folder, 12)
    for answer, cot in zip(arms["answer"], arms["cot"]):
        assert sorted(numbers([answer])) == sorted(numbers([cot]))
        assert len(numbers([answer])) == 8
    trained = arms["cot"][0].targets_BT[arms["cot"][0].weights_BT > 0].tolist()
    assert sorted(TOKENIZER.decode(trained).split("<|im_end|>")[:-1]) == sorted(
        text.split("|")[1] for text in texts(arms["cot"][:1])
    )


# ------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("way", [*PACKINGS, BEST_FIT], ids=lambda way: way["packing"])
def test_the_next_batch_after_a_resume_is_bit_equal(folder, way, monkeypatch):
    """Peer fault 12. The thread is up to three batches ahead of the state."""
    monkeypatch.setattr(packing, "OPEN_ROWS", 6)
    config = config_of(folder, "ab", **way)
    running = build(config, TOKENIZER, folder)
    states, batches = [json.dumps(running.get_state())], []
    for _ in range(14):
        batches.append(next(running))
        states.append(json.dumps(running.get_state()))
    stats = running.stats()
    running.close()
    for number in (0, 1, 2, 5, 9):
        resumed = build(config, TOKENIZER, folder)
        next(resumed)  # so that its thread is running when the state comes
        resumed.set_state(json.loads(states[number]))
        assert json.dumps(resumed.get_state()) == states[number]
        assert_same(list(itertools.islice(resumed, 14 - number)), batches[number:])
        assert json.dumps(resumed.get_state()) == states[14]
        assert resumed.stats() == stats
        resumed.close()


def test_a_host_resumes_from_the_states_of_all_shards(folder):
    config = config_of(folder, "ab")
    running = build(config, TOKENIZER, folder)
    list(itertools.islice(running, 3))
    state = running.get_state()
    expected = next(running).tokens_BT[4:6]
    running.close()
    host = build(config, TOKENIZER, folder, shards=(2,))
    host.set_state(state)
    np.testing.assert_array_equal(next(host).tokens_BT, expected)
    assert list(host.get_state()["shards"]) == ["2"]
    host.close()
    with pytest.raises(ValueError, match=r"not \[3\].*data.num_shards"):
        build(config, TOKENIZER, folder, shards=(3,)).set_state(host.get_state())


# ------------------------------------------------------------------------------------ mixing


def test_sources_are_mixed_by_weight_and_else_by_size(folder):
    way = dict(num_shards=1, packing="per_batch", examples_per_batch=20, rows=20)
    for weights, share in (({"a": 3.0, "b": 1.0}, 0.25), ({"a": 1, "b": 0}, 0.0), ({}, 230 / 630)):
        seen = numbers(take(config_of(folder, "ab", weights=weights, **way), folder, 20))
        for count in (20, 100, 400):  # within one record of the share at all times
            assert abs(sum(n >= 1000 for n in seen[:count]) - share * count) <= 1


def test_weights_may_change_between_runs_without_losing_a_record(folder):
    way = dict(num_shards=1, packing="per_batch", examples_per_batch=80, rows=80)
    running = build(config_of(folder, "ab", weights={"a": 1, "b": 1}, **way), TOKENIZER, folder)
    seen = numbers(itertools.islice(running, 3))
    resumed = build(config_of(folder, "ab", weights={"a": 7, "b": 1}, **way), TOKENIZER, folder)
    resumed.set_state(running.get_state())
    running.close()
    later = numbers(itertools.islice(resumed, 4))
    resumed.close()
    assert sum(n < 1000 for n in later) == 280  # the new weights, from the first batch on
    of_a = [n for n in seen + later if n < 1000]
    assert sorted(of_a) == list(range(400))  # 120 + 280: one epoch, nothing skipped or repeated


@pytest.mark.parametrize("way", PACKINGS[:2], ids=lambda way: way["packing"])
def test_weights_change_where_nothing_is_half_packed(folder, way, monkeypatch):
    """A first-fit window and a document cut by concat are finished under the old weights."""
    monkeypatch.setattr(packing, "OPEN_ROWS", 32)
    shape = dict(num_shards=1, rows=4, length=45, **way)
    for weights, count in itertools.product(({"a": 9, "b": 1}, {"a": 0, "b": 1}), range(1, 10)):
        running = build(config_of(folder, "ab", **shape), TOKENIZER, folder)
        batches = list(itertools.islice(running, count))
        config = config_of(folder, "ab", weights=weights, **shape)
        resumed = build(config, TOKENIZER, folder)
        resumed.set_state(running.get_state())
        running.close()
        batches += itertools.islice(resumed, 10)
        resumed.close()
        # Whole documents only: `concat` cuts, and the text goes on in the next piece.
        joined = "".join(texts(batches)).split("<")[1:-1]
        seen = [int(text.split(">")[0]) for text in joined]
        assert ["<" + text for text in joined] == [text_of(n) for n in seen]
        assert len(set(seen)) == len(seen) > 50


def test_epochs_end(folder):
    config = config_of(folder, "ab", weights={"a": 1, "b": 5})
    batches = take(config, folder, None, num_epochs=2)
    counts = collections.Counter(numbers(batches))
    assert counts == dict.fromkeys([*range(400), *range(1000, 1230)], 2)
    made = build(config, TOKENIZER, folder, num_epochs=1)
    list(made)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(made)
    with pytest.raises(ValueError, match="num_epochs needs all shards"):
        build(config, TOKENIZER, folder, shards=(0,), num_epochs=1)


# ------------------------------------------------------------------------- lengths and faults


def test_too_long_records(folder):
    config = config_of(folder, length=12)
    with pytest.raises(ValueError) as error:  # "<8>abcdefgh" and the end of sequence are 12
        build(config, TOKENIZER, folder)
    expected = f"data.sources.a: record 9 ({folder / 'a.jsonl'} line 10) has 13 tokens"
    assert expected in str(error.value) and "data.length is 12" in str(error.value)
    assert "\n" not in str(error.value)
    cut = take(dataclasses.replace(config, truncation="keep_start"), folder, None, num_epochs=1)
    assert sorted(texts(cut)) == sorted(text_of(n)[:12] for n in range(400))
    whole = dataclasses.replace(config, packing="concat")
    assert len(take(whole, folder, 3)) == 3


def test_a_long_record_beyond_the_checked_ones_stops_the_run(folder, monkeypatch):
    monkeypatch.setattr(pipeline, "NUM_CHECKED", 5)
    made = build(config_of(folder, length=12, shuffle=False), TOKENIZER, folder)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"record .* tokens and data.length is 12"):
            for _ in range(100):
                next(made)
    made.close()


@pytest.mark.parametrize("way", [PACKINGS[1], BEST_FIT], ids=lambda way: way["packing"])
def test_too_long_documents_may_be_dropped_and_are_counted(folder, way, monkeypatch):
    """Of 400 records those of 7 letters and more are over 12 tokens; resume is bit-equal."""
    monkeypatch.setattr(packing, "OPEN_ROWS", 6)
    config = config_of(folder, length=24, truncation="drop", max_tokens=12, **way)
    kept = [n for n in range(400) if len(text_of(n)) < 12]
    made = build(config, TOKENIZER, folder, num_epochs=1)
    batches, states = [], [json.dumps(made.get_state())]
    for batch in made:
        batches.append(batch)
        states.append(json.dumps(made.get_state()))
    if way["packing"] == "concat":
        joined = "".join(texts(batches)).split("<")[1:]
        assert sum(map(len, joined)) == sum(len(text_of(n)) - 1 for n in kept)
    else:
        assert sorted(numbers(batches)) == kept
    assert made.stats().dropped == 400 - len(kept) > 100
    resumed = build(config, TOKENIZER, folder, num_epochs=1)
    for number in (0, 1, 3, 7):
        resumed.set_state(json.loads(states[number]))
        assert_same(list(resumed), batches[number:])
        assert resumed.stats() == made.stats()
    with pytest.raises(ValueError) as error:
        build(dataclasses.replace(config, max_tokens=3), TOKENIZER, folder)
    assert "data.sources.a: all 400 records have more than 3 tokens" in str(error.value)
    assert "\n" not in str(error.value)


# ------------------------------------------------------- tasks, pairs, traces, a teacher's store


def test_two_tasks_of_one_file(folder):
    """Distilling Step-by-Step's: a prompt for the label and one for the rationale."""
    path = str(folder / "a.jsonl")
    config = DataConfig(
        sources={
            "label": dict(
                path=path, prompt_template="predict: {q}|", response_field="a", task="label"
            ),
            "why": dict(
                path=path, prompt_template="explain: {q}|", response_field="q", task="rationale"
            ),
        },
        rows=8,
        length=96,
        chat_template="plain",
    )
    for batch in take(config, folder, 5):
        assert isinstance(batch, TaskBatch)
        tasks = [
            batch.tasks_BT[row, segments_T == s]
            for row, segments_T in enumerate(batch.segments_BT)
            for s in range(1, segments_T.max() + 1)
        ]
        for text, task_T in zip(texts([batch]), tasks, strict=True):
            assert set(task_T) == {1 if text.startswith("predict") else 2}
        assert not batch.tasks_BT[batch.segments_BT == 0].any()


def write_pairs(folder, pairs):
    lines = [json.dumps(dict(prompt=p, chosen=c, rejected=r)) for p, c, r in pairs]
    (folder / "p.jsonl").write_text("\n".join(lines))


def pair_config(folder, **changes):
    sources = {"p": dict(kind="preference", path=str(folder / "p.jsonl"))}
    shape = dict(rows=2, length=64, chat_template="plain", shuffle=False)
    return DataConfig(sources=sources, **{**shape, **changes})


@pytest.mark.parametrize(
    "way", [PACKINGS[0], BEST_FIT, dict(PACKINGS[2], rows=4)], ids=lambda way: way["packing"]
)
def test_pairs_learn_the_answers_only(folder, way):
    write_pairs(folder, [(f"P{n}=", "A" * (n % 5 + 1), "B" * (n % 7 + 1)) for n in range(40)])
    for batch in take(pair_config(folder, **way), folder, None, num_epochs=1):
        found = texts([batch])
        assert len(found) % 2 == 0
        for row, segments_T in enumerate(batch.segments_BT):
            for s in range(1, segments_T.max() + 1):
                here = segments_T == s
                weights_T = batch.weights_BT[row, here]
                assert set(weights_T) == {0, 1}
                learnt = TOKENIZER.decode(batch.targets_BT[row, here][weights_T == 1].tolist())
                assert set(learnt.removesuffix("<|im_end|>")) == {"A" if s % 2 else "B"}
                assert learnt.endswith("<|im_end|>")
        prompts = [text.split("=")[0] for text in found]
        assert prompts[::2] == prompts[1::2]


def test_earlier_answers_of_a_pair_are_prompt(folder):
    turns = lambda *texts: [
        dict(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(texts)
    ]
    write_pairs(folder, [(turns("Q", "first", "R"), turns("", "A")[1:], turns("", "B")[1:])])
    config = pair_config(folder, chat_template="qwen3", length=512)
    (batch,) = take(config, folder, None, num_epochs=1)
    learnt = TOKENIZER.decode(batch.targets_BT[batch.weights_BT == 1].tolist())
    turn = "<think>\n\n</think>\n\n{}<|im_end|>"
    assert learnt == turn.format("A") + turn.format("B")
    assert "first" in texts([batch])[0]


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [((10, 40), (10, 22)), ((40, 10), (22, 10)), ((30, 40), (16, 16)), ((16, 17), (16, 16))],
)
def test_pairs_too_long_for_a_row(folder, sizes, kept):
    """Sizes are tokens of the two documents: one of the prompt, the letters, the end."""
    letters = [letter * (size - 2) for letter, size in zip("AB", sizes)]
    write_pairs(folder, [("?", *letters)])
    config = pair_config(folder, length=32)
    with pytest.raises(ValueError) as error:
        build(config, TOKENIZER, folder)
    assert f"has a pair of {sizes[0]} and {sizes[1]} tokens" in str(error.value)
    with pytest.raises(ValueError, match="none is left"):
        build(dataclasses.replace(config, truncation="drop"), TOKENIZER, folder)
    cut = dataclasses.replace(config, truncation="keep_start")
    (batch,) = take(cut, folder, None, num_epochs=1)
    assert tuple(np.bincount(batch.segments_BT.ravel())[1:]) == kept
    write_pairs(folder, [("?" * 20, *letters)])
    with pytest.raises(ValueError, match="a prompt of 20 tokens and it leaves no answer"):
        take(dataclasses.replace(cut, length=36), folder, None, num_epochs=1)


def test_traces_of_a_schema_through_the_pipeline(folder):
    """Counts of what is left out; weights of reasoning and answer; one trace by the run's seed."""
    trace = lambda n, i: f"<think>\nr{n}.{i}\n</think>\n\na{n}"
    record = lambda n: {
        "problem": f"p{n}",
        "generations": [trace(n, 0), trace(n, 1), "<think>\ncut"],
        "correctness_math_verify": [n % 4 > 0, n % 4 > 0, True],
        "is_reasoning_complete": [True] * 3,
    }
    (folder / "r1.jsonl").write_text("\n".join(json.dumps(record(n)) for n in range(40)))
    source = dict(kind="openr1", path=str(folder / "r1.jsonl"), choose="random")
    shape = dict(rows=4, length=128, shuffle=False, reasoning_weight=0.5, answer_weight=2.0)
    config = DataConfig(sources={"r1": source}, **shape)
    made = build(config, TOKENIZER, folder, num_epochs=1)
    batches = list(made)
    stats = made.stats()
    assert (stats.filtered, stats.quarantined, stats.dropped) == (20, 40, 0)
    for weight, letter in ((0.5, "r"), (2.0, "a")):
        learnt = "".join(
            TOKENIZER.decode(b.targets_BT[b.weights_BT == weight].tolist()) for b in batches
        )
        assert learnt.count(letter) == 30
    chosen = lambda seed: [
        text.split("<think>")[1].split("<")[0]
        for text in texts(take(dataclasses.replace(config, seed=seed), folder, None, num_epochs=1))
    ]
    assert chosen(0) == chosen(0) != chosen(1)


def fake_score(ids_T, k=4):
    """Rows that tell what they are about."""
    ids_TK = (np.asarray(ids_T)[1:, None] + np.arange(k)) % TOKENIZER.vocab_size
    return ids_TK, -ids_TK / 512.0


@pytest.mark.parametrize("way", PACKINGS[:2], ids=lambda way: way["packing"])
def test_a_teacher_s_store_meets_the_tokens_that_it_scored(folder, way):
    header = lambda name: logits.Header(
        vocabulary=TOKENIZER.fingerprint(), source=name, k=4, chunk=16, part_documents=50
    )
    base = config_of(folder, "ab", **way)
    found = documents.open_documents(base, TOKENIZER, folder)
    for name, ids in found.items():
        logits.write(folder / "store" / name, ids, lambda d: map(fake_score, d), header(name))
    config = dataclasses.replace(base, teacher="@store")
    batches, plain = take(config, folder, 6), take(base, folder, 6)
    for batch, other in zip(batches, plain):
        assert isinstance(batch, DistillBatch)
        assert np.array_equal(batch.targets_BT, other.targets_BT)
        has_BT = batch.weights_BT > 0
        expected = (batch.targets_BT[..., None] + np.arange(4)) % TOKENIZER.vocab_size
        assert np.array_equal(batch.teacher_ids_BTK[has_BT], expected[has_BT])
        logprobs = (-expected / 512.0).astype(batch.teacher_logprobs_BTK.dtype)
        assert np.array_equal(batch.teacher_logprobs_BTK[has_BT], logprobs[has_BT])
        assert not batch.teacher_ids_BTK[~has_BT].any()
    source = dict(path=str(folder / "a.jsonl"), prompt_field="q", response_field="a")
    other = DataConfig(sources={"a": source}, rows=8, length=128, teacher="@store")
    with pytest.raises(ValueError) as error:
        take(other, folder, 1)
    assert "data.teacher: document 0 has other tokens than those scored" in str(error.value)
    assert "\n" not in str(error.value)


def test_malformed_lines_are_counted_and_training_goes_on(folder):
    with open(folder / "a.jsonl", "a") as out:
        out.write('\n{"q": "cut\n')
    made = build(config_of(folder), TOKENIZER, folder)
    batch = next(made)
    made.close()
    stats = made.stats()
    assert stats.quarantined == 1
    assert stats.tokens == np.count_nonzero(batch.segments_BT)
    assert stats.examples == len(texts([batch]))
    assert stats.fill == stats.tokens / batch.segments_BT.size
    (entry,) = [json.loads(line) for line in open(folder / "quarantine.jsonl")]
    assert (entry["file"], entry["line"]) == (str(folder / "a.jsonl"), 401)


def test_close_does_not_hang_and_goes_on_where_it_was(folder):
    config = config_of(folder)
    expected = take(config, folder, 3)
    made = build(config, TOKENIZER, folder)
    got = [next(made)]
    time.sleep(0.3)  # the queue is full, the thread waits for room
    start = time.perf_counter()
    made.close()
    made.close()
    assert time.perf_counter() - start < 1
    assert not [thread for thread in threading.enumerate() if thread.name == "data"]
    assert_same([*got, next(made), next(made)], expected)
    made.close()


BASE = dict(sources={"a": dict(path="a.jsonl", text_field="q")}, rows=8, length=32)
PAIRS = {"p": dict(kind="preference", path="p.jsonl")}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(sources={}), "data.sources is empty"),
        (
            dict(sources={"a": dict(pth="a.jsonl")}),
            "data.sources.a.pth is unknown; known: name, kind, path",
        ),
        (dict(rows=0), "data.rows is 0; it must be 1 or more"),
        (dict(length=1), "data.length is 1; it must be 2 or more"),
        (dict(num_shards=0), "data.num_shards is 0"),
        (
            dict(rows=10, num_shards=4),
            "data.rows = 10 is not a multiple of data.num_shards = 4",
        ),
        (
            dict(packing="per_batch", examples_per_batch=6, num_shards=4),
            "data.examples_per_batch = 6 is not a multiple of data.num_shards = 4",
        ),
        (dict(packing="bfd"), "data.packing is 'bfd'; it must be one of first_fit, best_fit"),
        (dict(packing="per_batch"), "data.examples_per_batch is None"),
        (dict(examples_per_batch=8), "data.examples_per_batch is 8 and data.packing is"),
        (dict(truncation="cut"), "data.truncation is 'cut'; it must be one of error, keep_start"),
        (dict(chat_template="alpaca"), "data.chat_template is 'alpaca'"),
        (dict(train_roles=("human",)), "data.train_roles is ('human',)"),
        (dict(train_roles=()), "data.train_roles is ()"),
        (dict(weights={"b": 1.0}), "data.weights names b and data.sources a"),
        (dict(weights={"a": 0.0}), "data.weights is {'a': 0.0}"),
        (dict(seed=-1), "data.seed is -1"),
        (dict(max_tokens=33), "data.max_tokens is 33; it must be 2 to data.length = 32"),
        (dict(reasoning_weight=-1), "data.reasoning_weight is -1; it must be 0 or more"),
        (dict(reasoning_weight=0, answer_weight=0), "data.reasoning_weight is 0"),
        (dict(sources=PAIRS, packing="concat"), "data.packing is 'concat', which cuts documents"),
        (dict(sources=PAIRS, answer_weight=2), "answer_weight 2; the tokens of pairs all weigh 1"),
        (dict(sources=PAIRS, teacher="t"), "data has pairs and data.teacher"),
        (
            dict(sources={**BASE["sources"], **PAIRS}),
            "data.sources.a has not pairs, as others of data.sources have",
        ),
        (
            dict(sources={"a": dict(path="a", text_field="q", task="labels")}),
            "data.sources.a.task is 'labels'; known: label, rationale",
        ),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(changes, says):
    with pytest.raises(ValueError) as error:
        DataConfig(**{**BASE, **changes})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_more_shards_than_records(folder):
    with pytest.raises(ValueError, match=r"sources.b has 230 records, fewer than data.num_sh"):
        build(config_of(folder, "b", rows=240, num_shards=240), TOKENIZER, folder)


# -------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("way", PACKINGS, ids=lambda way: way["packing"])
def test_evaluation_is_one_epoch_in_order_and_counts_its_bytes(folder, way):
    config = config_of(folder, "b", num_shards=1, rows=8, length=24, **way)
    found = evaluation_batches(config, TOKENIZER, folder)
    assert {batch.tokens_BT.shape for batch in found.batches} == {(8, 24)}
    stream = [text_of(n) for n in range(1000, 1230)]
    assert sorted("".join(texts(found.batches))) == sorted("".join(stream))
    if way["packing"] == "concat":
        assert "".join(texts(found.batches)) == "".join(stream)
    # The first byte of a document is nobody's target; every other one is once.
    assert found.num_bytes == sum(len(text) - 1 for text in stream)
    targets = sum(int((batch.weights_BT > 0).sum()) for batch in found.batches)
    assert targets == found.num_bytes + len(stream)  # and the ends of sequence
    part = evaluation_batches(config, TOKENIZER, folder, max_batches=2)
    assert_same(list(part.batches), list(found.batches[:2]))
    assert 0 < part.num_bytes < found.num_bytes


def test_evaluation_bytes_of_other_scripts(folder):
    text = "naïve “quotes” 数学 🧮 " * 40
    (folder / "u.jsonl").write_text(json.dumps({"q": text}))
    config = config_of(folder, "u", num_shards=1, packing="concat")
    found = evaluation_batches(config, TOKENIZER, folder)
    # Each of the batches' two ends may cut a character: at most 2 bytes more or less each time.
    assert abs(found.num_bytes - (len(text.encode()) - 1)) <= 4 * len(found.batches)


# ----------------------------------------------------------------------------- the real thing


def test_prepared_arithmetic_feeds_both_arms(tmp_path):
    from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic

    made = ArithmeticConfig(min_operations=2, max_operations=3, num_train=64, num_test=8)
    prepare_arithmetic(made, tmp_path / "arithmetic")

    def config(rendering, rows, **changes):
        source = dict(kind="arithmetic", rendering=rendering, split="train")
        chat = dict(prompt_template="{expression}=") if rendering != "text" else {}
        shape = dict(rows=rows, length=256, packing="per_batch", examples_per_batch=16)
        return DataConfig(
            sources={rendering: {**source, **chat}},
            chat_template="plain",
            num_shards=2,
            **{**shape, **changes},
        )

    answer = take(config("answer", 2), tmp_path, 4)
    cot = take(config("long_cot", 16), tmp_path, 4)
    for one, two in zip(answer, cot):
        asked = [sorted(text.split("=")[0] for text in texts([batch])) for batch in (one, two)]
        assert asked[0] == asked[1] and len(asked[0]) == 16
    assert all("<think>" in text for text in texts(cot))
    plain = texts(take(config("text", 4), tmp_path, 4))
    assert sorted(plain) == sorted(texts(answer))  # "1+2=3" both as a text and as a turn
    with pytest.raises(ValueError, match=r"no folder .*nowhere"):
        source = dict(kind="arithmetic", rendering="text", split="test", path="nowhere")
        build(DataConfig(sources={"x": source}, rows=1, length=64), TOKENIZER, tmp_path)


@pytest.mark.slow
def test_throughput(tmp_path):
    """10x what the quickstart's step eats (about 30k tokens/s), on one busy core."""
    rng = np.random.default_rng(0)
    with open(tmp_path / "a.jsonl", "w") as out:
        for size in rng.integers(20, 140, 20_000):
            text = "".join(rng.choice(list("0123456789+-*/()"), size))
            out.write(json.dumps({"q": text}) + "\n")
    for way in PACKINGS:
        way = {**way, **({"examples_per_batch": 80} if "examples_per_batch" in way else {})}
        shape = dict(rows=32, length=256, num_shards=1)
        made = build(config_of(tmp_path, **shape, **way), TOKENIZER, tmp_path)
        next(made)
        start, before = time.perf_counter(), made.stats().tokens
        for _ in range(150):
            next(made)
        rate = (made.stats().tokens - before) / (time.perf_counter() - start)
        made.close()
        print(f"{way['packing']}: {rate:,.0f} tokens/s, fill {made.stats().fill:.3f}")
        assert rate > 400_000
