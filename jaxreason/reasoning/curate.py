"""Which sampled traces a student is trained on: choices over records, each with its reasons.

  keep        of the samples of every question: all, the correct, one of them (SCoTD, arXiv
              2306.14050; Fine-tune-CoT, arXiv 2212.10071)
  difficulty, diversity, and `s1k` of the two (s1, arXiv 2501.19393, section 2)
  decontaminate, deduplicate      n-grams of words, against other texts or one another
Nothing here reads a file or calls a model: what models say (correct, solved, domain) comes in as
data. A selection names every record that it leaves out and why; draws are a function of the seed.
"""

import collections
import dataclasses
import random
import string
from collections.abc import Callable, Hashable, Mapping, Sequence

from jaxreason.reasoning.traces import Trace

KEEPS = ("all", "correct", "first_correct", "shortest_correct")
NOT_CORRECT = "not correct"
NO_CORRECT = "question without a correct trace"
ANOTHER = "another trace of its question is kept"
BEYOND = "beyond the samples of a question"
SOLVED = "solved by "
NOT_DRAWN = "not drawn"
CONTAMINATED = "shares an n-gram with a held-out text"
DUPLICATE = "near-duplicate of an earlier one"

# Of all traces that remain in a domain the longest is drawn half the time, the next a quarter;
# beyond 60 ranks the chance is 2^-60.
_MAX_RANK = 60


@dataclasses.dataclass(frozen=True)
class Selection:
    """Numbers of the records kept, in their order (of `diversity`: as drawn), and the others."""

    kept: tuple[int, ...]
    dropped: dict[int, str]  # record -> why

    @property
    def reasons(self) -> dict[str, int]:
        """{reason: records}, the most frequent first."""
        return dict(collections.Counter(self.dropped.values()).most_common())


def without(num: int, dropped: Mapping[int, str]) -> Selection:
    """Of `num` records all but those that are dropped, {record: why}."""
    return Selection(
        tuple(i for i in range(num) if i not in dropped), dict(sorted(dropped.items()))
    )


def after(first: Selection, choose: Callable[[list[int]], Selection]) -> Selection:
    """Chooses further among what a selection kept; numbers stay those of the first records."""
    then = choose(list(first.kept))
    dropped = {first.kept[i]: why for i, why in then.dropped.items()}
    kept = tuple(first.kept[i] for i in then.kept)
    return Selection(kept, dict(sorted({**first.dropped, **dropped}.items())))


# ------------------------------------------------------------------- the samples of each question


def keep(traces: Sequence[Trace], which: str, num_samples: int | None = None) -> Selection:
    """Chooses among the samples of every question.

    Args:
      which: `all`; `correct`, each of them; `first_correct` or `shortest_correct` (by tokens, the
        first of equals), one a question. What is not graded is not correct.
      num_samples: only the first so many samples of a question are looked at, as if no more had
        been drawn (N of SCoTD, D of Fine-tune-CoT); None: all.

    Raises:
      ValueError: an unknown `which`, or a number of samples below 1.
    """
    if which not in KEEPS:
        raise ValueError(f"keep is {which!r}; it must be one of {', '.join(KEEPS)}")
    if num_samples is not None and num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}; it must be at least 1, or None")
    samples: dict[str, list[int]] = collections.defaultdict(list)
    for i, trace in enumerate(traces):
        samples[trace.question].append(i)
    dropped: dict[int, str] = {}
    for question in samples.values():
        seen = question[:num_samples]
        dropped |= dict.fromkeys(question[len(seen) :], BEYOND)
        if which != "all":
            dropped |= _drop_of_question(traces, seen, which)
    return without(len(traces), dropped)


def _drop_of_question(traces: Sequence[Trace], seen: list[int], which: str) -> dict[int, str]:
    correct = [bool(traces[i].correct) for i in seen]
    kept = {seen[at] for at in of_question(correct, [traces[i].num_tokens for i in seen], which)}
    if not kept:
        return dict.fromkeys(seen, NO_CORRECT)
    others = (i for i in seen if i not in kept)
    return {i: ANOTHER if traces[i].correct else NOT_CORRECT for i in others}


