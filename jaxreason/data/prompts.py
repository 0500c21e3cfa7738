"""Questions for reinforcement learning, in an order that can be resumed, and how hard each one is.

Every epoch goes once through the prompts of all sources in an order of (seed, epoch) alone. What
the policy solves of a prompt is recorded; prompts that it (nearly) always or never solves have no
advantage to learn from and are passed over, as in the curricula of DAPO (arXiv 2503.14476) and
Kimi k1.5 (arXiv 2501.12599).

    stream = build(config, data_dir, say=print, check=check_golds)
    prompts = stream.next(64)
    stream.record(prompts[0].id, solved=0.25, samples=8)   # 2 of 8 completions were right
    state = stream.get_state()                             # JSON; set_state(state) continues
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxreason.data import countdown
from jaxreason.data import sources as sources_lib
from jaxreason.data.files import Found, JsonlSource
from jaxreason.data.sources import Source, SourceConfig, named_sources
from jaxreason.types import Prompt

NUM_CHECKED = 10_000  # prompts of a generated source whose answers are checked; of files, all are
_CHECK_CHUNK = 1_000  # prompts handed to `check` at once
_MEMORY = 0.5  # weight of a prompt's former samples in its solve rate, with each new record

Check = Callable[[Sequence[Prompt]], None]  # raises ValueError for an answer it cannot read


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSource:
    """One source of prompts and where its gold answers are.

    kind "jsonl": the prompt is `prompt_field` or `prompt_template`; the answer is `answer_field`,
    all of it (answer_kind "text") or what follows its last `####` ("hashes", as in GSM8K).
    kind "arithmetic": a prepared benchmark; the answer is the expression's value.
    kind "countdown": generated or from files; the answer is JSON with `target` and `numbers`.

    Where answers of the data set itself are learnt from too (`rollout.lmbda` below 1), they are
    `response_field` after `reasoning_field` or `reasoning`, of arithmetic and countdown a
    `rendering`, all as in SourceConfig; a record that lacks its own is then quarantined.

    Raises:
      ValueError: a field is missing, unknown or of no use to the kind.
    """

    name: str
    kind: str = "jsonl"
    path: str | Sequence[str] = ""  # as in SourceConfig
    prompt_field: str = ""
    prompt_template: str = ""
    answer_field: str = ""  # jsonl only
    answer_kind: str = "text"  # jsonl only: text or hashes
    response_field: str = ""
    reasoning_field: str = ""
    reasoning: str = ""
    rendering: str = ""
    split: str = ""  # arithmetic and countdown: train or test
    countdown: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # as in SourceConfig

    def __post_init__(self):
        key = f"data.sources.{self.name}"
        if self.answer_kind not in ("text", "hashes"):
            raise ValueError(
                f"{key}.answer_kind is {self.answer_kind!r}; it must be text or hashes"
            )
        if (self.kind == "jsonl") != bool(self.answer_field):
            raise ValueError(
                f"{key}.answer_field is {self.answer_field!r} and {key}.kind {self.kind!r}; it is "
                "set for jsonl and for nothing else"
            )
        object.__setattr__(self, "countdown", self.to_source().countdown)
        if not self.response_field and (self.reasoning_field or self.reasoning):
            name = "reasoning_field" if self.reasoning_field else "reasoning"
            raise ValueError(
                f"{key}.{name} is {getattr(self, name)!r}; it is read beside response_field"
            )
        if self.rendering == "text":
            raise ValueError(f"{key}.rendering is 'text', which answers no prompt")
        self.to_target()  # its mistakes name the keys

    @property
    def has_target(self) -> bool:
        """Whether records bring an answer to learn from."""
        return bool(self.response_field or self.rendering)

    def to_target(self) -> SourceConfig | None:
        """The records as examples of the data set's own answers; None where it has none."""
        if not self.has_target:
            return None
        names = ("response_field", "reasoning_field", "reasoning", "rendering")
        own = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self.to_source(), **own)

    def to_source(self) -> SourceConfig:
        """The same records as examples: how they are opened, and how their prompts are written."""
        shared = {
            "name": self.name,
            "kind": self.kind,
            "path": self.path,
            "prompt_field": self.prompt_field,
            "prompt_template": self.prompt_template,
            "split": self.split,
            "countdown": self.countdown,
        }
        if self.kind == "jsonl":
            hashes = "split_hashes" if self.answer_kind == "hashes" else ""
            return SourceConfig(**shared, response_field=self.answer_field, reasoning=hashes)
        return SourceConfig(**shared, rendering="answer")

    def to_answer(self, record: Mapping[str, Any]) -> str:
        """The gold answer of a record, as the source's reward reads it."""
        if self.kind == "arithmetic":
            return record["answer"]
        if self.kind == "countdown":
            return countdown.gold(record)
        text = str(record[self.answer_field])
        return text.rpartition("####")[2].strip() if self.answer_kind == "hashes" else text


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """Which prompts come, and in what order. `sources` maps a name to fields of a PromptSource.

    `band` is (lowest, highest): a prompt whose solve rate is known and outside is passed over. The
    rate is known after `band_min_samples` samples. It is forgotten as the policy moves: in every
    new record of a prompt the weight of its former samples is halved. A prompt that was passed
    over is drawn again, and so measured again, in the `revisit_epochs`-th epoch after its last
    record. Where a whole epoch's worth of prompts in a row is passed over, the band is lifted until
    the end of the epoch.

    Raises:
      ValueError: a field is out of its range or does not fit another.
    """

    sources: Mapping[str, Any]
    seed: int = 0
    shuffle: bool = True
    band: tuple[float, float] | None = None  # e.g. (0.2, 0.8); None: every prompt always
    band_min_samples: int = 8
    revisit_epochs: int = 4

    def __post_init__(self):
        object.__setattr__(self, "sources", named_sources(self.sources, PromptSource))
        if self.seed < 0:
            raise ValueError(f"data.seed is {self.seed}; it must be 0 or more")
        if self.band is not None:
            object.__setattr__(self, "band", tuple(self.band))
            if len(self.band) != 2 or not 0 <= self.band[0] <= self.band[1] <= 1:
                raise ValueError(
                    f"data.band is {self.band}; it must be (lowest, highest) within 0 to 1"
                )
        for name in ("band_min_samples", "revisit_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be 1 or more")


