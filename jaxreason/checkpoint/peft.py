"""LoRA adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, both ways.

A module's `lora_A.weight` is [r, in] and its `lora_B.weight` [out, r], a pair for each layer; ours
are stacked over layers with the dims of the weight that they adapt (model/lora.py).
Source: the format as peft 0.21 writes and reads it (huggingface.co/docs/peft, "Checkpoint format").
"""

import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxreason.checkpoint import hf_names
from jaxreason.checkpoint.safetensors_files import (
    Entry,
    misfits,
    open_file,
    read_json,
    write_json,
    write_shards,
)
from jaxreason.checkpoint.whole_folder import written_whole
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import TARGETS, LoraConfig
from jaxreason.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# Keys of adapter_config.json that import_peft reads, and those that only training did. Of the rest,
# known today or not, any that is set may make the adapter compute something else: it is refused.
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules",
    "base_model_name_or_path", "revision",
}  # fmt: skip
_ONLY_TRAINING = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "runtime_config",
    "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "layers_pattern",
}  # fmt: skip
# Other ways to begin (pissa, olora, corda, loftq, ...) change the base as well.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")


def is_adapter(directory: pathlib.Path) -> bool:
    """Whether it holds an adapter and no whole model (some tools put the base's config beside)."""
    return (directory / CONFIG).is_file() and not any(directory.glob("model*.safetensors"))


def base_of(directory: pathlib.Path) -> tuple[str, str | None]:
    """(the base that the adapter was trained on, a directory or ORG/NAME; its revision)."""
    settings = read_json(directory / CONFIG)
    base = settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{directory / CONFIG} names no base_model_name_or_path")
    return base, settings.get("revision")


def settings_of(directory: pathlib.Path) -> dict[str, Any]:
    """What adapter_config.json says of the adapter itself: all but where its base lies."""
    settings = read_json(directory / CONFIG)
    return {k: v for k, v in settings.items() if k not in ("base_model_name_or_path", "revision")}


# --- import ---------------------------------------------------------------------------------------


def import_peft(directory: pathlib.Path, config: DecoderConfig) -> tuple[LoraConfig, Params]:
    """(rank, alpha and targets; the adapters as numpy arrays, float32) of a PEFT LoRA directory.

    Args:
      config: of the base.

    Raises ValueError, one line, for settings under which PEFT would compute something else, and
    one naming every unknown, missing, duplicate, misshapen or non-float tensor.
    """
    settings = read_json(directory / CONFIG)
    lora = _lora_config(directory / CONFIG, settings, config)
    if not (directory / WEIGHTS).is_file():
        raise ValueError(f"{directory} has no {WEIGHTS}; adapters in pickles (.bin) are not read")
    tensors, duplicates = open_file(directory / WEIGHTS)
    found = {tensor.name: tensor for tensor in tensors}
    expected = _names(lora, config)
    problems = [f"duplicate {name}" for name in duplicates]
    problems += misfits(
        {name: place[-1] for name, place in expected.items()},
        {name: [tensor] for name, tensor in found.items()},
    )
    if problems:
        raise ValueError(f"{directory / WEIGHTS} does not fit its base: {'; '.join(problems)}")
    shapes = LanguageModel(config, lora=lora).shapes["lora"]["layers"]
    adapters = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    for name, (weight, part, layer, _) in expected.items():
        leaf = adapters[weight][part][layer]
        leaf[...] = found[name].array.T.astype(np.float32).reshape(leaf.shape)
    return lora, {"lora": {"layers": adapters}}


def _lora_config(path: pathlib.Path, settings: Mapping, config: DecoderConfig) -> LoraConfig:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {settings.get('peft_type')!r}; only LORA is read")
    for key, value in settings.items():
        refused = bool(value) and value != "none" and key not in _READ | _ONLY_TRAINING
        if key == "init_lora_weights":
            refused = value not in _INITS
        if refused:
            raise ValueError(
                f"{path}: {key} is {value!r}, which computes something else than "
                "W + alpha / rank A B; an adapter without it can be read"
            )
    rank, alpha = settings["r"], float(settings["lora_alpha"])
    if settings.get("use_rslora"):
        alpha *= math.sqrt(rank)  # PEFT multiplies by alpha / sqrt(r) then (arXiv 2312.03732)
    return LoraConfig(rank=rank, alpha=alpha, targets=_targets(path, settings, config))


