"""What the stages of a run share, once the model stands."""

import dataclasses

from ml_collections import ConfigDict

from jaxreason.model.decoder import LanguageModel
from jaxreason.recipes.evaluation import Evaluation
from jaxreason.recipes.workdir import Workdir
from jaxreason.text.tokenizer import Tokenizer
from jaxreason.train.metrics import MetricsWriter, Progress


@dataclasses.dataclass(frozen=True)
class Run:
    config: ConfigDict
    workdir: Workdir
    tokenizer: Tokenizer
    model: LanguageModel
    evaluation: Evaluation
    writer: MetricsWriter
    progress: Progress