def of_question(
    correct: Sequence[bool], num_tokens: Sequence[int], which: str, most: int = 0
) -> list[int]:
    """Numbers of the samples of one question that a rule of KEEPS keeps, the first choice first.

    Args:
      most: how many at most; 0: one of first_correct and shortest_correct, else no limit.
    """
    kept = [i for i, right in enumerate(correct) if right or which == "all"]
    if which == "shortest_correct":
        kept.sort(key=lambda i: num_tokens[i])  # the earlier where two are as short
    alone = which in ("first_correct", "shortest_correct")
    return kept[: most or (1 if alone else None)]


# --------------------------------------------------------------------------------- s1K's curation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Diversity:
    """How many are drawn, and from which domains.

    The paper draws every domain equally often. Its code does so for the first 700 of 1,000 only,
    and draws the domains of the rest from those of the benchmarks: `num_uniform` and `histogram`
    (domain -> weight).

    Raises:
      ValueError: a number or a weight is out of its range, or only one of the two is given.
    """

    num: int
    seed: int = 0
    num_uniform: int | None = None  # None: all of them
    histogram: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"diversity.num is {self.num}; it must be at least 1")
        if (self.num_uniform is None) != (self.histogram is None):
            raise ValueError(
                f"diversity.num_uniform is {self.num_uniform} and histogram {self.histogram}; give "
                "both or neither"
            )
        if self.num_uniform is not None and not 0 <= self.num_uniform <= self.num:
            raise ValueError(
                f"diversity.num_uniform is {self.num_uniform}; it must be 0 to num {self.num}"
            )
        if self.histogram is not None:
            bad = {domain: w for domain, w in self.histogram.items() if not w > 0}
            if bad or not self.histogram:
                raise ValueError(
                    f"diversity.histogram is {dict(self.histogram)!r}; it must have domains, each "
                    "with a weight above 0"
                )


def draw(num: int, size: int, seed: int) -> Selection:
    """`size` of `num` records at random: what a curated set of that size is compared with."""
    kept = set(random.Random(seed).sample(range(num), size))
    return without(num, {i: NOT_DRAWN for i in range(num) if i not in kept})


def difficulty(num: int, solved: Mapping[str, Sequence[bool]]) -> Selection:
    """Drops what any of the models solves: too easy.

    Args:
      num: how many records there are.
      solved: {model: whether it solves the question of each record}.

    Raises:
      ValueError: a model has another number of answers.
    """
    for model, answers in solved.items():
        if len(answers) != num:
            raise ValueError(f"difficulty: {model} has {len(answers)} answers to {num} questions")
    dropped = {}
    for i in range(num):
        solvers = [model for model, answers in solved.items() if answers[i]]
        if solvers:
            dropped[i] = SOLVED + " and ".join(solvers)
    return without(num, dropped)


def hard(
    traces: Sequence[Trace], solved: Mapping[str, Sequence[bool]], trusted: Callable[[Trace], bool]
) -> Selection:
    """`difficulty`, which keeps what is trusted whoever solves it."""
    kept = [trusted(trace) for trace in traces]
    tried = {
        model: [answer and not in_anyway for answer, in_anyway in zip(answers, kept)]
        for model, answers in solved.items()
    }
    return difficulty(len(traces), tried)


def diversity(traces: Sequence[Trace], config: Diversity, chosen: Sequence[int] = ()) -> Selection:
    """Draws `config.num` traces: a domain, then one of its traces with weight 2^-rank.

    Rank 0 is the longest trace, by tokens, that is still there. `kept` begins with `chosen`, which
    are in from the start and count (s1 sets trusted ones aside), and goes on in the order drawn.

    Raises:
      ValueError: a question has two traces (choose one with `keep` first), there are not so many
        traces, or the histogram's domains have no more.
    """
    twice = [q for q, n in collections.Counter(t.question for t in traces).items() if n > 1]
    if twice:
        raise ValueError(
            f"diversity: {len(twice)} questions have several traces, {twice[0][:60]!r} among them; "
            "keep one of each first"
        )
    if len(traces) < config.num:
        raise ValueError(f"diversity.num is {config.num}; there are {len(traces)} traces left")
    if len(chosen) > config.num:
        raise ValueError(f"diversity.num is {config.num}; {len(chosen)} are chosen beforehand")
    rng = random.Random(config.seed)
    pools: dict[str, list[int]] = collections.defaultdict(list)
    for i in sorted(
        set(range(len(traces))) - set(chosen), key=lambda i: (-traces[i].num_tokens, i)
    ):
        pools[traces[i].domain].append(i)
    pools = dict(sorted(pools.items()))  # a draw depends on the names, not on the records' order
    kept = list(chosen)
    while len(kept) < config.num:
        pool = pools[_draw_domain(pools, config, len(kept), rng)]
        ranks = range(min(len(pool), _MAX_RANK))
        kept.append(pool.pop(rng.choices(ranks, [2.0**-rank for rank in ranks])[0]))
        pools = {domain: left for domain, left in pools.items() if left}
    dropped = dict.fromkeys(sorted(set(range(len(traces))) - set(kept)), NOT_DRAWN)
    return Selection(tuple(kept), dropped)