def _targets(path: pathlib.Path, settings: Mapping, config: DecoderConfig) -> tuple[str, ...]:
    """Of TARGETS, those that PEFT would adapt in every layer.

    Raises ValueError where it would in some layers only, or in none.
    """
    chosen, excluded = settings["target_modules"], settings.get("exclude_modules") or ()
    targets = []
    for target, module in _modules(config).items():
        layers = [
            layer
            for layer in range(config.num_layers)
            if _matches(path, chosen, module.format(layer=layer))
            and not _matches(path, excluded, module.format(layer=layer))
        ]
        if layers and len(layers) < config.num_layers:
            raise ValueError(
                f"{path}: target_modules adapts {target} in layers {layers} of "
                f"{config.num_layers}; it must be all or none"
            )
        targets += [target] if layers else []
    if not targets:
        raise ValueError(
            f"{path}: target_modules is {chosen!r}, none of {', '.join(_modules(config))}"
        )
    return tuple(targets)


def _matches(path: pathlib.Path, pattern: str | list[str], module: str) -> bool:
    """As PEFT's: one text is a regular expression of the whole name, a list holds their ends."""
    if pattern == "all-linear":
        return True
    if not isinstance(pattern, str):
        return any(module == end or module.endswith(f".{end}") for end in pattern)
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise ValueError(f"{path}: {pattern!r} is no regular expression: {error}") from None


# --- export ---------------------------------------------------------------------------------------


def export_peft(
    directory: pathlib.Path,
    lora: LoraConfig,
    config: DecoderConfig,
    adapters: Params,
    base: tuple[str | None, str | None] = (None, None),
    save_tokenizer: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes a directory that PeftModel.from_pretrained loads over the base; replaces an older one.

    Args:
      adapters: as LanguageModel.init makes them, not scaled; float32 in the file.
      base: base_model_name_or_path and revision, None where the base is no Hugging Face model.
      save_tokenizer: writes the tokenizer, with its chat template, into a folder.

    Everything is written beside and moved into place whole. Raises ValueError when `directory`
    holds something else than an adapter, or when the disk is full.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists() and any(directory.iterdir()) and not (directory / CONFIG).is_file():
        raise ValueError(f"{directory} is not empty and holds no adapter to replace")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base[0],
        "revision": base[1],
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": list(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
    names = _names(lora, config)
    entries = [Entry(name, shape, np.dtype(np.float32)) for name, (*_, shape) in names.items()]
    with written_whole(directory, sum(entry.num_bytes for entry in entries)) as partial:
        write_shards(partial, {WEIGHTS: entries}, _arrays(names, adapters))
        write_json(partial / CONFIG, settings)
        if save_tokenizer is not None:
            save_tokenizer(partial)


def _arrays(names: Mapping, adapters: Params) -> Iterator[np.ndarray]:
    layers = jax.device_get(adapters["lora"]["layers"])
    for weight, part, layer, shape in names.values():
        yield layers[weight][part][layer].reshape(shape[::-1]).T


# --- names ----------------------------------------------------------------------------------------


def _names(lora: LoraConfig, config: DecoderConfig) -> dict[str, tuple[str, str, int, tuple]]:
    """PEFT's name -> (weight, "a" or "b", layer, PEFT's shape)."""
    shapes, modules = LanguageModel(config, lora=lora).shapes["lora"]["layers"], _modules(config)
    names = {}
    for target in lora.targets:
        weight = TARGETS[target][0]
        into = math.prod(shapes[weight]["a"].shape[1:-1])
        out = math.prod(shapes[weight]["b"].shape[2:])
        for layer in range(config.num_layers):
            module = _PREFIX + modules[target].format(layer=layer)
            names[f"{module}.lora_A.weight"] = (weight, "a", layer, (lora.rank, into))
            names[f"{module}.lora_B.weight"] = (weight, "b", layer, (out, lora.rank))
    return names


def _modules(config: DecoderConfig) -> dict[str, str]:
    """Of TARGETS, what this model has as one matrix a layer: its name, with {layer} to fill in."""
    rows = {row.path: row for row in hf_names.rows(config)}
    return {
        target: rows[f"layers/{weight}"].name.removesuffix(".weight")
        for target, (weight, _) in TARGETS.items()
        if "{expert}" not in rows[f"layers/{weight}"].name
    }
