"""LoRA in a stage: what is asked for, its model, the base that it reads, the adapter it leaves."""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from jaxreason.checkpoint.peft import export_peft
from jaxreason.checkpoint.store import restore_params
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import BASE_DTYPE, LoraConfig
from jaxreason.parallel import hosts
from jaxreason.recipes import bases, weights
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.workdir import Workdir
from jaxreason.types import Params


def plan(section: ConfigDict, start: Checkpoint) -> LoraConfig | None:
    """`train.lora` of a stage; None where the weights themselves are trained.

    Raises ValueError naming key and value for what cannot be, for adapters to random weights, and
    for what would be ignored.
    """
    lora = LoraConfig(**section.train.lora.to_dict())
    for field in () if lora.rank else dataclasses.fields(lora):
        value = getattr(lora, field.name)
        if value != field.default:
            raise ValueError(
                f"train.lora.rank is 0, so train.lora.{field.name} = {value!r} would be ignored; "
                "set the rank"
            )
    if lora.rank and start.kind == "random":
        raise ValueError(
            f"train.lora.rank is {lora.rank} and init.from is 'random'; adapters change a model "
            "that was trained: start from one"
        )
    return lora if lora.rank else None


def frozen_base(workdir: Workdir, stage: str, start: Checkpoint, model: LanguageModel) -> Params:
    """What the stage's adapters are added to, bfloat16; what it was is recorded (bases.begun).

    A start that is not bfloat16 itself is rounded to it. Raises ValueError where a stage that goes
    on finds another base than it began with.
    """
    base = bases.begun(workdir, stage, start)
    return weights.load(base, model, workdir.checkpoints, BASE_DTYPE)


def export(
    model: LanguageModel,
    workdir: Workdir,
    stage: str,
    start: Checkpoint,
    save_tokenizer: Callable[[pathlib.Path], None],
) -> str | None:
    """adapters/STAGE: the newest adapters as PEFT reads them, tokenizer and chat template beside.

    Args:
      model: a plain model of the stage's, with its LoraConfig.
      save_tokenizer: writes both into a folder.

    Returns the base that they name; None where no folder holds it.
    """
    folder = workdir.checkpoints(stage)
    adapters = restore_params(folder, model.abstract(), optional=("value_head",))
    if model.mesh is not None:  # whole where they are written
        adapters = jax.device_put(adapters, NamedSharding(model.mesh, PartitionSpec()))
    base = _base_name(bases.recorded(workdir.path, stage, start, workdir.checkpoints), workdir.path)
    target = workdir.path / "adapters" / stage
    write = lambda: export_peft(target, model.lora, model.config, adapters, base, save_tokenizer)
    hosts.first(write)
    return base[0]


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
