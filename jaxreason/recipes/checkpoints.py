"""`init.from`: the ways to name the parameters that a stage starts from or an evaluation scores."""

import dataclasses
import json
import pathlib

from jaxreason.checkpoint import hf
from jaxreason.checkpoint.store import restore_params
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.text.chat import TEMPLATES
from jaxreason.text.tokenizer import Tokenizer, load_tokenizer
from jaxreason.types import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """random | @STAGE of this run | WORKDIR@STAGE[@STEP] | a Hugging Face directory."""

    text: str
    kind: str  # random | run | hf
    directory: pathlib.Path | None = None  # the other run's workdir, or the Hugging Face directory
    stage: str = ""
    step: int | None = None

    @property
    def has_architecture(self) -> bool:
        """Whether the model's shape comes with it (it does not from this run's own stages)."""
        return self.directory is not None and self.kind != "random"

    @property
    def name(self) -> str:
        return self.stage or (self.directory.name if self.directory else self.kind)

    def architecture(self) -> DecoderConfig:
        if self.kind == "hf":
            return hf.config_from_hf(json.loads((self.directory / "config.json").read_text()))
        config = self._run_config()
        return DecoderConfig(**config["architecture"])

    def chat_template(self) -> str:
        """The template it was trained with, as chat.template_for takes it: a name or a folder.

        Raises ValueError when there is none: random parameters were never given one.
        """
        if self.directory is None:
            raise ValueError(
                f"chat.template is 'checkpoint', but init.from is {self.text!r}, which has none"
            )
        if self.kind == "hf":
            return str(self.directory)
        name = self._run_config()["chat_template"]
        return name if name in TEMPLATES else str(self.directory / "tokenizer")

    def tokenizer(self) -> Tokenizer:
        """Raises ValueError when there is none: random parameters were never given one."""
        if self.directory is None:
            raise ValueError(
                f"tokenizer.kind is 'checkpoint', but init.from is {self.text!r}, which has none"
            )
        folder = self.directory if self.kind == "hf" else self.directory / "tokenizer"
        return load_tokenizer(folder)

    def load(self, model: LanguageModel, checkpoints) -> Params | None:
        """The parameters, placed where the model wants them; None: random ones.

        A value head comes along where the model has one too.

        Args:
          checkpoints: this run's stage name -> folder of its checkpoints.
        """
        if self.kind == "random":
            return None
        if self.kind == "hf":
            shardings = model.shardings() if model.mesh is not None else None
            return hf.import_hf(self.directory, shardings=shardings)[1]
        folder = checkpoints(self.stage)
        if self.directory is not None:
            folder = self.directory / "checkpoints" / self.stage
        return restore_params(folder, model.abstract(), self.step, optional=("value_head",))

    def _run_config(self) -> dict:
        content = json.loads((self.directory / "config.json").read_text())
        if "architecture" not in content:
            raise ValueError(f"init.from is {self.text!r}; that run never built its model")
        return content


def parse(text: str) -> Checkpoint:
    """Reads `init.from`. Raises ValueError in one line when nothing is there."""
    if text == "random":
        return Checkpoint(text, "random")
    folder, _, rest = text.partition("@")
    stage, _, step = rest.partition("@")
    if step and not step.isdigit():
        raise ValueError(f"init.from is {text!r}; the step {step!r} is not a number")
    number = int(step) if step else None
    if not folder and not stage:
        raise ValueError(
            f"init.from is {text!r}; give random, WORKDIR@STAGE[@STEP] or a Hugging Face directory"
        )
    if not folder:
        return Checkpoint(text, "run", None, stage, number)
    directory = pathlib.Path(folder).expanduser()
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(
            f"init.from is {text!r}; {directory} holds no config.json (give random, @STAGE, "
            "WORKDIR@STAGE[@STEP] or a Hugging Face directory)"
        )
    if "model_type" in json.loads(config.read_text()):
        if rest:
            raise ValueError(f"init.from is {text!r}; a Hugging Face directory has no stages")
        return Checkpoint(text, "hf", directory)
    stages = sorted(p.name for p in (directory / "checkpoints").glob("*"))
    if stage not in stages:
        raise ValueError(
            f"init.from is {text!r}; the stages of {directory}: {', '.join(stages) or 'none'}"
        )
    return Checkpoint(text, "run", directory, stage, number)
