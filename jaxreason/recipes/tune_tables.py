"""docs/scaling.md's tables: the tuner's answer for models and machines, made again by one command.

Compiled figures are kept by the Compiler, so a run that was stopped goes on where it was.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

from jaxreason.parallel import chips
from jaxreason.recipes import tune
from jaxreason.recipes.tune import Candidate, Compiler
from jaxreason.recipes.tune_request import Request
from jaxreason.report.summary import write_whole

MODELS = ("qwen3-1.5b", "qwen3-1.7b", "qwen3-8b", "qwen3-32b", "qwen3-30b-a3b")
# (name, chip, hosts, tokens a step): batches as large as such runs use, and a row for each device.
MACHINES = (
    ("8 B200 (one DGX)", "b200", 1, 2**21),
    ("64 B200", "b200", 8, 2**22),
    ("512 B200", "b200", 64, 2**23),
    ("8 H200", "h200", 1, 2**21),
    ("v5p-128 (64 chips)", "v5p", 16, 2**22),
)
SEQUENCE, TOKENS = 4096, (80e9, 100e9)
_KERNELS = {"cuda": "flash", "tpu": "splash"}  # of a platform
_NOTE = ("With `{name}` the first layout is what it would be once that kernel, which is taken by "
         "name alone, has run on its chip: its memory is the compiler's, its time that of "
         "published kernels, not its own.")  # fmt: skip
_ARGUMENTS = ("weights and optimizer", "batch")  # of a step, among the parts of an estimate
_BEGIN, _END = "<!-- made by tools/tune_mesh.py --tables -->", "<!-- end of what is made -->"
_HEAD = ("mesh", "microbatches", "remat", "GiB", "by arithmetic", "tokens/s", "MFU", "binds",
         *(f"hours for {tokens / 1e9:g}B" for tokens in TOKENS))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best layouts of one model on one machine; or why there is none."""

    request: Request
    found: tuple[Candidate, ...]
    refused: str = ""

    @property
    def shown(self) -> list[Candidate]:
        return [c for c in self.found if tune.fits(self.request, c)][:2]


def make(
    path: pathlib.Path,
    compiler: Compiler,
    count: int,
    say: Callable[[str], None],
    models: Sequence[str] = MODELS,
    machines: Sequence[tuple[str, str, int, int]] = MACHINES,
) -> None:
    """Fills the file's part between its two marks. Raises ValueError where it has none.

    Args:
      count: layouts to compile for each of them.
    """
    text = path.read_text() if path.is_file() else ""
    if text.count(_BEGIN) != 1 or text.count(_END) != 1:
        raise ValueError(f"{path} has no part to fill, between {_BEGIN} and {_END}")
    answers, kernels = {}, {}
    for number, (name, chip, hosts, step) in enumerate(machines):
        for model in models:
            say(f"{number + 1} of {len(machines)} machines: {model} on {name}")
            request = Request(chip, hosts, model, SEQUENCE, step, max(TOKENS))
            answers[name, model] = _answer(request, compiler, count)
        kernels[name] = _with_kernel(answers[name, models[0]], compiler)
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    sections = [
        _section(name, {m: answers[name, m] for m in models}, kernels[name])
        for name, *_ in machines
    ]
    made = "\n\n".join(
        [_BEGIN, *sections, _agreement([*answers.values(), *kernels.values()]), _END]
    )
    write_whole(path, before + made + after)


def _answer(request: Request, compiler: Compiler, count: int) -> Answer:
    try:
        found, _ = tune.search(request, compiler, count)
    except ValueError as error:
        return Answer(request, (), str(error))
    return Answer(request, tuple(found))


def _with_kernel(answer: Answer, compiler: Compiler) -> Answer:
    """The fastest layout with the chip's kernel, that is taken by name alone until it has run."""
    name = _KERNELS.get(answer.request.device.platform)
    if name is None or not answer.shown:
        return Answer(answer.request, ())
    try:
        request, candidate = tune.with_attention(answer.request, answer.shown[0], name)
    except ValueError as error:
        return Answer(dataclasses.replace(answer.request, attention=name), (), str(error))
    (tried,) = compiler.run(request, [candidate])
    return Answer(request, (tried,), tried.figures.get("error", "does not fit"))


