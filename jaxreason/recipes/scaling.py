"""The stage of kind `scaling`: accuracy against tokens for votes, budgets and waits."""

import bisect
import dataclasses
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from jaxreason.evals.accuracy import bootstrap_interval
from jaxreason.reasoning import scaling
from jaxreason.recipes import assemble, checkpoints
from jaxreason.recipes.evaluation import Evaluation
from jaxreason.text import chat
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train.metrics import Progress
from jaxreason.types import Completion, Params, Sampling, ThinkingBudget


@dataclasses.dataclass(frozen=True)
class ScalingStage:
    """What can be checked of the stage before anything is built."""

    name: str
    section: ConfigDict
    start: checkpoints.Checkpoint
    sampling: Sampling  # of one sample, without a budget
    tags: chat.ThinkTags = chat.DEFAULT_TAGS

    @property
    def length(self) -> int:
        """Tokens of the longest answer."""
        return self.sampling.max_tokens

    @property
    def num_points(self) -> int:
        s = self.section
        return 1 + len(s.budgets) * len(s.wordings) + len(s.waits)


def plan(config: ConfigDict, name: str, section: ConfigDict) -> ScalingStage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    sets = [key for key, spec in config.eval.sets.items() if spec.kind != "text"]
    if section.set not in sets:
        raise ValueError(
            f"set is {section.set!r}; the sampled sets of eval.sets: {', '.join(sets) or 'none'}"
        )
    for key, least in (("votes", 1), ("budgets", 0), ("waits", 0)):
        _check_numbers(key, section[key], least)
    if not section.votes:
        raise ValueError("votes is (); it must hold at least one size of the vote, as in (1,)")
    if section.rank_by not in ("", "logprob"):
        raise ValueError(f"rank_by is {section.rank_by!r}; it must be logprob or empty")
    for wording in section.wordings:
        ThinkingBudget(wording=wording)
    for key, least in (("limit", 0), ("num_samples", 1)):
        if section[key] < least:
            raise ValueError(f"{key} is {section[key]}; it must be {least} or more")
    spec = config.eval.sets[section.set]
    own = lambda key: spec[key] if section[key] is None else section[key]
    sampling = Sampling(
        max_tokens=own("max_tokens"),
        temperature=own("temperature"),
        top_k=spec.top_k,
        top_p=spec.top_p,
    )
    late = [budget for budget in section.budgets if budget >= sampling.max_tokens]
    if late:
        raise ValueError(
            f"budgets holds {late[0]}; it must be below max_tokens {sampling.max_tokens}, which "
            "counts the answer too"
        )
    if max(section.votes) > 1 and sampling.temperature == 0:
        raise ValueError(
            f"votes is {tuple(section.votes)} at temperature 0, where all samples are the same"
        )
    start, tags = checkpoints.parse(section.init["from"]), assemble.think_tags(config)
    if start.kind == "random":
        raise ValueError("init.from is 'random'; test-time scaling is of a model that was trained")
    return ScalingStage(name, section, start, sampling, tags)


def _check_numbers(key: str, values: tuple, least: int) -> None:
    if not all(type(value) is int and value >= least for value in values):
        raise ValueError(f"{key} is {tuple(values)}; it must hold whole numbers from {least} on")
    if len(set(values)) < len(values):
        raise ValueError(f"{key} is {tuple(values)}; it holds one of them twice")


def run(
    stage: ScalingStage,
    evaluation: Evaluation,
    tokenizer: Tokenizer,
    params: Params,
    key: jax.Array,
    progress: Progress,
) -> list[dict]:
    """The curves' records, in the form of summary.json's `scaling`.

    Every point is sampled with the same key. Beside reasoning/scaling.py's fields a record has
    `stage`, whose parameters these are, and `set`.
    """
    (asked,) = [sampled for sampled in evaluation.sampled if sampled.name == stage.section.set]
    problems = asked.problems[: stage.section.limit or None]
    bench = scaling.Bench(
        prompts=[problem.prompt for problem in problems],
        answers=[problem.answer for problem in problems],
        generate=lambda prompts, sampling: evaluation.generate(params, prompts, sampling, key),
        grade=asked.grade,
        interval=bootstrap_interval,
        thinking_tokens=thinking_counter(tokenizer.decode, stage.tags),
    )
    records = []
    progress.start(stage.name, stage.num_points)
    for number, points in enumerate(_curves(stage, bench), start=1):
        records += [{"stage": stage.start.name, "set": asked.name, **point} for point in points]
        last = points[-1]
        asked_for = f"n {last['n']}" if last["budget"] is None else f"{last['budget']} tokens"
        progress.update(
            number,
            f"{last['method']} {asked_for}: accuracy {last['accuracy']:.3f}, "
            f"{last['mean_tokens']:.1f} tokens",
        )
    progress.stop()
    return records


def _curves(stage: ScalingStage, bench: scaling.Bench) -> Iterator[list[dict]]:
    """The records of one set of samples after another: `stage.num_points` of them."""
    section = stage.section
    several = dataclasses.replace(stage.sampling, num_samples=max(section.votes))
    drawn = scaling.draw(bench, several)
    votes = scaling.majority_curve(bench, drawn, section.votes)
    if section.rank_by == "logprob":
        votes += scaling.best_of_n_curve(bench, drawn, section.votes, _mean_logprob)
    yield votes
    few = dataclasses.replace(stage.sampling, num_samples=section.num_samples)
    for wording in section.wordings:
        for budget in section.budgets:
            yield [scaling.budget_point(bench, few, budget, wording)]
    for waits in section.waits:
        yield [scaling.waits_point(bench, few, waits)]


def _mean_logprob(prompt: str, completion: Completion) -> float:
    return sum(completion.logprobs) / len(completion.logprobs)


def thinking_counter(
    decode: Callable[[list[int]], str], tags: chat.ThinkTags = chat.DEFAULT_TAGS
) -> Callable[[Completion], int]:
    """Counts the ids that the model chose to think with: all of them where no thinking ended.

    The tags do not count (of a closing tag of several ids, only its last does not), nor does what a
    budget put there. A tag is looked for in the text, where it stays from the id on that ends it.
    """

    def end_of(tag: str, ids: tuple[int, ...]) -> int:
        """How many of the first ids hold the tag; one more than there are: never."""
        holds = lambda size: tag in decode(list(ids[:size]))
        return bisect.bisect_left(range(len(ids) + 1), True, key=holds)

    def count(completion: Completion) -> int:
        closed, opened = (end_of(tag, completion.ids) for tag in (tags.close, tags.open))
        thinking = slice(opened if opened < closed else 0, closed - 1)
        forced = completion.forced[thinking]
        return len(completion.ids[thinking]) - sum(forced)

    return count
