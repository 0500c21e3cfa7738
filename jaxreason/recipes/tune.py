"""Which mesh, microbatches and remat for a model on a machine, before the machine is there.

  enumerate   every mesh that the rules allow, every cut into microbatches, every remat policy
  reject      by arithmetic (parallel/cost.py): memory, then predicted tokens a second
  compile     the real train step of the best, each in its own process (recipes/tune_step.py)
  rank        by predicted speed, among those whose compiled memory fits

recipes/tune_request.py has what is asked, recipes/tune_files.py writes what was found as a config,
tools/tune_mesh.py is the command.
"""

import concurrent.futures
import dataclasses
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxreason.model.attention import IMPLEMENTATIONS, PLAIN, choose
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import KEEPABLE, REMAT
from jaxreason.parallel import cost, hosts, rules
from jaxreason.parallel.mesh import AXES
from jaxreason.parallel.workload import KEPT, Layout, Weight, Workload
from jaxreason.recipes import tune_kept
from jaxreason.recipes.tune_request import Request
from jaxreason.recipes.tune_step import Step, execution

_POLICIES = ("none", *REMAT, "qkv+attention", "attention+gate_up")
_A_MESH = 3  # candidates of one mesh among those that are compiled
_SLACK = 1.15  # the arithmetic's tolerance: what it says does not fit by less may be compiled
_ROUNDS = 3  # of compiling, until something fits
_PACKAGE = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One layout, what arithmetic says of it, and what the compiler did (or `error`)."""

    layout: Layout
    remat: str
    estimate: cost.Estimate
    figures: dict | None = None  # of tune_step.compiled, or {"error": ...}

    @property
    def bytes(self) -> float:
        """Of a device: the compiler's where it was asked."""
        if not self.compiled:
            return self.estimate.total_bytes
        extra = self.estimate.memory.get("rollout", 0.0)
        return self.figures["argument_bytes"] + self.figures["temp_bytes"] + extra

    @property
    def compiled(self) -> bool:
        return self.figures is not None and "error" not in self.figures

    @property
    def exchanged_bytes(self) -> float:
        """By the collectives of a compiled step, of a device."""
        return sum(self.figures["collective_bytes"].values())

    @property
    def disagreement(self) -> float:
        """Of the arithmetic's bytes from the compiler's, as a share of these."""
        return self.estimate.total_bytes / self.bytes - 1

    @property
    def label(self) -> str:
        shape = " ".join(f"{axis}={size}" for axis, size in self.layout.shape.items() if size > 1)
        return f"{shape or 'one device'}, {self.layout.microbatches} microbatches, {self.remat}"


def workload(request: Request) -> Workload:
    """The numbers of the model and the batch that are asked for."""
    dtype_bytes = jnp.dtype(execution(request.chip, "none").dtype).itemsize
    work = workload_of(request.architecture, request.rows, request.sequence, dtype_bytes)
    return dataclasses.replace(work, rollout=request.rollout)


def workload_of(c: DecoderConfig, rows: int, length: int, dtype_bytes: int = 2) -> Workload:
    model = LanguageModel(c)
    name = lambda path: "/".join(str(key.key) for key in path)
    weights = jax.tree_util.tree_map_with_path(
        lambda path, s, axes: Weight(name(path), s.shape, axes), model.shapes, model.axes
    )
    windows = [c.window if sliding else None for sliding in c.sliding]
    return Workload(
        weights=tuple(jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, Weight))),
        keys_per_query=sum(cost.causal_keys(length, window) for window in windows),
        rows=rows,
        length=length,
        dtype_bytes=dtype_bytes,
        tied=c.tie_embeddings,
        **{name: getattr(c, name) for name in _SHARED},
    )


_SHARED = ("num_layers", "embed_dim", "mlp_dim", "num_heads", "num_kv_heads", "head_dim",
           "vocab_size", "num_experts", "experts_per_token")  # fmt: skip


# --- enumerate ------------------------------------------------------------------------------------


def candidates(request: Request) -> list[Candidate]:
    """All that is legal, fastest first by arithmetic, whether it fits or not.

    Raises ValueError where the attention cannot run there, with every implementation's reason, and
    where no mesh is legal, with the first.
    """
    work, found = workload(request), []
    for shape in legal_shapes(request, work):
        for microbatches in _cuts(request, shape):
            for remat in _POLICIES:
                found.append(_candidate(request, work, shape, microbatches, remat))
    return sorted(found, key=lambda c: (c.estimate.step_seconds, c.estimate.total_bytes))