def _draw_domain(
    pools: Mapping[str, list[int]], config: Diversity, num_kept: int, rng: random.Random
) -> str:
    """One of the domains that still have traces."""
    if config.num_uniform is None or num_kept < config.num_uniform:
        return rng.choice(list(pools))
    weights = {d: w for d, w in sorted(config.histogram.items()) if d in pools}
    if not weights:
        raise ValueError(
            f"diversity.histogram: its domains have no more traces after {num_kept} of "
            f"{config.num}; raise num_uniform or lower num"
        )
    return rng.choices(list(weights), list(weights.values()))[0]


def s1k(
    traces: Sequence[Trace],
    *,
    solved: Mapping[str, Sequence[bool]],
    config: Diversity,
    trusted: Callable[[Trace], bool] = lambda trace: False,
) -> Selection:
    """Difficulty and diversity, one after the other; the traces are of good quality.

    Args:
      solved: {model: whether it solves the question of each trace}; the paper has two models.
      trusted: traces that are in whatever their difficulty.
    """

    def diverse(numbers: list[int]) -> Selection:
        chosen = [at for at, i in enumerate(numbers) if trusted(traces[i])]
        return diversity([traces[i] for i in numbers], config, chosen)

    return after(hard(traces, solved, trusted), diverse)


# ----------------------------------------------------------------- contamination and duplicates


def decontaminate(texts: Sequence[str], held_out: Sequence[str], n: int = 8) -> Selection:
    """Drops every text that shares an n-gram of words with a held-out one (s1: n = 8).

    Words are compared without case and without the punctuation around them. A text of fewer than n
    words is one gram, so it is found again only as a whole.
    """
    taken = set().union(*(grams(text, n) for text in held_out)) if held_out else set()
    dropped = {
        i: CONTAMINATED for i, text in enumerate(texts) if not taken.isdisjoint(grams(text, n))
    }
    return without(len(texts), dropped)


def deduplicate(texts: Sequence[str], n: int = 3, threshold: float = 0.8) -> Selection:
    """Drops every text whose n-grams are those of an earlier kept one, nearly.

    Near is a Jaccard similarity of at least `threshold` (1: the same grams). Exact, and yet not
    every pair is compared: two texts so similar share one of the first, rarest grams of both (the
    prefix filter of Bayardo et al. 2007, "Scaling up all pairs similarity search").

    Raises:
      ValueError: the threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"deduplicate.threshold is {threshold}; it must be in (0, 1]")
    all_grams = [grams(text, n) for text in texts]
    frequency = collections.Counter(gram for found in all_grams for gram in found)
    index: dict[Hashable, list[int]] = collections.defaultdict(list)
    dropped: dict[int, str] = {}
    for i, found in enumerate(all_grams):
        # Of m grams at least threshold * m are in a similar text, so of the first m - that + 1 one.
        needed = -int(-threshold * len(found) // 1)
        prefix = sorted(found, key=lambda gram: (frequency[gram], gram))[: len(found) - needed + 1]
        candidates = {j for gram in prefix for j in index[gram]}
        if any(_jaccard(found, all_grams[j]) >= threshold for j in candidates):
            dropped[i] = DUPLICATE
            continue
        for gram in prefix:
            index[gram].append(i)
    return without(len(texts), dropped)


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    """The n-grams of a text's words; all of its words where it has fewer than n.

    Raises ValueError for n below 1.
    """
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least 1 word")
    words = [word.strip(_PUNCTUATION) for word in text.lower().split()]
    words = [word for word in words if word]
    if 0 < len(words) < n:
        return {tuple(words)}
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# Operators stay: `3 + 4` and `3 - 4` are two texts.
_PUNCTUATION = "".join(set(string.punctuation) - set("+-*/=<>^%|&~")) + "“”‘’"


def _jaccard(a: set, b: set) -> float:
    common = len(a & b)
    return common / (len(a) + len(b) - common) if common else 0.0
