"""`init.from`: the ways to name the parameters that a stage starts from or an evaluation scores."""

import dataclasses
import pathlib
from typing import Any

from jaxreason.checkpoint import hf, hub, peft
from jaxreason.checkpoint.hf_config import generation_settings
from jaxreason.checkpoint.safetensors_files import read_json
from jaxreason.model.config import DecoderConfig
from jaxreason.report.summary import read_metrics
from jaxreason.text.chat import TEMPLATES
from jaxreason.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """random | @STAGE of this run | WORKDIR[@STAGE[@STEP]] | a Hugging Face directory | hf://...

    A Hugging Face directory may hold an adapter of PEFT's alone: then all else is its base's.
    """

    text: str
    kind: str  # random | run | hf | adapter
    directory: pathlib.Path | None = None  # the other run's workdir, or the Hugging Face directory
    stage: str = ""
    step: int | None = None
    base: "Checkpoint | None" = None  # of an adapter

    @property
    def has_architecture(self) -> bool:
        """Whether the model's shape comes with it (it does not from this run's own stages)."""
        return self.directory is not None and self.kind != "random"

    @property
    def name(self) -> str:
        if hub.is_address(self.text):  # its directory is named by a hash
            return self.text.split("@")[0].rsplit("/", 1)[1]
        return self.stage or (self.directory.name if self.directory else self.kind)

    def architecture(self) -> DecoderConfig:
        """Its shape; raises ValueError where a Hugging Face directory's tensors do not fit it."""
        if self.base is not None:
            return self.base.architecture()
        if self.kind == "hf":
            return hf.checked_config(self.directory)
        return DecoderConfig(**self._run_config()["architecture"])

    def generation(self) -> dict[str, Any]:
        """What its generation_config.json says, ids and sampling; {} where it has none."""
        if self.directory is None:
            return {}
        if self.base is not None:
            return self.base.generation()
        if self.kind == "hf":
            return generation_settings(self.directory)
        return self._run_config().get("generation", {})

    def dtypes(self) -> dict[str, str]:
        """{path: dtype} of the leaves that an import left in theirs; a run's are float32."""
        return self._run_config().get("dtypes", {})

    def chat_template(self) -> str:
        """The template it was trained with, as chat.template_for takes it: a name or a folder.

        Raises ValueError when there is none: random parameters were never given one.
        """
        if self.directory is None:
            raise ValueError(
                f"chat.template is 'checkpoint', but init.from is {self.text!r}, which has none"
            )
        name = self._run_config()["chat_template"] if self.kind == "run" else None
        return name if name in TEMPLATES else str(self.tokenizer_folder)

    def tokenizer(self) -> Tokenizer:
        """Raises ValueError when there is none: random parameters were never given one.

        And when it is not the one that a Hugging Face config.json was written with.
        """
        if self.directory is None:
            raise ValueError(
                f"tokenizer.kind is 'checkpoint', but init.from is {self.text!r}, which has none"
            )
        loaded = load_tokenizer(self.tokenizer_folder)
        if self.kind != "run":
            ids = self.generation()
            _check_tokenizer(self.tokenizer_folder, self.architecture(), ids, loaded)
        return loaded

    @property
    def tokenizer_folder(self) -> pathlib.Path:
        """Where a tokenizer lies if there is one; an adapter may leave that to its base."""
        own = self.directory / "tokenizer" if self.kind == "run" else self.directory
        if self.base is None or (own / "tokenizer_config.json").is_file():
            return own
        return self.base.tokenizer_folder

    def _run_config(self) -> dict:
        content = read_json(self.directory / "config.json")
        if "architecture" not in content:
            raise ValueError(f"init.from is {self.text!r}; that run never built its model")
        return content


def parse(text: str, key: str = "init.from") -> Checkpoint:
    """Reads `init.from`, or a key like it; fetches hf://.

    Raises ValueError in one line, naming the key, when nothing is there.
    """
    if text == "random":
        return Checkpoint(text, "random")
    if hub.is_address(text):
        return _hugging_face(text, key, hub.resolve(text))
    folder, _, rest = text.partition("@")
    stage, _, step = rest.partition("@")
    if step and not step.isdigit():
        raise ValueError(f"{key} is {text!r}; the step {step!r} is not a number")
    number = int(step) if step else None
    if not folder and not stage:
        raise ValueError(
            f"{key} is {text!r}; give random, WORKDIR@STAGE[@STEP] or a Hugging Face directory"
        )
    if not folder:
        return Checkpoint(text, "run", None, stage, number)
    directory = pathlib.Path(folder).expanduser()
    if peft.is_adapter(directory) and not rest:
        return _hugging_face(text, key, directory)
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(
            f"{key} is {text!r}; {directory} holds no config.json (give random, @STAGE, "
            "WORKDIR[@STAGE[@STEP]], a Hugging Face directory or hf://ORG/NAME[@REV])"
        )
    if "model_type" in read_json(config):
        if rest:
            raise ValueError(f"{key} is {text!r}; a Hugging Face directory has no stages")
        return Checkpoint(text, "hf", directory)
    stages = _stages(directory)
    if not stage and stages:
        stage = stages[-1]
    if stage not in stages:
        raise ValueError(
            f"{key} is {text!r}; the stages of {directory}: {', '.join(stages) or 'none'}"
        )
    return Checkpoint(text, "run", directory, stage, number)


def _hugging_face(text: str, key: str, directory: pathlib.Path) -> Checkpoint:
    """A whole model, or an adapter with the base that it names: a directory, else one of the hub's.

    Raises ValueError as `parse` does when the base is not there.
    """
    if not peft.is_adapter(directory):
        return Checkpoint(text, "hf", directory)
    name, revision = peft.base_of(directory)
    if not pathlib.Path(name).expanduser().is_dir():
        name = f"hf://{name}" + (f"@{revision}" if revision else "")
    try:
        base = parse(name, key)
    except ValueError as error:
        raise ValueError(f"{key} is {text!r}, an adapter to a base: {error}") from error
    return Checkpoint(text, "adapter", directory, base=base)


def _stages(directory: pathlib.Path) -> list[str]:
    """The stages of a run that have a checkpoint, the one that trained last at the end."""
    steps = (directory / "checkpoints").glob("*/*")
    saved = sorted({step.parent.name for step in steps if step.name.isdigit()})
    trained = [record["stage"] for record in read_metrics(directory)]
    last = {stage: number for number, stage in enumerate(trained)}
    return sorted(saved, key=lambda stage: last.get(stage, -1))


def _check_tokenizer(
    directory: pathlib.Path, own: DecoderConfig, ids: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Raises ValueError where the weights cannot have been trained with this tokenizer."""
    try:
        tokenizer.limited_to(own.vocab_size)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}; it is another model's") from error
    ends = {*tokenizer.special_ids, tokenizer.eos_id, tokenizer.pad_id}
    for key in ("eos_token_id", "pad_token_id"):
        given = ids.get(key)
        several = given if isinstance(given, list) else [] if given is None else [given]
        for number in several:
            if number not in ends:
                raise ValueError(
                    f"{directory}: {key} is {number}, which is no special token of the tokenizer "
                    f"beside it (those are {sorted(ends)[:8]}...); it is another model's"
                )
