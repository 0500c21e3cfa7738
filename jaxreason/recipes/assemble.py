"""From a configuration to the objects it describes. Configuration stops here."""

import dataclasses
import datetime
import functools
import os
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxreason.checkpoint import hf, hub
from jaxreason.data import sources
from jaxreason.data.pipeline import DataConfig
from jaxreason.kernels import grouped
from jaxreason.model import attention, decode_choice
from jaxreason.model.config import DecoderConfig, preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.parallel import chips, hosts
from jaxreason.parallel.mesh import make_mesh
from jaxreason.recipes import checkpoints
from jaxreason.recipes.checkpoints import Checkpoint
from jaxreason.recipes.workdir import Workdir
from jaxreason.rewards import mix
from jaxreason.text import chat
from jaxreason.text.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from jaxreason.types import Params


def stage_key(seed: int, name: str) -> jax.Array:
    """A PRNG key of its own for every stage and every evaluation."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)


def architecture(config: ConfigDict, start: Checkpoint) -> DecoderConfig:
    """The decoder's shape: the checkpoint's own where training starts from one, else config.model.

    model.vocab_size may give a checkpoint more rows (Checkpoint.load). Raises ValueError for an
    unknown preset, and for any other model key set against a checkpoint.
    """
    given = lambda section: {key: value for key, value in section.items() if value is not None}
    fields = config.model.to_dict()
    name, scaling = fields.pop("preset"), given(fields.pop("rope_scaling"))
    changes = given(fields) | ({"rope_scaling": scaling} if scaling else {})
    if not start.has_architecture:
        return preset(name, **changes)
    own = start.architecture()
    rows = changes.pop("vocab_size", own.vocab_size)
    if rows < own.vocab_size:
        raise ValueError(
            f"model.vocab_size is {rows}, fewer than the {own.vocab_size} rows of init.from = "
            f"{start.text!r}; a table can only grow"
        )
    if changes:
        key, value = next(iter(changes.items()))
        raise ValueError(
            f"model.{key} is {value!r}, but the model's shape comes from init.from = {start.text!r}"
        )
    return dataclasses.replace(own, vocab_size=rows)


def execution(mesh: ConfigDict) -> Execution:
    """`auto` becomes float32 and unrolled layers on CPU, bfloat16 and scanned layers elsewhere."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = {"auto": "float32" if on_cpu else "bfloat16"}.get(mesh.dtype, mesh.dtype)
    scan = {"auto": not on_cpu, "true": True, "false": False}.get(mesh.scan_layers)
    if scan is None:
        raise ValueError(
            f"mesh.scan_layers is {mesh.scan_layers!r}; it must be auto, true or false"
        )
    return Execution(
        dtype=dtype,
        attention=mesh.attention,
        experts=mesh.experts,
        remat=mesh.remat,
        offload=tuple(mesh.offload),
        scan_layers=scan,
        context=mesh.context,
        decode_attention=mesh.decode_attention,
        kv_cache_dtype=mesh.kv_cache_dtype,
    )


def xla_options(mesh: ConfigDict) -> dict[str, object]:
    """The train step's compiler options: those of the chip, then the config's own, which win."""
    defaults = chips.xla_options(chips.detect(jax.devices()[0]), jax.device_count())
    return {**defaults, **mesh.xla_options.to_dict()}


def check_xla_options(mesh: ConfigDict) -> None:
    """Raises ValueError for an option of the config that the compiler of this machine refuses."""
    for name, value in mesh.xla_options.items():
        try:
            jax.jit(lambda x: x, compiler_options={name: value}).lower(0).compile()
        except (RuntimeError, TypeError, ValueError) as error:  # unknown; no value for an option
            said = str(error) if isinstance(error, RuntimeError) else "no bool, number or text"
            raise ValueError(
                f"mesh.xla_options.{name} is {value!r}: {said.removeprefix('INVALID_ARGUMENT: ')}; "
                f"options of XLA and their types are the fields of DebugOptions in its xla.proto"
            ) from error


def device_mesh(mesh: ConfigDict) -> Mesh | None:
    """The mesh of all devices; None where there is one device only, and nothing to lay out.

    Raises ValueError for a shape that cannot be, and for microbatches below 1.
    """
    if mesh.microbatches < 1:
        raise ValueError(f"mesh.microbatches is {mesh.microbatches}; it must be at least 1")
    built = make_mesh(mesh.shape.to_dict())
    return built if built.size > 1 else None


