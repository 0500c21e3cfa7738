"""What an optimized program holds: its arrays outside fusions, each that is updated in place once.

Two values are one array where the compiler must not copy between them: a tuple and its parts, a
bitcast, a loop's carry, an update in place, an argument that is donated to a result.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%?([\w.\-]+)$")
_LEAF = re.compile(r"\s*([a-z]\w*)\[([\d,]*)\]")
_DONATED = re.compile(r"\{([\d, ]*)\}: \((\d+), \{([\d, ]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_IN_PLACE = ("dynamic-update-slice", "scatter")
_INSIDE = ("fusion", "reduce", "reduce-window", "scatter", "sort", "map", "select-and-scatter",
           "all-reduce", "all-reduce-start", "reduce-scatter", "custom-call")  # fmt: skip

Path = tuple[int, ...]
Value = tuple[str, str, Path]  # computation, instruction, place in its tuple


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One line of the program. `shapes` has a leaf (dtype, dims) for each place in its tuple."""

    name: str
    opcode: str
    shapes: dict[Path, tuple[str, tuple[int, ...]]]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """Where JAX made it."""
        found = _OP_NAME.search(self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call; else empty."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    def named(self, *keys: str) -> list[str]:
        """The computations that it calls under these keys."""
        found = []
        for key in keys:
            called = rf"\b{key}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})"
            for one, several in re.findall(called, self.attributes):
                found += [one] if one else [n.strip().lstrip("%") for n in several.split(",")]
        return found


@dataclasses.dataclass(frozen=True)
class Array:
    """One array: all its shapes are of as many elements. `makers` write it, those in place too."""

    dtype: str
    dims: tuple[int, ...]
    makers: tuple[Instruction, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each its instructions by name in their order."""

    entry: str
    computations: dict[str, dict[str, Instruction]]
    donated: tuple[tuple[Path, int, Path], ...]  # (place in the result, argument, place in it)

    def outside(self) -> Iterator[tuple[str, Instruction]]:
        """(computation, instruction) outside fusions: the entry's, and what loops, branches and
        calls run."""
        todo, seen = [self.entry], set()
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            for one in self.computations[name].values():
                yield name, one
                todo += _runs(one)

    def arrays(self) -> list[Array]:
        """Those outside fusions, each once."""
        same = _Same()
        outside = list(self.outside())
        for computation, one in outside:
            for a, b in self._one_array(computation, one):
                same.join(a, b)
        root, arguments = self._root(self.entry), self._arguments(self.entry)
        for place, number, part in self.donated:
            same.join((self.entry, root.name, place), (self.entry, arguments[number].name, part))
        groups = collections.defaultdict(list)
        for computation, one in outside:
            for path, shape in one.shapes.items():
                groups[same.of((computation, one.name, path))].append((one, path, shape))
        found = []
        for group in groups.values():
            makers = [one for one, _, _ in group if one.opcode not in _PASSING]
            dtype, dims = group[0][2]
            found.append(Array(dtype, dims, tuple(dict.fromkeys(makers))))
        return found

    def _root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation].values() if one.is_root)

    def _arguments(self, computation: str) -> dict[int, Instruction]:
        ones = self.computations[computation].values()
        return {int(one.operands[0]): one for one in ones if one.opcode == "parameter"}

    def _one_array(self, computation: str, one: Instruction) -> Iterator[tuple[Value, Value]]:
        """Pairs of values that are one array because of this instruction."""
        me = (computation, one.name)
        whole = lambda other, at=(): [
            ((*me, (*at, *path)), (computation, other, path))
            for path in self.computations[computation][other].shapes
        ]
        if one.opcode == "tuple":
            for i, operand in enumerate(one.operands):
                yield from whole(operand, (i,))
        elif one.opcode == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", one.attributes)[1])
            for path in one.shapes:
                yield (*me, path), (computation, one.operands[0], (index, *path))
        elif one.opcode in ("bitcast", "optimization-barrier", *_IN_PLACE):
            yield from whole(one.operands[0])
        elif one.opcode == "while":
            yield from whole(one.operands[0])
            for called in one.named("body", "condition"):
                yield from self._passed(me, one, called, self._arguments(called)[0])
            (body,) = one.named("body")
            yield from self._passed(me, one, body, self._root(body))
        elif one.opcode in ("call", "conditional", "async-start"):
            yield from self._called(computation, one)
        elif one.opcode == "fusion":
            yield from self._updated_in_fusion(computation, one)
        elif re.fullmatch(r"all-reduce-(start|done)|async-update", one.opcode):
            yield from whole(one.operands[0])  # in place
        elif re.fullmatch(r".*-(start|done)", one.opcode):
            yield from self._asynchronous(computation, one)
        if aliased := re.search(r"output_to_operand_aliasing=\{(.*?)\)\}", one.attributes):
            for out, number, part in _DONATED.findall(aliased[1] + ")"):
                operand = one.operands[int(number)]
                yield (*me, _path(out)), (computation, operand, _path(part))

    def _passed(self, me, one: Instruction, called: str, other: Instruction):
        for path in one.shapes:
            yield (*me, path), (called, other.name, path)

    def _called(self, computation: str, one: Instruction):
        me = (computation, one.name)
        named = one.named("to_apply", "calls", "branch_computations", "true_computation",
                          "false_computation", "called_computations")  # fmt: skip
        for number, called in enumerate(named):
            root, arguments = self._root(called), self._arguments(called)
            at = (1,) if one.opcode == "async-start" else ()
            for path in root.shapes:
                yield (*me, (*at, *path)), (called, root.name, path)
            given = one.operands
            if one.opcode == "conditional":
                given = (one.operands[number + 1],)
            for i, operand in enumerate(given):
                for path in arguments[i].shapes:
                    yield (computation, operand, path), (called, arguments[i].name, path)

    def _updated_in_fusion(self, computation: str, one: Instruction):
        """A fusion that ends in an update of one of its operands writes into that operand."""
        (called,) = one.named("calls")
        inside, root = self.computations[called], self._root(called)
        ends = {(): root}
        if root.opcode == "tuple":
            ends = {(i,): inside[name] for i, name in enumerate(root.operands)}
        for place, end in ends.items():
            end = _behind(inside, end)
            if end.opcode not in _IN_PLACE:
                continue
            start = _behind(inside, inside[end.operands[0]])
            if start.opcode == "parameter":
                operand = one.operands[int(start.operands[0])]
                yield (computation, one.name, place), (computation, operand, ())

    def _asynchronous(self, computation: str, one: Instruction):
        """Where the start holds (operand, result) or, of a copy, (result, operand)."""
        me, operand = (computation, one.name), one.operands[0]
        result = 0 if one.opcode.startswith("copy") else 1
        if one.opcode.endswith("-start"):
            several = (1 - result, 0) in one.shapes  # operands in a tuple of their own
            for i, operand in enumerate(one.operands):
                for path in self.computations[computation][operand].shapes:
                    at = (1 - result, i) if several else (1 - result,)
                    yield (*me, (*at, *path)), (computation, operand, path)
        elif one.opcode.endswith("-done"):
            for path in one.shapes:
                yield (*me, path), (computation, operand, (result, *path))


# Opcodes that make nothing: they name what another instruction made.
_PASSING = {"tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
            "all-gather-done", "async-done", "async-update", "collective-permute-done",
            "optimization-barrier"}  # fmt: skip


class _Same:
    """Groups of values (union-find)."""

    def __init__(self):
        self._parent: dict[Value, Value] = {}

    def of(self, value: Value) -> Value:
        while (parent := self._parent.get(value, value)) != value:
            self._parent[value] = self._parent.get(parent, parent)
            value = parent
        return value

    def join(self, a: Value, b: Value) -> None:
        self._parent[self.of(a)] = self.of(b)


def program(text: str) -> Program:
    """Of `compiled.as_text()`."""
    entry, computations, own = "", {}, {}
    for line in text.splitlines():
        if head := _HEAD.match(line):
            own = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif found := _LINE.match(line):
            one = _instruction(*found.groups())
            own[one.name] = one
    header = text[: text.find("\n")]
    donated = re.search(r"input_output_alias=\{(.*?)\) ?\}", header)
    pairs = _DONATED.findall(donated[1] + ")") if donated else []
    places = tuple((_path(out), int(number), _path(part)) for out, number, part in pairs)
    return Program(entry, computations, places)


def _instruction(root: str | None, name: str, rest: str) -> Instruction:
    end = _balanced(rest) if rest.startswith("(") else rest.index(" ")
    shapes = dict(_leaves(rest[:end]))
    opcode = _OPCODE.match(rest, end)
    inside = rest[opcode.end() - 1 :]
    end = _balanced(inside)
    operands = [part.strip() for part in _split(inside[1 : end - 1])]
    names = tuple(_NAME.search(part)[1] for part in operands if _NAME.search(part))
    return Instruction(name, opcode[1], shapes, names, inside[end:], bool(root))


def _balanced(text: str) -> int:
    """The end of the parenthesis with which the text begins."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "({[") - (c in ")}]")
        if depth == 0:
            return i + 1
    raise ValueError(f"a parenthesis that does not end: {text[:80]}")


def _split(text: str) -> list[str]:
    """At the commas outside parentheses."""
    parts, depth = [""], 0
    for c in re.sub(r"/\*.*?\*/", "", text):
        depth += (c in "({[") - (c in ")}]")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return parts if parts != [""] else []


def _leaves(text: str, path: Path = ()) -> Iterator[tuple[Path, tuple[str, tuple[int, ...]]]]:
    text = text.strip()
    if text.startswith("("):
        for i, part in enumerate(_split(text[1:-1])):
            yield from _leaves(part, (*path, i))
    elif found := _LEAF.match(text):
        yield path, (found[1], _path(found[2]))
    else:
        yield path, (text, ())


def _path(text: str) -> Path:
    return tuple(int(n) for n in text.split(",") if n.strip())


def _runs(one: Instruction) -> list[str]:
    """The computations that run as they stand, not as part of a kernel."""
    if one.opcode in _INSIDE:
        return []
    return one.named("body", "condition", "to_apply", "calls", "branch_computations",
                     "true_computation", "false_computation", "called_computations")  # fmt: skip


def _behind(inside: dict[str, Instruction], one: Instruction) -> Instruction:
    while one.opcode == "bitcast":
        one = inside[one.operands[0]]
    return one