# --------------------------------------------------------------------------- prompts by number


class Prompts(Sequence[Prompt]):
    """The prompts of one opened source, made when asked for."""

    def __init__(self, config: PromptSource, source: Source):
        self.config = config
        self._source_config, self._target_config = config.to_source(), config.to_target()
        self._source = source
        self.num_quarantined = sources_lib.left_out([source])["quarantined"]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Prompt:
        record, target = self._source[index], None
        if self._target_config is not None:
            target = sources_lib.to_example(self._target_config, record).messages[-1]
        return Prompt(
            id=f"{self.config.name}/{index}",
            text=sources_lib.to_prompt(self._source_config, record),
            answer=self.config.to_answer(record),
            source=self.config.name,
            response=target and target.content,
            reasoning=target and target.reasoning,
        )

    def check(self, check: Check) -> None:
        """Lets `check` read the answers: all that came from files, the first of those we make.

        Raises:
          ValueError: that of `check`, with the source's key in front.
        """
        from_files = self.config.kind != "arithmetic" and self.config.path
        num = len(self) if from_files else min(len(self), NUM_CHECKED)
        for begin in range(0, num, _CHECK_CHUNK):
            try:
                check([self[i] for i in range(begin, min(begin + _CHECK_CHUNK, num))])
            except ValueError as error:
                raise ValueError(f"{self._source_config.key}: {error}") from error


def open_prompts(config: PromptSource, data_dir) -> Prompts:
    """The prompts of a source; prepared files go into `data_dir`.

    Raises:
      ValueError: files are missing, are not what they should be, or hold no valid record.
    """
    source, target = config.to_source(), config.to_target()
    if target is None or config.kind != "jsonl":  # what is generated has everything
        return Prompts(config, sources_lib.open_source(source, data_dir))
    rule, key = _WithTarget(source, target), f"{source.key}.path"
    return Prompts(config, JsonlSource(source.path, fields=rule, data_dir=data_dir, key=key))


