"""What is shipped: configs that load, a README that is true, a wheel that runs."""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from jaxreason import launch
from jaxreason.data.arithmetic import ArithmeticConfig
from jaxreason.recipes import assemble, checkpoints, defaults, study
from jaxreason.recipes.pipeline import stages_of

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ARGUMENTS = {
    "quickstart": ("", "smoke"),
    "pretrain": ("", "smoke", "b200"),
    "sft": ("", "smoke", "hf"),
    "study_distill": ("", "smoke"),
    "study_pruning": ("", "smoke"),
    "study_valley": ("", "smoke"),
    "traces": ("", "smoke"),
    "distill": ("", "smoke", "rewarded", "minillm", "opd", "logit-smoke", "topk", "sequence"),
    "lfm": ("", "smoke"),
    "rationales": ("", "smoke", "step_by_step", "hf"),
    "long_cot": ("", "smoke", "8k", "220k", "8k-large-batch", "s1k", "s1k-1.1", "curated"),
    "rl": ("", "smoke", "countdown", "gsm8k", "hf"),
    "eval": ("", "smoke", "arithmetic"),
    "generate": ("", "smoke"),
}


def python_files(folder: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))


# --------------------------------------------------------------------------------- the configs


def test_every_shipped_config_is_listed_and_documented():
    shipped = {path.stem for path in (ROOT / "configs").glob("[a-z]*.py")}
    assert shipped == set(ARGUMENTS)
    for name in shipped:
        assert f"| `{name}` |" in README
        lab_note = ast.get_docstring(ast.parse((ROOT / f"configs/{name}.py").read_text()))
        assert "python -m jaxreason.launch" in lab_note and ":smoke" in lab_note


@pytest.mark.parametrize("name, arg", [(n, arg) for n, args in ARGUMENTS.items() for arg in args])
def test_shipped_config_loads_and_describes_what_can_be_built(name, arg, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = launch.load_config(f"{name}:{arg}")
    assert config.recipe in launch.RECIPES
    if config.recipe == "study":
        defaults.check_keys(config)
        monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)  # not the suite's eight
        study.plan(config)
        return
    if "arithmetic" in config:
        ArithmeticConfig(**config.arithmetic.to_dict())
    assemble.architecture(config, checkpoints.parse("random"))
    if config.recipe not in ("evaluate", "generate"):
        # Where the parameters come from is the user's; the rest must stand by itself.
        for section in config.get("stages", {"": config}).values():
            if "init" not in section:  # a stage that curates
                section.solvers = ()
            elif not section.init["from"].startswith("@"):
                section.init["from"] = "random"
        config.chat.template = "plain"
        monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)  # not the suite's eight
        stages_of(config)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_unknown_argument_is_named_with_the_known_ones(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=rf"--config={name}:no: the argument is nothing.*smoke"):
        launch.load_config(f"{name}:no")


def test_the_configs_of_the_docs_are_ones_that_work(tmp_path, monkeypatch):
    page = (ROOT / "docs/recipes.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    mine, continued = (block for block in blocks if "def get_config" in block)
    (tmp_path / "mine.py").write_text(mine)
    (tmp_path / "continued.py").write_text(continued)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT)  # the second is for a checkout
    configs = [launch.load_config(name) for name in ("mine", "continued")]
    for config in configs:
        defaults.check_keys(config)
    source = assemble.DataConfig(**configs[0].data.to_dict()).sources["mine"]
    assert (source.reasoning_field, source.response_field) == ("solution", "answer")
    assert configs[1].stages.continued.init["from"] == "runs/quickstart@sft_cot"


# ---------------------------------------------------------------------------------- the README


def test_readme_begins_with_the_two_commands():
    run, test = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[:2]
    assert run.endswith("-m jaxreason.launch")
    assert test.endswith("-m pytest -n 2 --dist loadfile")
    for command in (run, test):
        assert "\n" not in command and " && " in command


def test_ci_runs_the_readmes_test_command():
    """The same awk program, so that a moved comment does not leave CI with nothing to run."""
    program = re.search(r"awk '(.*?)' README\.md", (ROOT / ".ci/run").read_text(), re.DOTALL)[1]
    found = subprocess.run(["awk", program, ROOT / "README.md"], capture_output=True, text=True)
    assert found.stdout == re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[1]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/recipes.md", "docs/scaling.md", "docs/benchmarks.md"]
)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https://)([^)]+)\)", (ROOT / page).read_text())
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], link


def test_the_tree_of_the_readme_is_the_tree():
    tree = README.split("## The code")[1].split("```")[1]
    shelves = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    folders = {p.parent.name for p in (ROOT / "jaxreason").glob("*/__init__.py")}
    assert shelves == folders
    for folder in re.findall(r"^(\w+)/", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir()


# ----------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> pathlib.Path:
    """Built from a copy: setuptools leaves a build folder in the tree."""
    source = tmp_path_factory.mktemp("source") / "jaxreason"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("jaxreason", "configs"):
        shutil.copytree(ROOT / name, source / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        source / "w",
    ]
    subprocess.run([*pip, source], check=True)
    (built,) = (source / "w").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_the_package_the_configs_and_the_licence(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    configs = {f"jaxreason/{path}" for path in python_files("configs")}
    code = {name for name in names if name.endswith(".py")}
    assert code == configs | set(python_files("jaxreason"))
    assert any(name.endswith("LICENSE") for name in names)
    base = [r for r in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M) if "extra ==" not in r]
    assert not [requirement for requirement in base if "[" in requirement]
    assert {"cuda", "tpu", "test", "dev"} == set(
        re.findall(r"^Provides-Extra: (.*)$", metadata, re.M)
    )


@pytest.mark.slow
def test_the_wheel_runs_in_an_empty_environment_from_another_directory(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", wheel], check=True)
    run = [python, "-m", "jaxreason.launch", "--config=quickstart:smoke", "--workdir=run"]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "PYTHON"))}
    subprocess.run(run, check=True, cwd=tmp_path, env=keep)
    assert (tmp_path / "run/summary.json").stat().st_size > 0
    where = "import jaxreason; print(jaxreason.__file__)"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, env=keep, capture_output=True)
    assert str(tmp_path) in found.stdout.decode()
