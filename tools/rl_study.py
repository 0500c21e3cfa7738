"""Algorithms of reinforcement learning side by side: seeds, paired intervals, curves.

  python tools/rl_study.py --start=runs/quickstart@sft_cot --algorithms grpo dapo ppo --seeds 0 1 2

Every run is `--config=rl` from the same checkpoint on the same held-out problems, in a workdir of
its own under --out, and resumes like any run. Arguments after `--` go to every run. The gain of an
algorithm is the mean over its seeds of final minus start, paired by problem; its 95 % interval
resamples the problems. NAME:KEY=VALUE,... gives an algorithm other switches, as in
dapo:rollout.filter_zero_std=false; grpo:rewards.accuracy.weight=-1 is the wrong-sign canary.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # no installation needed

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import rich.console
import rich.table

from jaxreason.evals.accuracy import bootstrap_interval
from jaxreason.launch import load_config
from jaxreason.report.summary import read_lines, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
_WORKERS: dict[int, int] = {}  # thread -> which share of the cores its runs have


def main() -> None:
    args, passed_on = _arguments()
    console = rich.console.Console()
    start = _evaluate(args)
    table = rich.table.Table(
        "algorithm", "start", "final", "gain", "95 %", "steps", "seconds a run"
    )
    results = {}
    pairs = [(name, seed) for name in args.algorithms for seed in args.seeds]
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda pair: _run(args, *pair, passed_on, console), pairs))
    for name in args.algorithms:
        runs = [run for (own, _), run in zip(pairs, done, strict=True) if own == name]
        row = results[name] = _compare(start, runs)
        low, high = row["ci"]
        table.add_row(
            name, f"{row['start']:.3f}", f"{row['final']:.3f}", f"{row['gain']:+.3f}",
            f"{low:+.3f} to {high:+.3f}", f"{row['steps']:.0f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    console.print(table)
    _plot(args, results, args.out / "curves.png")
    console.print(f"curves: {args.out / 'curves.png'}")
    if args.json:
        kept = {name: {k: v for k, v in r.items() if k != "curves"} for name, r in results.items()}
        args.json.write_text(json.dumps(kept, indent=2) + "\n")


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    own, passed_on = sys.argv[1:at], sys.argv[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--start", required=True, help="WORKDIR@STAGE[@STEP]")
    parser.add_argument("--algorithms", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/rl_study"))
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on CPU a core each")
    return parser.parse_args(own), passed_on


def _launch(args: argparse.Namespace, workdir: pathlib.Path, *flags: str) -> float:
    """Runs to the end, or finds that it has; seconds this time. Raises when it fails."""
    began = time.monotonic()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "jaxreason.launch", *flags, f"--workdir={workdir}"]
    share = None
    if args.jobs > 1:  # a core each is faster than all of them for everybody
        cores = sorted(os.sched_getaffinity(0))
        mine = cores[
            _WORKERS.setdefault(threading.get_ident(), len(_WORKERS)) % args.jobs :: args.jobs
        ]
        share = lambda: os.sched_setaffinity(0, mine)
    with workdir.with_suffix(".log").open("a") as log:
        code = subprocess.run(
            command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=share
        ).returncode
    if code:
        raise SystemExit(f"exit code {code}: see {workdir.with_suffix('.log')}")
    return time.monotonic() - began


def _evaluate(args: argparse.Namespace) -> np.ndarray:
    """The start's accuracy on each problem that the runs are scored on."""
    config = load_config("rl")
    flags = [f"--config.arithmetic.{k}={v}" for k, v in config.arithmetic.items()]
    flags += [
        f"--config.eval.sets.arithmetic.{key}={value}"
        for key, value in config.eval.sets.arithmetic.items()
    ]
    workdir = args.out / "start"
    _launch(args, workdir, "--config=eval:arithmetic", f"--config.init.from={args.start}", *flags)
    return _accuracies(workdir)


def _run(args, name: str, seed: int, passed_on: list[str], console) -> dict:
    algorithm, _, switches = name.partition(":")
    workdir = args.out / f"{name.replace(':', '-').replace('/', '-')}-{seed}"
    own = [f"--config.{switch}" for switch in switches.split(",") if switch]
    seconds = _launch(
        args, workdir, "--config=rl", f"--config.init.from={args.start}", f"--config.seed={seed}",
        f"--config.train.algorithm={algorithm}", *passed_on, *own,
    )  # fmt: skip
    records = [r for r in read_metrics(workdir) if r["stage"] == "rl"]
    final = _accuracies(workdir)
    console.print(f"{name} seed {seed}: {final.mean():.3f} in {seconds:.0f} s")
    return {"final_Q": final, "records": records, "seconds": seconds}


def _accuracies(workdir: pathlib.Path) -> np.ndarray:
    """Of each problem, in order, over the four samples that avg@4 counts."""
    samples = [line for line in read_lines(workdir / "samples.jsonl") if "set" in line]
    return np.array([np.mean([c["correct"] for c in s["completions"][:4]]) for s in samples])


def _compare(start_Q: np.ndarray, runs: list[dict]) -> dict:
    gain_Q = np.mean([run["final_Q"] - start_Q for run in runs], axis=0)
    return {
        "start": float(start_Q.mean()),
        "final": float(np.mean([run["final_Q"].mean() for run in runs])),
        "finals": [float(run["final_Q"].mean()) for run in runs],
        "gain": float(gain_Q.mean()),
        "ci": bootstrap_interval(gain_Q),
        "steps": float(np.mean([run["records"][-1]["step"] for run in runs])),
        "samples": float(np.mean([_samples(run["records"])[-1] for run in runs])),
        "seconds": float(np.median([run["seconds"] for run in runs])),
        "curves": [_curve(run["records"]) for run in runs],
    }


def _samples(records: list[dict]) -> np.ndarray:
    return np.cumsum([r.get("rollout/generated_groups", 0) for r in records])


def _curve(records: list[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(step, groups drawn so far, mean reward of all that was drawn, smoothed over 5 steps)."""
    records = [r for r in records if "reward" in r]  # a step on the data's own answers has none
    rewards = np.array([r["reward"] for r in records])
    kernel = np.ones(min(5, len(rewards)))
    smooth = np.convolve(rewards, kernel, "same") / np.convolve(
        np.ones_like(rewards), kernel, "same"
    )
    return np.array([r["step"] for r in records]), _samples(records), smooth


def _plot(args: argparse.Namespace, results: dict, path: pathlib.Path) -> None:
    """Mean and range over the seeds, against steps and against groups drawn."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, constrained_layout=True)
    for index, (name, result) in enumerate(results.items()):
        steps = result["curves"][0][0]
        rewards = np.array([curve[2] for curve in result["curves"]])
        drawn = np.mean([curve[1] for curve in result["curves"]], axis=0)
        for axis, x in zip(axes, (steps, drawn), strict=True):
            style = "-" if index < 7 else "--"
            label = name if len(name) <= 36 else f"{name[:35]}…"
            (line,) = axis.plot(x, rewards.mean(0), label=label, linestyle=style)
            axis.fill_between(x, rewards.min(0), rewards.max(0), alpha=0.15, color=line.get_color())
    axes[0].set(xlabel="step", ylabel="mean reward of all samples drawn")
    axes[1].set(xlabel="groups drawn")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.suptitle(f"{len(args.seeds)} seeds from {args.start}: mean and range")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
