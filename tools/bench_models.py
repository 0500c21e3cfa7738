"""A whole model beside transformers: updates, decoding, rollouts and the data that feeds them.

Ours and theirs on the same weights and shapes, after a check that both compute the same: the losses
of the first updates, the greedy tokens. Tokens a second, in turn; the ratio is the median of the
rounds' ratios, and beside it stands the same by CPU time, which other work on the machine changes
less. float32 on CPU, bfloat16 on accelerators.
"""

import dataclasses
import importlib.util
import pathlib
import statistics
import tempfile
from collections.abc import Callable

import bench_peers as peers
import jax
import numpy as np
from bench_timing import Run, Settings, WrongResultError, best_variant, in_turn, on_cpu

from jaxreason.model.config import DecoderConfig, preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.train import optim, state
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, Params, Sampling

NO_EOS = -1  # an id that no token has: every completion runs to its limit
DECODE_ROWS, PROMPT, NEW = 64, 16, 64
# Requests, lengths of their prompts, tokens of their completions; the batches that the peer tries.
REQUESTS, PROMPTS, LIMITS, BATCHES = 256, (16, 64), (16, 512), (32, 64, 128, 256)
GROUP, GROUP_PROMPT, GROUP_NEW = 16, 256, 64  # samples of one prompt, its length, their length
OPTIMIZER = optim.OptimizerConfig(learning_rate=1e-4, schedule="constant")


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the batch it trains on; the goals are ratios, ours over theirs."""

    name: str
    config: DecoderConfig
    rows: int
    length: int
    train_goal: float
    decode_goal: float
    feeds: dict[str, str]  # data: name -> the shipped config (and stage) that names the source
    rollout_goal: float = 3.0


CASES = {
    # The quickstart's model and its long-CoT batch (tests/tools/test_bench.py holds it to that).
    "tiny": Case(
        "tiny", preset("qwen3-tiny", vocab_size=261), 48, 160, 0.95, 2.0,
        {"sft_cot": "quickstart:smoke"}, 4.0,
    ),
    "10m": Case(
        "10m", preset("qwen3-10m"), 8, 256, 0.95, 1.5, {"books": "pretrain", "gsm8k": "sft"}
    ),
    # For accelerators. A second row would not fit into 80 GB beside the peer's four optimizers.
    "0.6b": Case("0.6b", preset("qwen3-0.6b"), 1, 4096, 1.15, 5.0, {"gsm8k": "sft"}),
    "1.7b": Case("1.7b", preset("qwen3-1.7b"), 1, 4096, 1.15, 5.0, {}),
}  # fmt: skip
DATA_GOAL, SHARING_GOAL = 10.0, 1.5


@dataclasses.dataclass(frozen=True)
class Result:
    """Rates (tokens/s) and CPU seconds a token of every round; no peer: `theirs` is empty."""

    suite: str
    case: str
    shape: str
    goal: float
    ours: list[float]
    ours_cpu: list[float]
    theirs: list[float]
    theirs_cpu: list[float]
    peer: str  # which one, or why there is none

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios: what slows both sides of a round cancels."""
        pairs = zip(self.ours, self.theirs)
        return statistics.median(a / b for a, b in pairs) if self.theirs else None

    @property
    def cpu_ratio(self) -> float | None:
        pairs = zip(self.ours_cpu, self.theirs_cpu)
        return statistics.median(b / a for a, b in pairs) if self.theirs_cpu else None

    def record(self) -> dict:
        ratios = {"ratio": self.ratio, "cpu_ratio": self.cpu_ratio}
        return {**dataclasses.asdict(self), **ratios}


def records(case: Case, found: list["Result | str"]) -> list[dict]:
    """What a suite found; where it measured nothing, why."""
    return [{"case": case.name, "left_out": r} if isinstance(r, str) else r.record() for r in found]


def language_model(case: Case) -> LanguageModel:
    """As the recipes run it on this device: see recipes.assemble.execution."""
    how = Execution() if on_cpu() else Execution(dtype="bfloat16", scan_layers=True)
    return LanguageModel(case.config, how)


# ---------------------------------------------------------------------------------- train


def bench_train(case: Case, settings: Settings) -> list[Result | str]:
    """A whole update: forward, backward, clipping, AdamW."""
    model, batch = language_model(case), random_batch(case)
    step, params = train_step(model, batch)
    shape = f"{case.rows} x {case.length}, vocabulary {case.config.vocab_size}"
    result = dict(suite="train", case=case.name, shape=shape, goal=case.train_goal)
    tokens = case.rows * case.length

    def ours() -> int:
        jax.block_until_ready(step())
        return tokens

    reason = peers.missing()
    if reason:
        ours()
        return [Result(**result, **in_turn(settings, ours, None), peer=reason)]
    with peers.load(case.config, params, bfloat16=False) as peer:
        steps, remark = peers.train_steps(
            peer, batch, OPTIMIZER, autocast=not on_cpu(), compiled=settings.compiled
        )
        _check_losses([float(step()) for _ in range(3)], steps["eager fused"])
        variant, theirs = best_variant({n: _counting(s, tokens) for n, s in steps.items()})
        peer_name = ", ".join(filter(None, (variant, remark)))
        return [Result(**result, **in_turn(settings, ours, theirs), peer=peer_name)]


