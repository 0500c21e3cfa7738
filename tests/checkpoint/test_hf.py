"""Hugging Face Qwen3 here and back: every tensor, every refusal, and transformers' own logits."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxreason.checkpoint import hf
from jaxreason.model.config import PRESETS, DecoderConfig

THETAS = (1e4, 1e6, 5e6)
SHAPE = DecoderConfig(vocab_size=160, num_layers=3, embed_dim=48, mlp_dim=96, num_heads=6,
                      num_kv_heads=2, head_dim=24, rope_theta=1e4, max_length=1024)  # fmt: skip
NO_IDS = {"eos_id": None, "pad_id": None}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="transformers parity needs torch")


@pytest.fixture(scope="module")
def checkpoints(torch, tmp_path_factory):
    """{(theta, tied): directory} of random Qwen3 models that transformers made and saved."""
    transformers = pytest.importorskip("transformers")

    def make(theta, tied):
        torch.manual_seed(int(theta) + tied)
        config = transformers.Qwen3Config(
            vocab_size=160, hidden_size=48, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=6, num_key_value_heads=2, head_dim=24, tie_word_embeddings=tied,
            max_position_embeddings=1024, initializer_range=0.2,
            rope_parameters={"rope_theta": theta, "rope_type": "default"})  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config)
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones would not notice a norm left out or swapped
                torch.nn.init.uniform_(weight, 0.5, 1.5)
        directory = tmp_path_factory.mktemp("hf") / f"{theta:g}-{tied}"
        model.save_pretrained(directory)
        return directory

    return {(theta, tied): make(theta, tied) for theta in THETAS for tied in (True, False)}


def random_params(config, seed=0):
    rng, sizes, params = np.random.default_rng(seed), hf._sizes(config), {}
    for row in hf._rows(config):
        leaf = rng.standard_normal(row.shape_here(sizes), np.float32)
        hf._put(params, row.path, jnp.asarray(leaf))
    return params


@pytest.fixture
def exported(tmp_path):
    """A small untied export, to be spoiled."""
    config = dataclasses.replace(SHAPE, tie_embeddings=False)
    hf.export_hf(tmp_path / "model", config, random_params(config), **NO_IDS)
    return tmp_path / "model"


def respell(directory, change):
    """Rewrites the weights file after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def assert_trees_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_hf_to_here_to_hf_is_bit_equal(checkpoints, tmp_path):
    for (theta, tied), source in checkpoints.items():
        config, params = hf.import_hf(source)
        assert config == dataclasses.replace(SHAPE, rope_theta=theta, tie_embeddings=tied,
                                             init_std=0.2)  # fmt: skip
        hf.export_hf(tmp_path / source.name, config, params, **NO_IDS)
        before = load_file(source / "model.safetensors")
        after = load_file(tmp_path / source.name / "model.safetensors")
        assert list(before) and sorted(before) == sorted(after)
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype == np.float32
            np.testing.assert_array_equal(tensor, after[name], err_msg=name)


def test_logits_match_transformers(checkpoints, torch):
    import transformers

    from jaxreason.model.decoder import LanguageModel

    ids = np.random.default_rng(0).integers(0, 160, (1, 512))
    segments, positions = np.ones((1, 512), np.int32), np.arange(512, dtype=np.int32)[None]

    def logits_here(config, params):
        model = LanguageModel(config)

        @jax.jit
        def forward(params):
            h_BTD = model.hidden(params, ids.astype(np.int32), segments, positions)
            return jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))

        return np.asarray(forward(params))

    for directory in checkpoints.values():
        reference = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            theirs = reference(torch.tensor(ids)).logits.numpy()
        config, params = hf.import_hf(directory)
        # Logits are about 5 in size; float32 sums in another order differ by about 1e-5.
        np.testing.assert_allclose(logits_here(config, params), theirs, rtol=0, atol=1e-4)
    # Fault 1 of facts/peers.md: a decoder that ignores the configured base would pass the above for
    # one theta only, and here it would show no difference.
    other = dataclasses.replace(config, rope_theta=1e4)
    assert np.abs(logits_here(other, params) - theirs).max() > 0.1