def _candidate(request: Request, work: Workload, shape, microbatches: int, remat: str) -> Candidate:
    kept = execution(request.chip, remat).kept
    kept = None if kept is None else frozenset(kept)
    layout = Layout(shape, microbatches, kept, _scores(request, shape))
    return Candidate(layout, remat, cost.estimate(work, layout, request.device))


def _scores(request: Request, shape: dict[str, int]) -> str:
    """Where attention's scores are (workload.Layout): of a kernel, all on the chip."""
    chosen = request.chosen_attention
    if shape["context"] > 1:
        chosen = choose(request.attention, request.attention_use(parts=True))
    return chosen if chosen in PLAIN else "flash"


def with_attention(request: Request, candidate: Candidate, name: str) -> tuple[Request, Candidate]:
    """The same layout with another implementation. Raises ValueError where it cannot run there."""
    other, layout = dataclasses.replace(request, attention=name), candidate.layout
    shape, work = dict(layout.shape), workload(other)
    return other, _candidate(other, work, shape, layout.microbatches, candidate.remat)


def legal_shapes(request: Request, work: Workload) -> list[dict[str, int]]:
    """Meshes of all devices that every weight and the batch divide over, and attention can run on.

    Raises ValueError where there is none.
    """
    _ = request.chosen_attention  # refused where no mesh would help
    refused: list[str] = []
    legal = list(_legal(request, work, refused.append))
    if not legal:
        raise ValueError(_what_would_work(request, work, refused))
    return legal


def _legal(
    request: Request, work: Workload, refuse: Callable[[str], None] = lambda why: None
) -> Iterator[dict[str, int]]:
    for shape in _shapes(request, work):
        mesh = AbstractMesh(tuple(shape.values()), tuple(shape))
        try:
            for weight in work.weights:
                rules.sharding(mesh, weight.name, weight.shape, weight.axes)
            hosts.check_rows(mesh, request.rows, 1, 1)
            _check_attention(request, shape)
        except ValueError as error:
            refuse(str(error))
        else:
            yield shape


def _check_attention(request: Request, shape: dict[str, int]) -> None:
    """Raises ValueError where the mesh splits rows, and what is asked for cannot merge them."""
    use = request.attention_use(parts=shape["context"] > 1)
    if request.attention != "auto" and (why := IMPLEMENTATIONS[request.attention].reasons(use)):
        raise ValueError(f"--attention={request.attention} {', '.join(why)}")


