"""LoRA in a stage: what is asked for, its model, the base that it reads, the adapter it leaves."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from jaxreason.checkpoint.peft import export_peft
from jaxreason.checkpoint.store import restore_params
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import BASE_DTYPE, LoraConfig
from jaxreason.types import Params

if TYPE_CHECKING:  # it imports this file
    from jaxreason.recipes.checkpoints import Checkpoint


def plan(section: ConfigDict, start: Checkpoint) -> LoraConfig | None:
    """`train.lora` of a stage; None where the weights themselves are trained.

    Raises ValueError naming key and value for what cannot be, and for adapters to random weights.
    """
    lora = LoraConfig(**section.train.lora.to_dict())
    if lora.rank and start.kind == "random":
        raise ValueError(
            f"train.lora.rank is {lora.rank} and init.from is 'random'; adapters change a model "
            "that was trained: start from one"
        )
    return lora if lora.rank else None


def adapted(
    model: LanguageModel, lora: LoraConfig | None, value_head: bool = False
) -> LanguageModel:
    """The run's model as a stage trains it; the run's own where it trains all of it.

    Raises ValueError where the adapters do not fit the model.
    """
    if lora is None and not value_head:
        return model
    return LanguageModel(
        model.config, model.execution, model.mesh, model.valid_vocab, value_head, lora
    )


def frozen_base(
    lora: LoraConfig | None,
    start: Checkpoint,
    model: LanguageModel,
    checkpoints: Callable[[str], pathlib.Path],
) -> Params | None:
    """What the adapters are added to, bfloat16; None of a stage without adapters.

    A start that is not bfloat16 itself is rounded to it.
    """
    return None if lora is None else start.load(model, checkpoints, BASE_DTYPE)


def export(
    model: LanguageModel, folder: pathlib.Path, start: Checkpoint, target: pathlib.Path
) -> None:
    """The adapters of the newest checkpoint of `folder`, as PEFT reads them.

    Args:
      model: a plain model of the stage's, with its LoraConfig.
    """
    adapters = restore_params(folder, model.abstract(), optional=("value_head",))
    export_peft(target, model.lora, model.config, adapters, _base_name(start, folder.parents[1]))


def _base_name(start: Checkpoint, workdir: pathlib.Path) -> tuple[str | None, str | None]:
    """(base_model_name_or_path, revision): of a run of ours, what it exported, if it did.

    None where no folder holds the base: what began from an adapter has it merged.
    """
    if start.kind == "adapter":
        return None, None
    if start.kind == "run":
        exported = ((start.directory or workdir) / "hf" / start.stage).absolute()
        return (str(exported) if exported.is_dir() else None), None
    if not start.text.startswith("hf://"):
        return str(start.directory.absolute()), None
    name, _, revision = start.text.removeprefix("hf://").partition("@")
    return name, revision or None
