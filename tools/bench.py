"""Speed of the train step, decoding and the data, beside transformers where it is installed.

  python tools/bench.py train decode data --rounds=7 --json=OUT.json

Ours and theirs run in one process, in turn (A B A B), on the same shapes and weights; the table
gives medians with min and max. float32 on CPU, bfloat16 on accelerators.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import rich.console
import rich.table

from jaxreason.checkpoint import hf
from jaxreason.model.config import DecoderConfig, preset
from jaxreason.model.decoder import Execution, LanguageModel
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.parallel.allocator import keep_freed_memory
from jaxreason.rollout.sample import build_generate
from jaxreason.train import optim
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, Sampling

NO_EOS = -1  # an id that no token has: every completion runs to its limit


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and the shapes it is timed on; the goals are issue A's, ours over theirs."""

    name: str
    config: DecoderConfig
    rows: int
    length: int
    steps: int  # train steps a round: long enough to time, short enough to take turns
    train_goal: float
    decode_goal: float


CASES = {
    # The quickstart's model and its long-CoT batch.
    "tiny": Case("tiny", preset("qwen3-tiny", vocab_size=261), 48, 160, 3, 0.95, 2.0),
    "10m": Case("10m", preset("qwen3-10m"), 8, 256, 2, 0.95, 1.5),
}


@dataclasses.dataclass
class Result:
    """Rates (tokens/s) of every round; `theirs` is empty where there is no peer."""

    suite: str
    case: str
    ours: list[float]
    theirs: list[float]
    goal: float
    peer: str

    @property
    def ratio(self) -> float | None:
        if not self.theirs:
            return None
        return statistics.median(self.ours) / statistics.median(self.theirs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="*", default=["all"], help=f"{', '.join(SUITES)} or all")
    parser.add_argument("--models", default="tiny,10m", help="which of " + ", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--minutes", type=float, default=60.0, help="no suite starts after this")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures of every round here")
    args = parser.parse_args()
    suites = list(SUITES) if "all" in args.suites else args.suites
    for kind, given, known in (("suite", suites, SUITES), ("model", args.models.split(","), CASES)):
        for name in given:
            if name not in known:
                parser.error(f"unknown {kind} {name!r}; there are {', '.join(known)}")
    keep_freed_memory()
    console, began, results = rich.console.Console(), time.monotonic(), []
    for suite in suites:
        for name in args.models.split(","):
            if time.monotonic() - began > 60 * args.minutes:
                console.print(f"{suite} {name}: left out, {args.minutes:g} minutes are over")
                continue
            console.print(f"{suite} {name} ...")
            result = SUITES[suite](CASES[name], args.rounds)
            results += [result] if result else []
    console.print(_table(results))
    if args.json:
        content = {"machine": _machine(), "results": [_record(r) for r in results]}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


def in_turn(rounds: int, ours: Callable[[], int], theirs: Callable[[], int] | None):
    """Tokens/s of `ours` and `theirs`, round by round; each returns the tokens it made."""
    runs = [ours] if theirs is None else [ours, theirs]
    for run in runs:
        run()  # compiles, and warms what there is to warm
    rates = [[] for _ in runs]
    for _ in range(rounds):
        for run, found in zip(runs, rates, strict=True):
            start = time.perf_counter()
            tokens = run()
            found.append(tokens / (time.perf_counter() - start))
    return rates[0], rates[1] if theirs is not None else []


def execution() -> Execution:
    if jax.default_backend() == "cpu":
        return Execution()
    return Execution(dtype="bfloat16", scan_layers=True)


@contextlib.contextmanager
def peer_model(config: DecoderConfig, params):
    """The same weights in transformers; None (and why) where torch or transformers is missing."""
    missing = [m for m in ("torch", "transformers") if importlib.util.find_spec(m) is None]
    if missing:
        yield None, f"{missing[0]} is not installed"
        return
    import torch
    import transformers

    on_gpu = jax.default_backend() == "gpu"
    dtype, device = (torch.bfloat16, "cuda") if on_gpu else (torch.float32, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        hf.export_hf(f"{folder}/model", config, params, eos_id=None, pad_id=None)
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(f"{folder}/model", dtype=dtype, attn_implementation="sdpa").to(device)
        yield model, f"transformers {transformers.__version__}, torch {torch.__version__}"


def bench_train(case: Case, rounds: int) -> Result:
    """A whole update: forward, backward, clipping, AdamW."""
    model = LanguageModel(case.config, execution())
    config = optim.OptimizerConfig(learning_rate=1e-4, weight_decay=0.1)
    optimizer = optim.make_optimizer(config, model.axes)
    step = make_train_step(
        model, LanguageModeling(), optimizer, optim.make_schedule(config, 1000), clip_norm=1.0
    )
    state = state_lib.create(model, optimizer, jax.random.key(0))
    batch = _random_batch(case)
    tokens = case.steps * batch.tokens_BT.size

    def ours() -> int:
        nonlocal state
        for _ in range(case.steps):
            state, metrics = step(state, batch, None)
        jax.block_until_ready(metrics)
        return tokens

    with peer_model(case.config, jax.tree.map(np.array, state.params)) as (peer, label):
        theirs = _torch_steps(peer, batch, case.steps) if peer is not None else None
        return Result("train", case.name, *in_turn(rounds, ours, theirs), case.train_goal, label)


def _torch_steps(model, batch: Batch, steps: int) -> Callable[[], int]:
    import torch

    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    device = next(model.parameters()).device
    tokens, targets = (
        torch.from_numpy(x.astype(np.int64)).to(device) for x in (batch.tokens_BT, batch.targets_BT)
    )

    def run() -> int:
        for _ in range(steps):
            logits = model(tokens, use_cache=False).logits.float()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps * tokens.numel()

    return run


def bench_decode(case: Case, rounds: int) -> Result:
    """64 equal prompts of 16 tokens, 64 greedy tokens each, prefill included, no early stop."""
    rows, prompt_length, new = 64, 16, 64
    model = LanguageModel(case.config, execution())
    # Initialisation times 5: clear winners, so that both sides can be held to the same tokens.
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, model.init(jax.random.key(0)))
    generate = build_generate(model, list, str, NO_EOS, rows=rows)
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 256, (rows, prompt_length)).tolist()
    sampling, key = Sampling(max_tokens=new, temperature=0.0), jax.random.key(0)

    def ours() -> int:
        generate(params, prompts, sampling, key)
        return rows * new

    with peer_model(case.config, jax.tree.map(np.array, params)) as (peer, label):
        theirs = None
        if peer is not None:
            theirs = _torch_generate(peer, prompts, new)
            same = _same_rows(generate(params, prompts, sampling, key), theirs.tokens())
            label += f"; {same} of {rows} rows the same tokens"
        rates = in_turn(rounds, ours, theirs)
        return Result("decode", case.name, *rates, case.decode_goal, label)


