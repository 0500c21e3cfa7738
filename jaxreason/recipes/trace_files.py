"""The files of a stage of traces: every trace as it came, and those that are kept to train on.

data/STAGE.all.jsonl    grows by whole batches; a run that was killed goes on after its last
                        whole question
data/STAGE.jsonl        made of it at the end, in one rename
"""

import collections
import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxreason.reasoning.curate import KEEPS, of_question
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.workdir import Workdir
from jaxreason.report.summary import iterate_lines

NO_REASONING, SEVERAL_TURNS = "no reasoning", "several turns"  # of records that are chosen among
REASONS = ("refused", "truncated", "no_answer", "wrong", "surplus")  # why a trace is not kept


@dataclasses.dataclass(frozen=True)
class Keep:
    """Which traces of a question are kept.

    None that the server refused, that ran into the token limit, or that has no answer, as where the
    thinking never ended. Of the rest `all`, those that are `correct`, or of these the first or the
    shortest.

    Raises:
      ValueError: a rule is unknown, or a limit negative.
    """

    rule: str
    per_question: int = 0  # at most; 0: one of first_correct and shortest_correct, else no limit
    num_samples: int = 1  # a question

    def __post_init__(self):
        if self.rule not in KEEPS:
            raise ValueError(f"keep is {self.rule!r}; it must be one of {', '.join(KEEPS)}")
        if not 0 <= self.per_question <= self.num_samples:
            raise ValueError(
                f"per_question is {self.per_question}; it must be 0 to sampling.num_samples = "
                f"{self.num_samples}"
            )

    def choose(self, traces: Sequence[dict[str, Any]]) -> tuple[list[dict], collections.Counter]:
        """What is kept of one question's traces, and how many are not, by reason."""
        usable, dropped = [], collections.Counter()
        for trace in traces:
            why = fault(trace, trace["response"])
            if why is None and self.rule != "all" and not trace["correct"]:
                why = "wrong"
            if why is None:
                usable.append(trace)
            else:
                dropped[why] += 1
        tokens = [trace["num_tokens"] for trace in usable]
        chosen = of_question([True] * len(usable), tokens, self.rule, self.per_question)
        dropped["surplus"] += len(usable) - len(chosen)
        return [usable[i] for i in chosen], dropped


def fault(record: dict[str, Any], response: str) -> str | None:
    """Of REASONS, why nobody should learn such a trace, right or wrong; None: one may."""
    if record.get("refused"):
        return "refused"
    if record.get("truncated"):
        return "truncated"
    return None if response.strip() else "no_answer"


def lacking(record: Mapping[str, Any], section: Mapping[str, Any], *keys: str) -> str | None:
    """Why a record cannot be used of which these keys of a stage name fields; None: it has them."""
    for key in keys:
        if section[key] and section[key] not in record:
            return f"{key} is {section[key]!r}; the record has {', '.join(record)}"
    return None


class TraceFiles:
    """Those of one stage; used by one process."""

    def __init__(self, folder: pathlib.Path, stage: str, num_samples: int):
        self.every = folder / f"{stage}.all.jsonl"
        self.kept = folder / f"{stage}.jsonl"
        self._num_samples = num_samples

    def resume(self, ids: Sequence[str], teacher: str, say: Callable[[str], None]) -> int:
        """How many questions are answered whole; what comes after them is cut off.

        Args:
          ids: of all questions, in order.
        Raises ValueError where the file answers other questions. Where another teacher wrote it
        (one that was trained further meanwhile), it begins anew, and `say` hears of it.
        """
        if not self.every.exists():
            return 0
        lines = end = at = 0
        with self.every.open("rb") as file:
            for line in file:
                record, at = _whole_record(line), at + len(line)
                if record is None:
                    break
                question = lines // self._num_samples
                if question >= len(ids) or record["id"] != ids[question]:
                    raise ValueError(
                        f"{self.every} holds traces of other questions than data.sources now do "
                        f"({record['id']} in line {lines + 1}); a run goes on with the files that "
                        "it began with"
                    )
                if record["teacher"] != teacher:
                    say(f"{self.every} is of {record['teacher']}; it begins anew with {teacher}")
                    lines = end = 0
                    break
                lines += 1
                end = at if lines % self._num_samples == 0 else end
        with self.every.open("rb+") as file:
            file.truncate(end)
            os.fsync(file.fileno())
        return lines // self._num_samples

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """On the disk when it returns."""
        text = "".join(json.dumps(record) + "\n" for record in records)
        self.every.parent.mkdir(parents=True, exist_ok=True)
        with self.every.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def select(self, keep: Keep) -> dict[str, Any]:
        """Writes the kept traces and counts: questions, those solved, samples, correct, kept, ...

        Raises ValueError where none is kept.
        """
        counts: dict[str, Any] = dict.fromkeys(
            ("questions", "solved", "samples", "correct", "kept", "sampled_tokens", "kept_tokens"),
            0,
        )
        dropped, accepted = collections.Counter(), None
        partial = self.kept.with_name(f".{self.kept.name}.partial")
        groups = itertools.groupby(iterate_lines(self.every), key=lambda record: record["id"])
        with partial.open("w", encoding="utf-8") as file:
            for _, group in groups:
                traces = list(group)
                kept, why = keep.choose(traces)
                dropped += why
                right = sum(trace["correct"] for trace in traces)
                tokens = [sum(t["num_tokens"] for t in some) for some in (traces, kept)]
                for name, number in (
                    ("questions", 1),
                    ("solved", right > 0),
                    ("samples", len(traces)),
                    ("correct", right),
                    ("kept", len(kept)),
                    ("sampled_tokens", tokens[0]),
                    ("kept_tokens", tokens[1]),
                ):
                    counts[name] += number
                if "accepted" in traces[0]:
                    accepted = (accepted or 0) + sum(trace["accepted"] for trace in traces)
                file.writelines(json.dumps(trace) + "\n" for trace in kept)
            file.flush()
            os.fsync(file.fileno())
        counts |= {f"dropped_{reason}": dropped[reason] for reason in REASONS}
        if accepted is not None:
            counts["accepted_share"] = round(accepted / max(counts["sampled_tokens"], 1), 4)
        if not counts["kept"]:
            partial.unlink()
            raise ValueError(f"keep is {keep.rule!r}, and not one trace is kept: {told(counts)}")
        os.replace(partial, self.kept)
        return counts


def author(start: Checkpoint, workdir: Workdir) -> str:
    """Whose work a record is: of a stage of this run with the step that it ended at, as it may be
    trained further."""
    if start.directory is not None or start.step is not None:
        return start.text
    return f"{start.text}@{workdir.marker(start.stage)['steps']}"


def told(counts: dict[str, Any]) -> str:
    """The counts in a line."""
    reasons = [f"{counts[f'dropped_{r}']} {r}" for r in REASONS if counts[f"dropped_{r}"]]
    share = counts.get("accepted_share")
    gate = "" if share is None else f"; {share:.1%} of tokens accepted by the student"
    return (
        f"{counts['kept']} of {counts['samples']} traces kept, of {counts['questions']} questions "
        f"({', '.join(reasons) or 'none'} dropped){gate}"
    )


def _whole_record(line: bytes) -> dict[str, Any] | None:
    """None of what was cut off: a line without its end, or that is no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "id" in record else None
