"""The stage of kind `prune`: long traces become the shortest prefix that the student answers from.

Efficient Long CoT (arXiv 2505.18440), by reasoning/prune.py. The student itself is asked for the
answer after the first k steps of a trace: the checkpoint that the stage starts from, greedily, all
traces of a batch at once. Three files come of it in the run's data folder:

  STAGE.all.jsonl    every trace, its steps and what the student said; grows by whole batches
  STAGE.jsonl        the pruned traces, to be trained on by path="@STAGE"
  STAGE.pairs.jsonl  chosen: the pruned trace, rejected: the full one, where they differ (DPO)
"""

import collections
import dataclasses
import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from jaxreason.data import sources as sources_lib
from jaxreason.parallel import hosts
from jaxreason.reasoning import prune as search
from jaxreason.reasoning.prune import Pruned, Question
from jaxreason.reasoning.segment import Segmentation, segment
from jaxreason.recipes import assemble, checkpoints, evaluation, trace_files, weights
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import iterate_lines, write_whole
from jaxreason.rewards import math, mix, numerals
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Prompt, Sampling

METHODS = (*search.METHODS, "first_correct", "random")


@dataclasses.dataclass(frozen=True)
class PruneStage:
    """What can be checked of the stage before anything is built."""

    name: str
    section: ConfigDict
    start: checkpoints.Checkpoint  # the student
    sources: dict[str, sources_lib.SourceConfig]
    segmentation: Segmentation
    rewards: dict[str, mix.RewardConfig]
    sampling: Sampling

    @property
    def length(self) -> int:
        return self.sampling.max_tokens


@dataclasses.dataclass(frozen=True)
class Chain:
    """One record: a question, the steps of a trace, and the answer it comes to."""

    id: str
    question: str
    steps: tuple[str, ...]
    response: str
    answer: str  # the gold answer
    system: str = ""

    @property
    def turns(self) -> list[chat.Message]:
        """What comes before the answer."""
        system = [chat.Message("system", self.system)] if self.system else []
        return [*system, chat.Message("user", self.question)]

    def reasoning(self, kept: int) -> str:
        return "".join(self.steps[:kept]).strip("\n")


def plan(config: ConfigDict, name: str, section: ConfigDict) -> PruneStage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    if section.method not in METHODS:
        raise ValueError(f"method is {section.method!r}; it must be one of {', '.join(METHODS)}")
    for key, least in (("data.limit", 0), ("batch", 1), ("rows", 1), ("max_tokens", 1)):
        value = section.data.limit if key == "data.limit" else section[key]
        if value < least:
            raise ValueError(f"{key} is {value}; it must be {least} or more")
    if section.init["from"] in ("", "random"):
        raise ValueError(
            f"init.from is {section.init['from']!r}; traces are pruned for a student: a checkpoint "
            "that has learnt to answer from such traces"
        )
    if section.solved_by not in section.rewards:
        raise ValueError(
            f"solved_by is {section.solved_by!r}; it must be one of rewards: "
            f"{', '.join(section.rewards)}"
        )
    sources = sources_lib.trace_sources(section.data.sources.to_dict(), section.answer_field)
    rewards = {
        reward: assemble.from_section(mix.RewardConfig, spec)
        for reward, spec in section.rewards.items()
    }
    return PruneStage(
        name, section, checkpoints.parse(section.init["from"]), sources,
        Segmentation(**section.segment.to_dict()), rewards,
        Sampling(max_tokens=section.max_tokens, temperature=0.0),
    )  # fmt: skip


def check_data(
    config: ConfigDict, stage: PruneStage, tokenizer: Tokenizer, workdir: Workdir
) -> None:
    """Opens the traces and reads the gold answers of the first. Raises ValueError."""
    hosts.first(lambda: _check_chains(config, stage, workdir))


def _check_chains(config: ConfigDict, stage: PruneStage, workdir: Workdir) -> None:
    records = _records(config, stage, workdir)
    found = [_chain(stage, records, one) for one in itertools.islice(records, 1_000)]
    chains = [chain for chain in found if isinstance(chain, Chain)]
    if not chains:
        raise ValueError(
            f"data.sources: none of the first {len(found)} records can be pruned, the first one "
            f"for {found[0]!r}"
        )
    with assemble.rewards(config, stage.rewards) as reward:
        reward.check([Prompt(c.id, c.question, c.answer, c.id.split("/")[0]) for c in chains])


def _chain(stage: PruneStage, records: sources_lib.Records, chain_id: str) -> Chain | str:
    """The chain of a record, or why it has none to prune."""
    record, messages = records[chain_id]
    system = next((m.content for m in messages if m.role == "system"), "")
    turns = [m for m in messages if m.role != "system"]
    if [m.role for m in turns] != ["user", "assistant"]:
        return trace_files.SEVERAL_TURNS
    question, answer = turns
    if not (answer.reasoning or "").strip():
        return trace_files.NO_REASONING
    if missing := trace_files.lacking(record, stage.section, "answer_field"):
        return missing
    steps = tuple(segment(answer.reasoning, stage.segmentation))
    field = stage.section.answer_field
    gold = str(record[field] if field else answer.content)
    return Chain(chain_id, question.content, steps, answer.content, gold, system)


