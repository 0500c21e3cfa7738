"""The order of a pipeline's stages."""

import pytest

from jaxreason import launch
from jaxreason.recipes.pipeline import stages_of


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr("jaxreason.recipes.assemble.device_mesh", lambda mesh: None)


def test_stages_come_after_the_one_they_start_from():
    """A ConfigDict gives them by name: rl before the sft_cot that it starts from."""
    names = [stage.name for stage in stages_of(launch.load_config("quickstart:smoke"))]
    assert names == ["pretrain", "sft_answer", "sft_cot", "rl", "scaling"]


def test_a_stage_from_nowhere_or_from_itself_is_refused():
    config = launch.load_config("quickstart:smoke")
    config.stages.rl.init["from"] = "@sft"
    with pytest.raises(ValueError, match=r"stages\.rl\.init\.from is '@sft'; stages that can come"):
        stages_of(config)
    config.stages.rl.init["from"] = "@scaling"
    with pytest.raises(ValueError, match="'@scaling'"):
        stages_of(config)


def test_a_pipeline_without_a_stage_is_refused():
    config = launch.load_config("quickstart:smoke")
    config.stages = {}
    with pytest.raises(ValueError, match="stages is empty; it must have one at least"):
        stages_of(config)


def test_a_start_that_is_not_given_is_said_of_its_own_stage():
    """`rl` comes before `sft` by name, and its template is that of where `sft` starts."""
    with pytest.raises(ValueError, match=r"stages\.sft: init\.from is ''; give random, WORKDIR@"):
        stages_of(launch.load_config("lfm"))
