"""`train.objective` of a stage that learns from data: which loss, and what it compares with."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from jaxreason.data.pipeline import DataConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.objectives.distill import Distillation, DistillConfig, TopKDistillation
from jaxreason.objectives.lm import LanguageModeling, StepByStep
from jaxreason.objectives.preference import PRESETS, Preference
from jaxreason.recipes import teacher
from jaxreason.recipes.checkpoints import Checkpoint

_DISTILL = {"distill": Distillation, "distill_topk": TopKDistillation}
_TEXT = {"lm": LanguageModeling, "step_by_step": StepByStep}
NAMES = (*_TEXT, *_DISTILL, *PRESETS)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What can be checked of a stage's objective before a model is there."""

    name: str
    fields: dict[str, Any]  # of the objective, but for a teacher's model
    reads: str = ""  # teacher | reference: the parameters that it compares with
    start: Checkpoint | None = None  # of these

    @property
    def pairs(self) -> bool:
        """Whether it learns from chosen and rejected answers."""
        return self.name in PRESETS

    def build(self, taught_by: LanguageModel | None):
        """The objective. `taught_by` is the teacher's model where it reads one."""
        if self.name in _TEXT:
            return _TEXT[self.name](**self.fields)
        if self.pairs:
            return Preference(**self.fields)
        own = {"teacher": taught_by} if self.reads == "teacher" else {}
        return _DISTILL[self.name](**self.fields, **own)


def plan(training: ConfigDict, start: Checkpoint) -> Plan:
    """Of a stage's `train` section. Raises ValueError naming key, value and what would be right.

    Args:
      start: of the stage: the reference of a preference, where train.teacher.from names no other.
    """
    name = training.objective
    if name not in NAMES:
        raise ValueError(f"train.objective is {name!r}; it must be one of {', '.join(NAMES)}")
    _check_read(training, name)
    other = teacher.parse(training.teacher["from"])
    if name in _TEXT:
        own = {"alpha": training.alpha} if name == "step_by_step" else {}
        fields = {"z_loss": training.z_loss, **own}
        _TEXT[name](**fields)
        return Plan(name, fields)
    if name in PRESETS:
        own = {key: value for key, value in training.preference.items() if value is not None}
        objective = dataclasses.replace(PRESETS[name], **own)
        fields = dataclasses.asdict(objective)
        if not objective.needs_reference:
            return Plan(name, fields)
        reference = other or start
        if reference.kind == "random":
            raise ValueError(
                f"train.objective is {name}, which keeps to the model that it starts from, and "
                "init.from is 'random'; start from one that was trained"
            )
        return Plan(name, fields, "reference", reference)
    fields = training.distill.to_dict()
    if name == "distill_topk":
        TopKDistillation(**fields)
        return Plan(name, fields)
    fields.pop("add_tail")
    DistillConfig(**fields)
    if other is None:
        raise ValueError(
            "train.teacher.from is empty, and train.objective = distill learns from a teacher; "
            "give a checkpoint as in init.from"
        )
    return Plan(name, fields, "teacher", other)


def check_data(plan: Plan, data: DataConfig) -> None:
    """Raises ValueError where the objective wants other documents than the stage's data has."""
    for source in data.sources.values():
        if plan.pairs != source.has_pairs:
            said = "pairs of answers" if plan.pairs else "single answers"
            raise ValueError(
                f"train.objective is {plan.name}, which learns from {said}; {source.key} sets "
                "chosen_field and rejected_field where it has pairs"
            )
        if (plan.name == "step_by_step") != bool(source.task):
            raise ValueError(
                f"train.objective is {plan.name} and {source.key}.task is {source.task!r}; "
                "step_by_step wants label or rationale of every source, and nothing else reads it"
            )
    if (plan.name == "distill_topk") != bool(data.teacher):
        raise ValueError(
            f"train.objective is {plan.name} and data.teacher {data.teacher!r}; distill_topk reads "
            "the stored log-probs of that folder, and nothing else does"
        )


def _check_read(training: ConfigDict, name: str) -> None:
    """Raises ValueError for what is set and would be ignored."""
    distilled, preferred = name in _DISTILL, name in PRESETS
    unread = []
    if not distilled:
        plain = {f.name: f.default for f in dataclasses.fields(TopKDistillation)}
        unread += [("distill", k, v) for k, v in training.distill.items() if v != plain[k]]
    if not preferred:
        unread += [("preference", k, v) for k, v in training.preference.items() if v is not None]
    reads_other = name == "distill" or (preferred and PRESETS[name].needs_reference)
    if training.teacher["from"] and not reads_other:
        unread.append(("teacher", "from", training.teacher["from"]))
    if training.alpha != StepByStep.alpha and name != "step_by_step":
        raise ValueError(
            f"train.alpha is {training.alpha}, but train.objective is {name}; step_by_step reads it"
        )
    if training.z_loss and name not in _TEXT:
        raise ValueError(f"train.z_loss is {training.z_loss}, but train.objective {name} has none")
    for section, key, value in unread:
        raise ValueError(
            f"train.{section}.{key} is {value!r}, but train.objective is {name}, which does not "
            "read it"
        )
