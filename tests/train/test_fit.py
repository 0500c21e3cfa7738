"""The fit loop: resuming is bit-exact, logs have no step twice, and what stops a run."""

import dataclasses
import functools
import io
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rich.console
from tiny_models import assert_trees_equal, tiny_model

from jaxreason.checkpoint.store import Store
from jaxreason.data import pipeline as pipeline_lib
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.report.summary import read_metrics
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.train.fit import Fit, FitConfig, NonFinite, Terminated, fit
from jaxreason.train.metrics import MetricsWriter, Progress
from jaxreason.train.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxreason.train.step import make_train_step

STEPS = 6
TOKENIZER = ByteTokenizer()
MODEL = tiny_model(vocab_size=TOKENIZER.vocab_size, num_layers=1)
OPTIMIZER = make_optimizer(OptimizerConfig(), MODEL.axes)
SCHEDULE = make_schedule(OptimizerConfig(warmup_steps=2), STEPS)
TRAIN_STEP = make_train_step(MODEL, LanguageModeling(), OPTIMIZER, SCHEDULE, clip_norm=1.0)


@functools.cache
def first_params():
    return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pipeline_lib.DataConfig:
    path = tmp_path_factory.mktemp("data") / "lines.jsonl"
    lines = [json.dumps({"text": f"{n} + {n} = {2 * n}; " * (1 + n % 2)}) for n in range(200)]
    path.write_text("\n".join(lines))
    return pipeline_lib.DataConfig(
        sources={"lines": {"path": str(path), "text_field": "text"}},
        rows=4, length=48, num_shards=2, seed=1,
    )  # fmt: skip


def run(workdir, data, train_step=TRAIN_STEP, params=first_params, **changes):
    """fit() in this workdir, everything but the compiled step built anew, as a new process would.

    The log has every step; validation (the norm of the parameters) comes every second step.
    """
    config = FitConfig(
        **{**dict(steps=STEPS, log_every=1, save_every=3, validate_every=2), **changes}
    )
    batches = pipeline_lib.build(data, TOKENIZER, workdir)
    writer, terminal = MetricsWriter(workdir), io.StringIO()
    try:
        with Store(workdir / "checkpoints", keep=10) as store:
            job = Fit(
                stage="sft", config=config, model=MODEL, optimizer=OPTIMIZER, schedule=SCHEDULE,
                train_step=train_step, pipeline=batches, store=store, writer=writer,
                progress=Progress(rich.console.Console(file=terminal)),
                validate=lambda p: {"eval/norm": float(optax.tree.norm(p))},
            )  # fmt: skip
            return fit(job, jax.random.key(0), params)
    finally:
        writer.close()
        batches.close()


def log(workdir):
    """{(stage, step): (loss, tokens, norm)}: all but the times; no pair may come twice."""
    records = read_metrics(workdir)
    keys = [(record["stage"], record["step"]) for record in records]
    assert len(set(keys)) == len(keys)
    values = [[r.get(k) for k in ("loss", "num_tokens", "eval/norm")] for r in records]
    return dict(zip(keys, values))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return run(workdir, data), log(workdir)


def assert_same_run(resumed, workdir, uninterrupted):
    (want_state, want_tokens), want_log = uninterrupted
    state, tokens = resumed
    assert_trees_equal(state, want_state)
    assert tokens == want_tokens
    assert log(workdir) == want_log


def test_every_step_is_logged_once(uninterrupted):
    (state, tokens), records = uninterrupted
    steps = [("sft", n) for n in range(1, STEPS + 1)]
    assert sorted(records) == steps + [("sft.validation", n) for n in (0, 2, 4, 6)]
    assert state.step == STEPS
    assert tokens == sum(records[step][1] for step in steps)
    assert records["sft", STEPS][0] < records["sft", 1][0]


def test_three_steps_and_three_more_are_six(tmp_path, data, uninterrupted):
    run(tmp_path, data, steps=3, validate_every=0)
    assert read_metrics(tmp_path)[-1]["stage"] == "sft.validation"  # after its last step
    run_again = run(tmp_path, data)
    result, records = uninterrupted
    # The shorter run validated after step 3 too and not after 2.
    changed = {key: value for key, value in records.items() if key != ("sft.validation", 2)}
    changed["sft.validation", 3] = log(tmp_path)["sft.validation", 3]
    assert_same_run(run_again, tmp_path, (result, changed))


def test_a_crash_after_a_save_takes_the_lost_steps_again(tmp_path, data, uninterrupted):
    """It dies dispatching step 6: steps 4 and 5 are logged, and the newest checkpoint is 3."""
    calls = []

    def dies(*args):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return TRAIN_STEP(*args)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, train_step=dies)
    assert ("sft", 4) in log(tmp_path) and ("sft.validation", 4) in log(tmp_path)
    assert_same_run(run(tmp_path, data), tmp_path, uninterrupted)


def test_sigterm_saves_the_step_and_exits_143(tmp_path, data, uninterrupted):
    def told_to_stop(state, batch, frozen):
        if state.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return TRAIN_STEP(state, batch, frozen)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as stopped:
        run(tmp_path, data, train_step=told_to_stop)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    with Store(tmp_path / "checkpoints", keep=10) as store:
        assert store.latest() == 4
    assert max(step for stage, step in log(tmp_path) if stage == "sft") == 4
    assert_same_run(run(tmp_path, data), tmp_path, uninterrupted)


def test_sigterm_at_the_last_step_finishes_the_stage_and_exits_143(tmp_path, data, uninterrupted):
    """No next stage is begun, and the same command finds this one whole."""

    def told_to_stop(state, batch, frozen):
        if state.step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return TRAIN_STEP(state, batch, frozen)

    with pytest.raises(Terminated):
        run(tmp_path, data, train_step=told_to_stop)
    with Store(tmp_path / "checkpoints", keep=10) as store:
        assert store.latest() == STEPS
    assert_same_run(run(tmp_path, data), tmp_path, uninterrupted)


def test_a_finished_run_trains_no_further(tmp_path, data):
    run(tmp_path, data, steps=2, save_every=2)

    def never(*_):
        raise AssertionError("a step was taken")

    state, tokens = run(tmp_path, data, train_step=never, steps=2)
    assert state.step == 2 and tokens > 0


def test_a_run_of_nonfinite_steps_stops_with_the_batches_named(tmp_path, data):
    broken = jax.tree.map(lambda s: jnp.full(s.shape, np.nan), MODEL.shapes)
    message = "stage sft: .* of 2 consecutive steps was not finite, on batches 1 to 2 of its data"
    with pytest.raises(NonFinite, match=message):
        run(tmp_path, data, params=lambda: broken, max_nonfinite=2)
    assert ("sft", 1) in log(tmp_path) and ("sft", 2) not in log(tmp_path)


def test_mistakes_are_named():
    for name in ("steps", "log_every", "save_every", "max_nonfinite"):
        with pytest.raises(ValueError, match=rf"{name} is 0; it must be at least 1"):
            FitConfig(**{**dataclasses.asdict(FitConfig(steps=1)), name: 0})
