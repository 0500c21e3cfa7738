"""The loop for every recipe that samples from the model: reinforcement learning from rewards."""

import concurrent.futures
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxreason.checkpoint.store import Store
from jaxreason.model.decoder import LanguageModel
from jaxreason.objectives.advantage import TokenArrays, advantages, mismatch
from jaxreason.objectives.policy import Algorithm, PolicyGradient, next_entropy_coef
from jaxreason.parallel import hosts, rules
from jaxreason.report.summary import read_lines, write_whole
from jaxreason.rollout.sync import snapshot
from jaxreason.train import state as state_lib
from jaxreason.train.collect import Collector, Interrupted, Rollout
from jaxreason.train.fit import NonFinite, Terminated, sigterm_asks
from jaxreason.train.groups import Group, Rows, RowsConfig, lay_out_updates, statistics
from jaxreason.train.metrics import MetricsWriter, Progress, peak_memory_gib
from jaxreason.train.step import TrainStep
from jaxreason.train.trace import Trace, check_steps
from jaxreason.types import Batch, Frozen, Params, PolicyBatch, TrainState


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """How long, how often, how patient. One step is one rollout and all the updates on it."""

    steps: int
    updates: int = 1  # the groups of a rollout are split into so many updates
    num_iterations: int = 1  # passes over a rollout
    asynchronous: bool = False  # the rollout of step n + 1 is drawn while step n is learnt from
    entropy_coef: float = 0.0  # of the entropy bonus; where it starts when there is a target
    entropy_target: float | None = None  # nats a token; None: the coefficient stays as it is
    entropy_step: float = 0.005
    log_every: int = 1  # steps between two lines on the terminal; metrics.jsonl has every step
    save_every: int = 20
    evaluate_every: int = 0  # 0: never inside the stage
    samples_every: int = 10  # steps between those whose groups go into samples.jsonl
    max_nonfinite: int = 5
    # Limit of rollout/token_mult_prob_error; when asynchronous that holds a step of learning too.
    max_mult_prob_error: float = 1.05
    profile: tuple[int, ...] = ()  # (first, last) step to trace, counted from 1

    def __post_init__(self):
        least = ("steps", "updates", "num_iterations", "log_every", "save_every", "samples_every")
        for name in (*least, "max_nonfinite"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name, key in (("entropy_coef", "train.entropy_coef"), ("evaluate_every", "eval.every")):
            if getattr(self, name) < 0:
                raise ValueError(f"{key} is {getattr(self, name)}; it must be 0 or more")
        if self.max_mult_prob_error <= 1:
            raise ValueError(
                f"rollout.max_mult_prob_error is {self.max_mult_prob_error}; it must be above 1, "
                "where sampler and trainer agree exactly"
            )
        check_steps(self.profile, self.steps)

    @property
    def has_entropy_bonus(self) -> bool:
        return self.entropy_coef > 0 or self.entropy_target is not None

    @property
    def num_updates(self) -> int:
        """Of the whole stage: what the learning-rate schedule counts."""
        return self.steps * self.updates * self.num_iterations


@dataclasses.dataclass(frozen=True)
class RL:
    """One stage of reinforcement learning, ready to run."""

    stage: str
    config: RLConfig
    algorithm: Algorithm
    rows: RowsConfig
    model: LanguageModel
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    score: Callable  # of make_score
    collector: Collector
    store: Store
    writer: MetricsWriter
    progress: Progress
    samples: pathlib.Path
    seed: int
    to_sampler: Callable[[Params], Params] = lambda params: params  # where the sampler reads them
    evaluate: Callable[[Params], dict[str, float]] | None = None
    trace_dir: str = ""  # for the trace and its table


@dataclasses.dataclass(frozen=True)
class Kept:
    """What makes the parameters that a stage reads and leaves as they are; None where it has none.

    Of LoRA adapters base and reference are the same.
    """

    reference: Callable[[], Params] | None = None  # that the KL is to
    base: Callable[[], Params] | None = None  # that adapters are added to
    teacher: Callable[[], Params] | None = None  # that is distilled


class Mismatch(RuntimeError):
    """The sampler's probabilities are not the trainer's: the updates would be wrong."""


def train(
    job: RL,
    key: jax.Array,
    params: Callable[[], Params | None],
    kept: Kept = Kept(),
) -> tuple[TrainState, float]:
    """Learn to `config.steps`, resuming from the store's newest checkpoint if it has one.

    Returns the final state and the number of tokens learnt over the whole stage.

    Args:
      key: the stage's PRNG key, of the initial state only; the collector has its own.
      params: makes the initial parameters (None: random); called only when nothing is to resume.
    """
    config = job.config

    # --- state: the newest checkpoint, or a fresh one ---------------------------------------------
    done, state, host = _begin(job, key, params)
    pending = Rollout.from_json(host["pending"]) if host["pending"] else None
    made = {"reference": kept.reference, "teacher": kept.teacher}
    read = {name: make() for name, make in made.items() if make is not None}
    frozen = Frozen(base=kept.base and kept.base(), read=read)
    whole = lambda params: job.model.complete(params, frozen.base)

    def save(done: int, pending: Rollout | None, wait: bool) -> None:
        content = {**host, "pending": pending.to_json() if pending else None}
        items = {"state": state, "data": job.collector.prompts.get_state(), "host": content}
        job.store.save(done, items, wait=wait)

    # --- steps ------------------------------------------------------------------------------------
    job.progress.start(job.stage, config.steps, done)
    trained = (0.0, 0.0)  # when the step before was learnt from, in seconds of perf_counter
    traced = Trace(config.profile, job.trace_dir, job.progress.say)
    job = dataclasses.replace(job, train_step=traced.watched(job.train_step))
    with sigterm_asks() as asked, traced, _Rollouts(job, pending) as rollouts:
        sign = hosts.StopSign(job.stage, asked)
        while done < config.steps:
            traced.before(done, state)
            began = time.perf_counter()
            latest = lambda: job.to_sampler(whole(state.params))
            try:
                rollout = rollouts.take(done + 1, latest, sign.seen)
            except Interrupted:
                save(done, rollouts.begun, wait=True)
                job.progress.say(f"{job.stage}: SIGTERM in a rollout, saved step {done}")
                raise Terminated from None
            # A copy: the train step donates the original. Moved from here, not from the thread:
            # several processes must start what all their devices do in one order.
            rollouts.draw_ahead(done + 2, lambda: job.to_sampler(whole(snapshot(state.params))))
            learning = time.perf_counter()
            if why := _why_skipped(job, rollout):
                host["skipped"] += 1
                job.progress.say(f"{job.stage}: step {rollout.step} skipped: {why}")
                values = {}
            else:
                state, values = _learn(job, state, rollout, host["entropy_applied"], frozen)
                host["tokens"] += values["num_tokens"]
                if config.entropy_target is not None:
                    host["entropy_coef"], host["entropy_applied"] = next_entropy_coef(
                        host["entropy_coef"], values["entropy"], config.entropy_target,
                        config.entropy_step,
                    )  # fmt: skip
            done += 1
            traced.after(done, state)
            now = time.perf_counter()
            values |= _rollout_values(rollout) | {"rollout/skipped": host["skipped"]}
            values |= _times(values, rollout, began, learning, now)
            values["perf/overlap"] = _overlap(trained, (rollout.began, rollout.ended))
            trained = (learning, now)
            last = done == config.steps
            if config.evaluate_every and (last or done % config.evaluate_every == 0):
                values |= job.evaluate(whole(state.params))
            _report(job, done, values, rollout)
            stopping = sign.agreed()
            if last or stopping or done % config.save_every == 0:
                save(done, rollouts.ahead(), wait=last or stopping)
            if stopping:
                break
        if sign.agreed():  # after the last step too: no other stage begins
            job.progress.say(f"{job.stage}: SIGTERM, saved step {done}")
            raise Terminated
    job.progress.stop()
    return state, host["tokens"]


def _begin(
    job: RL, key: jax.Array, params: Callable[[], Params | None]
) -> tuple[int, TrainState, dict[str, Any]]:
    """(steps done, state, what the host keeps); prompts and logs are where those steps end."""
    if job.store.latest() is None:
        state = state_lib.create(job.model, job.optimizer, key, params())
        coefficient = job.config.entropy_coef
        host = {"tokens": 0.0, "skipped": 0, "pending": None}
        host |= {"entropy_coef": coefficient, "entropy_applied": coefficient}
        done = 0
    else:
        done, items = job.store.restore(state_lib.abstract(job.model, job.optimizer))
        state, host = items["state"], items["host"]
        job.collector.prompts.set_state(items["data"])
        job.progress.say(f"{job.stage}: resumed from step {done}")
    job.writer.cut(job.stage, done)
    _cut_samples(job, done)
    return done, state, host


class _Rollouts:
    """The next rollout: drawn when it is asked for, or one step ahead by a thread.

    Which parameters draw a rollout follows from the step alone, never from timing: those before
    the step that learns from it, or when asynchronous those before the step in front of that.
    """

    def __init__(self, job: RL, pending: Rollout | None):
        self._job, self.begun = job, pending
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._future: concurrent.futures.Future[Rollout] | None = None

    def take(self, step: int, params: Callable[[], Params], stop: Callable[[], bool]) -> Rollout:
        """The complete rollout of this step. Raises Interrupted, leaving it in `begun`."""
        if self._future is not None:
            rollout, self._future = self._future.result(), None
            return rollout
        self.begun = self.begun or Rollout(step)
        rollout = self._job.collector.collect(self.begun, params(), stop)
        self.begun = None
        return rollout

    def draw_ahead(self, step: int, copy: Callable[[], Params]) -> None:
        if self._job.config.asynchronous and step <= self._job.config.steps:
            collect = self._job.collector.collect
            self._future = self._thread.submit(collect, Rollout(step), copy())

    def ahead(self) -> Rollout | None:
        """The rollout drawn ahead, waited for: a checkpoint holds it, its parameters are gone."""
        return self._future.result() if self._future is not None else None

    def __enter__(self) -> "_Rollouts":
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()


# --- learning from one rollout --------------------------------------------------------------------


def make_score(model: LanguageModel, policy: PolicyGradient, teacher: LanguageModel | None = None):
    """jitted `(params, read, batch) -> {name: float32 [rows, length]}` before the updates.

    `logprobs` of the targets at the rollout temperature, `values` with a value head, and of what is
    read: `ref_logprobs` with a `reference`, `teacher_logprobs` with the model of a `teacher`.
    """

    @jax.jit
    def score(params: Params, read: dict[str, Params | None], batch: Batch) -> dict[str, jax.Array]:
        logprobs_BT, _, values_BT = policy.score(model, params, batch)
        scores = {"logprobs": logprobs_BT}
        if values_BT is not None:
            scores["values"] = values_BT
        if "reference" in read:
            scores["ref_logprobs"] = policy.score(model, read["reference"], batch)[0]
        if teacher is not None:
            scores["teacher_logprobs"] = policy.score(teacher, read["teacher"], batch)[0]
        # Whole on every device: every process reads all of them.
        return {name: rules.constrain(x, model.mesh, "whole") for name, x in scores.items()}

    return score


def _learn(
    job: RL,
    state: TrainState,
    rollout: Rollout,
    entropy_coef: float,
    frozen: Frozen,
) -> tuple[TrainState, dict[str, float]]:
    """All updates on one rollout, and the means of their metrics."""
    updates = _split(job, rollout)
    rows_U = lay_out_updates(updates, job.rows)
    place = lambda tree: hosts.to_global(job.model.mesh, tree) if job.model.mesh else tree
    whole = job.model.complete(state.params, frozen.base)
    scores_U = [jax.device_get(job.score(whole, frozen.read, place(rows.batch))) for rows in rows_U]
    if rollout.on_policy:
        batches = _policy_batches(job, updates, rows_U, scores_U, entropy_coef)
        values = mismatch(
            np.concatenate([b.old_logprobs_BT for b in batches]),
            np.concatenate([b.rollout_logprobs_BT for b in batches]),
            np.concatenate([b.weights_BT for b in batches]),
        )
        _check_mismatch(job, rollout, values)
        if job.algorithm.teacher is not None:
            values["teacher/kl"] = _gap_to_teacher(batches, scores_U)
    else:
        batches, values = _answer_batches(rows_U, scores_U), {}
    batches = [place(batch) for batch in batches]
    found = []
    for _ in range(job.config.num_iterations):
        for batch in batches:
            state, metrics = job.train_step(state, batch, frozen)
            found.append(metrics)
    found = jax.device_get(found)
    if found[-1]["nonfinite"] >= job.config.max_nonfinite:
        raise NonFinite(
            f"stage {job.stage}: the loss or the gradient of {int(found[-1]['nonfinite'])} "
            f"consecutive updates was not finite, the last in step {rollout.step}"
        )
    for name in found[0]:
        values[name] = float(np.mean([metrics[name] for metrics in found]))
    if job.algorithm.has_policy:
        values["clip_ratio/low_min"] = float(min(m["clip_ratio/low_mean"] for m in found))
        values["clip_ratio/high_max"] = float(max(m["clip_ratio/high_mean"] for m in found))
    values["num_tokens"] = float(sum(b.weights_BT.sum() for b in batches))
    return state, values


def _split(job: RL, rollout: Rollout) -> list[list[Group]]:
    """The groups in a random order, cut into as many parts as there are updates."""
    order = np.random.default_rng((job.seed, rollout.step)).permutation(len(rollout.groups))
    return [[rollout.groups[i] for i in part] for part in np.split(order, job.config.updates)]


def _policy_batches(
    job: RL,
    updates: Sequence[Sequence[Group]],
    rows_U: Sequence[Rows],
    scores_U: Sequence[dict[str, np.ndarray]],
    entropy_coef: float,
) -> list[PolicyBatch]:
    """Advantages are of the whole rollout: whitening sees every token of it."""

    def gather(name: str) -> np.ndarray | None:
        if name not in scores_U[0]:
            return None
        pairs = zip(rows_U, scores_U, strict=True)
        return np.concatenate([rows.gather(scores[name]) for rows, scores in pairs])

    tokens = TokenArrays(
        mask_BT=np.concatenate([rows.gather(rows.batch.weights_BT) for rows in rows_U]),
        old_logprobs_BT=gather("logprobs"),
        ref_logprobs_BT=gather("ref_logprobs"),
        values_BT=gather("values"),
    )
    sampled_CT = [_sampled_logprobs(u, rows.width) for u, rows in zip(updates, rows_U, strict=True)]
    if job.algorithm.teacher is not None:
        external_BT = job.algorithm.teacher.advantages(
            gather("teacher_logprobs"), np.concatenate(sampled_CT), tokens.mask_BT
        )
        tokens = dataclasses.replace(tokens, external_BT=external_BT)
    rewards_QR = np.array([group.rewards for update in updates for group in update])
    estimate = advantages(job.algorithm.advantage, rewards_QR, tokens)
    batches, at = [], 0
    for rows, scores, drawn_CT in zip(rows_U, scores_U, sampled_CT, strict=True):
        mine = slice(at, at + len(rows.size_C))
        at = mine.stop
        fields = {f.name: getattr(rows.batch, f.name) for f in dataclasses.fields(Batch)}
        fields["advantages_BT"] = rows.spread(estimate.advantages[mine])
        fields["rollout_logprobs_BT"] = rows.spread(drawn_CT)
        renamed = {"logprobs": "old_logprobs", "values": "old_values"}
        for name, values_BT in scores.items():
            if name != "teacher_logprobs":  # the advantages hold all that is learnt from them
                fields[f"{renamed.get(name, name)}_BT"] = values_BT
        if estimate.returns_BT is not None:
            fields["returns_BT"] = rows.spread(estimate.returns_BT[mine])
        weights_BT = rows.batch.weights_BT
        for name in fields.keys() - {f.name for f in dataclasses.fields(Batch)}:
            fields[name] = fields[name] * weights_BT
        if job.config.has_entropy_bonus:
            fields["entropy_coef_B"] = np.full(len(weights_BT), entropy_coef, np.float32)
        batches.append(PolicyBatch(**fields))
    return batches


def _answer_batches(
    rows_U: Sequence[Rows], scores_U: Sequence[dict[str, np.ndarray]]
) -> list[PolicyBatch]:
    """Of answers that nobody sampled: no advantages, so that a policy gradient is 0 on them."""
    batches = []
    for rows, scores in zip(rows_U, scores_U, strict=True):
        fields = {f.name: getattr(rows.batch, f.name) for f in dataclasses.fields(Batch)}
        logprobs_BT = scores["logprobs"] * rows.batch.weights_BT
        fields |= {"old_logprobs_BT": logprobs_BT, "rollout_logprobs_BT": logprobs_BT}
        batches.append(PolicyBatch(**fields, advantages_BT=np.zeros_like(logprobs_BT)))
    return batches


def _gap_to_teacher(
    batches: Sequence[PolicyBatch], scores_U: Sequence[dict[str, np.ndarray]]
) -> float:
    """The mean of log p - log p_teacher over the learnt tokens: an estimate of KL(policy, teacher)
    for each token, which may be below 0."""
    of = lambda values: np.concatenate([v[b.weights_BT > 0] for v, b in zip(values, batches)])
    sampled = of([b.rollout_logprobs_BT for b in batches])
    return float((sampled - of([s["teacher_logprobs"] for s in scores_U])).mean())


def _sampled_logprobs(groups: Sequence[Group], width: int) -> np.ndarray:
    """The sampler's, [C, width], 0 after each completion's last id."""
    completions = [c for group in groups for c in group.completions]
    out_CT = np.zeros((len(completions), width), np.float32)
    for row_T, completion in zip(out_CT, completions, strict=True):
        row_T[: completion.num_tokens] = completion.logprobs
    return out_CT


def _check_mismatch(job: RL, rollout: Rollout, values: dict[str, float]) -> None:
    error, limit = values["rollout/token_mult_prob_error"], job.config.max_mult_prob_error
    if error > limit:
        raise Mismatch(
            f"stage {job.stage}, step {rollout.step}: rollout/token_mult_prob_error is "
            f"{error:.4f}, over rollout.max_mult_prob_error = {limit}: the sampler's probabilities "
            "are not the trainer's"
        )


# --- what is written ------------------------------------------------------------------------------


def _rollout_values(rollout: Rollout) -> dict[str, float]:
    """`reward` and `frac_reward_zero_std` are of all groups drawn, the rest of those kept."""
    own = {f"prompts/{name}": value for name, value in rollout.prompts.items()}
    own["rollout/on_policy"] = float(rollout.on_policy)
    if not rollout.on_policy:
        return own
    values = statistics(rollout.groups) if rollout.groups else {}
    if values:
        values["rollout/kept_reward"] = values["reward"]
    return (
        values
        | own
        | {
            "reward": rollout.earned / rollout.generated,
            "frac_reward_zero_std": rollout.agreed / rollout.generated,
            "rollout/gen_batches": rollout.gen_batches,
            "rollout/generated_groups": rollout.generated,
        }
    )


def _report(job: RL, step: int, values: dict[str, float], rollout: Rollout) -> None:
    config = job.config
    memory = peak_memory_gib()
    if memory is not None:
        values["perf/peak_memory_gib"] = memory
    job.writer.write(job.stage, step, values)
    if step % config.log_every == 0 or step == config.steps:
        loss = values.get("loss", float("nan"))
        detail = f"loss {loss:.3f} on the data's answers  "
        if rollout.on_policy:
            detail = f"reward {values['reward']:.3f}  "
        if rollout.on_policy and rollout.groups:
            detail += f"length {values['completions/mean_length']:.0f}  "
        job.progress.update(step, detail + f"{values['perf/step_time']:.1f} s a step")
    chosen = step % config.samples_every == 0 or step in (1, config.steps)
    if hosts.is_first() and chosen and rollout.on_policy:
        with job.samples.open("a") as file:
            for group in rollout.groups:
                file.write(json.dumps(_sample(job, step, group)) + "\n")


def _sample(job: RL, step: int, group: Group) -> dict[str, Any]:
    """One line of samples.jsonl."""
    return {
        "stage": job.stage,
        "step": step,
        "prompt": group.prompt.text,
        "answer": group.prompt.answer,
        "completions": [
            {
                "text": completion.text,
                "reward": reward,
                "num_tokens": completion.num_tokens,
                "truncated": completion.truncated,
                "rewards": {name: values[i] for name, values in group.breakdown.items()},
            }
            for i, (completion, reward) in enumerate(
                zip(group.completions, group.rewards, strict=True)
            )
        ],
    }


def _times(
    values: dict[str, float], rollout: Rollout, began: float, learning: float, now: float
) -> dict[str, float]:
    """Seconds of a step that began to wait for its rollout, then to learn, and is over now."""
    return {
        "perf/step_time": now - began,
        "perf/tokens_per_sec": values.get("num_tokens", 0.0) / (now - began),
        "perf/rollout_time": rollout.ended - rollout.began,
        "perf/train_time": now - learning,
        "perf/rollout_wait": learning - began,
    }


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    """How much of the shorter of two intervals lies in the other: a share."""
    common = min(a[1], b[1]) - max(a[0], b[0])
    return max(common, 0.0) / max(min(a[1] - a[0], b[1] - b[0]), 1e-9)


def _cut_samples(job: RL, done: int) -> None:
    """Forget the groups of steps that will be taken again."""
    if not hosts.is_first():
        return
    lines = read_lines(job.samples)
    kept = [s for s in lines if s["stage"] != job.stage or s.get("step", 0) <= done]
    write_whole(job.samples, "".join(json.dumps(line) + "\n" for line in kept))


def _why_skipped(job: RL, rollout: Rollout) -> str | None:
    """What keeps a rollout from being learnt from; None where nothing does."""
    wanted = job.collector.config.num_prompts
    if len(rollout.groups) < wanted:
        return (
            f"{len(rollout.groups)} of {wanted} groups had different rewards after "
            f"{rollout.gen_batches} draws (rollout.max_gen_batches)"
        )
    completions = [c for group in rollout.groups for c in group.completions]
    if job.rows.mask_truncated and all(c.truncated for c in completions):
        return (
            f"all {len(completions)} completions ran into rollout.max_tokens "
            "(train.mask_truncated_completions)"
        )
    return None
