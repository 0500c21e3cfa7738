"""What an optimized program says of its collectives: kinds, counts, bytes, how often each runs."""

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
          "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}  # fmt: skip
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction. `bytes` are those that a device gets or gives, whichever is more."""

    kind: str
    bytes: int
    group: int  # devices that take part together
    times: int  # in one run of the program: the trips of the loops around it


def collectives(text: str) -> list[Collective]:
    """Of `compiled.as_text()`, those of more than one device. A loop whose trips the compiler does
    not know counts once."""
    entry, own, calls = _read(text)
    times = collections.Counter({entry: 1})
    for name in _in_order(entry, calls):
        for called, trips in calls[name]:
            times[called] += times[name] * trips
    return [
        dataclasses.replace(found, times=times[name])
        for name, instructions in own.items()
        for found in instructions
        if times[name] and found.group > 1
    ]


def total_bytes(found: list[Collective]) -> dict[str, int]:
    """Bytes of a run by kind."""
    totals = collections.Counter()
    for one in found:
        totals[one.kind] += one.bytes * one.times
    return dict(totals)


def summary(found: list[Collective]) -> list[dict]:
    """Those of one kind, group and number of times together: how many instructions they are, and
    the bytes of each time."""
    lines = collections.defaultdict(list)
    for one in found:
        lines[one.kind, one.group, one.times].append(one.bytes)
    return [
        {"kind": kind, "group": group, "times": times, "instructions": len(sizes),
         "bytes": sum(sizes)}
        for (kind, group, times), sizes in sorted(lines.items())
    ]  # fmt: skip


def _read(text: str):
    """(the entry's name, computation -> its collectives, computation -> [(called, trips)])."""
    entry, name, own, calls, limits = "", "", {}, {}, {}
    everyone = re.search(r"num_partitions=(\d+)", text)
    everyone = int(everyone[1]) if everyone else 1
    for line in text.splitlines():
        head = _COMPUTATION.match(line)
        if head:
            name = head[2]
            own[name], calls[name] = [], []
            entry = name if head[1] else entry
            continue
        found = _COLLECTIVE.search(line)
        if found:
            # TPUs split a sum in a fusion of that name, with the sum inside it.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else found[2]
            one = _collective(line, found[1], found[2], bool(found[3]), everyone)
            own[name].append(dataclasses.replace(one, kind=kind))
        if limit := _LIMIT.search(line):
            limits[name] = int(limit[1])
        trips = _trips(line, limits)
        called = _CALLED.findall(line)
        called += [c.strip().lstrip("%") for b in _BRANCHES.findall(line) for c in b.split(",")]
        for other in called:
            calls[name].append((other, trips))
    return entry, own, calls


def _trips(line: str, limits: dict[str, int]) -> int:
    """Of a loop: what XLA wrote (GPU, CPU), or what its condition compares with (TPU)."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition = _CONDITION.search(line)
    return limits.get(condition[1], 1) if condition else 1


def _in_order(entry: str, calls) -> list[str]:
    """Callers before those they call: HLO's calls have no cycles."""
    order, seen = [], set()

    def visit(name: str) -> None:
        if name in seen or name not in calls:
            return
        seen.add(name)
        for called, _ in calls[name]:
            visit(called)
        order.append(name)

    visit(entry)
    return order[::-1]


def _collective(line: str, result: str, kind: str, started: bool, everyone: int) -> Collective:
    size = sum(
        _BYTES[dtype] * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(result)
        if dtype in _BYTES
    )
    group = _group_size(line) or everyone
    if kind == "all-gather" and started:  # the operand is part of the result's tuple
        size = size * group // (group + 1)
    elif kind in ("collective-permute", "all-to-all") and started:
        size //= 2
    elif kind == "reduce-scatter":
        size = size * group // (group + 1) if started else size * group
    return Collective(kind, size, group, 1)


def _group_size(line: str) -> int:
    """Devices that take part together; a permutation has pairs. 0 where none are named: all.

    Three ways of writing: replica_groups={{0,1},{2,3}}, [groups,size]<=[...], and
    mesh['a'=2,'b'=4] {'b'} or mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}, where an axis may
    be a part of one: 'b':(2)2, of size 2. Raises ValueError for another.
    """
    if "replica_groups={}" in line:
        return 0
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[axis] for axis, part in named)
    if "source_target_pairs=" in line:
        return 2
    raise ValueError(f"a collective with no groups: {line.strip()}")