def sampling_model(model: LanguageModel, mesh: Mesh | None = None) -> LanguageModel:
    """The model as it samples: on `mesh`, or else on its own.

    Of several processes each samples on its own devices: then `mesh` is of those, and without one
    they lie as they do within the model's mesh.
    """
    if hosts.several() and mesh is None:
        mesh = make_mesh(hosts.own_part(model.mesh.shape), jax.local_devices())
    if mesh is None:
        return model
    return LanguageModel(model.config, model.execution, mesh, model.valid_vocab)


def random_params(model: LanguageModel, key: jax.Array) -> Params:
    """Born where the model wants them."""
    places = None if model.mesh is None else model.shardings()
    return jax.jit(model.init, out_shardings=places)(key)


def language_model(
    config: ConfigDict, shape: DecoderConfig, tokenizer: Tokenizer, value_head: bool = False
) -> LanguageModel:
    """The run's model. Kernels that it chose are first held against plain XLA's results.

    Raises ValueError where it cannot run here, or a kernel's results are wrong.
    """
    model = LanguageModel(
        shape,
        dataclasses.replace(execution(config.mesh), deterministic=config.run.deterministic),
        device_mesh(config.mesh),
        valid_vocab=tokenizer.vocab_size,
        value_head=value_head,
    )
    if model.attention not in attention.PLAIN:
        attention.check(model.attention, model.attention_use, model.execution.deterministic)
    if model.decode_attention not in decode_choice.PLAIN:
        decode_choice.check(model.decode_attention, model.decode_use)
    if model.expert_product not in (None, "loop"):  # a loop is XLA's own operations
        grouped.check(model.expert_product, jax.numpy.dtype(model.execution.dtype))
    return model


def tokenizer(config: ConfigDict, workdir: Workdir, start: Checkpoint) -> Tokenizer:
    """The run's tokenizer, made once and kept in the workdir: turns end as the template says.

    Raises ValueError for an unknown kind, a path that holds none, and a template that it cannot
    write.
    """
    made = hosts.first(lambda: _kept_tokenizer(config, workdir, start))
    return made or load_tokenizer(workdir.tokenizer)


def _kept_tokenizer(config: ConfigDict, workdir: Workdir, start: Checkpoint) -> Tokenizer:
    spec = config.tokenizer
    if (workdir.tokenizer / "tokenizer_config.json").exists():
        return load_tokenizer(workdir.tokenizer)
    partial = workdir.path / ".tokenizer.partial"
    partial.mkdir(exist_ok=True)
    if spec.kind == "bytes":
        made = ByteTokenizer()
    elif spec.kind == "hf":
        made = load_tokenizer(_one_path(spec.path, "tokenizer.path"))
    elif spec.kind == "checkpoint":
        made = start.tokenizer().limited_to(architecture(config, start).vocab_size)
    elif spec.kind == "sentencepiece":
        made = train_sentencepiece(
            _training_texts(spec, workdir.data), partial / "sentencepiece.model", spec.vocab_size
        )
    else:
        raise ValueError(
            f"tokenizer.kind is {spec.kind!r}; it must be bytes, sentencepiece, hf or checkpoint"
        )
    if spec.kind != "checkpoint":
        _check_same_tokens(made, start, spec.kind)
    made = chat.fitted(made, template_name(config))
    made.save(partial, chat_template=chat_template(config, made).jinja)
    partial.rename(workdir.tokenizer)
    return made


def _check_same_tokens(made: Tokenizer, start: Checkpoint, kind: str) -> None:
    """Raises ValueError where the parameters were trained with other tokens; more may follow."""
    other = first_difference(made, start)
    if other is not None:
        token, there, here = other
        raise ValueError(
            f"tokenizer.kind is {kind!r}, but init.from = {start.text!r} was trained with "
            f"other tokens (id {token} is {there!r} there and {here!r} here); set "
            "tokenizer.kind to checkpoint"
        )


def first_difference(made: Tokenizer, start: Checkpoint) -> tuple[int, str, str | None] | None:
    """(id, its text with the checkpoint's tokenizer, its text with `made`) of the first that are
    not the same; None where none is, `made` may have more, or no tokenizer lies beside it."""
    if start.directory is None or not (start.tokenizer_folder / "tokenizer_config.json").is_file():
        return None
    own = load_tokenizer(start.tokenizer_folder)
    if made.fingerprint() == own.fingerprint():
        return None
    for token in range(own.vocab_size):
        there, here = own.decode([token]), made.decode([token]) if token < made.vocab_size else None
        if there != here:
            return token, there, here
    return None


