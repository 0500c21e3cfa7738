"""What travels between the shelves of the house, one frozen dataclass each.

Dimensions, one letter each, in names (`x_BTD`, `q_BTNH`):
  B batch      T query or target length   S key or cache length   D model
  N query heads   K key/value heads   G = N / K   H head   F feed-forward   V vocabulary
  L layers     E experts     Q prompts    R completions a prompt    P shared prefixes
Say *axis* for the mesh, *dim* for a tensor, *num_* for counts.
"""

import dataclasses
import functools
from typing import Any

import jax

Params = dict[str, Any]  # a plain nested dict of arrays; see model/decoder.py for the tree
TASKS = ("label", "rationale")  # what a document may be trained for apart from others


def pytree_dataclass(*static: str):
    """Class decorator: frozen dataclass registered as a pytree; `static` fields are metadata."""

    def wrap(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return wrap


@pytree_dataclass()
class Batch:
    """Rows of packed token sequences, as every language-model objective reads them.

    Rows may hold several documents. Document boundaries are `segments_BT` (1, 2, ...; 0 is padding)
    and `positions_BT` restart at 0 with every document.
    """

    tokens_BT: jax.Array  # int32, inputs
    targets_BT: (
        jax.Array
    )  # int32, the next token of the same document; any value where the weight is 0
    weights_BT: (
        jax.Array
    )  # float32, loss weight of each target; 0 on padding and on a document's last input
    segments_BT: jax.Array  # int32, 1, 2, ... for each document of the row; 0 is padding
    positions_BT: jax.Array  # int32, position inside the document


@pytree_dataclass()
class TaskBatch(Batch):
    """A Batch whose documents belong to tasks, for objectives that weigh them apart."""

    tasks_BT: jax.Array  # int32, 1 + the place in TASKS; 0 is padding


@pytree_dataclass()
class DistillBatch(Batch):
    """A Batch with the k likeliest tokens that a teacher gave for each target, in any order.

    Where the target has no weight both arrays may be 0.
    """

    teacher_ids_BTK: jax.Array  # int32, different ids of one place
    teacher_logprobs_BTK: jax.Array  # bfloat16 or float32, at the temperature of the objective


@pytree_dataclass()
class PolicyBatch:
    """Packed rows of prompts and sampled completions, as the policy gradient reads them.

    Rows are laid out as in Batch; a document is one prompt with one of its completions. Every
    float array is aligned with the targets and 0 where its document has no weight.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array
    weights_BT: jax.Array  # float32, 1 where the target was sampled (EOS too) and is learnt from
    segments_BT: jax.Array
    positions_BT: jax.Array
    advantages_BT: jax.Array
    old_logprobs_BT: jax.Array  # the trainer's, before the first update on this rollout
    rollout_logprobs_BT: jax.Array  # the sampler's, at the sampling temperature
    ref_logprobs_BT: jax.Array | None = None  # the reference model's; None without one
    old_values_BT: jax.Array | None = None  # the value head's, as old_logprobs_BT; None without one
    returns_BT: jax.Array | None = None  # what the value head learns; None without one
    entropy_coef_B: jax.Array | None = None  # float32, one number repeated; None: no entropy bonus


@pytree_dataclass("causal", "window", "soft_cap", "scale")
class AttentionMask:
    """Which keys a query may read, as data. An implementation honours all of it or refuses.

    A query attends to a key when every condition holds: equal segment ids (and not 0), key index <=
    query index (`causal`), key index > query index - `window`. A fully masked row gives zeros.
    """

    q_segments_BT: jax.Array | None = None  # int32; None: one segment
    kv_segments_BS: jax.Array | None = None  # int32; given exactly when q_segments_BT is
    q_offset_B: jax.Array | None = None  # int32; index of the first query among the keys; None: 0
    causal: bool = True
    window: int | None = None  # number of keys a query reads, itself included
    soft_cap: float | None = None  # logits become cap * tanh(logits / cap)
    scale: float | None = None  # None: 1 / sqrt(H)


@pytree_dataclass()
class TrainState:
    """All that a train step reads and writes; donated to it."""

    step: jax.Array  # int32 scalar, updates taken or skipped
    params: Params  # float32 master weights
    opt: Any  # optax state
    key: jax.Array  # the stage's PRNG key; a step uses fold_in(key, step)
    nonfinite: jax.Array  # int32 scalar, consecutive steps skipped for a non-finite gradient


@pytree_dataclass()
class Frozen:
    """Parameters that a train step reads and leaves as they are: sharded, never donated."""

    base: Params | None = None  # that LoRA adapters are added to
    # What an objective compares with: `teacher`, `reference`.
    read: dict[str, Params] = dataclasses.field(default_factory=dict)


@pytree_dataclass()
class Loss:
    """What an objective returns for one microbatch.

    `terms[name]` = (weighted sum over this microbatch, coefficient): the trainer divides each sum
    by the term's weight over the *global* batch, then adds coefficient * mean. `metrics[name]` are
    sums that the trainer divides by the weight of the objective's first term.
    """

    terms: dict[str, tuple[jax.Array, float]]
    metrics: dict[str, jax.Array]


WORDINGS = ("s1", "qwen3", "tag")


@dataclasses.dataclass(frozen=True)
class ThinkingBudget:
    """Control of the thinking part of one completion (s1, arXiv 2501.19393; Qwen3's report)."""

    max_tokens: int | None = None  # thinking tokens before its end is forced; None: no limit
    wording: str = "s1"  # how the end is forced: s1 | qwen3 | tag, the closing tag alone
    waits: int = 0  # ends of thinking that are replaced by "Wait"

    def __post_init__(self):
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"thinking.max_tokens is {self.max_tokens}; it must be 0 or more")
        if self.wording not in WORDINGS:
            known = ", ".join(WORDINGS)
            raise ValueError(f"thinking.wording is {self.wording!r}; it must be one of {known}")
        if self.waits < 0:
            raise ValueError(f"thinking.waits is {self.waits}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How completions are drawn. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0  # keeps tokens with at least this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides a seen token's positive logit, multiplies a negative
    min_tokens: int = 0  # no end of sequence before so many tokens
    stop: tuple[str, ...] = ()  # texts that end a completion; they are not part of it
    stop_ids: tuple[int, ...] = ()  # tokens that end it as the end of sequence does
    ignore_eos: bool = False  # go on to max_tokens: for benchmarks
    thinking: ThinkingBudget | None = None
    num_samples: int = 1  # completions a prompt

    def __post_init__(self):
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens is {self.max_tokens}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"sampling.temperature is {self.temperature}; it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p is {self.top_p}; it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling.min_p is {self.min_p}; it must be in [0, 1]")
        if self.repetition_penalty <= 0:
            raise ValueError(
                f"sampling.repetition_penalty is {self.repetition_penalty}; it must be above 0"
            )
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise ValueError(
                f"sampling.min_tokens is {self.min_tokens}; it must be 0 to max_tokens "
                f"{self.max_tokens}"
            )
        if self.num_samples < 1:
            raise ValueError(f"sampling.num_samples is {self.num_samples}; it must be at least 1")
        is_text = lambda text: isinstance(text, str) and text
        if not (isinstance(self.stop, tuple) and all(map(is_text, self.stop))):
            raise ValueError(
                f"sampling.stop is {self.stop!r}; it must be a tuple of texts, none of them empty"
            )
        is_id = lambda i: isinstance(i, int) and not isinstance(i, bool) and i >= 0
        if not (isinstance(self.stop_ids, tuple) and all(map(is_id, self.stop_ids))):
            raise ValueError(
                f"sampling.stop_ids is {self.stop_ids!r}; it must be a tuple of token ids, whole "
                "numbers from 0"
            )


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer. The end-of-sequence token, when it was drawn, is the last of `ids`."""

    text: str  # decoded without the end-of-sequence token, and without a stop text
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of each id at the sampling temperature, unfiltered distribution
    truncated: bool  # the token limit came before the end of sequence or a stop
    forced: tuple[bool, ...] = ()  # which ids the thinking budget put there; () where none

    @functools.cached_property
    def num_tokens(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question of reinforcement learning, with what its rewards need."""

    id: str  # stable over runs and epochs: SOURCE/INDEX
    text: str  # the user's turn
    answer: str  # the gold answer, in the form that the source's reward reads
    source: str
    response: str | None = None  # what the data set itself answers, where it was asked for
    reasoning: str | None = None  # ... and thinks before
