"""A stage that writes a teacher's top-k log-probs, which a stage of `distill_topk` learns from.

Every document of `data.sources`, tokenized as that stage will have it, goes once through the
teacher; data/STAGE/SOURCE is then the store of data/logits.py, read by `data.teacher="@STAGE"`. So
the teacher need not be in memory beside the student, and is asked once for any number of epochs.
Each process writes its own parts. A run that was killed goes on with the parts that are not there.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxreason.data import logits
from jaxreason.data.documents import DataConfig, open_documents
from jaxreason.data.packing import Example, Piece, best_fit_decreasing, lay_out
from jaxreason.data.pipeline import NUM_CHECKED
from jaxreason.model.decoder import LanguageModel
from jaxreason.objectives.distill import check_teacher
from jaxreason.parallel import hosts, rules
from jaxreason.recipes import assemble, checkpoints, teacher, trace_files
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.rollout.sync import place
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Params


@dataclasses.dataclass(frozen=True)
class TopKStage:
    """What can be checked of a stage before anything is built."""

    name: str
    section: ConfigDict  # of defaults.topk_config
    start: checkpoints.Checkpoint  # the teacher
    data: DataConfig

    @property
    def length(self) -> int:
        return self.data.length


def plan(config: ConfigDict, name: str, section: ConfigDict) -> TopKStage:
    """Raises ValueError, naming key, value and what would be right, for whatever cannot run."""
    for key in ("k", "rows", "part_documents"):
        if section[key] < 1:
            raise ValueError(f"{key} is {section[key]}; it must be 1 or more")
    if section.temperature <= 0:
        raise ValueError(f"temperature is {section.temperature}; it must be above 0")
    start = teacher.parse(section.init["from"], "init.from")
    if start is None:
        raise ValueError("init.from is ''; it must name the teacher, a checkpoint")
    if section.data.teacher:
        raise ValueError(
            f"data.teacher is {section.data.teacher!r}; this stage writes a store: leave it empty"
        )
    data = assemble.data_config(config, section)
    if data.has_pairs:
        raise ValueError("data.sources hold pairs; a teacher's logits are of single documents")
    return TopKStage(name, section, start, data)


def check_data(
    config: ConfigDict, stage: TopKStage, tokenizer: Tokenizer, workdir: Workdir
) -> None:
    """Opens the sources and tokenizes their first records; of all processes. Raises ValueError."""
    if stage.section.k > tokenizer.vocab_size:
        raise ValueError(
            f"k is {stage.section.k}; it must be at most {tokenizer.vocab_size}, the number of "
            "tokens"
        )
    teacher.check_tokens(stage.start, tokenizer, "init.from")
    hosts.first(lambda: _check_documents(stage, tokenizer, workdir))


def _check_documents(stage: TopKStage, tokenizer: Tokenizer, workdir: Workdir) -> None:
    for documents in open_documents(stage.data, tokenizer, workdir.data).values():
        for index in range(min(len(documents), NUM_CHECKED)):
            documents[index]  # raises where it is too long


def run_stage(run: Run, stage: TopKStage) -> None:
    """Writes the stores, resuming where they were, and leaves the stage's done marker."""
    folder = run.workdir.data / stage.name
    if run.workdir.marker(stage.name) and hosts.told(folder.is_dir):
        return
    began = time.monotonic()
    taught_by = teacher.build(stage.start, run.model, run.tokenizer)
    check_teacher(run.model, taught_by.model)
    model = assemble.sampling_model(taught_by.model)  # of several processes each on its own devices
    params = place(taught_by.load(run.workdir.checkpoints), model)
    score = scorer(model, params, stage.section.k, stage.section.temperature, stage.data.length,
                   stage.section.rows, run.tokenizer.pad_id)  # fmt: skip
    author = trace_files.author(stage.start, run.workdir)
    say = run.progress.say if hosts.is_first() else lambda line: None
    headers = {}
    for name, documents in open_documents(stage.data, run.tokenizer, run.workdir.data).items():
        wanted = logits.Header(
            vocabulary=run.tokenizer.fingerprint(),
            source=f"data.sources.{name} by {author}",
            k=stage.section.k,
            temperature=stage.section.temperature,
            part_documents=stage.section.part_documents,
        )
        run.progress.start(stage.name, len(documents), 0)
        headers[name] = logits.write(
            folder / name, documents, score, wanted, process=hosts.index(),
            processes=hosts.count(), say=say, progress=lambda done, own: run.progress.update(
                done, f"documents of {own}"),
        )  # fmt: skip
        run.progress.stop()
    hosts.exchange(f"topk/{stage.name}", b"")  # all processes have written theirs

    def outcome() -> dict:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return {
            "teacher": author,
            "k": stage.section.k,
            "temperature": stage.section.temperature,
            "documents": sum(header.documents for header in headers.values()),
            "tokens": sum(header.tokens for header in headers.values()),
            "bytes": size,
            "seconds": round(time.monotonic() - began, 1),
        }

    run.workdir.mark(stage.name, outcome)


def scorer(
    model: LanguageModel,
    params: Params,
    k: int,
    temperature: float,
    length: int,
    rows: int,
    pad_id: int,
) -> Callable[[Sequence[np.ndarray]], Iterator[tuple[np.ndarray, np.ndarray]]]:
    """What `logits.write` asks: (ids_TK, logprobs_TK) of each of some documents.

    They are packed into rows of `length` (longer where one of them is), `rows` at a time and
    rounded up to the devices', so that few shapes are compiled.
    """
    ways = 1 if model.mesh is None else rules.axis_size(model.mesh, "batch")
    rows = -(-rows // ways) * ways

    @jax.jit
    def of_rows(params, batch):
        h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        return model.top_k(params, h_BTD, batch.tokens_BT.shape[1], k, temperature=temperature)

    def score(documents: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        sizes = [len(ids_T) for ids_T in documents]
        T = -(-max(sizes) // length) * length
        placed = best_fit_decreasing(sizes, T)
        found = [None] * len(documents)
        for first in range(0, max(placed) + 1, rows):
            own = [i for i, row in enumerate(placed) if first <= row < first + rows]
            examples = [Example(documents[i], np.ones(sizes[i], np.float32)) for i in own]
            pieces = [
                Piece(example, placed[i] - first, 0, sizes[i])
                for i, example in zip(own, examples, strict=True)
            ]
            ids_BTK, logprobs_BTK = jax.device_get(
                of_rows(params, lay_out(pieces, rows, T, pad_id))
            )
            used_B = np.zeros(rows, int)
            for i in own:  # within a row in the order given, as `lay_out` has it
                row, start = placed[i] - first, used_B[placed[i] - first]
                here = slice(start, start + sizes[i] - 1)
                found[i] = ids_BTK[row, here], logprobs_BTK[row, here]
                used_B[row] += sizes[i]
        yield from found

    return score