def _section(machine: str, answers: dict[str, Answer], kernel: Answer) -> str:
    lines = [f"### {machine}", ""]
    first = next(iter(answers.values())).request
    lines += [f"{first.tokens_per_step:,} tokens a step in rows of {first.sequence:,}.", ""]
    lines += [_line(("model", *_HEAD)), _line(["---"] * (1 + len(_HEAD)))]
    for answer in answers.values():
        lines += _rows(answer.request.model, answer)
    note = []
    if named := kernel.request.by_name:
        lines += _rows(kernel.request.model + named, kernel)
        note = [_NOTE.format(name=named.removeprefix(", ")), ""]
    return "\n".join([*lines, "", *note, f"`{_command(first)}`"])


def _rows(label: str, answer: Answer) -> list[str]:
    rows = [_line((label, *_cells(answer.request, c))) for c in answer.shown]
    return rows or [_line((label, answer.refused, *[""] * (len(_HEAD) - 1)))]


def _cells(request: Request, candidate: Candidate) -> list[str]:
    estimate = candidate.estimate
    hours = [tokens / estimate.tokens_per_second / 3600 for tokens in TOKENS]
    shape = candidate.layout.shape.items()
    return [
        " ".join(f"{axis}={size}" for axis, size in shape if size > 1),
        str(candidate.layout.microbatches),
        candidate.remat,
        f"{candidate.bytes / 2**30:.1f}" if candidate.compiled else "",
        f"{estimate.total_bytes / 2**30:.1f}",
        f"{estimate.tokens_per_second:,.0f}",
        f"{estimate.mfu:.1%}",
        estimate.binds,
        *(f"{h:,.1f}" for h in hours),
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _command(request: Request) -> str:
    return (
        f"python tools/tune_mesh.py --chip={request.chip} --hosts={request.hosts} --model=MODEL "
        f"--sequence={request.sequence} --tokens-per-step={request.tokens_per_step} "
        f"--tokens={request.tokens:g}"
    )


def _agreement(answers) -> str:
    """How far the arithmetic of memory is from the compiler's, each miss with its reason."""
    misses = [
        (answer.request, candidate)
        for answer in answers
        for candidate in answer.found
        if candidate.compiled and abs(candidate.disagreement) > 0.15
    ]
    total = sum(c.compiled for answer in answers for c in answer.found)
    text = f"Memory by arithmetic is within 15 % of the compiler's for {total - len(misses)} of "
    lines = [text + f"{total} compiled layouts."]
    lines += [
        f"- {request.model} on {request.num_devices} {chips.chip(request.chip).name}, "
        f"{candidate.label}{request.by_name}: {candidate.disagreement:+.0%}; {_reason(candidate)}"
        for request, candidate in misses
    ]
    return "\n".join(["### Arithmetic against the compiler", "", *lines])


def _reason(candidate: Candidate) -> str:
    """Which part of the arithmetic a miss is in: arguments or, of the rest, the largest."""
    memory, figures = candidate.estimate.memory, candidate.figures
    arguments = sum(memory[part] for part in _ARGUMENTS)
    rest = {part: size for part, size in memory.items() if part not in (*_ARGUMENTS, "rollout")}
    missed = {
        "arguments": (arguments, figures["argument_bytes"]),
        "temporaries": (sum(rest.values()), figures["temp_bytes"]),
    }
    where = max(missed, key=lambda name: abs(missed[name][0] - missed[name][1]))
    ours, theirs = (size / 2**30 for size in missed[where])
    text = f"{where} are {theirs:.1f} GiB, {ours:.1f} by arithmetic"
    if where == "arguments":
        return text
    largest = max(rest, key=rest.get)
    return f"{text}, most of it {largest} ({rest[largest] / 2**30:.1f})"
