"""Adapters in PEFT's files, against peft itself: logits, merged weights, and what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, VOCAB, make
from safetensors.numpy import load_file, save_file
from tiny_models import CONFIG, assert_trees_equal

from jaxreason.checkpoint import hf, hf_names, hub, peft
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.model.lora import LoraConfig
from jaxreason.recipes import checkpoints, weights

NAMES = ("qwen3-tied", "qwen2-tied", "llama-untied-linear", "gemma3-tied")
IDS = np.random.default_rng(0).integers(3, VOCAB, (2, 40))
LORA = LoraConfig(rank=4, alpha=12.0)
TINY = DecoderConfig(**CONFIG)


def random_adapters(lora: LoraConfig, config: DecoderConfig):
    """A and B of order 0.1, so that a wrong scale or a turned matrix shows in the logits."""
    random = np.random.default_rng(1)
    draw = lambda leaf: random.normal(0, 0.1, leaf.shape).astype(np.float32)
    return jax.tree.map(draw, LanguageModel(config, lora=lora).shapes)


@functools.partial(jax.jit, static_argnums=0)
def logits(model: LanguageModel, params):
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    h_BTD = model.hidden(params, IDS, jnp.ones_like(positions), positions)
    return jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params), precision="highest")


def plain(config: DecoderConfig) -> LanguageModel:
    return LanguageModel(config, Execution(attention="reference", scan_layers=not config.window))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """name -> (directory of the base, torch model, config, parameters): made when asked for."""
    reason = "parity with peft needs torch, transformers and peft (.[test] on Python 3.11)"
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=reason)
    cases = {case.name: case for case in CASES}

    @functools.cache
    def family(name: str):
        directory = tmp_path_factory.mktemp("base") / name
        torch_model = make(cases[name])
        torch_model.save_pretrained(directory)
        return directory, torch_model, *hf.import_hf(directory)

    return family


def torch_logits(torch_model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return torch_model.eval()(torch.tensor(IDS)).logits.numpy()


def assert_same_logits(got, want):
    """float32 sums of 3 to 5 layers in another order: 1e-4 of the largest logit, with room."""
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
def test_an_exported_adapter_is_the_same_model_in_peft(families, name, tmp_path):
    directory, _, config, params = families(name)
    adapters = random_adapters(LORA, config)
    peft.export_peft(tmp_path / "adapter", LORA, config, adapters, (str(directory), None))

    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype="float32", attn_implementation="eager"
    )
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    complete = LanguageModel(config, lora=LORA).complete(adapters, params)
    want = torch_logits(theirs)
    assert np.abs(want - logits(plain(config), params)).max() > 0.5  # the adapter does something
    assert_same_logits(logits(plain(config), complete), want)

    merged = theirs.merge_and_unload().state_dict()
    ours, sizes = plain(config).merge(complete), hf_names.sizes(config)
    for row in hf_names.rows(config):
        leaf = np.asarray(hf_names.get(ours, row.path))
        for place in row.places(sizes):
            there = merged[row.name_at(place)].numpy()
            np.testing.assert_allclose(row.to_there(leaf[place]), there, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_of_peft_is_the_same_model_here(families, name, tmp_path):
    """Through init.from: the base comes from the adapter's own settings."""
    import peft as theirs_lib

    directory, torch_model, config, _ = families(name)
    layers = config.num_layers
    targets = {  # every way of naming modules, over the families
        "qwen3-tied": "all-linear",
        "qwen2-tied": ["q_proj", "v_proj", "mlp.down_proj"],
        "llama-untied-linear": r".*\.(q|o)_proj",
        "gemma3-tied": [f"model.layers.{i}.self_attn.o_proj" for i in range(layers)],
    }[name]
    wanted = theirs_lib.LoraConfig(
        r=5, lora_alpha=7, target_modules=targets, use_rslora=name == "qwen2-tied",
        lora_dropout=0.1, init_lora_weights=False,
    )  # fmt: skip
    theirs = theirs_lib.get_peft_model(torch_model, wanted)
    for parameter_name, weight in theirs.named_parameters():
        if "lora_" in parameter_name:
            weight.data.normal_(0, 0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    want = torch_logits(theirs)
    theirs.unload()

    settings = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert not settings["base_model_name_or_path"]  # the model was made, not loaded
    settings["base_model_name_or_path"] = str(directory)
    (tmp_path / "adapter" / peft.CONFIG).write_text(json.dumps(settings))
    start = checkpoints.parse(str(tmp_path / "adapter"))
    assert start.kind == "adapter" and start.architecture() == config
    params = weights.load(start, plain(config), None)
    assert_same_logits(logits(plain(config), params), want)


def test_what_is_exported_comes_back_bit_for_bit(tmp_path):
    lora = LoraConfig(rank=3, alpha=5.5, targets=("o_proj", "up_proj"))
    adapters = random_adapters(lora, TINY)
    for _ in range(2):  # the second replaces the first
        peft.export_peft(tmp_path / "a", lora, TINY, adapters, ("org/name", "main"))
    again, loaded = peft.import_peft(tmp_path / "a", TINY)
    assert again == lora
    assert_trees_equal(loaded, adapters)
    assert peft.base_of(tmp_path / "a") == ("org/name", "main")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no adapter to replace"):
        peft.export_peft(tmp_path / "mine", lora, TINY, adapters)


def changed(tmp_path, settings=(), tensors=lambda found: found):
    """An exported adapter with changed settings and tensors, imported."""
    peft.export_peft(tmp_path / "a", LORA, TINY, random_adapters(LORA, TINY), ("org/name", None))
    path = tmp_path / "a" / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(settings)))
    weights = tmp_path / "a" / peft.WEIGHTS
    save_file(tensors(load_file(weights)), weights)
    return peft.import_peft(tmp_path / "a", TINY)


