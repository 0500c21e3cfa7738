"""The stage of kind `curate`: of many traces those that a student is trained on, chosen as by s1.

By reasoning/curate.py, in this order: the samples looked at of each question, quality, the rule
that keeps, decontamination, deduplication; then `method`:

  s1k     drops what any of `solvers` solves, asked greedily through the engine, and draws `limit`
          of the rest, every domain equally often and long traces first (arXiv 2501.19393)
  random  draws `limit` of them: the set of the same size that a curated one is compared with

Files of the run's data folder:

  STAGE.solverN.all.jsonl   what the solver N answered; grows by whole batches
  STAGE.jsonl               the traces that are kept, to be trained on by path="@STAGE"
  STAGE.dropped.jsonl       the others, each with its `reason`
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from ml_collections import ConfigDict

from jaxreason.data import sources as sources_lib
from jaxreason.data.files import write_whole
from jaxreason.data.schemas import is_true
from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.reasoning import curate as choices
from jaxreason.reasoning.curate import Selection
from jaxreason.reasoning.reflect import find_loop
from jaxreason.reasoning.traces import Trace
from jaxreason.recipes import assemble, checkpoints, speakers, teacher, trace_files
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import iterate_lines
from jaxreason.rewards import mix
from jaxreason.text.chat import Message
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Completion, Prompt, Sampling

METHODS = ("s1k", "random")
TOO_SHORT, TOO_LONG, LOOPS = "too short", "too long", "repeats itself"
_READ = ("domain_field", "correct_field", "answer_field")  # name fields that every record has
_CHECKED = 1_000  # records that are read before anything runs


@dataclasses.dataclass(frozen=True)
class CurateStage:
    """What can be checked of the stage before anything is built."""

    name: str
    section: ConfigDict
    starts: dict[str, checkpoints.Checkpoint]  # the solvers, by the keys that name them
    sources: dict[str, sources_lib.SourceConfig]
    rewards: dict[str, mix.RewardConfig]
    sampling: Sampling

    @property
    def start(self) -> checkpoints.Checkpoint:
        return next(iter(self.starts.values()), checkpoints.parse("random"))

    @property
    def length(self) -> int:
        return self.sampling.max_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate(Trace):
    """A trace without its text, which stays on the disk: 220,000 of them are gigabytes."""

    id: str  # SOURCE/NUMBER
    answer: str  # the gold answer, else the trace's own
    fault: str | None  # why nobody should learn it
    trusted: bool  # in, however easy


def plan(config: ConfigDict, name: str, section: ConfigDict) -> CurateStage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    _check_numbers(section)
    for key, known in (("method", METHODS), ("keep", choices.KEEPS)):
        if section[key] not in known:
            raise ValueError(f"{key} is {section[key]!r}; it must be one of {', '.join(known)}")
    if section.method == "random" and (section.solvers or not section.limit):
        raise ValueError(
            f"method is 'random', limit {section.limit} and solvers {tuple(section.solvers)}; it "
            "draws as many as limit says and asks nobody"
        )
    if section.keep != "all" and not (section.correct_field or section.answer_field):
        raise ValueError(
            f"keep is {section.keep!r}; say what is correct: correct_field, or answer_field with "
            "the gold answer"
        )
    if section.solved_by not in section.rewards:
        raise ValueError(
            f"solved_by is {section.solved_by!r}; it must be one of rewards: "
            f"{', '.join(section.rewards)}"
        )
    if section.limit and section.method == "s1k":
        _spread(section, seed=0)
    elif section.trusted_field or any(section.diversity.values()):
        raise ValueError(
            f"diversity is {section.diversity.to_dict()}, trusted_field {section.trusted_field!r}; "
            "only method s1k with a limit above 0 draws by them"
        )
    if "{question}" not in section.prompt_template:
        raise ValueError(
            f"prompt_template is {section.prompt_template!r}; it must have {{question}} in it"
        )
    rewards = {
        reward: assemble.from_section(mix.RewardConfig, spec)
        for reward, spec in section.rewards.items()
    }
    sampling = Sampling(max_tokens=section.max_tokens, temperature=0.0)
    read = (*(section[key] for key in _READ), section.trusted_field, "truncated", "refused")
    sources = sources_lib.trace_sources(section.data.sources.to_dict(), *read)
    return CurateStage(name, section, _solvers(section), sources, rewards, sampling)


def _check_numbers(section: ConfigDict) -> None:
    found = {
        "data.limit": (section.data.limit, 0), "limit": (section.limit, 0),
        "num_samples": (section.num_samples, 0), "max_tokens": (section.max_tokens, 1),
        "batch": (section.batch, 1), "rows": (section.rows, 1),
        "held_out.n": (section.held_out.n, 1), "deduplicate.n": (section.deduplicate.n, 1),
        "quality.min_tokens": (section.quality.min_tokens, 0),
    }  # fmt: skip
    for key, (value, least) in found.items():
        if value < least:
            raise ValueError(f"{key} is {value}; it must be {least} or more")
    most = section.quality.max_tokens
    if most is not None and most < max(section.quality.min_tokens, 1):
        raise ValueError(
            f"quality.max_tokens is {most}; it must be quality.min_tokens = "
            f"{section.quality.min_tokens} or more, and not 0, or unset"
        )
    if not 0 <= section.deduplicate.threshold <= 1:
        raise ValueError(
            f"deduplicate.threshold is {section.deduplicate.threshold}; it must be above 0 to 1, "
            "or 0 to keep duplicates"
        )


def _solvers(section: ConfigDict) -> dict[str, checkpoints.Checkpoint]:
    texts = tuple(section.solvers)
    if len(set(texts)) < len(texts) or "" in texts:
        raise ValueError(f"solvers is {texts}; it must name checkpoints, each once")
    return {f"solvers.{i}": teacher.parse(text, "solvers") for i, text in enumerate(texts)}


def check_data(
    config: ConfigDict, stage: CurateStage, tokenizer: Tokenizer, workdir: Workdir
) -> None:
    """Opens traces, held-out texts and solvers, and reads the first records. Raises ValueError."""
    if workdir.marker(stage.name) is not None:
        return
    hosts.first(lambda: _check_pool(config, stage, workdir, tokenizer))
    for key, start in stage.starts.items():
        _solver(config, stage, key, start, workdir, tokenizer, None)


def _check_pool(
    config: ConfigDict, stage: CurateStage, workdir: Workdir, tokenizer: Tokenizer
) -> None:
    found = [c for c, _ in zip(Pool(config, stage, workdir, tokenizer), range(_CHECKED))]
    _held_out(stage, workdir)
    usable = [c for c in found if c.fault is None]
    if not usable:
        raise ValueError(
            f"data.sources: none of the first {len(found)} records is a trace to learn from, the "
            f"first one for {found[0].fault!r}"
        )
    with assemble.rewards(config, stage.rewards) as reward:
        if stage.section.answer_field or stage.starts:
            reward.check([Prompt(c.id, c.question, c.answer, c.id.split("/")[0]) for c in usable])


# ------------------------------------------------------------------------------- the candidates


class Pool:
    """All traces of the sources, in order."""

    def __init__(
        self, config: ConfigDict, stage: CurateStage, workdir: Workdir, tokenizer: Tokenizer
    ):
        self._stage, self._tokenizer = stage, tokenizer
        limit = stage.section.data.limit
        self._records = sources_lib.Records(stage.sources, workdir.data, config.seed, limit)
        self.left_out = self._records.left_out

    def __iter__(self) -> Iterator[Candidate]:
        return map(self._candidate, self._records)

    def record(self, trace_id: str) -> dict[str, Any]:
        """A trace as it is written, without what was found out of it."""
        _, messages = self._records[trace_id]
        system = [m.content for m in messages if m.role == "system"]
        return {
            "id": trace_id,
            **({"system": system[0]} if system else {}),
            "question": next((m.content for m in messages if m.role == "user"), ""),
            "reasoning": messages[-1].reasoning,
            "response": messages[-1].content,
        }

    def _candidate(self, trace_id: str) -> Candidate:
        section, (record, messages) = self._stage.section, self._records[trace_id]
        missing = trace_files.lacking(record, section, *_READ)
        last = messages[-1]
        tokens = len(self._tokenizer.encode(last.reasoning or ""))
        domain, correct, answer = (section[key] for key in _READ)
        return Candidate(
            id=trace_id,
            question=next((m.content for m in messages if m.role == "user"), ""),
            text="",
            num_tokens=tokens,
            domain=str(record.get(domain, "")),
            correct=is_true(record, [correct], 0) if correct in record else None,
            answer=str(record.get(answer, last.content)),
            trusted=is_true(record, [section.trusted_field], 0),
            fault=missing or _fault(section.quality, record, messages, tokens),
        )


def _fault(
    quality: ConfigDict, record: Mapping[str, Any], messages: Sequence[Message], tokens: int
) -> str | None:
    """What is wrong with a trace, the first of all that may be."""
    last, reasoning = messages[-1], messages[-1].reasoning or ""
    if [m.role for m in messages if m.role != "system"] != ["user", "assistant"]:
        return trace_files.SEVERAL_TURNS
    if why := trace_files.fault(record, last.content):
        return why
    if quality.needs_reasoning and not reasoning.strip():
        return trace_files.NO_REASONING
    if tokens < quality.min_tokens:
        return TOO_SHORT
    if quality.max_tokens is not None and tokens > quality.max_tokens:
        return TOO_LONG
    for text in quality.without:
        if any(text in part for part in (messages[-2].content, reasoning, last.content)):
            return f"has {text!r}"
    return LOOPS if quality.loops and find_loop(reasoning) else None


def _held_out(stage: CurateStage, workdir: Workdir) -> list[str]:
    section = stage.section.held_out
    if not section.path:
        return []
    opened = sources_lib.JsonlSource(
        section.path, fields={section.field: ""}, data_dir=workdir.data, key="held_out.path"
    )
    return [str(opened[i][section.field]) for i in range(len(opened))]


# ---------------------------------------------------------------------------------- the choice

Step = Callable[[list[Candidate]], Selection]


def _in_turn(found: Sequence[Candidate], selection: Selection, steps: Sequence[Step]) -> Selection:
    """Each step chooses among what those before it left."""
    for step in steps:
        choose = lambda numbers, step=step: step([found[i] for i in numbers])
        selection = choices.after(selection, choose)
    return selection


def _good(run: Run, stage: CurateStage, pool: Pool, held_out: Sequence[str]) -> list[Step]:
    """Whatever the method: no model is asked."""
    section = stage.section
    duplicates = section.deduplicate
    steps: list[Step] = [
        lambda traces: choices.keep(traces, "all", section.num_samples or None),
        lambda traces: choices.without(
            len(traces), {i: one.fault for i, one in enumerate(traces) if one.fault}
        ),
    ]
    if section.keep != "all":
        steps.append(lambda traces: choices.keep(_graded(run, stage, pool, traces), section.keep))
    if held_out:
        clean = lambda texts: choices.decontaminate(texts, held_out, section.held_out.n)
        steps.append(lambda traces: _of_questions(traces, clean))
    if duplicates.threshold:
        unlike = lambda texts: choices.deduplicate(texts, duplicates.n, duplicates.threshold)
        steps.append(lambda traces: _of_questions(traces, unlike))
    return steps


def _of_questions(
    traces: Sequence[Candidate], choose: Callable[[list[str]], Selection]
) -> Selection:
    """A choice of questions; the traces of one share its lot."""
    questions = list(dict.fromkeys(trace.question for trace in traces))
    why = {questions[i]: reason for i, reason in choose(questions).dropped.items()}
    dropped = {i: why[one.question] for i, one in enumerate(traces) if one.question in why}
    return choices.without(len(traces), dropped)


def _graded(
    run: Run, stage: CurateStage, pool: Pool, traces: Sequence[Candidate]
) -> list[Candidate]:
    """With `correct`: as the records say, else by the reward, of answers to the gold ones."""
    if stage.section.correct_field:
        return list(traces)

    def grade() -> list[bool]:
        grades = []
        with assemble.rewards(run.config, stage.rewards) as reward:
            for begin in range(0, len(traces), _CHECKED):
                part = traces[begin : begin + _CHECKED]
                texts = [pool.record(one.id)["response"] for one in part]
                drawn = [Completion(text, (), (), False) for text in texts]
                grades += _right(reward, stage, drawn, part)
        return grades

    return [
        dataclasses.replace(one, correct=right)
        for one, right in zip(traces, hosts.told(grade), strict=True)
    ]


def _right(
    reward: mix.Reward,
    stage: CurateStage,
    drawn: Sequence[Completion],
    traces: Sequence[Candidate],
) -> list[bool]:
    _, parts = reward(drawn, [one.answer for one in traces])
    return [value >= 1 for value in parts[stage.section.solved_by]]


def _drawn(
    config: ConfigDict,
    stage: CurateStage,
    traces: list[Candidate],
    solved: Mapping[str, Sequence[bool]],
) -> Selection:
    """Args: solved, {solver: of each trace whether it solves the question}."""
    limit = stage.section.limit
    if stage.section.method == "random":
        return choices.draw(len(traces), limit, config.seed)
    trusted = lambda one: one.trusted
    hard = choices.hard(traces, solved, trusted)
    if not limit or len(hard.kept) < limit:  # the caller says what is lacking
        return hard
    spread = _spread(stage.section, config.seed)
    return choices.s1k(traces, solved=solved, config=spread, trusted=trusted)


def _spread(section: ConfigDict, seed: int) -> choices.Diversity:
    return choices.Diversity(
        num=section.limit,
        seed=seed,
        num_uniform=section.diversity.num_uniform,
        histogram=section.diversity.histogram.to_dict() or None,
    )


# --------------------------------------------------------------------------------- the solvers


def _solver(
    config: ConfigDict,
    stage: CurateStage,
    key: str,
    start: checkpoints.Checkpoint,
    workdir: Workdir,
    tokenizer: Tokenizer,
    model: LanguageModel | None,
) -> speakers.Speaker:
    name = f"{stage.name}-{key}"
    return speakers.find(config, start, stage.section.template, workdir, name, tokenizer, model)


class Solver:
    """A checkpoint that answers questions, greedily, and is graded."""

    def __init__(self, run: Run, stage: CurateStage, key: str, reward: mix.Reward):
        start = stage.starts[key]
        speaker = _solver(run.config, stage, key, start, run.workdir, run.tokenizer, run.model)
        self._generate = speaker.generator(stage.section.rows, run.workdir.checkpoints)
        self._key = assemble.stage_key(run.config.seed, f"{stage.name}.{key}")
        self._stage, self._reward = stage, reward

    def answer(self, traces: Sequence[Candidate]) -> tuple[list[str], list[bool]]:
        """To the question of each: what it says, and whether that is right."""
        template = self._stage.section.prompt_template
        asked = [template.replace("{question}", one.question) for one in traces]
        drawn = [row[0] for row in self._generate(asked, self._stage.sampling, self._key)]
        right = hosts.told(lambda: _right(self._reward, self._stage, drawn, traces))
        return [completion.text for completion in drawn], right


def _solved(run: Run, stage: CurateStage, traces: Sequence[Candidate]) -> dict[str, list[bool]]:
    """{solver: of each trace whether it solves the question}; goes on where it was stopped."""
    asked = list({one.question: one for one in reversed(traces)}.values())[::-1]
    found = {}
    for key, start in stage.starts.items():
        files = trace_files.TraceFiles(run.workdir.data, f"{stage.name}.{key.replace('s.', '')}", 1)
        author = trace_files.author(start, run.workdir)
        ids = [one.id for one in asked]
        done = hosts.told(lambda: files.resume(ids, author, run.progress.say))
        if done < len(asked):
            run.progress.say(f"{stage.name}: {len(asked)} questions to {author}")
            _ask(run, stage, key, author, asked, files, done)
        lines = hosts.told(lambda: [line["solved"] for line in iterate_lines(files.every)])
        solves = dict(zip((one.question for one in asked), lines, strict=True))
        found[start.text] = [solves[one.question] for one in traces]
    return found


def _ask(
    run: Run,
    stage: CurateStage,
    key: str,
    author: str,
    asked: Sequence[Candidate],
    files: trace_files.TraceFiles,
    done: int,
) -> None:
    """The questions from number `done` on, in batches that are on the disk before the next."""
    solved, every = 0, stage.section.batch
    run.progress.start(f"{stage.name} {key}", len(asked), done)
    with assemble.rewards(run.config, stage.rewards) as reward:
        solver = Solver(run, stage, key, reward)
        for begin in range(done, len(asked), every):
            part = asked[begin : begin + every]
            texts, right = solver.answer(part)
            records = [
                {"id": one.id, "question": one.question, "answer": one.answer, "text": text,
                 "solved": solves, "teacher": author}
                for one, text, solves in zip(part, texts, right, strict=True)
            ]  # fmt: skip
            hosts.first(lambda records=records: files.append(records))
            solved, end = solved + sum(right), begin + len(part)
            run.progress.update(end, f"{solved} of {end - done} solved")
    run.progress.stop()


# ------------------------------------------------------------------------------- the stage


def run_stage(run: Run, stage: CurateStage) -> None:
    """Chooses, resuming where it was, and leaves the files and the stage's done marker."""
    target = run.workdir.data / f"{stage.name}.jsonl"
    if run.workdir.marker(stage.name) and hosts.told(target.exists):
        return
    began = time.monotonic()
    run.progress.say(f"{stage.name}: reading traces")
    pool = Pool(run.config, stage, run.workdir, run.tokenizer)
    found = list(pool)
    everything = choices.without(len(found), {})
    good = _in_turn(found, everything, _good(run, stage, pool, _held_out(stage, run.workdir)))
    _check_left(stage, found, good)
    traces = [found[i] for i in good.kept]
    solved = _solved(run, stage, traces)
    selection = _in_turn(found, good, [lambda left: _drawn(run.config, stage, left, solved)])
    _check_left(stage, found, selection)

    def outcome() -> dict:
        counts = _counts(found, selection) | pool.left_out
        if solved:
            counts["solved"] = {solver: sum(answers) for solver, answers in solved.items()}
        _write(pool, found, selection, target)
        run.progress.say(f"{stage.name}: {told(counts)}")
        return {"method": stage.section.method, **counts,
                "seconds": round(time.monotonic() - began, 1)}  # fmt: skip

    run.workdir.mark(stage.name, outcome)