def _records(config: ConfigDict, stage: PruneStage, workdir: Workdir) -> sources_lib.Records:
    limit = stage.section.data.limit
    return sources_lib.Records(stage.sources, workdir.data, config.seed, limit)


# ----------------------------------------------------------------------------------- the search


class Student:
    """Answers from the first steps of a trace, and is graded."""

    def __init__(self, run: Run, stage: PruneStage, reward: mix.Reward):
        template = assemble.chat_template(run.config, run.tokenizer)

        def encode(asked: tuple[Chain, int]) -> list[int]:
            chain, kept = asked
            reasoning = chain.reasoning(kept)
            return chat.encode_to_answer(run.tokenizer, template, chain.turns, reasoning)

        self._generate = evaluation.generator(
            run.config, run.tokenizer, run.model, stage.section.rows, encode
        )
        self._params = weights.load(stage.start, run.model, run.workdir.checkpoints)
        self._key = assemble.stage_key(run.config.seed, stage.name)
        self._sampling, self._solved_by = stage.sampling, stage.section.solved_by
        self._reward = reward

    def is_valid(self, chains: Sequence[Chain], questions: Sequence[Question]) -> list[bool]:
        """Of each (chain, steps kept): whether the student's answer is right."""
        asked = [(chains[i], kept) for i, kept in questions]
        drawn = self._generate(self._params, asked, self._sampling, self._key)
        answers = [chains[i].answer for i, _ in questions]

        def graded() -> list[float]:
            _, parts = self._reward([completions[0] for completions in drawn], answers)
            return list(parts[self._solved_by])

        return [value >= 1 for value in hosts.told(graded)]


def _pruned(
    stage: PruneStage, chains: Sequence[Chain], seed: int, first: int, ask: Callable
) -> list[Pruned]:
    """Args: first, the number of the first chain among all; ask, Student.is_valid of them."""
    method = stage.section.method
    if method == "random":
        return [search.random_cut(len(c.steps), seed, first + i) for i, c in enumerate(chains)]
    if method in ("binary", "exhaustive"):
        return search.prune([c.steps for c in chains], ask, method=method)
    solved = [search.first_correct_solution(c.steps, _has(c.answer)) for c in chains]
    if method == "first_correct":
        return solved
    guesses = [one.kept for one in solved]
    return search.prune([c.steps for c in chains], ask, method=method, guesses=guesses)


def _has(answer: str) -> Callable[[str], bool]:
    """Whether a step comes to the answer: its last box, else what stands right of its last =.

    Numbers are the same in any spelling; what is no number is found as it is written. An operand of
    a computation is not what the step comes to.
    """
    gold = math.written_answer(answer) or answer.strip()
    as_written = re.compile(rf"(?<![\w.-]){re.escape(gold)}(?!\w|\.\w)")
    is_number = numerals.read(gold) is not None

    def has(step: str) -> bool:
        boxed = math.last_boxed(step)
        if boxed is not None:
            return math.answers_equal(boxed, gold)
        result = step.rpartition("=")[2]
        if is_number:
            return any(math.answers_equal(number, gold) for number in numerals.find(result))
        return as_written.search(result) is not None

    return has


def run_stage(run: Run, stage: PruneStage) -> None:
    """Prunes, resuming where it was, and leaves the files and the stage's done marker."""
    files = trace_files.TraceFiles(run.workdir.data, stage.name, 1)
    if run.workdir.marker(stage.name) and hosts.told(files.kept.exists):
        return
    began = time.monotonic()
    records = _records(run.config, stage, run.workdir)
    found = [_chain(stage, records, one) for one in records]
    chains = [chain for chain in found if isinstance(chain, Chain)]
    without = collections.Counter(why for why in found if isinstance(why, str))
    student = trace_files.author(stage.start, run.workdir)
    done = hosts.told(lambda: files.resume([c.id for c in chains], student, run.progress.say))
    if done < len(chains):
        run.progress.say(f"{stage.name}: {len(chains)} traces, {stage.section.method}, {student}")
        _search(run, stage, chains, student, files, done)

    def outcome() -> dict:
        counts = _write(run, stage, files, without) | records.left_out
        return {"student": student, **counts, "seconds": round(time.monotonic() - began, 1)}

    run.workdir.mark(stage.name, outcome)


