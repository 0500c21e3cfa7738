"""A model that answers questions in a run that is not its own: a teacher, a student, a solver.

Text is all that travels: a checkpoint of another run or of Hugging Face's answers with its own
shape, tokenizer and chat template, whatever the run's are.
"""

import dataclasses
import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from jaxreason.model.decoder import LanguageModel
from jaxreason.parallel import hosts
from jaxreason.recipes import assemble, defaults, evaluation, weights
from jaxreason.recipes.bases import Folders
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.workdir import Workdir
from jaxreason.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model as it speaks: `config` is the run's, with its own tokenizer and template."""

    start: Checkpoint
    config: ConfigDict
    tokenizer: Tokenizer
    model: LanguageModel | None

    def generator(self, rows: int, folders: Folders) -> Callable:
        """`generate` of the rollout engine with its parameters loaded: (texts, sampling, key)."""
        generate = evaluation.generator(self.config, self.tokenizer, self.model, rows)
        return functools.partial(generate, weights.load(self.start, self.model, folders))


def find(
    config: ConfigDict,
    start: Checkpoint,
    template: str,
    workdir: Workdir,
    name: str,
    tokenizer: Tokenizer,
    model: LanguageModel | None,
) -> Speaker:
    """The speaker of a checkpoint.

    Args:
      config, tokenizer, model: the run's; None for a model that is not known yet.
      template: of its chat, as chat.template; "": its own.
      name: of a folder under teachers/ in the workdir, for its tokenizer.
    Raises ValueError where the checkpoint cannot be read.
    """
    own = with_template(config, template)
    if start.has_architecture:
        own = _of_its_own(config, start, template)
        folder = Workdir(workdir.path / "teachers" / name)
        hosts.first(lambda: folder.path.mkdir(parents=True, exist_ok=True))
        tokenizer = assemble.tokenizer(own, folder, start)
        model = assemble.language_model(own, assemble.architecture(own, start), tokenizer)
    assemble.chat_template(own, tokenizer)
    return Speaker(start, own, tokenizer, model)


def with_template(config: ConfigDict, template: str) -> ConfigDict:
    """The run's configuration, where `template` is set with that chat template."""
    own = config.copy_and_resolve_references()
    own.unlock()
    if template:
        own.chat.template = template
    return own


def _of_its_own(config: ConfigDict, start: Checkpoint, template: str) -> ConfigDict:
    """The run's configuration as a recipe for this checkpoint alone would have it."""
    own = with_template(config, template or "checkpoint")
    own.init = ConfigDict({"from": start.text})
    own.tokenizer.kind = "checkpoint"
    own.model = defaults.model_config()
    return own