def test_transformers_loads_the_export(torch, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(SHAPE, rope_theta=5e6)
    params = random_params(config)

    def save_tokenizer(path):
        (path / "tokenizer.json").write_text("{}")

    hf.export_hf(tmp_path / "hf", config, params, dtype=ml_dtypes.bfloat16, eos_id=3, pad_id=0,
                 save_tokenizer=save_tokenizer, generation={"temperature": 0.6})  # fmt: skip
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert model.config.rope_parameters == {"rope_theta": 5e6, "rope_type": "default"}
    assert (model.config.eos_token_id, model.config.pad_token_id) == (3, 0)
    assert model.generation_config.temperature == 0.6
    assert model.generation_config.eos_token_id == 3
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    saved = model.model.layers[2].mlp.down_proj.weight.detach().float().numpy()
    ours = np.asarray(params["layers"]["w_down"][2].astype(jnp.bfloat16).astype(jnp.float32)).T
    np.testing.assert_array_equal(saved, ours)


@pytest.mark.parametrize("tied", [True, False])
def test_shards_and_shardings_change_nothing(tied, tmp_path, monkeypatch):
    config = dataclasses.replace(SHAPE, tie_embeddings=tied)
    params = random_params(config)
    monkeypatch.setattr(hf, "MAX_SHARD_BYTES", 100_000)
    hf.export_hf(tmp_path / "hf", config, params, **NO_IDS)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2 and all(s.stat().st_size < 105_000 for s in shards)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * leaf.size for leaf in jax.tree.leaves(params))

    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    shardings = jax.tree.map(lambda x: sharding if x.shape[0] % 2 == 0 else None, params)
    config_again, again = hf.import_hf(tmp_path / "hf", shardings=shardings)
    assert config_again == config
    assert again["embedding"].sharding == sharding
    assert_trees_bit_equal(again, params)
    _, half = hf.import_hf(tmp_path / "hf", dtype=jnp.bfloat16)
    assert_trees_bit_equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_every_wrong_tensor_is_in_one_error(exported):
    def spoil(tensors):
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(144, np.float32)
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.norm.weight"] = np.ones(47, np.float32)
        tensors["model.layers.2.self_attn.k_norm.weight"] = np.ones(24, np.int8)

    respell(exported, spoil)
    with pytest.raises(ValueError) as error:
        hf.import_hf(exported)
    for part in ("unknown model.layers.0.self_attn.q_proj.bias",
                 "missing model.layers.1.mlp.up_proj.weight", "missing lm_head.weight",
                 "model.norm.weight has shape (47,), not (48,)",
                 "model.layers.2.self_attn.k_norm.weight has dtype I8"):  # fmt: skip
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_duplicates_and_missing_shards_are_errors(exported):
    tensors = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    names = sorted(tensors)
    first = {name: tensors[name] for name in names[:20]}
    second = {name: tensors[name] for name in names[19:]}  # the 20th lies in both
    save_file(first, exported / "a.safetensors")
    weight_map = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    index = exported / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"points to missing files: b.safetensors"):
        hf.import_hf(exported)
    save_file(second, exported / "b.safetensors")
    with pytest.raises(ValueError, match=f"duplicate {names[19]} in a.safetensors, b.safetensors"):
        hf.import_hf(exported)
    whole = (exported / "b.safetensors").read_bytes()
    (exported / "b.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"b.safetensors is not a whole safetensors file"):
        hf.import_hf(exported)
    index.unlink()
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor"):
        hf.import_hf(exported)


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    params = random_params(SHAPE)
    hf.export_hf(tmp_path / "hf", SHAPE, params, **NO_IDS)

    def write_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def spoil_head(tensors):
        tensors["lm_head.weight"][3, 4] += 1

    respell(tmp_path / "hf", write_head)
    assert_trees_bit_equal(hf.import_hf(tmp_path / "hf")[1], params)
    respell(tmp_path / "hf", spoil_head)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        hf.import_hf(tmp_path / "hf")


def test_config_round_trips_in_both_spellings():
    for config in PRESETS.values():
        written = json.loads(json.dumps(hf.config_to_hf(config, eos_id=1, pad_id=0)))
        assert hf.config_from_hf(written) == config
        old = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
        new = {k: v for k, v in written.items() if k not in ("rope_theta", "torch_dtype")}
        assert hf.config_from_hf(old) == hf.config_from_hf(new) == config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'; only 'qwen3'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type is 'linear'"),
        ({"rope_theta": None}, "no rope_theta"),
        ({"rope_parameters": {"rope_theta": 5e6}}, "two values of rope_theta"),
        ({"use_sliding_window": True, "sliding_window": 8}, "sliding window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"num_key_value_heads": None}, "no num_key_value_heads"),
    ],
)
def test_config_refuses_what_it_cannot_honour(change, message):
    plain = hf.config_to_hf(SHAPE, **NO_IDS)
    plain.pop("rope_parameters")
    with pytest.raises(ValueError, match=re.escape(message)):
        hf.config_from_hf({**plain, **change})


def test_head_dim_defaults_to_the_embedding_over_the_heads():
    plain = hf.config_to_hf(SHAPE, **NO_IDS)
    plain.pop("head_dim")
    assert hf.config_from_hf(plain).head_dim == 48 // 6


def test_export_replaces_a_model_and_nothing_else(tmp_path):
    target = tmp_path / "hf"
    hf.export_hf(target, SHAPE, random_params(SHAPE, 0), **NO_IDS)
    (target / "stale.txt").write_text("from an older export")
    newer = random_params(SHAPE, 1)
    hf.export_hf(target, SHAPE, newer, **NO_IDS)
    assert_trees_bit_equal(hf.import_hf(target)[1], newer)
    assert not (target / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def fail(path):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        hf.export_hf(target, SHAPE, random_params(SHAPE, 2), save_tokenizer=fail, **NO_IDS)
    assert_trees_bit_equal(hf.import_hf(target)[1], newer)

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no Hugging Face model to replace"):
        hf.export_hf(tmp_path / "thesis", SHAPE, newer, **NO_IDS)