def _one_path(path: str, key: str) -> pathlib.Path:
    """A folder given by the user: as written, under the data root, or from a hub."""
    if hub.is_address(path):
        return hub.resolve(path, weights=False)
    for base in (pathlib.Path(), sources.data_root()):
        if path and (base / path).is_dir():
            return base / path
    raise ValueError(f"{key} is {path!r}; no such folder, here or in {sources.data_root()}")


def _training_texts(spec: ConfigDict, data_dir: pathlib.Path):
    """Documents for the tokenizer, until `max_bytes` of them have been read."""
    source = sources.JsonlSource(
        spec.path, fields={spec.text_field: ""}, data_dir=data_dir, key="tokenizer.path"
    )
    read = 0
    for index in range(len(source)):
        text = source[index][spec.text_field]
        yield text
        read += len(text.encode())
        if read >= spec.max_bytes:
            return


def chat_template(config: ConfigDict, tokenizer: Tokenizer) -> chat.ChatTemplate:
    spec = {"tags": think_tags(config), "today": chat_date(config)}
    return chat.template_for(template_name(config), tokenizer, **spec)


def think_tags(config: ConfigDict) -> chat.ThinkTags:
    return chat.ThinkTags(config.chat.think_open, config.chat.think_close)


def chat_date(config: ConfigDict) -> datetime.date | None:
    """The day that templates tell, None for the clock's. Raises ValueError."""
    try:
        return datetime.date.fromisoformat(config.chat.date) if config.chat.date else None
    except ValueError as error:
        raise ValueError(
            f"chat.date is {config.chat.date!r}; it must be a day as in 2024-07-26, or empty"
        ) from error


def split_reasoning(config: ConfigDict) -> Callable[[str], tuple[str | None, str]]:
    """chat.split_reasoning with the run's tags."""
    return functools.partial(chat.split_reasoning, tags=think_tags(config))


def rewards(config: ConfigDict, terms: Mapping[str, mix.RewardConfig]) -> mix.Reward:
    """The terms' weighted sum, which tells reasoning from answer by the run's tags."""
    return mix.build(terms, split_reasoning(config), think_tags(config))


def template_name(config: ConfigDict) -> str:
    """`chat.template`; `checkpoint` becomes what init.from was trained with: a name or a folder."""
    if config.chat.template != "checkpoint":
        return os.path.expanduser(config.chat.template)
    return _first_start(config).chat_template()


def data_config(config: ConfigDict, stage: ConfigDict) -> DataConfig:
    """`stage.data` as the pipeline takes it; its own ValueErrors name the keys."""
    return DataConfig(**stage.data.to_dict(), **chat_fields(config), seed=config.seed)


def chat_fields(config: ConfigDict) -> dict[str, object]:
    """What DataConfig wants to know of conversations."""
    return {
        "chat_template": template_name(config),
        "think_tags": think_tags(config),
        "today": chat_date(config),
    }


def from_section(cls, section: ConfigDict | dict):
    """A frozen dataclass from a section of the configuration with the same field names."""
    fields = section.to_dict() if isinstance(section, ConfigDict) else section
    return cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name in fields})


def export(
    config: ConfigDict, model: LanguageModel, params, tokenizer: Tokenizer, directory: pathlib.Path
) -> None:
    """hf/STAGE: weights, tokenizer and chat template for transformers and vLLM."""
    template = chat_template(config, tokenizer)
    hf.export_hf(
        directory,
        model.config,
        params,
        generation=generation(config, tokenizer),
        save_tokenizer=lambda path: tokenizer.save(path, chat_template=template.jinja),
        dtype=jax.numpy.dtype(config.run.export_dtype),
    )


def generation(config: ConfigDict, tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: every id that ends a generation here, the turn's end first.

    The rest is as init.from had it: sampling, and the id that begins a text where the tokenizer is
    its own too.
    """
    said = _first_start(config).generation()
    if config.tokenizer.kind != "checkpoint":
        said.pop("bos_token_id", None)
    ends = [tokenizer.eos_id, *tokenizer.stop_ids] if tokenizer.stop_ids else tokenizer.eos_id
    return {**said, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}


def _first_start(config: ConfigDict) -> Checkpoint:
    """Where training starts from: not from a stage of the run itself, where there is a choice.

    Of stages those that train count, where there are any.
    """
    if "init" in config:
        return checkpoints.parse(config.init["from"])
    stages = list(config.stages.values())
    trained = [stage for stage in stages if "train" in stage]
    # "" where a server is the teacher; a stage that curates has solvers, or nobody.
    texts = [
        stage.init["from"] if "init" in stage else next(iter(stage.solvers), "")
        for stage in trained or stages
    ]
    outside = next((text for text in texts if not text.startswith("@")), texts[0])
    return checkpoints.parse(outside or "random")
