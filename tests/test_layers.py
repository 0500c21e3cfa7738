"""The import rule of the house, read from the code itself: imports only go down."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Shelf -> floor. Shelves on one floor never import each other; `launch`, the recipes, tools and
# configs are one shelf, the edge.
FLOORS = {
    "types": 0,
    "parallel": 1,
    "kernels": 2,
    "model": 3, "text": 3,
    "data": 4, "objectives": 4, "rewards": 4, "reasoning": 4, "rollout": 4,
    "evals": 5, "checkpoint": 5, "report": 5,
    "train": 6,
    "edge": 7,
}  # fmt: skip
EDGE = {"launch", "recipes", "tools", "configs"}

# Package -> the places that may import it: shelves, or single files.
ONLY_IN = {
    "ml_collections": ("train", "edge"),
    "flax": ("model", "train/state.py"),
    "jax.experimental.pallas": ("kernels",),
    "orbax": ("checkpoint",),
    "grain": ("data", "checkpoint"),
    "tensorflow_datasets": ("data", "checkpoint"),
    "array_record": ("data", "checkpoint"),
    "pyarrow": ("data",),
}
LAZY = (
    "orbax",
    "grain",
    "tensorflow_datasets",
    "array_record",
    "pyarrow",
)  # imported inside functions
NEVER = ("tensorflow", "torch", "transformers", "pickle")  # in the package
FLOOR_0 = {"numpy", "jax", "chex"} | set(sys.stdlib_module_names)


def sources():
    """{path relative to the package (or the root, for tools and configs): syntax tree}."""
    found = {}
    for folder, base in (("jaxreason", "jaxreason"), ("configs", "."), ("tools", ".")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found[path.relative_to(ROOT / base).as_posix()] = ast.parse(path.read_text())
    return found


SOURCES = sources()


def imports(tree):
    """(full name of the imported thing, whether it is inside a function) of every import."""
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import hides its shelf"
            yield from ((f"{node.module}.{alias.name}", node in lazy) for alias in node.names)


def shelf_of(path: str) -> str:
    """Of a file, or of a module with dots: `data/packing.py` and `data.packing` are `data`."""
    first = path.removesuffix(".py").replace(".", "/").split("/")[0]
    return "edge" if first in EDGE else first


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def violations(path: str, tree) -> list[str]:
    """What a file imports against the rule, one line each."""
    here, found = shelf_of(path), []
    for name, lazy in imports(tree):
        if within(name, "jaxreason"):
            there = shelf_of(name.removeprefix("jaxreason").removeprefix(".") or "types")
            if there != here and FLOORS[there] >= FLOORS[here]:
                found.append(f"{path} (floor {FLOORS[here]}) imports {name} ({FLOORS[there]})")
        elif here == "types" and name.split(".")[0] not in FLOOR_0:
            found.append(f"{path} imports {name}; floor 0 has the standard library, jax and chex")
        for package, places in ONLY_IN.items():
            if within(name, package) and not {here, path} & set(places):
                found.append(f"{path} imports {name}; only {', '.join(places)} may")
            if within(name, package) and package in LAZY and not lazy:
                found.append(f"{path} imports {name} at its top; import it inside a function")
        if any(within(name, package) for package in NEVER) and not path.startswith("tools/"):
            found.append(f"{path} imports {name}")
    return found


def test_every_file_is_on_a_shelf():
    shelves = {shelf_of(path) for path in SOURCES if path != "__init__.py"}
    assert shelves <= set(FLOORS), shelves - set(FLOORS)
    assert len(SOURCES) > 50


def test_imports_only_go_down():
    found = [v for path, tree in SOURCES.items() if path != "__init__.py"
             for v in violations(path, tree)]  # fmt: skip
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path, code",
    [
        ("kernels/flash.py", "from jaxreason.model import config"),
        ("model/decoder.py", "from jaxreason.text.chat import Message"),
        ("data/pipeline.py", "def f():\n    import jaxreason.rollout.sample"),
        ("report/html.py", "from jaxreason.recipes import defaults"),
        ("report/html.py", "from jaxreason import launch"),
        ("evals/suite.py", "from jaxreason.checkpoint.store import Store"),
        ("types.py", "import optax"),
        ("data/sources.py", "import grain"),
        ("data/files.py", "from pyarrow import parquet"),
        ("data/sources.py", "class A:\n    from array_record.python import array_record_module"),
        ("train/step.py", "def f():\n    from orbax.checkpoint import v1"),
        ("model/attention.py", "from jax.experimental import pallas as pl"),
        ("train/step.py", "from flax import nnx"),
        ("evals/suite.py", "from ml_collections import ConfigDict"),
        ("checkpoint/hf.py", "import torch"),
    ],
)
def test_the_rule_finds_what_breaks_it(path, code):
    assert violations(path, ast.parse(code))


@pytest.mark.parametrize(
    "path, code",
    [
        ("train/state.py", "from flax import nnx"),
        ("train/fit.py", "from ml_collections import ConfigDict"),
        ("data/sources.py", "def f():\n    import grain"),
        ("recipes/fit.py", "from jaxreason.launch import load_config"),
        ("kernels/flash.py", "from jax.experimental import pallas as pl"),
        ("model/heads.py", "from jaxreason import types"),
    ],
)
def test_the_rule_allows_what_it_should(path, code):
    assert not violations(path, ast.parse(code))


def test_the_core_imports_without_data_packages():
    """GPU images often lack them: model, kernels, step and rollout must not need them."""
    code = """
import sys
for name in ("grain", "tensorflow_datasets", "array_record", "pyarrow", "ml_collections",
             "orbax"):
    sys.modules[name] = None  # importing it raises ImportError
import jaxreason.kernels.blockwise, jaxreason.kernels.decode, jaxreason.kernels.linear_xent
import jaxreason.model.decoder, jaxreason.objectives.lm, jaxreason.parallel.hosts
import jaxreason.parallel.chips, jaxreason.rollout.sample, jaxreason.train.optim
import jaxreason.train.step
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