def train_step(model: LanguageModel, batch: Batch, keep: bool = True):
    """(a closure that makes one update and returns its loss, the parameters it starts from).

    These are None unless `keep`.
    """
    optimizer = optim.make_optimizer(OPTIMIZER, model.axes)
    schedule = optim.make_schedule(OPTIMIZER, 1)
    update = make_train_step(
        model, LanguageModeling(), optimizer, schedule, clip_norm=OPTIMIZER.clip_norm
    )
    now = state.create(model, optimizer, jax.random.key(0))
    start = jax.device_get(now.params) if keep else None

    def step() -> jax.Array:
        nonlocal now
        now, metrics = update(now, batch, None)
        return metrics["loss"]

    return step, start


def _check_losses(ours: list[float], their_step: Callable) -> None:
    theirs = [float(their_step()) for _ in ours]
    tolerance = 1e-4 if on_cpu() else 2e-2
    if not np.allclose(ours, theirs, rtol=tolerance):
        raise WrongResultError(f"the first losses are {ours} here and {theirs} in transformers")


def _counting(step: Callable, tokens: int) -> Run:
    def run() -> int:
        step().item()  # waits for the device
        return tokens

    return run


def random_batch(case: Case) -> Batch:
    """Full rows of one document each; a fifth of the targets has no weight, as in a prompt."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, case.config.vocab_size, (case.rows, case.length + 1)).astype(np.int32)
    shape = (case.rows, case.length)
    return Batch(
        tokens_BT=ids[:, :-1],
        targets_BT=ids[:, 1:],
        weights_BT=(rng.random(shape) < 0.8).astype(np.float32),
        segments_BT=np.ones(shape, np.int32),
        positions_BT=np.tile(np.arange(case.length, dtype=np.int32), (case.rows, 1)),
    )


# --------------------------------------------------------------------------------- decode


def bench_decode(case: Case, settings: Settings) -> list[Result | str]:
    """Equal prompts, greedy, a fixed number of tokens; from ids to `Completion`s, with prefill."""
    model, params = clear_model(case)
    generate = build_generate(model, list, str, NO_EOS, EngineConfig(slots=DECODE_ROWS))
    prompts = np.random.default_rng(0).integers(0, 256, (DECODE_ROWS, PROMPT)).tolist()
    sampling, key = Sampling(max_tokens=NEW, temperature=0.0), jax.random.key(0)
    shape = f"{DECODE_ROWS} x ({PROMPT} + {NEW})"
    result = dict(suite="decode", case=case.name, shape=shape, goal=case.decode_goal)

    def ours() -> int:
        generate(params, prompts, sampling, key)
        return DECODE_ROWS * NEW

    reason = peers.missing()
    if reason:
        ours()
        return [Result(**result, **in_turn(settings, ours, None), peer=reason)]
    with peers.load(case.config, params, bfloat16=not on_cpu()) as peer:
        made = peers.generators(peer, prompts, NEW)
        found = np.array([row[0].ids for row in generate(params, prompts, sampling, key)])
        gaps = peers.first_differences(peer, prompts, found, made["dynamic cache"]())
        if max(gaps, default=0.0) > (1e-3 if on_cpu() else 0.1):
            raise WrongResultError(f"{len(gaps)} rows have other tokens, by gaps of {gaps}")
        variant, theirs = best_variant({n: lambda m=m: m().size for n, m in made.items()})
        same = f"{variant}; same tokens in {DECODE_ROWS - len(gaps)} of {DECODE_ROWS} rows"
        return [Result(**result, **in_turn(settings, ours, theirs), peer=same)]


def clear_model(case: Case) -> tuple[LanguageModel, Params]:
    """Layers 5 times their initial size: clear winners, so that both sides choose the same."""
    model = language_model(case)
    return model, jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, model.init(jax.random.key(0)))


# -------------------------------------------------------------------------------- rollout


def bench_rollout(case: Case, settings: Settings) -> list[Result | str]:
    """Requests of mixed lengths that all run to their own limit, greedy, from ids to `Completion`s.

    The peer takes them in the order they come, in its best batch, each batch to its longest row, or
    by its continuous batching. Then the samples of one prompt, with and without a shared prefix.
    """
    model, params = clear_model(case)
    prompts, limits = rollout_requests()
    samplings = [Sampling(max_tokens=n, temperature=0.0, ignore_eos=True) for n in limits]
    generate, key = build_generate(model, list, str, NO_EOS), jax.random.key(0)
    settings = dataclasses.replace(settings, rounds=min(settings.rounds, 3))
    shape = f"{REQUESTS} x ({PROMPTS[0]}-{PROMPTS[1]} + {LIMITS[0]}-{LIMITS[1]})"
    result = dict(suite="rollout", case=case.name, shape=shape, goal=case.rollout_goal)

    def ours() -> int:
        return sum(row[0].num_tokens for row in generate(params, prompts, samplings, key))

    found = [row[0].ids for row in generate(params, prompts, samplings, key)]
    sharing = _bench_sharing(case, settings, model, params)
    reason = peers.missing()
    if reason:
        return [Result(**result, **in_turn(settings, ours, None, long=True), peer=reason), sharing]
    with peers.load(case.config, params, bfloat16=not on_cpu()) as peer:
        runs = peers.rollouts(peer, prompts, limits, BATCHES)
        name, made = peers.best_rollout(runs)
        first = slice(0, BATCHES[0])  # comparing them all would take as long as making them
        gaps = peers.first_differences(peer, prompts[first], *_padded(found[first], made[first]))
        if max(gaps, default=0.0) > (1e-3 if on_cpu() else 0.1):
            raise WrongResultError(f"{len(gaps)} rows have other tokens, by gaps of {gaps}")
        theirs = lambda run=runs[name]: sum(map(len, run()))
        name += f"; same tokens in {BATCHES[0] - len(gaps)} of {BATCHES[0]} rows"
        return [Result(**result, **in_turn(settings, ours, theirs, long=True), peer=name), sharing]


def rollout_requests() -> tuple[list[list[int]], list[int]]:
    """(prompts, tokens of each completion), the same every time."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(PROMPTS[0], PROMPTS[1] + 1, REQUESTS)
    limits = rng.integers(LIMITS[0], LIMITS[1] + 1, REQUESTS)
    return [rng.integers(0, 256, n).tolist() for n in sizes], limits.tolist()