def _search(
    run: Run,
    stage: PruneStage,
    chains: Sequence[Chain],
    student: str,
    files: trace_files.TraceFiles,
    done: int,
) -> None:
    """The chains from number `done` on, in batches that are on the disk before the next."""
    every, kept, asked = stage.section.batch, 0, 0
    run.progress.start(stage.name, len(chains), done)
    with assemble.rewards(run.config, stage.rewards) as reward:
        judge = Student(run, stage, reward)
        for begin in range(done, len(chains), every):
            part = chains[begin : begin + every]
            ask = lambda questions, part=part: judge.is_valid(part, questions)
            found = _pruned(stage, part, run.config.seed, begin, ask)
            records = [
                _record(run.tokenizer, chain, result, stage.section.method, student)
                for chain, result in zip(part, found, strict=True)
            ]
            hosts.first(lambda records=records: files.append(records))
            kept += sum(result.kept is not None for result in found)
            asked += sum(len(result.asked) for result in found)
            end = begin + len(part)
            run.progress.update(end, f"{kept} of {end - done} kept  {asked:,} questions asked")
    run.progress.stop()


def _record(
    tokenizer: Tokenizer, chain: Chain, result: Pruned, method: str, student: str
) -> dict[str, Any]:
    return {
        "id": chain.id,
        **({"system": chain.system} if chain.system else {}),
        "question": chain.question,
        "answer": chain.answer,
        "response": chain.response,
        "steps": chain.steps,
        "step_tokens": [len(tokenizer.encode(step)) for step in chain.steps],
        "kept": result.kept,
        "dropped": result.dropped,
        "asked": result.asked,
        "method": method,
        "teacher": student,  # as trace_files calls whose work a record is
    }


# ------------------------------------------------------------------------------ what comes of it


def _write(
    run: Run, stage: PruneStage, files: trace_files.TraceFiles, without: Mapping[str, int]
) -> dict[str, Any]:
    """STAGE.jsonl, STAGE.pairs.jsonl, and the report. Raises ValueError where nothing is kept.

    Args:
      without: records that had no chain, by reason.
    """
    kept, pairs, results, step_tokens = [], [], [], []
    tags = assemble.think_tags(run.config)
    for record in iterate_lines(files.every):
        asked = tuple((k, valid) for k, valid in record["asked"])
        result = Pruned(len(record["steps"]), record["kept"], record["dropped"], asked)
        results.append(result)
        step_tokens.append(record["step_tokens"])
        if result.kept is None:
            continue
        chain = Chain(record["id"], record["question"], tuple(record["steps"]),
                      record["response"], record["answer"],
                      record.get("system", ""))  # fmt: skip
        kept.append(_kept(chain, record, result))
        if result.kept < result.num_steps:
            pairs.append(_pair(chain, result, tags))
    report = search.report(results, step_tokens, stage.section.method)
    counts = dataclasses.asdict(report)
    counts["dropped"] |= without
    run.progress.say(f"{stage.name}: {told(report)}")
    if not kept:
        raise ValueError(
            f"method is {stage.section.method!r}, and not one trace is kept: {counts['dropped']}"
        )
    lines = lambda content: "".join(json.dumps(one) + "\n" for one in content)
    write_whole(files.kept.with_name(f"{stage.name}.pairs.jsonl"), lines(pairs))
    write_whole(files.kept, lines(kept))
    return {"pairs": len(pairs), **counts}


def _kept(chain: Chain, record: dict[str, Any], result: Pruned) -> dict[str, Any]:
    """A pruned trace with where it comes from."""
    return {
        "id": chain.id,
        **({"system": chain.system} if chain.system else {}),
        "question": chain.question,
        "reasoning": chain.reasoning(result.kept),
        "response": chain.response,
        "answer": chain.answer,
        "kept_steps": result.kept,
        "num_steps": result.num_steps,
        "kept_tokens": sum(record["step_tokens"][: result.kept]),
        "num_tokens": sum(record["step_tokens"]),
        "method": record["method"],
        "student": record["teacher"],
    }


def _pair(chain: Chain, result: Pruned, tags: chat.ThinkTags) -> dict[str, Any]:
    """As TRL's conversational pairs have it; the reasoning stands in the content, in its tags."""

    def turn(kept: int) -> list[dict[str, str]]:
        thought = f"{tags.open}\n{chain.reasoning(kept)}\n{tags.close}\n\n"
        return [{"role": "assistant", "content": thought + chain.response}]

    return {
        "id": chain.id,
        "prompt": [{"role": turn.role, "content": turn.content} for turn in chain.turns],
        "chosen": turn(result.kept),
        "rejected": turn(result.num_steps),
    }


def told(report: search.Report) -> str:
    """The report in a line."""
    dropped = ", ".join(f"{number} {why}" for why, number in report.dropped.items()) or "none"
    if not report.num_kept:
        return f"none of {report.num_traces} traces kept ({dropped} dropped)"
    return (
        f"{report.num_kept} of {report.num_traces} traces kept ({dropped} dropped), "
        f"{report.kept_tokens:.0%} of their tokens and {report.kept_steps:.0%} of their steps, "
        f"{report.tokens_before:.1f} -> {report.tokens_after:.1f} tokens a trace; "
        f"{report.questions:,} questions asked, at most {report.max_questions} of a trace"
    )
