"""Where the time of traced steps goes: a table from the trace that jax.profiler wrote.

A device runs several things at once (streams, threads). Each instant is counted once: it is shared
by what computes then, and is a collective's only where nothing computes. So the parts and what is
left, in which the device waits, add up to the wall time.
"""

import collections
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxreason.parallel import hlo_arrays
from jaxreason.report.summary import write_whole

KINDS = ("matmul", "attention", "other Pallas kernels", "collectives", "copies and transposes",
         "elementwise and reductions", "optimizer")  # fmt: skip
OPTIMIZER_SCOPE = "optimizer"  # jax.named_scope of train/step.py

# By name alone: what a kernel is called (GPU) or the instruction that it runs (CPU, TPU). In order.
_MOVE = "copy|transpose|slice|dynamic[-_](update[-_])?slice|pad|concatenate|bitcast|reshape"
_NAMES = {
    "collectives": r"nccl|all[-_]?(gather|reduce|to[-_]all)|reduce[-_]?scatter|"
    r"collective[-_]?(permute|broadcast)|^(send|recv)\b",
    "attention": r"flash|fmha|sdpa|attention|splash",
    "matmul": r"gemm|cublas|nvjet|xmma|cutlass|wgmma|matmul|(^|[\W_])dot([\W_]|$)|convolution",
    "other Pallas kernels": r"pallas|mosaic|tpu_custom_call|decode_|grouped",
    "copies and transposes": rf"mem(cpy|set)|^(wrapped_|loop_|input_)?({_MOVE})(_fusion)?([.\d]|$)",
}
_NAMES = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in _NAMES.items()}
_MOVES = {"copy", "transpose", "bitcast", "reshape", "slice", "dynamic-slice", "pad", "concatenate",
          "dynamic-update-slice", "parameter", "constant", "tuple", "get-tuple-element",
          "broadcast", "convert", "iota", "copy-start", "copy-done"}  # fmt: skip
_MATMUL = re.compile(r"__cublas|__cudnn\$conv|__triton_gemm|__onednn\$matmul|matmul", re.IGNORECASE)


def kind_of_name(name: str) -> str:
    """Which of KINDS a kernel or an instruction of this name is."""
    found = (kind for kind, pattern in _NAMES.items() if pattern.search(name))
    return next(found, "elementwise and reductions")


def kinds_of_program(text: str) -> dict[str, str]:
    """Instruction -> which of KINDS, of all that run by themselves in `compiled.as_text()`."""
    program = hlo_arrays.program(text)
    return {one.name: _kind(program, one) for _, one in program.outside()}


def _kind(program: hlo_arrays.Program, one: hlo_arrays.Instruction) -> str:
    parts = [one]
    if one.opcode == "fusion":
        (called,) = one.named("calls")
        parts = list(program.computations[called].values())
    whole = lambda part: any(dims for _, dims in part.shapes.values())  # the rest computes indices
    opcodes = {part.opcode for part in parts if whole(part)}
    if kind_of_name(one.opcode) == "collectives":
        return "collectives"
    if one.opcode == "custom-call" and not _MATMUL.search(one.target):
        named = kind_of_name(f"{one.op_name} {one.target}")
        pallas = re.search(r"triton|mosaic|tpu_custom_call|pallas", one.target, re.IGNORECASE)
        return "other Pallas kernels" if pallas and named != "attention" else named
    if opcodes & {"dot", "convolution"} or _MATMUL.search(one.target):
        return "matmul"
    if re.search(rf"\b{OPTIMIZER_SCOPE}\b", one.op_name):
        return "optimizer"
    if opcodes <= _MOVES:
        return "copies and transposes"
    return "elementwise and reductions"


# --- reading a trace ------------------------------------------------------------------------------

Span = tuple[float, float, str, str]  # begin and end in seconds, name, module


