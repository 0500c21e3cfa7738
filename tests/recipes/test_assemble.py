"""From a configuration to the objects it describes."""

import json
import pathlib

import pytest
from ml_collections import ConfigDict

from jaxreason.recipes import assemble, defaults


@pytest.fixture
def earlier(tmp_path) -> pathlib.Path:
    """What an earlier run, itself begun from a checkpoint, leaves of its template."""
    (tmp_path / "checkpoints/sft/1").mkdir(parents=True)
    content = {"config": {"chat": {"template": "checkpoint"}}, "chat_template": "plain"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": {}, **content}))
    return tmp_path


def config_from(start: str) -> ConfigDict:
    c = defaults.default_config("later", "fit")
    c.update(defaults.stage_config())
    c.init["from"] = start
    c.chat.template = "checkpoint"
    c.data.sources = {"text": defaults.source(name="text", path="a.jsonl", text_field="text")}
    return c


def test_the_checkpoints_template_is_used_for_training_too(earlier):
    config = config_from(f"{earlier}@sft")
    assert assemble.data_config(config, config).chat_template == "plain"
    several = config_from("random")
    del several["init"]
    several.stages = {
        "one": {"init": {"from": f"{earlier}@sft"}},
        "two": {"init": {"from": "@one"}},
    }
    assert assemble.template_name(several) == "plain"


def test_random_parameters_have_no_template():
    with pytest.raises(
        ValueError, match=r"chat\.template is 'checkpoint', but init\.from is 'random'"
    ):
        assemble.template_name(config_from("random"))


@pytest.mark.parametrize("text, scanned", [("auto", False), ("true", True), ("false", False)])
def test_scanning_can_be_asked_for_by_flag(text, scanned):
    mesh = defaults.default_config("x", "fit").mesh
    mesh.scan_layers = text
    assert assemble.execution(mesh).scan_layers is scanned  # auto: unrolled, on a CPU


def test_scanning_is_true_false_or_auto():
    mesh = defaults.default_config("x", "fit").mesh
    mesh.scan_layers = "maybe"
    with pytest.raises(ValueError, match=r"mesh\.scan_layers is 'maybe'; it must be auto"):
        assemble.execution(mesh)
