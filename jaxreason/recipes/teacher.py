"""The model that a stage learns from or is held to: of its own shape, with the run's tokens.

A stage reads it beside its own parameters and leaves it as it is (types.Frozen.other).
"""

import dataclasses

import jax.numpy as jnp

from jaxreason.model.decoder import LanguageModel
from jaxreason.recipes import assemble, checkpoints, weights
from jaxreason.recipes.bases import Folders
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.types import Params


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A checkpoint and the model that reads it."""

    start: Checkpoint
    model: LanguageModel

    def load(self, folders: Folders) -> Params:
        """In the dtype that the mesh computes in: nothing is added to it."""
        dtype = jnp.dtype(self.model.execution.dtype)
        return weights.load(self.start, self.model, folders, dtype)


def parse(text: str, key: str = "train.teacher.from") -> Checkpoint | None:
    """The checkpoint of that key; None where it is empty. Raises ValueError, naming the key."""
    if not text:
        return None
    if text == "random":
        raise ValueError(f"{key} is 'random'; a teacher is a model that was trained")
    return checkpoints.parse(text, key)


def check_tokens(start: Checkpoint, tokenizer: Tokenizer, key: str = "train.teacher.from") -> None:
    """Raises ValueError where it was trained with other tokens, or with fewer: the log-probs of
    different vocabularies cannot be compared."""
    other = assemble.first_difference(tokenizer, start)
    if other is not None:
        token, there, here = other
        raise ValueError(
            f"{key} is {start.text!r}, which was trained with other tokens than this run's (id "
            f"{token} is {there!r} there and {here!r} here); take a teacher of the same family, or "
            "learn from its texts (a stage of kind traces)"
        )
    if not start.has_architecture:
        return
    rows = start.architecture().vocab_size
    if rows < tokenizer.vocab_size:
        raise ValueError(
            f"{key} is {start.text!r}, whose head has {rows} tokens and this run's tokenizer "
            f"{tokenizer.vocab_size}; distillation compares them token by token: both need one "
            "tokenizer"
        )


def build(start: Checkpoint, model: LanguageModel, tokenizer: Tokenizer) -> Teacher:
    """The teacher of a run with this model and tokenizer, on the same mesh."""
    if not start.has_architecture:
        return Teacher(start, LanguageModel(model.config, model.execution, model.mesh,
                                            model.valid_vocab))  # fmt: skip
    shape = start.architecture()
    rows = min(tokenizer.vocab_size, shape.vocab_size)
    return Teacher(start, LanguageModel(shape, model.execution, model.mesh, rows))