def table(
    folder: pathlib.Path, wall_seconds: float, steps: tuple[int, int], program: str = ""
) -> dict[str, Any]:
    """Writes FOLDER/where_time_goes.json, of the newest trace under FOLDER, and returns it.

    Args:
      wall_seconds: of all the traced steps, as the host measured them.
      steps: the first and the last of them.
      program: `compiled.as_text()` of the train step; what it does not hold goes by name.

    Raises ValueError where the trace has no work of a device.
    """
    path = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    devices = _devices(jax.profiler.ProfileData.from_file(str(path)))
    if not any(lines for lines in devices.values()):
        raise ValueError(f"{path}: the trace has no work of a device")
    kinds = kinds_of_program(program) if program else {}
    # Other programs have instructions of the same names.
    own = {"", *re.findall(r"\AHloModule ([\w.\-]+)", program)}
    by_op: collections.Counter = collections.Counter()
    kind_of = lambda name, module: (module in own and kinds.get(name)) or kind_of_name(name)
    for lines in devices.values():
        for seconds, name, module in _shares(lines, kind_of):
            by_op[name, module] += seconds / len(devices)
    count = steps[1] - steps[0] + 1
    by_kind = dict.fromkeys(KINDS, 0.0)
    for (name, module), seconds in by_op.items():
        by_kind[kind_of(name, module)] += seconds / count
    step_seconds = wall_seconds / count
    found = {
        "steps": list(steps),
        "devices": len(devices),
        "step_seconds": step_seconds,
        "kinds": by_kind | {"waiting": step_seconds - sum(by_kind.values())},
        "ops": [
            {"name": name, "module": module, "kind": kind_of(name, module),
             "seconds": seconds / count}
            for (name, module), seconds in by_op.most_common(10)
        ],
    }  # fmt: skip
    write_whole(folder / "where_time_goes.json", json.dumps(found, indent=2) + "\n")
    return found


def lines(found: dict[str, Any]) -> Iterator[str]:
    """The table as it is printed."""
    total = found["step_seconds"]
    first, last = found["steps"]
    yield f"where time goes, steps {first} to {last}: {total:.4f} s a step"
    for kind, seconds in found["kinds"].items():
        yield f"  {kind:28s} {seconds:10.5f} s  {seconds / total:6.1%}"
    for op in found["ops"]:
        yield f"  {op['seconds']:10.5f} s  {op['seconds'] / total:6.1%}  {op['kind']}: {op['name']}"


def _devices(profile: jax.profiler.ProfileData) -> dict[str, list[list[Span]]]:
    """Device -> its lines (streams; of a CPU threads), each the spans of what ran there."""
    planes = {plane.name: plane for plane in profile.planes}
    names = [name for name in planes if re.match(r"/device:(GPU|TPU|CUSTOM):", name)]
    if not names:  # XLA:CPU runs in threads of the host
        threads = [list(_spans(line.events, named=True)) for line in planes["/host:CPU"].lines]
        return {"cpu": [spans for spans in threads if spans]}
    runs = re.compile(r"XLA Ops|Async XLA Ops|Stream.*")  # a TPU's, a GPU's; others are summaries
    return {
        name: [
            list(_spans(line.events)) for line in planes[name].lines if runs.fullmatch(line.name)
        ]
        for name in names
    }


def _spans(events: Iterable, named: bool = False) -> Iterator[Span]:
    """`named`: only of events that say which instruction they are."""
    for event in events:
        stats = dict(event.stats)
        if named and "hlo_op" not in stats:
            continue
        begin = event.start_ns * 1e-9
        name = str(stats.get("hlo_op") or event.name).split(" = ")[0].lstrip("%")
        yield begin, begin + event.duration_ns * 1e-9, name, str(stats.get("hlo_module", ""))


def _shares(lines: list[list[Span]], kind_of) -> Iterator[tuple[float, str, str]]:
    """(seconds, name, module): each instant of a device, shared by what runs in it."""
    edges = []
    for number, spans in enumerate(lines):
        for begin, end, name, module in _innermost(spans):
            edges += [(begin, 1, number, name, module), (end, 0, number, name, module)]
    running: dict[int, tuple[str, str]] = {}
    before = 0.0
    for at, starts, number, name, module in sorted(edges):
        if running and at > before:
            busy = list(running.values())
            computing = [one for one in busy if kind_of(*one) != "collectives"] or busy
            for one in computing:
                yield (at - before) / len(computing), *one
        before = at
        if starts:
            running[number] = (name, module)
        elif running.get(number) == (name, module):
            del running[number]


def _innermost(spans: list[Span]) -> Iterator[Span]:
    """Of nested spans (a loop holds its body) the parts in which no other is inside."""
    open_: list[Span] = []
    at = 0.0

    def until(time: float) -> Iterator[Span]:
        nonlocal at
        while open_:
            _, end, name, module = open_[-1]
            if min(end, time) > at:
                yield at, min(end, time), name, module
                at = min(end, time)
            if end > time:
                break
            open_.pop()

    for span in sorted(spans, key=lambda span: (span[0], -span[1])):
        yield from until(span[0])
        at = max(at, span[0])
        open_.append(span)
    yield from until(float("inf"))
