"""The command line: help, where configs are looked for, overrides, and what a resume may change."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
from ml_collections import ConfigDict, config_dict

from jaxreason import launch
from jaxreason.recipes import defaults
from jaxreason.recipes.workdir import Workdir

ROOT = pathlib.Path(launch.__file__).parents[1]


def example() -> ConfigDict:
    """The keys of a real config with one stage of its own and two more by name."""
    c = defaults.default_config("example", "fit")
    c.update(defaults.stage_config())
    c.data.sources = {"pairs": defaults.source(name="pairs", path="a.jsonl", text_field="text")}
    c.data.weights = {"pairs": 1.0}
    c.stages = {"first": defaults.stage_config()}
    return c


# ---------------------------------------------------------------------------------- the command


def test_help_says_the_two_flags_and_does_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--config=nowhere", "--help"]) == 0
    said = capsys.readouterr().out
    for word in ("--config=FILE[:ARG]", "--workdir=DIR", "--config.KEY=VALUE", "resumes"):
        assert word in said
    assert not list(tmp_path.iterdir())


def test_no_arguments_mean_the_quickstart(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, workdir = launch.read_command([])
    assert (config.name, config.recipe) == ("quickstart", "pipeline")
    assert workdir == pathlib.Path("runs/quickstart")


def test_compiled_programs_are_kept_below_home_by_default(tmp_path):
    script = (
        "from jaxreason import launch\n"
        "launch.set_up_jax(launch.load_config('quickstart:smoke'))\n"
        "import jax\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.jit(lambda x: x + 1)(1)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"HOME": str(tmp_path), "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True)
    assert list((tmp_path / ".cache/jaxreason/xla").iterdir())


def test_workdir_may_be_below_home(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", "/nobody")
    _, workdir = launch.read_command(["--workdir=~/run"])  # no shell expands this one
    assert workdir == pathlib.Path("/nobody/run")


@pytest.mark.parametrize("argument", ["quickstart", "--config", "-v=1", "--wrkdir=x", "--seed=3"])
def test_what_is_no_flag_is_named(argument, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=argument.partition("=")[0]):
        launch.read_command([argument])


def test_unknown_recipe_is_named_with_the_known_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=r"recipe is 'fly'; it must be one of pipeline, fit"):
        launch.read_command(["--config.recipe=fly"])


# --------------------------------------------------------------------------- where configs are


def write_config(path: pathlib.Path, name: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        textwrap.dedent(f"""
            from ml_collections import ConfigDict
            def get_config(arg=""):
                return ConfigDict({{"name": "{name}", "arg": arg}})
        """)
    )
    return path


def test_config_is_looked_for_here_then_in_configs_then_among_the_shipped(tmp_path, monkeypatch):
    shipped = write_config(tmp_path / "package/lab.py", "shipped").parent
    monkeypatch.setattr(launch, "shipped_folders", lambda: [shipped])
    monkeypatch.chdir(tmp_path)
    assert launch.load_config("lab").name == "shipped"
    write_config(tmp_path / "configs/lab.py", "configs")
    assert launch.load_config("lab").name == "configs"
    write_config(tmp_path / "lab.py", "here")
    assert launch.load_config("lab").name == "here"
    assert launch.load_config("configs/lab.py:x").to_dict() == {"name": "configs", "arg": "x"}
    assert launch.load_config(f"{shipped}/lab.py").name == "shipped"


def test_a_missing_config_names_the_places_and_the_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "shipped_folders", lambda: [ROOT / "configs"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"--config=quikstart:smoke: .*configs/quikstart\.py.*quickstart"
    ):
        launch.load_config("quikstart:smoke")


# ---------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "3", 3),
        ("train.z_loss", "1", 1.0),  # a whole number where a number is wanted
        ("train.optimizer.learning_rate", "1e-4", 1e-4),
        ("data.shuffle", "false", False),
        ("run.deterministic", "True", True),
        ("chat.template", "plain", "plain"),
        ("tokenizer.path", "2", "2"),  # a text stays a text
        ("init.from", "runs/a@sft@200", "runs/a@sft@200"),
        ("run.profile.steps", "(5, 8)", (5, 8)),
        ("data.train_roles", "['user', 'assistant']", ("user", "assistant")),
        ("model.num_layers", "3", 3),  # None until set: the preset decides
        ("model.rope_theta", "10000", 10000.0),
        ("model.tie_embeddings", "false", False),
        ("data.sources.pairs.path", "b.jsonl", "b.jsonl"),
        ("stages.first.train.steps", "7", 7),
    ],
)
def test_an_override_has_the_type_of_its_key(key, text, value):
    config = example()
    launch.override(config, key, text)
    node = config
    for part in key.split("."):
        node = node[part]
    assert node == value and type(node) is type(value)


@pytest.mark.parametrize(
    "key, text, says",
    [
        ("train.steps", "2.5", "it must be a whole number"),
        ("train.z_loss", "small", "it must be a number"),
        ("data.shuffle", "1", "it must be true or false"),
        ("model.num_layers", "'3'", "it must be a whole number"),
        ("run.profile.steps", "5", "it must be a tuple"),
        ("train.optimizer", "adamw", "is a section; set one of its keys: .*learning_rate"),
        ("mesh.xla_options", "fast", "is no section; write it as in {'name': 1}"),
        ("mesh.xla_options", "{1: 2}", "is no section; write it as in {'name': 1}"),
        ("train.optimizer.learning_rat", "1", "did you mean 'learning_rate'"),
        ("trian.steps", "1", "the config has no 'trian'; did you mean 'train'"),
        ("train.steps.more", "1", "train.steps has no 'more'"),
    ],
)
def test_a_wrong_override_names_key_value_and_what_is_right(key, text, says):
    with pytest.raises(ValueError, match=says) as error:
        launch.override(example(), key, text)
    assert f"--config.{key}" in str(error.value)


def test_a_value_is_never_evaluated_as_code(tmp_path):
    text = f"__import__('pathlib').Path('{tmp_path}/made').touch()"
    with pytest.raises(ValueError, match="it must be a whole number"):
        launch.override(example(), "train.steps", text)
    assert not list(tmp_path.iterdir())


def test_a_section_of_the_users_own_names_is_set_as_a_whole():
    config = example()
    launch.override(config, "mesh.xla_options", "{'xla_cpu_enable_fast_math': False}")
    assert config.mesh.xla_options.to_dict() == {"xla_cpu_enable_fast_math": False}
    with pytest.raises(ValueError, match="set one of its keys: xla_cpu_enable_fast_math"):
        launch.override(config, "mesh.xla_options", "{}")


def test_a_key_without_a_type_takes_any_literal():
    config = ConfigDict({"free": None, "typed": config_dict.placeholder(int)})
    launch.override(config, "free", "[1, 2]")
    assert config.to_dict() == {"free": [1, 2], "typed": None}


# ------------------------------------------------------------------------------------- resuming


@pytest.fixture
def begun(tmp_path) -> Workdir:
    """A run that has trained."""
    workdir = Workdir(tmp_path / "run")
    workdir.open(example())
    (workdir.path / "metrics.jsonl").write_text("")
    return workdir


@pytest.mark.parametrize(
    "key, text",
    [
        ("mesh.microbatches", "2"),
        ("mesh.shape.fsdp", "2"),
        ("run.save_every", "7"),
        ("log.every", "7"),
        ("eval.rows", "7"),
        ("data.weights.pairs", "0.5"),
        ("train.steps", "300"),
        ("stages.first.train.steps", "300"),
    ],
)
def test_how_a_run_is_executed_may_change_and_goes_to_the_history(begun, key, text):
    config = example()
    launch.override(config, key, text)
    begun.open(config)
    content = json.loads(begun.config.read_text())
    ((changed, (_, now)),) = content["history"][0]["changes"].items()
    assert (changed, str(now)) == (key, text)
    assert content["config"] == json.loads(config.to_json())
    begun.open(config)  # the same again is no change
    assert len(json.loads(begun.config.read_text())["history"]) == 1


@pytest.mark.parametrize(
    "key, text, old",
    [
        ("seed", "1", "0"),
        ("data.rows", "64", "32"),
        ("data.num_shards", "2", "1"),
        ("train.optimizer.learning_rate", "0.5", "0.001"),
        ("data.sources.pairs.path", "b.jsonl", "'a.jsonl'"),
        ("stages.first.data.length", "512", "256"),
        ("model.num_layers", "3", "None"),
        ("chat.template", "plain", "'qwen3'"),
    ],
)
def test_what_is_trained_may_not_change(begun, key, text, old):
    config, before = example(), begun.config.read_text()
    launch.override(config, key, text)
    with pytest.raises(ValueError) as error:
        begun.open(config)
    assert f"{key} = {old}, and now it is" in str(error.value) and text in str(error.value)
    assert begun.config.read_text() == before


def test_a_run_that_never_started_takes_any_config_and_prepares_anew(tmp_path):
    workdir = Workdir(tmp_path / "run")
    workdir.open(example())
    workdir.tokenizer.mkdir()
    workdir.data.mkdir()
    workdir.open(example())
    assert workdir.tokenizer.exists() and workdir.data.exists()
    config = example()
    config.seed = 1
    workdir.open(config)
    assert not workdir.tokenizer.exists() and not workdir.data.exists()
    assert json.loads(workdir.config.read_text())["config"]["seed"] == 1


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_folder_of_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match=r"holds files but no config\.json of a run"):
        Workdir(tmp_path).open(example())
    assert [p.name for p in tmp_path.iterdir()] == [name]
