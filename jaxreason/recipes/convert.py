"""Hugging Face directories to checkpoints of ours and back, without a run: tools/convert_hf.py."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from jaxreason.checkpoint import hf, hf_names
from jaxreason.checkpoint.hf_config import GENERATION
from jaxreason.checkpoint.safetensors_files import INDEX, write_json
from jaxreason.checkpoint.store import Store, restore_params
from jaxreason.checkpoint.whole_folder import written_whole
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.recipes import checkpoints, weights
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.text.tokenizer import load_tokenizer
from jaxreason.types import Params, TrainState

STAGE = "imported"
_TOKENIZER = "tokenizer_config.json"  # which no tokenizer's folder lacks


def import_checkpoint(
    source: str, out: pathlib.Path, on_progress: hf.OnProgress = lambda *_: None
) -> dict[str, Any]:
    """A Hugging Face directory or hf:// as a workdir that init.from accepts: OUT, or OUT@imported.

    Every leaf keeps its dtype. Returns what was imported, in numbers. Raises ValueError, one line,
    for whatever is wrong with the source, when OUT is there already, and on a full disk.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is there already; an import makes a new folder")
    start = checkpoints.parse(source)
    if start.kind != "hf":
        raise ValueError(f"{source!r} is no Hugging Face directory and no hf://ORG/NAME[@REV]")
    if (start.directory / _TOKENIZER).is_file():
        start.tokenizer()  # raises where it is another model's
    config, params = hf.import_hf(start.directory, dtype=None, on_progress=on_progress)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    num_bytes = sum(leaf.nbytes for _, leaf in leaves)
    facts = {
        "architecture": dataclasses.asdict(config),
        "chat_template": "checkpoint",  # the folder's own, which lies in tokenizer/
        "generation": start.generation(),
        "parameters": sum(leaf.size for _, leaf in leaves),
        "dtypes": {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.dtype.name
            for path, leaf in leaves
        },
        "imported_from": source,
    }
    with written_whole(out, num_bytes) as partial:
        _save(partial, params)
        _copy_tokenizer(start.directory, partial / "tokenizer")
        write_json(partial / "config.json", facts)
    left_out = hf.left_out(start.directory)
    return {"parameters": facts["parameters"], "bytes": num_bytes, "left_out": left_out}


def export_checkpoint(
    source: str,
    out: pathlib.Path,
    dtype: str | None = None,
    on_progress: hf.OnProgress = lambda *_: None,
) -> dict[str, Any]:
    """WORKDIR[@STAGE[@STEP]] as a Hugging Face directory, adapters merged.

    Args:
      dtype: of the written weights; None: as they are stored, float32 for what was trained here.

    Returns what was exported, in numbers. Raises ValueError as import_checkpoint does.
    """
    start = checkpoints.parse(source)
    if start.directory is None:
        raise ValueError(f"{source!r} names no folder; give WORKDIR[@STAGE[@STEP]]")
    config = start.architecture()
    params = _load(start, config)
    folder = start.tokenizer_folder
    hf.export_hf(
        out,
        config,
        params,
        generation=_generation(start, folder),
        save_tokenizer=lambda target: _copy_tokenizer(folder, target),
        dtype=dtype and jnp.dtype(dtype),
        on_progress=on_progress,
    )
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params)), "bytes": written}


def _save(workdir: pathlib.Path, params: Params) -> None:
    zero = jnp.int32(0)
    state = TrainState(step=zero, params=params, opt=(), key=jax.random.key(0), nonfinite=zero)
    with Store(workdir / "checkpoints" / STAGE) as store:
        store.save(0, {"state": state, "data": {}, "host": {}}, wait=True)


def _load(start: Checkpoint, config: DecoderConfig) -> Params:
    """Each leaf in the dtype that it is stored in; adapters merged into their base."""
    if start.kind == "hf":
        return hf.import_hf(start.directory, dtype=None)[1]
    dtypes = start.dtypes() if start.kind == "run" else {}
    if not dtypes:
        model = LanguageModel(config, valid_vocab=_num_tokens(start, config.vocab_size))
        return weights.load(start, model, lambda stage: start.directory / "checkpoints" / stage)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def abstract(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtype = jnp.dtype(dtypes[jax.tree_util.keystr(path, simple=True, separator="/")])
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place)

    folder = start.directory / "checkpoints" / start.stage
    wanted = jax.tree_util.tree_map_with_path(abstract, hf_names.shapes(config))
    return restore_params(folder, wanted, start.step)


def _num_tokens(start: Checkpoint, rows: int) -> int | None:
    """Of the table's rows; Gemma 3's tokenizer has an entry without one."""
    folder = start.tokenizer_folder
    if not (folder / _TOKENIZER).is_file():
        return None
    return min(load_tokenizer(folder).vocab_size, rows)


def _generation(start: Checkpoint, folder: pathlib.Path) -> dict[str, Any]:
    """As the run left it; of a run before it did, the tokenizer's ends."""
    said = start.generation()
    if "eos_token_id" in said or not (folder / _TOKENIZER).is_file():
        return said
    tokenizer = load_tokenizer(folder)
    return {"eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id, **said}


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Every small file that belongs to a tokenizer or a chat template, as it is."""
    target.mkdir(exist_ok=True)
    own = {"config.json", INDEX, "adapter_config.json"}
    if (target / GENERATION).exists():  # the export's own
        own.add(GENERATION)
    patterns = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        if path.name not in own:
            shutil.copyfile(path, target / path.name)
    if (source / "additional_chat_templates").is_dir():
        named = "additional_chat_templates"
        shutil.copytree(source / named, target / named)
