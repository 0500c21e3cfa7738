"""Speed of training, decoding, rollouts and the data, beside transformers where it is installed.

  python tools/bench.py train decode rollout data --json=bench.json

Ours and theirs run in one process, in turn (A B A B), on the same weights and shapes, after a check
that both compute the same: the losses of the first updates, the greedy tokens. The table gives
medians with least and most, and the median of the rounds' ratios; beside it the same ratio by CPU
time, which other work on the machine changes less. float32 on CPU, bfloat16 on accelerators.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[0]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed

import bench_peers as peers
import jax
import numpy as np
import rich.console
import rich.table

from jaxreason.model.config import DecoderConfig, preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.parallel.allocator import keep_freed_memory
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.train import optim, state
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, Params, Sampling

ROOT = pathlib.Path(__file__).resolve().parents[1]
Run = Callable[[], int]  # does the work, returns the tokens it made
NO_EOS = -1  # an id that no token has: every completion runs to its limit
DECODE_ROWS, PROMPT, NEW = 64, 16, 64
# Requests, lengths of their prompts, tokens of their completions; the batches that the peer tries.
REQUESTS, PROMPTS, LIMITS, BATCHES = 256, (16, 64), (16, 512), (32, 64, 128, 256)
GROUP, GROUP_PROMPT, GROUP_NEW = 16, 256, 64  # samples of one prompt, its length, their length
ROUND_SECONDS = 0.5  # at least, for each side of a round
OPTIMIZER = optim.OptimizerConfig(learning_rate=1e-4, schedule="constant")
VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy", "grain", "torch", "transformers")


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
}  # fmt: skip
DATA_GOAL, SHARING_GOAL = 10.0, 1.5


@dataclasses.dataclass(frozen=True)
class Settings:
    rounds: int
    deadline: float  # time.monotonic() after which no round begins
    compiled: bool  # try torch.compile


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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", default=["all"], help=f"{', '.join(SUITES)} or all")
    parser.add_argument("--models", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round begins after them")
    parser.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures of every round here")
    args = parser.parse_args(argv)
    suites = list(SUITES) if "all" in args.suites else args.suites
    names = args.models.split(",")
    for kind, given, known in (("suite", suites, SUITES), ("model", names, CASES)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; there are {', '.join(known)}")
    keep_freed_memory()
    console = rich.console.Console()
    console = console if console.is_terminal else rich.console.Console(width=160)
    deadline = time.monotonic() + 60 * args.minutes
    settings = Settings(args.rounds, deadline, not args.no_compile)
    about, results = _machine(), []
    for suite in suites:
        for name in names:
            console.print(f"{suite} {name} ...")
            for result in SUITES[suite](CASES[name], settings):
                if isinstance(result, str):
                    console.print(f"  left out: {result}")
                else:
                    results.append(result)
    console.print(_table(results))
    if args.json:
        about["load_after"] = os.getloadavg()
        content = {"machine": about, "results": [_record(r) for r in results]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------- measuring


def in_turn(
    settings: Settings, ours: Run, theirs: Run | None, long: bool = False
) -> dict[str, list[float]]:
    """The lists of a Result. Both have run before; each side of a round lasts ROUND_SECONDS.

    A `long` run lasts them by itself, and is not repeated to find that out.
    """
    runs = {"ours": ours} if theirs is None else {"ours": ours, "theirs": theirs}
    needed = lambda run: 1 if long else math.ceil(ROUND_SECONDS / _fastest(run, 2))
    repeats = {name: needed(run) for name, run in runs.items()}
    found = {"ours": [], "ours_cpu": [], "theirs": [], "theirs_cpu": []}
    for number in range(settings.rounds):
        if number and time.monotonic() > settings.deadline:
            break
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            tokens = sum(run() for _ in range(repeats[name]))
            found[name].append(tokens / (time.perf_counter() - wall))
            found[f"{name}_cpu"].append((time.process_time() - cpu) / tokens)
    return found


def best_variant(variants: dict[str, Run]) -> tuple[str, Run]:
    """The fastest by its best of three runs, after one that warms it."""
    seconds = {}
    for name, run in variants.items():
        run()
        seconds[name] = _fastest(run, 3)
    name = min(seconds, key=seconds.get)
    return name, variants[name]


def _fastest(run: Run, times: int) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


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


def train_step(model: LanguageModel, batch: Batch):
    """(a closure that makes one update and returns its loss, the parameters it starts from)."""
    optimizer = optim.make_optimizer(OPTIMIZER, model.axes)
    schedule = optim.make_schedule(OPTIMIZER, 1)
    update = make_train_step(
        model, LanguageModeling(), optimizer, schedule, clip_norm=OPTIMIZER.clip_norm
    )
    now = state.create(model, optimizer, jax.random.key(0))
    start = jax.device_get(now.params)

    def step() -> jax.Array:
        nonlocal now
        now, metrics = update(now, batch, None)
        return metrics["loss"]

    return step, start


def _check_losses(ours: list[float], their_step: Callable) -> None:
    theirs = [float(their_step()) for _ in ours]
    tolerance = 1e-4 if on_cpu() else 2e-2
    if not np.allclose(ours, theirs, rtol=tolerance):
        raise SystemExit(f"error: the first losses are {ours} here and {theirs} in transformers")


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
            raise SystemExit(f"error: {len(gaps)} rows have other tokens, by gaps of {gaps}")
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
            raise SystemExit(f"error: {len(gaps)} rows have other tokens, by gaps of {gaps}")
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


# --------------------------------------------------------------------------------- report


def _table(results: list[Result]) -> rich.table.Table:
    columns = ("suite", "case", "shape", "ours tok/s", "theirs tok/s", "ratio", "by CPU", "goal")
    table = rich.table.Table(*columns, "peer")
    number = lambda x: "" if x is None else f"{x:.2f}"
    spread = lambda x: f"{statistics.median(x):,.0f} ({min(x):,.0f}-{max(x):,.0f})" if x else ""
    for r in results:
        table.add_row(
            r.suite, r.case, r.shape, spread(r.ours), spread(r.theirs), number(r.ratio),
            number(r.cpu_ratio), f"{r.goal:g}", r.peer,
        )  # fmt: skip
    return table


def _record(result: Result) -> dict:
    ratios = {"ratio": result.ratio, "cpu_ratio": result.cpu_ratio}
    return {**dataclasses.asdict(result), **ratios}


def _machine() -> dict:
    """Where, when and with what: a figure without these is none."""
    ask = lambda *command: subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    about = {
        "date": time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime()),
        "commit": ask("git", "describe", "--always", "--dirty"),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in VERSIONS if name in installed},
        "load_before": os.getloadavg(),
    }
    if shutil.which("nvidia-smi"):
        fields = "name,driver_version,power.limit,clocks.sm,clocks.mem"
        about["gpu"] = ask("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    return about


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