class _torch_generate:
    """transformers' `generate`, greedy, to exactly `new` tokens."""

    def __init__(self, model, prompts, new: int):
        import torch

        self.model, self.new = model.eval(), new
        device = next(model.parameters()).device
        self.prompts = torch.tensor(prompts, device=device)
        self.mask = torch.ones_like(self.prompts)

    def tokens(self) -> np.ndarray:
        out = self.model.generate(
            self.prompts, attention_mask=self.mask, max_new_tokens=self.new, do_sample=False
        )
        return out[:, self.prompts.shape[1] :].cpu().numpy()

    def __call__(self) -> int:
        return self.tokens().size


def _same_rows(completions, tokens: np.ndarray) -> int:
    found = np.array([row[0].ids for row in completions])
    return int((found == tokens).all(axis=1).sum())


def bench_data(case: Case, rounds: int) -> Result | None:
    """The quickstart's long-CoT batches as they are fed, against what its train step eats."""
    needed = [m for m in ("grain", "tensorflow_datasets") if importlib.util.find_spec(m) is None]
    if needed or case.name != "tiny":
        print(f"data {case.name}: " + (f"no {needed[0]} here" if needed else "same pipeline"))
        return None
    from jaxreason.data import pipeline
    from jaxreason.data.arithmetic import ArithmeticConfig, prepare_arithmetic
    from jaxreason.launch import load_config
    from jaxreason.recipes import assemble
    from jaxreason.text.tokenizer import ByteTokenizer

    config = load_config("quickstart:smoke")
    with tempfile.TemporaryDirectory() as folder:
        arithmetic = ArithmeticConfig(**config.arithmetic.to_dict())
        prepare_arithmetic(arithmetic, pathlib.Path(folder) / "arithmetic")
        data = assemble.data_config(config, config.stages.sft_cot)
        batches = pipeline.build(data, ByteTokenizer(), folder)

        def ours() -> int:
            return sum(int((next(batches).segments_BT > 0).sum()) for _ in range(30))

        fed, _ = in_turn(rounds, ours, None)
        batches.close()
    eaten = bench_train(case, 3).ours
    return Result("data", "quickstart sft_cot", fed, eaten, 10.0, "our train step, same model")


SUITES = {"train": bench_train, "decode": bench_decode, "data": bench_data}


def _random_batch(case: Case) -> Batch:
    """Full rows of one document each."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, case.config.vocab_size, (case.rows, case.length + 1)).astype(np.int32)
    shape = (case.rows, case.length)
    return Batch(
        tokens_BT=ids[:, :-1],
        targets_BT=ids[:, 1:],
        weights_BT=np.ones(shape, np.float32),
        segments_BT=np.ones(shape, np.int32),
        positions_BT=np.broadcast_to(np.arange(case.length, dtype=np.int32), shape),
    )


def _table(results: list[Result]) -> rich.table.Table:
    table = rich.table.Table("suite", "case", "ours tok/s", "theirs tok/s", "ratio", "goal", "peer")
    for r in results:
        spread = lambda x: f"{statistics.median(x):,.0f} ({min(x):,.0f}-{max(x):,.0f})" if x else ""
        ratio = "" if r.ratio is None else f"{r.ratio:.2f}"
        table.add_row(
            r.suite, r.case, spread(r.ours), spread(r.theirs), ratio, f"{r.goal:g}", r.peer
        )
    return table


def _record(result: Result) -> dict:
    return {**dataclasses.asdict(result), "ratio": result.ratio}


def _machine() -> dict:
    git = ["git", "rev-parse", "--short", "HEAD"]
    root = pathlib.Path(__file__).parent
    commit = subprocess.run(git, cwd=root, capture_output=True, text=True).stdout.strip()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