@dataclasses.dataclass(frozen=True)
class _WithTarget:
    """The rule of files.JsonlSource: a record has its gold answer and the answer to learn from."""

    answer: SourceConfig
    target: SourceConfig

    def identity(self) -> Any:
        return {"answer": self.answer.identity(), "target": self.target.identity()}

    def columns(self) -> tuple[list[str], list[str]]:
        needed, optional = self.answer.columns()
        also, perhaps = self.target.columns()
        return list(dict.fromkeys(needed + also)), list(dict.fromkeys(optional + perhaps))

    def examine(self, record: dict[str, Any]) -> Found:
        found = self.answer.examine(record)
        return self.target.examine(record) if found.parts else found

    def take(self, record: dict[str, Any], part: int) -> dict[str, Any]:
        return self.target.take(record, part)


# -------------------------------------------------------------------------------- the stream


class PromptStream:
    """Endless prompts, each epoch in a new order; see `PromptConfig` for what is passed over.

    A call of `next` that reaches into a new epoch may hold a prompt twice.

    Args:
      prompts: the opened sources.
      say: takes one line for the user, when the band had to be lifted for the first time.
    """

    def __init__(
        self, config: PromptConfig, prompts: Mapping[str, Sequence[Prompt]], say: Callable
    ):
        self._config = config
        self._prompts = dict(prompts)
        self._say = say
        self.num_quarantined = sources_lib.left_out(prompts.values())["quarantined"]
        sizes = [len(source) for source in self._prompts.values()]
        self._starts = np.concatenate([[0], np.cumsum(sizes)])  # source i: starts[i]:starts[i + 1]
        total = int(self._starts[-1])
        if not total:
            raise ValueError(f"data.sources {', '.join(self._prompts)} hold no prompt")
        # The difficulty table, one place a prompt; only those with samples are part of the state.
        self._samples = np.zeros(total, np.int64)  # ever drawn
        self._weight = np.zeros(total)  # of the samples, former ones halved with each record
        self._rate = np.zeros(total)  # weighted mean of what was solved
        self._recorded = np.zeros(total, np.int64)  # epoch of the last record
        self._position = 0  # in this epoch's order
        self._passed = 0  # passed over, ever
        self._lifted = -1  # the last epoch in which the band was lifted
        self._start_epoch(0)

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self._samples)

    def next(self, n: int) -> list[Prompt]:
        """The next `n` prompts."""
        return [self._prompt(index) for index in itertools.islice(self._draw(), n)]

    def record(self, prompt_id: str, solved: float, samples: int) -> None:
        """Adds to the difficulty table: `solved` is the mean over `samples` completions.

        Raises:
          ValueError: there is no such prompt, `solved` is outside 0 to 1, or `samples` below 1.
        """
        if not 0 <= solved <= 1 or samples < 1:
            raise ValueError(
                f"prompt {prompt_id}: solved is {solved} of {samples} samples; it must be a share "
                "in [0, 1] of at least 1"
            )
        at = self._index(prompt_id)
        self._weight[at] = _MEMORY * self._weight[at] + samples
        self._rate[at] += (solved - self._rate[at]) * samples / self._weight[at]
        self._samples[at] += samples
        self._recorded[at] = self._epoch

    def solve_rate(self, prompt_id: str) -> float | None:
        """The share of completions that solved a prompt, newer ones weighing more; None: unseen."""
        at = self._index(prompt_id)
        return float(self._rate[at]) if self._samples[at] else None

    def stats(self) -> dict[str, float]:
        """For metrics: epochs begun and passed, and shares over all prompts or those sampled.

        `in_band` is the share of those whose rate is known (1 without a band, 0 where none is).
        """
        seen = self._samples > 0
        known = self._samples >= self._config.band_min_samples
        lowest, highest = self._config.band or (0.0, 1.0)
        in_band = known & (lowest <= self._rate) & (self._rate <= highest)
        return {
            "epoch": self._epoch + self._position / len(self),
            "seen": float(seen.mean()),
            "known": float(known.mean()),
            "in_band": float(in_band.sum() / max(known.sum(), 1)),
            "solve_rate": float(self._rate[seen].mean()) if seen.any() else 0.0,
            "passed_over": float(self._passed),
        }

    def get_state(self) -> dict[str, Any]:
        """JSON: all that later calls depend on."""
        rows = np.flatnonzero(self._samples).tolist()
        columns = (self._samples, self._weight, self._rate, self._recorded)
        return {
            "num_prompts": len(self),
            "epoch": self._epoch,
            "position": self._position,
            "passed": self._passed,
            "lifted": self._lifted,
            "table": {self._id(at): [column[at].item() for column in columns] for at in rows},
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues where `state` was taken.

        Raises:
          ValueError: it was taken of other prompts.
        """
        if state["num_prompts"] != len(self):
            raise ValueError(
                f"the saved state is of {state['num_prompts']} prompts, data.sources now hold "
                f"{len(self)}; a run continues with the files it began with"
            )
        columns = (self._samples, self._weight, self._rate, self._recorded)
        for column in columns:
            column[:] = 0
        for prompt_id, row in state["table"].items():
            at = self._index(prompt_id)
            for column, value in zip(columns, row, strict=True):
                column[at] = value
        self._start_epoch(state["epoch"])
        self._position = state["position"]
        self._passed, self._lifted = state["passed"], state["lifted"]

    # ---------------------------------------------------------------------- order and band

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        if self._config.shuffle:
            seed = np.random.SeedSequence([self._config.seed, epoch])
            self._order = np.random.default_rng(seed).permutation(len(self))
        else:
            self._order = np.arange(len(self))

    def _draw(self) -> Iterator[int]:
        """Numbers of prompts, for ever."""
        in_a_row = 0  # passed over since the last one drawn
        while True:
            if self._position == len(self):
                self._start_epoch(self._epoch + 1)
            at = int(self._order[self._position])
            self._position += 1
            if self._outside_band(at) and not self._is_lifted(in_a_row):
                in_a_row += 1
                self._passed += 1
            else:
                in_a_row = 0
                yield at

    def _outside_band(self, at: int) -> bool:
        """Whether a prompt is known to be too easy or too hard, by a record that is not too old."""
        if self._config.band is None or self._samples[at] < self._config.band_min_samples:
            return False
        lowest, highest = self._config.band
        recent = self._epoch - self._recorded[at] < self._config.revisit_epochs
        return bool(recent and not lowest <= self._rate[at] <= highest)

    def _is_lifted(self, in_a_row: int) -> bool:
        """Whether the band is lifted: in this epoch an epoch's worth was passed over in a row.

        Not a stop, because the rates are of a policy that has moved on.
        """
        if in_a_row >= len(self):
            if self._lifted < 0:
                self._say(
                    f"prompts: not one of {len(self)} has a solve rate within the band "
                    f"{self._config.band}; all are drawn until the end of the epoch"
                )
            self._lifted = self._epoch
        return self._lifted == self._epoch

    # ------------------------------------------------------------------- numbers and names

    def _place(self, at: int) -> tuple[str, int]:
        """The source of a prompt, and its number there."""
        number = int(np.searchsorted(self._starts, at, side="right")) - 1
        return list(self._prompts)[number], at - int(self._starts[number])

    def _prompt(self, at: int) -> Prompt:
        name, index = self._place(at)
        return self._prompts[name][index]

    def _id(self, at: int) -> str:
        name, index = self._place(at)
        return f"{name}/{index}"

    def _index(self, prompt_id: str) -> int:
        name, _, text = prompt_id.rpartition("/")
        if name in self._prompts and text.isdecimal() and int(text) < len(self._prompts[name]):
            return int(self._starts[list(self._prompts).index(name)]) + int(text)
        raise ValueError(f"prompt {prompt_id!r} is unknown; ids are SOURCE/INDEX of data.sources")


def build(
    config: PromptConfig, data_dir, *, say: Callable[[str], None], check: Check | None = None
) -> PromptStream:
    """Opens the sources and lets `check`, the reward's, read their gold answers.

    Args:
      data_dir: the workdir's data folder, as for the pipeline.
      say: takes lines for the user.

    Raises:
      ValueError: a source cannot be opened, or an answer cannot be read.
    """
    opened = {name: open_prompts(source, data_dir) for name, source in config.sources.items()}
    if check is not None:
        for prompts in opened.values():
            prompts.check(check)
    return PromptStream(config, opened, say)