REFUSED = {
    "peft_type": "LOHA", "use_dora": True, "bias": "all", "lora_bias": True,
    "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 8},
    "fan_in_fan_out": True, "layers_to_transform": [0], "init_lora_weights": "pissa",
    "layer_replication": [[0, 1]], "a_key_of_tomorrow": "on",
}  # fmt: skip


@pytest.mark.parametrize("key", REFUSED)
def test_settings_that_compute_something_else_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} is ") as error:
        changed(tmp_path, {key: REFUSED[key]})
    assert repr(REFUSED[key]) in str(error.value) and "\n" not in str(error.value)


def test_settings_of_training_alone_are_not(tmp_path):
    training = {"lora_dropout": 0.2, "inference_mode": False, "task_type": None, "r": 4,
                "init_lora_weights": "gaussian", "eva_config": {"rho": 2.0}}  # fmt: skip
    assert changed(tmp_path, training)[0] == LORA
    assert changed(tmp_path, {"use_rslora": True})[0].alpha == 24.0  # 12 / sqrt(4) = 24 / 4


TARGETS = {
    "some layers": ([r"model.layers.1.mlp.up_proj", "q_proj"], r"adapts up_proj in layers \[1\]"),
    "none": (["query"], r"target_modules is \['query'\], none of q_proj, k_proj"),
    "broken": ("(q", r"'\(q' is no regular expression"),
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_that_cannot_be_are_refused(tmp_path, case):
    targets, message = TARGETS[case]
    with pytest.raises(ValueError, match=message):
        changed(tmp_path, {"target_modules": targets})


def test_every_tensor_that_does_not_fit_is_listed(tmp_path):
    first = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight".format

    wide = "base_model.model.model.layers.{}.mlp.down_proj.lora_B.weight".format

    def broken(found):
        for layer in range(TINY.num_layers):  # as of a model of another width
            found[wide(layer)] = np.zeros((7, 4), np.float32)
        found[first(0)] = found[first(0)].T.copy()
        del found[first(1)]
        found["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)
        found["x.0.y"] = found["x.1.y"] = np.zeros(1, np.int8)
        return found

    with pytest.raises(ValueError) as error:
        changed(tmp_path, tensors=broken)
    for problem in (
        f"missing {first(1)}",
        "unknown base_model.model.lm_head.lora_A.weight",
        "unknown x.{0-1}.y",
        f"{first(0)} has shape (32, 4), not (4, 32)",
        f"{wide(f'{{0-{TINY.num_layers - 1}}}')} has shape (7, 4), not (",
        "does not fit its base: ",
    ):
        assert problem in str(error.value), problem


def test_a_pickle_is_not_read(tmp_path):
    peft.export_peft(tmp_path, LORA, TINY, random_adapters(LORA, TINY), ("org/name", None))
    (tmp_path / peft.WEIGHTS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors"):
        peft.import_peft(tmp_path, TINY)


def test_an_adapter_on_the_hub_brings_its_base(tmp_path, monkeypatch):
    changed(tmp_path, {"base_model_name_or_path": "org/base", "revision": "v1"})
    places = {"hf://org/tuned@main": tmp_path / "a", "hf://org/base@v1": tmp_path / "base"}
    monkeypatch.setattr(hub, "resolve", places.__getitem__)
    start = checkpoints.parse("hf://org/tuned@main")
    assert (start.kind, start.name, start.directory) == ("adapter", "tuned", tmp_path / "a")
    assert (start.base.kind, start.base.directory) == ("hf", tmp_path / "base")


def test_a_base_that_is_not_there_is_named(tmp_path):
    changed(tmp_path, {"base_model_name_or_path": None})
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        checkpoints.parse(str(tmp_path / "a"))
    changed(tmp_path, {"base_model_name_or_path": "no/such/place"})
    with pytest.raises(ValueError, match=r"an adapter to a base: 'hf://no/such/place' is no repos"):
        checkpoints.parse(str(tmp_path / "a"))