def _shapes(request: Request, work: Workload) -> Iterator[dict[str, int]]:
    """Ways to split the devices over the axes. Tensor stays on fast links: beyond them it loses."""
    fixed, island = dict(request.fixed), request.device.links.island
    for sizes in _factors(request.num_devices, len(AXES)):
        shape = dict(zip(AXES, sizes))
        useless = shape["expert"] > 1 and not work.num_experts
        if shape["tensor"] > min(island, 64) or (useless and "expert" not in fixed):
            continue
        if all(shape[axis] == size for axis, size in fixed.items()):
            yield shape


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            for rest in _factors(number // first, parts - 1):
                yield (first, *rest)


def _cuts(request: Request, shape: dict[str, int]) -> list[int]:
    """Numbers of microbatches that leave every device a row of each."""
    rows = request.rows // math.prod(shape[axis] for axis in rules.mesh_axes("batch"))
    return [n for n in range(1, rows + 1) if rows % n == 0]


def _what_would_work(request: Request, work: Workload, refused: list[str]) -> str:
    if not refused:
        wanted = ", ".join(f"{axis}={size}" for axis, size in request.fixed)
        return f"--mesh={wanted}: no mesh of {request.num_devices} devices of {request.chip} has it"
    why = refused[0].partition(";")[0]
    if request.fixed:
        legal = legal_shapes(dataclasses.replace(request, fixed=()), work)
        works = {axis: sorted({shape[axis] for shape in legal}) for axis, _ in request.fixed}
        hint = (f"{axis} may be {', '.join(map(str, sizes))}" for axis, sizes in works.items())
        return f"{why}; {'; '.join(hint)}"
    near = _hosts_that_work(request, work)
    if not near:
        return refused[0]
    return f"--hosts is {request.hosts}: {why}; --hosts={' or '.join(map(str, near))} would do"


def _hosts_that_work(request: Request, work: Workload) -> list[int]:
    """The nearest numbers of hosts for which there is a mesh, below and above."""

    def works(hosts: int) -> bool:
        try:
            other = dataclasses.replace(request, hosts=hosts)
        except ValueError:  # no slice of that size
            return False
        return next(_legal(other, work), None) is not None

    ways = (range(request.hosts - 1, 0, -1), range(request.hosts + 1, 2 * request.hosts + 1))
    return [n for numbers in ways if (n := next(filter(works, numbers), None)) is not None]


# --- reject ---------------------------------------------------------------------------------------


def best(
    request: Request, found: Sequence[Candidate], slack: float = _SLACK
) -> Iterator[Candidate]:
    """Those worth compiling, fastest first: of one mesh a few, that may fit by arithmetic.

    Args:
      slack: how far beyond the memory the arithmetic may be.
    Raises ValueError, with what would work, where nothing may.
    """
    chosen = _few(request, found, slack)
    if (first := next(chosen, None)) is None:
        raise ValueError(_does_not_fit(request))
    return itertools.chain([first], chosen)


def _few(request: Request, found: Sequence[Candidate], slack: float) -> Iterator[Candidate]:
    taken: dict[tuple, int] = {}
    for candidate in found:
        if candidate.estimate.total_bytes > slack * request.usable:
            continue
        key = tuple(candidate.layout.shape.items())
        taken[key] = taken.get(key, 0) + 1
        if taken[key] <= _A_MESH:
            yield candidate


def _does_not_fit(request: Request) -> str:
    least, layout = _leanest(request)
    shape = " ".join(f"{axis}={size}" for axis, size in layout.shape.items() if size > 1)
    what = (
        f"--model={request.model} at --sequence={request.sequence} does not fit "
        f"{request.num_devices} x {request.chip}: the leanest layout ({shape or 'one device'}, "
        f"{layout.microbatches} microbatches, full) needs {least / 2**30:.1f} GiB a device of "
        f"{request.usable / 2**30:.1f}"
    )
    for doublings in range(1, 11):
        try:
            larger = dataclasses.replace(request, hosts=request.hosts * 2**doublings)
            if _leanest(larger)[0] <= request.usable:
                return f"{what}; --hosts={larger.hosts} would do"
        except ValueError:  # no slice of that size, or fewer rows than devices
            break
    return f"{what}; a shorter --sequence, a smaller --model or a chip with more memory would do"


def _leanest(request: Request) -> tuple[float, Layout]:
    """The fewest bytes a device, by arithmetic."""
    work = workload(request)
    layouts = [
        Layout(shape, _cuts(request, shape)[-1], frozenset())
        for shape in legal_shapes(request, work)
    ]
    total = lambda layout: sum(cost.memory_bytes(work, layout, request.device).values())
    least = min(layouts, key=total)
    return total(least), least


# --- compile --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Where steps are compiled: so many processes, each with a time limit.

    Figures are kept by the lowered program (tune_kept.py); what failed is tried again.
    """

    cache: pathlib.Path
    processes: int = 2
    limit_seconds: float = 300.0

    def run(
        self,
        request: Request,
        chosen: Iterable[Candidate],
        on_done: Callable[[Candidate, bool], None] = lambda candidate, kept: None,
    ) -> list[Candidate]:
        """The candidates with their figures, in their order. `on_done` hears whether one was kept
        from an earlier run."""
        chosen = list(chosen)
        with concurrent.futures.ThreadPoolExecutor(self.processes) as pool:
            futures = [pool.submit(self._figures, step_of(request, c)) for c in chosen]
            done = {}
            for future in concurrent.futures.as_completed(futures):
                index = futures.index(future)
                figures, kept = future.result()
                done[index] = dataclasses.replace(chosen[index], figures=figures)
                on_done(done[index], kept)
        return [done[index] for index in range(len(chosen))]

    def _figures(self, step: Step) -> tuple[dict, bool]:
        figures = run_step(step, "compile", self.limit_seconds, self.cache)
        kept, key = figures.pop("kept", False), figures.pop("key", None)
        if key is not None:
            tune_kept.write(self.cache, key, dataclasses.asdict(step), figures)
        return figures, kept


def step_of(request: Request, candidate: Candidate) -> Step:
    return Step(
        chip=request.chip,
        hosts=request.hosts,
        devices_per_host=request.device.links.per_host,
        model=dataclasses.asdict(request.architecture),
        recipe="rl" if request.recipe == "rl" else "fit",
        rows=request.rows,
        length=request.sequence,
        shape=dict(candidate.layout.shape),
        microbatches=candidate.layout.microbatches,
        remat=candidate.remat,
        attention=request.attention,
    )


def run_step(
    step: Step, mode: str, limit_seconds: float, cache: pathlib.Path | None = None
) -> dict:
    """tune_step in a process of its own. What it could not do is {"error": why, in one line}.

    Args:
      mode: compile, for devices that are not here, or devices or measure, for those that are.
      cache: folder of figures that need not be compiled for.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(_PACKAGE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    if mode == "compile" or step.chip == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no TPU is touched
    if step.chip == "cpu":
        environment["JAX_NUM_CPU_DEVICES"] = str(step.hosts * step.devices_per_host)
    command = [sys.executable, "-m", "jaxreason.recipes.tune_step", mode]
    try:
        done = subprocess.run(
            command + ([] if cache is None else [str(cache)]),
            input=json.dumps(dataclasses.asdict(step)), env=environment, text=True,
            capture_output=True, timeout=limit_seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit_seconds:.0f} s"}
    if done.returncode:
        return {"error": _why(done.stderr)}
    warned = done.stderr.lower().count("involuntary full rematerialization")
    said = json.loads(done.stdout.splitlines()[-1])
    return {"involuntary_rematerializations": warned, **said}  # what is kept has its own


def _why(said: str) -> str:
    """The error in what a process said; JAX ends with a note on the frames it left out."""
    errors = re.findall(r"^[\w.]*Error(?:: .*)?$", said, re.MULTILINE)
    return (errors or said.strip().splitlines() or ["no output"])[-1].removeprefix("ValueError: ")


# --- rank -----------------------------------------------------------------------------------------


def ranked(request: Request, tried: Sequence[Candidate]) -> list[Candidate]:
    """Those that fit before those that do not, each by predicted speed."""
    order = lambda c: (not fits(request, c), c.estimate.step_seconds, c.bytes)
    return sorted(tried, key=order)


def fits(request: Request, candidate: Candidate) -> bool:
    failed = candidate.figures is not None and not candidate.compiled
    return not failed and candidate.bytes <= request.usable


def hours(request: Request, candidate: Candidate) -> float | None:
    """Of the whole run; None where no number of tokens was asked for."""
    if request.tokens is None:
        return None
    return request.tokens / candidate.estimate.tokens_per_second / 3600


def search(
    request: Request,
    compiler: Compiler,
    count: int,
    on_done: Callable[[Candidate, bool], None] = lambda candidate, kept: None,
) -> tuple[list[Candidate], int]:
    """(candidates ranked, how many were considered). `count` 0: by arithmetic alone.

    Where none of the first `count` that are compiled fits, others are, that the arithmetic gives
    as much less as it was wrong by. Raises ValueError where nothing fits.
    """
    found = candidates(request)
    if not count:
        return ranked(request, list(itertools.islice(best(request, found, 1.0), 20))), len(found)
    promising = best(request, found)
    tried: list[Candidate] = []
    for _ in range(_ROUNDS):
        tried += compiler.run(request, itertools.islice(promising, count), on_done)
        if any(fits(request, c) for c in tried):
            return ranked(request, tried), len(found)
        labels = {c.label for c in tried}
        slack = min([1.0, *(c.estimate.total_bytes / c.bytes for c in tried if c.compiled)])
        promising = (c for c in _few(request, found, slack) if c.label not in labels)
    errors = {c.figures["error"] for c in tried if not c.compiled}
    least = min((c.bytes for c in tried if c.compiled), default=None)
    if least is None:
        raise ValueError(f"of the {len(tried)} layouts tried none compiled: {min(errors)}")
    raise ValueError(
        f"none of the {len(tried)} layouts that were compiled fits: the least takes "
        f"{least / 2**30:.1f} GiB a device of {request.usable / 2**30:.1f}"
        + (f"; {len(errors)} kinds of failures, one: {min(errors)}" if errors else "")
    )


def check_devices(request: Request, limit_seconds: float) -> None:
    """Raises ValueError where the devices of this machine are not what is asked."""
    candidate = next(best(request, candidates(request)))
    found = run_step(step_of(request, candidate), "devices", limit_seconds)
    if "error" in found:
        raise ValueError(f"--measure: {found['error']}")


def measure(request: Request, candidate: Candidate, limit_seconds: float) -> dict:
    """{"step_seconds"} of the candidate on the devices of this machine, or {"error"}."""
    return run_step(step_of(request, candidate), "measure", limit_seconds)


assert set(KEEPABLE) == set(KEPT)  # workload.py knows what each name is to compute again
