"""The loop for every recipe that does not sample from the model: pretraining, SFT, distillation."""

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from jaxreason.checkpoint.store import Store
from jaxreason.data.pipeline import Pipeline
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.train import state as state_lib
from jaxreason.train.metrics import MetricsWriter, Progress, peak_memory_gib
from jaxreason.train.optim import Schedule
from jaxreason.train.step import TrainStep
from jaxreason.train.trace import Trace, check_steps
from jaxreason.types import Frozen, Params, TrainState


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """How long, how often, how patient. Saves and logs fall on steps, never on seconds."""

    steps: int
    log_every: int = 10
    save_every: int = 100
    validate_every: int = 0  # 0: only before the first step and after the last
    max_nonfinite: int = 5  # consecutive skipped steps before the run stops
    profile: tuple[int, ...] = ()  # (first, last) step to trace, counted from 1

    def __post_init__(self):
        for name in ("steps", "log_every", "save_every", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        check_steps(self.profile, self.steps)


@dataclasses.dataclass(frozen=True)
class Fit:
    """One stage of training, ready to run."""

    stage: str
    config: FitConfig
    model: LanguageModel
    optimizer: optax.GradientTransformation
    schedule: Schedule
    train_step: TrainStep
    pipeline: Pipeline  # of the rows that lie on this process's devices
    store: Store
    writer: MetricsWriter
    progress: Progress
    validate: Callable[[Params], dict[str, float]] | None = None
    flops_per_token: float = 0.0
    peak_flops: float | None = None  # of all devices together; None: no MFU is claimed
    trace_dir: str = ""  # for the trace and its table


class NonFinite(RuntimeError):
    """Too many consecutive steps had a non-finite loss or gradient."""


class Terminated(SystemExit):
    """SIGTERM came, and the state is saved."""

    def __init__(self):
        super().__init__(143)


def fit(
    job: Fit, key: jax.Array, params: Callable[[], Params | None], frozen: Frozen | None = None
) -> tuple[TrainState, float]:
    """Train to `config.steps`, resuming from the store's newest checkpoint if it has one.

    Returns the final state and the number of target tokens learnt over the whole stage.

    Args:
      key: the stage's PRNG key.
      params: makes the initial parameters (None: random); called only when nothing is to resume.
      frozen: what the step reads beside the state and leaves as it is.
    """
    config = job.config

    # --- state: the newest checkpoint, or a fresh one ---------------------------------------------
    if job.store.latest() is None:
        state = state_lib.create(job.model, job.optimizer, key, params())
        done, items = 0, {}
    else:
        abstract = state_lib.abstract(job.model, job.optimizer)
        done, items = job.store.restore(abstract)
        state = items["state"]
        job.pipeline.set_state(items["data"])
        job.progress.say(f"{job.stage}: resumed from step {done}")
    job.writer.cut(job.stage, done)
    job.writer.cut(_validation(job.stage), done if done else -1)
    report = _Reporter(job, items["host"]["tokens"] if done else 0.0, frozen)
    if done == 0:
        report.validation(0, state)

    # --- steps ------------------------------------------------------------------------------------
    job.progress.start(job.stage, config.steps, done)
    pending = None  # the step in flight: reported after the next is dispatched, never waited for
    owned, num_shards = job.pipeline.owned, job.pipeline.num_shards
    traced = Trace(config.profile, job.trace_dir, job.progress.say)
    train_step = traced.watched(job.train_step)
    with sigterm_asks() as asked, traced:
        sign = hosts.StopSign(job.stage, asked)
        while done < config.steps:
            traced.before(done, state)
            began = time.perf_counter()
            batch = next(job.pipeline)
            waited = time.perf_counter() - began
            read = np.count_nonzero(batch.segments_BT) * num_shards // len(owned)
            if job.model.mesh is not None:
                batch = hosts.to_global(job.model.mesh, batch, owned, num_shards)
            state, metrics = train_step(state, batch, frozen)
            done += 1
            traced.after(done, state)
            if pending is not None:
                report.step(*pending)
            pending = (done, metrics, read, waited)
            last, stopping = done == config.steps, sign.due(done)
            if last or stopping or done % config.save_every == 0:
                # The log is complete up to a step before that step can be resumed from.
                report.step(*pending)
                pending = None
                if last or (config.validate_every and done % config.validate_every == 0):
                    report.validation(done, state)
                host = {"stage": job.stage, "step": done, "tokens": report.total_tokens}
                items = {"state": state, "data": whole_state(job.pipeline), "host": host}
                job.store.save(done, items, wait=last or stopping)
                if stopping:
                    break
            elif config.validate_every and done % config.validate_every == 0:
                report.validation(done, state)
        if sign.agreed():  # after the last step too: no other stage begins
            job.progress.say(f"{job.stage}: SIGTERM, saved step {done}")
            raise Terminated
    job.progress.stop()
    return state, report.total_tokens


def whole_state(pipeline: Pipeline) -> dict[str, Any]:
    """Where the shards of all processes stand, in process 0, which saves it; else those owned.

    To be called by all processes together.
    """
    parts = hosts.to_first("data", json.dumps(pipeline.get_state()).encode())
    found = {int(i): state for part in parts for i, state in json.loads(part)["shards"].items()}
    return {"shards": {str(i): found[i] for i in sorted(found)}}


def _validation(stage: str) -> str:
    """Validation has a stage name of its own: a (stage, step) pair is logged once."""
    return f"{stage}.validation"


class _Reporter:
    """Writes a step's metrics, and stops the run when too many steps in a row were skipped."""

    def __init__(self, job: Fit, total_tokens: float, frozen: Frozen | None):
        self.job, self.total_tokens, self.frozen = job, total_tokens, frozen
        self.clock, self.tokens, self.steps, self.waited = time.perf_counter(), 0, 0, 0.0

    def step(self, step: int, metrics: dict[str, jax.Array], read: int, waited: float) -> None:
        job = self.job
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.tokens += read
        self.total_tokens += values["num_tokens"]
        self.steps += 1
        self.waited += waited
        nonfinite = int(values.pop("nonfinite"))
        if nonfinite:
            job.progress.say(f"{job.stage}: step {step} skipped, its gradient is not finite")
        if nonfinite >= job.config.max_nonfinite:
            raise NonFinite(
                f"stage {job.stage}: the loss or the gradient of {nonfinite} consecutive steps was "
                f"not finite, on batches {step - nonfinite + 1} to {step} of its data"
            )
        if step % job.config.log_every and step != job.config.steps:
            return
        now = time.perf_counter()
        seconds = max(now - self.clock, 1e-9)
        rate = self.tokens / seconds
        values["nonfinite"] = nonfinite
        values["perf/tokens_per_sec"] = rate
        values["perf/step_time"] = seconds / self.steps
        values["perf/data_wait"] = self.waited / seconds
        if job.peak_flops:
            values["perf/mfu"] = rate * job.flops_per_token / job.peak_flops
        memory = peak_memory_gib()
        if memory is not None:
            values["perf/peak_memory_gib"] = memory
        job.writer.write(job.stage, step, values)
        detail = f"loss {values['loss']:.4f}  {rate:,.0f} tokens/s"
        if "perf/mfu" in values:
            detail += f"  MFU {values['perf/mfu']:.1%}"
        job.progress.update(step, detail)
        self.clock, self.tokens, self.steps, self.waited = now, 0, 0, 0.0

    def validation(self, step: int, state: TrainState) -> None:
        job = self.job
        if job.validate is None:
            return
        began = time.perf_counter()
        base = self.frozen.base if self.frozen else None
        values = job.validate(job.model.complete(state.params, base))
        job.writer.write(_validation(job.stage), step, values)
        job.progress.say(
            f"{job.stage} {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        )
        self.clock += time.perf_counter() - began


@contextlib.contextmanager
def sigterm_asks() -> Iterator[threading.Event]:
    """Within the loop SIGTERM only asks: the loop saves at the next step and leaves."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked  # only the main thread may install a handler; tests run fit elsewhere
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
