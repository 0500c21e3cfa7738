"""The parameters behind a `Checkpoint`, in the shape and place that this run's model wants."""

import dataclasses
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxreason.checkpoint import hf, hf_names, peft
from jaxreason.checkpoint.safetensors_files import read_json
from jaxreason.checkpoint.store import restore_params
from jaxreason.checkpoint.vocabulary import resize_vocab
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import BASE_DTYPE, LoraConfig
from jaxreason.recipes import bases
from jaxreason.recipes.bases import Folders
from jaxreason.recipes.checkpoints import Checkpoint, parse
from jaxreason.text.tokenizer import load_tokenizer
from jaxreason.types import Params


def load(
    start: Checkpoint, model: LanguageModel, checkpoints: Folders | None, dtype=jnp.float32
) -> Params | None:
    """The parameters, placed where the model wants them; None: random ones.

    A value head comes along where the model has one too. Tokens that it was not trained with,
    which this run's tokenizer or a larger model.vocab_size brings, get mean rows. Adapters are
    merged into the base that they were trained on.

    Args:
      model: a plain one.
      checkpoints: folders of this run; None where `start` names none of its stages.
      dtype: of every parameter.
    Raises ValueError when the model has another shape.
    """
    if start.kind == "random":
        return None
    if start.kind == "adapter":
        lora, adapters = peft.import_peft(start.directory, model.config)
        base = load(start.base, model, checkpoints)
        return _merged(model.adapted(lora, model.value_head), adapters, base, dtype)
    if start.kind == "hf":
        return _load_hugging_face(start, model, dtype)
    return _load_run(start, model, checkpoints, dtype)


def _load_hugging_face(start: Checkpoint, model: LanguageModel, dtype) -> Params:
    own = start.architecture()
    abstract = _abstract(model, own.vocab_size, dtype)
    _check_shapes(start.text, own, abstract)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract) if model.mesh else None
    _, params = hf.import_hf(start.directory, dtype=dtype, shardings=shardings)
    for part, number in hf.left_out(start.directory).items():
        print(f"{start.name}: {part} is left out ({number} tensors)", file=sys.stderr)
    return _with_new_tokens(start, model, own, params)


def _load_run(start: Checkpoint, model: LanguageModel, checkpoints, dtype) -> Params:
    other = start.directory and start.directory / "checkpoints" / start.stage
    folder = other or checkpoints(start.stage)
    restore = lambda wanted: restore_params(folder, wanted, start.step, ("value_head",))
    section = _stage_section(folder.parents[1], start.stage)
    lora = LoraConfig(**section.get("train", {}).get("lora", {}))
    if lora.rank:
        trained = model.adapted(lora, model.value_head)
        base = bases.recorded(folder.parents[1], start.stage, _base_of(start, section), checkpoints)
        base = load(base, model, checkpoints, BASE_DTYPE)
        return _merged(trained, restore(trained.abstract()), base, dtype)
    if start.directory is None:
        return restore(model.abstract(dtype))
    own = start.architecture()
    return _with_new_tokens(start, model, own, restore(_abstract(model, own.vocab_size, dtype)))


def _base_of(start: Checkpoint, section: dict) -> Checkpoint:
    """Where the stage of this section, which trained adapters, found what they adapt."""
    try:
        base = parse(section["init"]["from"])
    except ValueError as error:
        raise ValueError(f"init.from is {start.text!r}, adapters to a base: {error}") from error
    if base.kind == "run" and base.directory is None:
        return dataclasses.replace(base, directory=start.directory)
    return base


def _with_new_tokens(
    start: Checkpoint, model: LanguageModel, own: DecoderConfig, params: Params
) -> Params:
    rows = model.config.vocab_size
    tokens, known = model.valid_vocab or rows, _num_tokens(start, own)
    if rows == own.vocab_size and tokens <= known:
        return params
    _, params = resize_vocab(params, own, rows, known)
    if model.mesh is None:
        return params
    return jax.device_put(params, {name: model.shardings()[name] for name in params})


def _num_tokens(start: Checkpoint, own: DecoderConfig) -> int:
    """Rows of the table that training moved; all of them where no tokenizer lies beside."""
    if not (start.tokenizer_folder / "tokenizer_config.json").is_file():
        return own.vocab_size
    return min(load_tokenizer(start.tokenizer_folder).vocab_size, own.vocab_size)


def _merged(model: LanguageModel, adapters: Params, base: Params, dtype) -> Params:
    """The plain tree, each weight where its base was."""

    def merge(adapters: Params, base: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), model.merge(model.complete(adapters, base)))

    places = {**base, **{name: part for name, part in adapters.items() if name != "lora"}}
    places = None if model.mesh is None else jax.tree.map(lambda leaf: leaf.sharding, places)
    return jax.jit(merge, out_shardings=places)(adapters, base)


def _stage_section(workdir: pathlib.Path, stage: str) -> dict[str, Any]:
    """The stage's part of the configuration; {} of an imported model, which no stage trained."""
    config = read_json(workdir / "config.json").get("config", {})
    return config.get("stages", {stage: config}).get(stage, {})


def _abstract(model: LanguageModel, vocab_size: int, dtype) -> Params:
    """What to restore into: the model's, with tables of that many rows."""
    abstract = model.abstract(dtype)
    if vocab_size == model.config.vocab_size:
        return abstract
    # The rows that are there may not divide as the model's do: whole on every device until grown.
    whole = None if model.mesh is None else NamedSharding(model.mesh, PartitionSpec())
    tables = {
        name: jax.ShapeDtypeStruct(
            (vocab_size, *leaf.shape[1:]), leaf.dtype, sharding=whole or leaf.sharding
        )
        for name, leaf in abstract.items()
        if name in ("embedding", "lm_head")
    }
    return {**abstract, **tables}


def _check_shapes(text: str, own: DecoderConfig, abstract: Params) -> None:
    """Raises ValueError naming a weight that the model, the first stage's, has otherwise."""
    there, here = _shapes(hf_names.shapes(own)), _shapes(abstract)
    for path, shape in there.items():
        if here.get(path) != shape:
            raise ValueError(
                f"init.from is {text!r}, where {path} is {shape}; in this run's model it is "
                f"{here.get(path, 'absent')}"
            )


def _shapes(tree: Params) -> dict[str, tuple[int, ...]]:
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape for p, leaf in flat}
