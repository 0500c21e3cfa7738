"""Steps on samples and steps on the data set's own answers: which is which, learnt and resumed."""

import dataclasses

import jax
import numpy as np
import pytest
from test_rl import (
    MODEL,
    OPTIMIZER,
    QUESTIONS,
    TEACHER,
    TOKENIZER,
    assert_same_run,
    first_params,
    log,
    run,
)
from test_rl import collector as sampling_collector

from jaxreason.objectives.on_policy import objective_of
from jaxreason.objectives.policy import PRESETS
from jaxreason.report.summary import read_lines
from jaxreason.train import rl
from jaxreason.train.collect import Rollout
from jaxreason.train.optim import OptimizerConfig, make_schedule
from jaxreason.train.step import make_train_step

GKD = PRESETS["gkd"]
STEP = make_train_step(
    MODEL, objective_of(GKD, TEACHER), OPTIMIZER,
    make_schedule(OptimizerConfig(learning_rate=1e-2, schedule="constant"), 12), clip_norm=1.0,
)  # fmt: skip
SCORE = rl.make_score(MODEL, GKD.policy)
ANSWERED = [dataclasses.replace(q, response=f"{q.answer};") for q in QUESTIONS]


def collector(lmbda: float, generate=None):
    """Of the questions with answers; a prompt's ids come back with those of its answer."""
    made = sampling_collector(filter_zero_std=False, lmbda=lmbda)
    made.prompts._prompts["s"] = ANSWERED
    own = {"generate": generate} if generate else {}
    encode = lambda q: (TOKENIZER.encode(q.text), [*TOKENIZER.encode(q.response), TOKENIZER.eos_id])
    return dataclasses.replace(made, encode_answer=encode, **own)


def distil(workdir, lmbda=0.5, **changes):
    params = jax.jit(TEACHER.init)(jax.random.key(5))
    params["final_norm"] = params["final_norm"] + 2.0  # a teacher with an opinion
    own = dict(collect=collector(lmbda), algorithm=GKD, train_step=STEP, score=SCORE, updates=1)
    return run(workdir, kept=rl.Kept(teacher=lambda: params), **own | changes), workdir


def test_lmbda_is_the_share_of_steps_that_sample():
    drawn = []

    def generate(params, texts, sampling, key, **_):
        drawn.append(texts)
        return [[] for _ in texts]

    def chosen(lmbda: float, steps: int) -> list[bool]:
        found = []
        for step in range(1, steps + 1):
            each = collector(lmbda, generate)
            each = dataclasses.replace(each, reward=lambda c, a: ([], {"even": []}))
            try:
                found.append(each.collect(Rollout(step), None).on_policy)
            except ZeroDivisionError:  # a generator that draws nothing has no mean reward
                found.append(True)
        return found

    assert chosen(0.0, 20) == [False] * 20 and not drawn
    assert all(chosen(1.0, 20)) and len(drawn) == 20
    some = chosen(0.25, 200)
    assert 30 < sum(some) < 70 and some == chosen(0.25, 200)


def test_the_datas_answers_are_rows_of_their_own():
    """As many as a rollout has completions; nothing is sampled, nothing recorded as solved."""
    each = collector(0.0, lambda *args, **kw: pytest.fail("sampled"))
    rollout = each.collect(Rollout(1), None)
    assert len(rollout.groups) == 4 * 3 and not rollout.on_policy
    for group in rollout.groups:
        (answer,) = group.completions
        assert TOKENIZER.decode(answer.ids[:-1]) == group.prompt.response
        assert answer.ids[-1] == TOKENIZER.eos_id
    assert not each.prompts.stats()["seen"]
    assert Rollout.from_json(rollout.to_json()).to_json() == rollout.to_json()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return distil(tmp_path_factory.mktemp("gkd"), steps=6)


def test_both_kinds_of_steps_come_near_the_teacher(whole):
    records = log(whole[1])
    kinds = [record["rollout/on_policy"] for record in records]
    assert 0 < sum(kinds) < len(kinds)
    assert all(("reward" in r) == r["rollout/on_policy"] for r in records)
    losses = [record["distill_loss"] for record in records]
    assert losses == pytest.approx([record["loss"] for record in records], rel=1e-6)
    assert np.mean(losses[-2:]) < 0.9 * np.mean(losses[:2]), losses
    sampled = {line["step"] for line in read_lines(whole[1] / "samples.jsonl")}
    assert sampled == {r["step"] for r in records if r["rollout/on_policy"]}


@pytest.mark.slow
def test_a_run_that_died_is_resumed_bit_for_bit(tmp_path, whole):
    """In its 4th step, after the checkpoint of the 2nd; save_every is 2."""
    calls = []

    def dying(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return STEP(*args)

    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path, steps=6, train_step=dying)
    assert_same_run(distil(tmp_path, steps=6), whole)


def test_a_teacher_that_is_the_policy_has_nothing_to_teach(tmp_path):
    step = make_train_step(
        MODEL, objective_of(GKD, MODEL), OPTIMIZER, make_schedule(OptimizerConfig(), 1)
    )
    kept = rl.Kept(teacher=first_params)
    own = dict(algorithm=GKD, train_step=step, score=SCORE, updates=1, steps=1)
    run(tmp_path, collect=collector(1.0), kept=kept, **own)
    (record,) = log(tmp_path)
    assert abs(record["distill_loss"]) < 1e-6 and record["grad_norm"] < 1e-4
    assert np.isfinite(record["entropy"])
