"""`path="@STAGE"` for tests: STAGE.jsonl in the data folder, until data/sources.py reads it so."""

import pathlib

from jaxreason.data import sources

_init = sources.JsonlSource.__init__


def read_made(self, path, *, fields, data_dir, key="data.path"):
    if isinstance(path, str) and path.startswith("@"):
        path = str(pathlib.Path(data_dir).resolve() / f"{path[1:]}.jsonl")
    _init(self, path, fields=fields, data_dir=data_dir, key=key)


def install() -> None:
    sources.JsonlSource.__init__ = read_made