def _check_left(stage: CurateStage, found: Sequence[Candidate], selection: Selection) -> None:
    """Raises ValueError where too few are left, or a draw would meet a question twice."""
    limit, left = stage.section.limit, len(selection.kept)
    if left < max(limit, 1):
        wanted = f"limit is {limit}; " if limit else ""
        raise ValueError(f"{wanted}{told(_counts(found, selection))}")
    questions = {found[i].question for i in selection.kept}
    if limit and stage.section.method == "s1k" and len(questions) < left:
        raise ValueError(
            f"limit is {limit}, and {left} traces are of {len(questions)} questions; s1k draws "
            "questions: keep one trace of each (num_samples = 1, or keep = first_correct)"
        )


def _counts(found: Sequence[Candidate], selection: Selection) -> dict[str, Any]:
    kept = [found[i] for i in selection.kept]
    return {
        "traces": len(found),
        "questions": len({one.question for one in found}),
        "kept": len(kept),
        "kept_tokens": sum(one.num_tokens for one in kept),
        "domains": len({one.domain for one in kept}),
        "dropped": selection.reasons,
    }


def told(counts: Mapping[str, Any]) -> str:
    """The counts in a line."""
    dropped = ", ".join(f"{number} {why}" for why, number in counts["dropped"].items()) or "none"
    return f"{counts['kept']} of {counts['traces']} traces left ({dropped} dropped)"


def _write(
    pool: Pool, found: Sequence[Candidate], selection: Selection, target: pathlib.Path
) -> None:
    """STAGE.dropped.jsonl and STAGE.jsonl, a record in memory at a time."""

    def fill(numbers: Iterable[int]) -> Callable[[BinaryIO], None]:
        def write(out: BinaryIO) -> None:
            for i in numbers:
                one, reason = found[i], selection.dropped.get(i)
                known = {"answer": one.answer, "num_tokens": one.num_tokens, "domain": one.domain}
                why = {} if reason is None else {"reason": reason}
                out.write(json.dumps({**pool.record(one.id), **known, **why}).encode() + b"\n")

        return write

    write_whole(target.with_name(f"{target.stem}.dropped.jsonl"), fill(selection.dropped))
    write_whole(target, fill(sorted(selection.kept)))  # as they lie in the sources