def _padded(*sides: list) -> tuple[np.ndarray, ...]:
    longest = max(len(ids) for side in sides for ids in side)
    return tuple(np.array([[*ids, *[0] * (longest - len(ids))] for ids in side]) for side in sides)


def _bench_sharing(case: Case, settings: Settings, model: LanguageModel, params: Params) -> Result:
    prompt = np.random.default_rng(0).integers(0, 256, GROUP_PROMPT).tolist()
    sampling = Sampling(max_tokens=GROUP_NEW, ignore_eos=True, num_samples=GROUP)

    def run(share: bool) -> Run:
        config = EngineConfig(share_prefix=share)
        generate = build_generate(model, list, str, NO_EOS, config)
        ids = lambda: [c.ids for c in generate(params, [prompt], sampling, jax.random.key(0))[0]]
        return lambda: sum(map(len, ids()))

    shared, alone = run(True), run(False)
    shared(), alone()
    return Result(
        "rollout", case.name, f"{GROUP} samples of {GROUP_PROMPT} + {GROUP_NEW}", SHARING_GOAL,
        **in_turn(settings, shared, alone), peer="ours, no prefix shared",
    )  # fmt: skip


# ----------------------------------------------------------------------------------- data


def bench_data(case: Case, settings: Settings) -> list[Result | str]:
    """Batches as the loop takes them, against the train step that eats them (same shape)."""
    for name in ("grain", "tensorflow_datasets", "ml_collections"):
        if importlib.util.find_spec(name) is None:
            return [f"{name} is not installed"]
    step, _ = train_step(language_model(case), random_batch(case))

    def eaten() -> int:
        jax.block_until_ready(step())
        return case.rows * case.length

    return [_bench_feed(case, settings, feed, eaten) for feed in case.feeds]


def _bench_feed(case: Case, settings: Settings, feed: str, eaten: Run) -> Result | str:
    from jaxreason.data import pipeline, sources
    from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic
    from jaxreason.launch import load_config
    from jaxreason.recipes import assemble
    from jaxreason.text.tokenizer import ByteTokenizer, load_tokenizer

    config, tokenizer = load_config(case.feeds[feed]), ByteTokenizer()
    section = config.stages[feed] if "stages" in config else config
    if feed != "sft_cot":
        if not sources.data_root().is_dir():
            return f"{feed}: no data at {sources.data_root()} (set JAXREASON_DATA)"
        tokenizer = load_tokenizer(sources.data_root() / "tokenizer_qwen3")
        section.data.update(rows=case.rows, length=case.length, num_shards=1)
        section.data.truncation = "keep_start"
    with tempfile.TemporaryDirectory() as folder:
        if "arithmetic" in config:
            arithmetic = ArithmeticConfig(**config.arithmetic.to_dict())
            prepare_arithmetic(arithmetic, pathlib.Path(folder) / "arithmetic")
        batches = pipeline.build(assemble.data_config(config, section), tokenizer, folder)

        def fed() -> int:  # of so many batches, those made in advance are few
            return sum(next(batches).tokens_BT.size for _ in range(20 * pipeline.PREFETCH))

        fed(), eaten()
        found = in_turn(settings, fed, eaten)
        batches.close()
    shape = f"{case.rows} x {case.length}, {type(tokenizer).__name__}"
    return Result("data", f"{case.name} {feed}", shape, DATA_GOAL, **found, peer="our train step")


SUITES = {
    "train": bench_train,
    "decode": bench_decode,
    "rollout": bench_rollout,
    "data": bench_data,
}
