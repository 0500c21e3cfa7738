"""Hugging Face weights here and back: names, shapes, slices, and every refusal."""

import dataclasses
import json
import pathlib
import shutil
import struct
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CASES, make
from safetensors.numpy import load_file, save_file

from jaxreason.checkpoint import hf, hf_names, safetensors_files, whole_folder
from jaxreason.checkpoint.vocabulary import resize_vocab
from jaxreason.model.config import FAMILIES, DecoderConfig
from jaxreason.model.decoder import LanguageModel

SHAPE = DecoderConfig(vocab_size=160, num_layers=3, embed_dim=48, mlp_dim=96, num_heads=6,
                      num_kv_heads=2, head_dim=24, rope_theta=1e4, max_length=1024)  # fmt: skip
GEMMA = dict(attention_scale=0.5, window=8, sliding_layers=(0, 2), local_rope_theta=1e4)
OF_FAMILY = {"gemma3_text": GEMMA, "qwen3_moe": dict(num_experts=3, experts_per_token=2)}


def shape_of(family, **changes):
    return dataclasses.replace(SHAPE, family=family, **OF_FAMILY.get(family, {}), **changes)


def random_params(config, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32), dtype)
    return jax.tree.map(draw, hf_names.shapes(config))


def export(directory, config, params, **options):
    hf.export_hf(directory, config, params, **{"generation": {}, **options})
    return directory


@pytest.fixture
def exported(tmp_path):
    """A small untied export, to be spoiled."""
    config = dataclasses.replace(SHAPE, tie_embeddings=False)
    return export(tmp_path / "model", config, random_params(config))


def respell(directory, change):
    """Rewrites the weights file after `change(tensors)`."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def assert_trees_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refusal(directory, **options):
    with pytest.raises(ValueError) as error:
        hf.import_hf(directory, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- names and shapes -----------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_every_weight_of_the_decoder(family, tied):
    config = shape_of(family, tie_embeddings=tied)
    of = lambda tree: jax.tree.map(lambda leaf: leaf.shape, tree)
    assert of(hf_names.shapes(config)) == of(LanguageModel(config).shapes)


def test_the_text_part_of_a_multimodal_gemma_is_imported(tmp_path):
    """In the names that transformers writes, and in those of 4.52."""
    pytest.importorskip("torch", reason="transformers makes the checkpoint")
    transformers = pytest.importorskip("transformers")
    (case,) = (case for case in CASES if case.name == "gemma3-tied")
    model = make(case)
    text = transformers.Gemma3TextConfig.from_dict(model.config.to_dict())
    vision = dict(
        model_type="siglip_vision_model", hidden_size=16, intermediate_size=32, image_size=28,
        num_hidden_layers=1, num_attention_heads=2, patch_size=14,
    )  # fmt: skip
    whole = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
    whole.model.language_model.load_state_dict(model.model.state_dict())
    model.save_pretrained(tmp_path / "text")
    whole.save_pretrained(tmp_path / "whole")
    config, params = hf.import_hf(tmp_path / "text")
    assert_trees_bit_equal(hf.import_hf(tmp_path / "whole")[1], params)
    assert hf.import_hf(tmp_path / "whole")[0] == config
    assert set(hf.left_out(tmp_path / "whole")) == {"vision_tower", "multi_modal_projector"}

    def rename(tensors):
        for name in list(tensors):
            newer = name.replace("language_model.model.", "language_model.")
            tensors[f"model.{newer}"] = tensors.pop(name)

    respell(tmp_path / "whole", rename)
    assert_trees_bit_equal(hf.import_hf(tmp_path / "whole")[1], params)


def test_frequencies_of_old_checkpoints_are_passed_over(exported):
    params = hf.import_hf(exported)[1]

    def add(tensors):
        for layer in range(3):
            name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
            tensors[name] = np.ones(12, np.float32)

    respell(exported, add)
    assert_trees_bit_equal(hf.import_hf(exported)[1], params)


def test_names_are_told_in_ranges():
    names = [f"m.{i}.e.{j}.w" for i in range(3) for j in range(4)]
    assert hf_names.brief(names) == ["m.{0-2}.e.{0-3}.w"]
    assert hf_names.brief(["a.1.x", "b", "a.2.x", "a.9.x"]) == ["a.{1-2,9}.x", "b"]
    assert hf_names.brief(["m.0.e.1.w", "m.0.e.2.w", "m.1.e.2.w"]) == ["m.0.e.{1-2}.w", "m.1.e.2.w"]


# --- shards, shardings, dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_and_shardings_change_nothing(family, tmp_path, monkeypatch):
    config = shape_of(family, tie_embeddings=family == "qwen2")
    params = random_params(config)
    monkeypatch.setattr(safetensors_files, "MAX_SHARD_BYTES", 100_000)
    export(tmp_path / "hf", config, params)
    shards = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 2 and all(s.stat().st_size < 110_000 for s in shards)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * leaf.size for leaf in jax.tree.leaves(params))

    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))
    # Layers over one axis and the last dim over the other, or the first alone: the rest replicated.
    shardings = jax.tree.map(lambda x: spread("x") if x.shape[0] % 2 == 0 else None, params)
    shardings["layers"]["w_up"] = spread(*[None] * (params["layers"]["w_up"].ndim - 2), "x", "y")
    shardings["layers"]["wo"] = spread(None, "x", None, "y")
    config_again, again = hf.import_hf(tmp_path / "hf", shardings=shardings)
    assert config_again == config
    assert again["embedding"].sharding == spread("x")
    assert_trees_bit_equal(again, params)
    _, half = hf.import_hf(tmp_path / "hf", dtype=jnp.bfloat16)
    assert_trees_bit_equal(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))


def test_of_a_sharded_leaf_each_part_is_read_once(exported, monkeypatch):
    """In halves over two devices, each half on four: a process reads what it has, once."""
    read, copy = [], hf._copy
    monkeypatch.setattr(hf, "_copy", lambda *piece: read.append(piece[0].size) or copy(*piece))
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    shardings = jax.tree.map(
        lambda leaf: jax.NamedSharding(mesh, jax.P(*[None] * (leaf.ndim - 1), "x")),
        hf_names.shapes(dataclasses.replace(SHAPE, tie_embeddings=False)),
    )
    _, params = hf.import_hf(exported, shardings=shardings)
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_on_cpu_the_array_is_the_memory_that_was_read_into(exported, monkeypatch):
    """A second copy would take as much again: tests/checkpoint/test_hf_memory.py measures it."""
    made, aligned = [], hf._aligned

    def note(*arguments):
        made.append(aligned(*arguments))
        return made[-1]

    monkeypatch.setattr(hf, "_aligned", note)
    _, params = hf.import_hf(exported)
    ours = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert ours == {array.ctypes.data for array in made}


def test_progress_reaches_the_end(exported, tmp_path):
    seen = []
    config, params = hf.import_hf(exported, on_progress=lambda *now: seen.append(now))
    assert seen[-1][1] == seen[-1][2] == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    export(tmp_path / "again", config, params, on_progress=lambda *now: seen.append(now))
    assert seen[-1][1] == seen[-1][2] and seen[-1][0] == "lm_head.weight"


# --- refusals (fault 18: tests/test_peer_faults.py) -----------------------------------------------


def split(directory):
    """The single file as two with an index, `a` and `b`."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, directory / file)
    weight_map = {name: file for file, inside in parts.items() for name in inside}
    rewrite_index(directory, weight_map)
    return weight_map


def rewrite_index(directory, weight_map):
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_an_index_that_does_not_fit_the_shards_is_refused(exported):
    weight_map = split(exported)
    names = sorted(weight_map)
    rewrite_index(exported, {name: weight_map[name] for name in names[1:]})
    assert f"index.json has no entry for {names[0]}, which a.safetensors holds" in refusal(exported)
    rewrite_index(exported, {**weight_map, names[0]: "b.safetensors"})
    assert f"index.json says that b.safetensors holds {names[0]}, which it" in refusal(exported)
    rewrite_index(exported, {**weight_map, "extra": "a.safetensors"})
    assert "index.json says that a.safetensors holds extra, which it does not" in refusal(exported)
    rewrite_index(exported, {})
    assert "has no weight_map" in refusal(exported)


def test_shards_that_are_missing_or_cut_off_are_refused(exported):
    split(exported)
    whole = (exported / "b.safetensors").read_bytes()
    for cut in (whole[:-100], whole[:100], b""):
        (exported / "b.safetensors").write_bytes(cut)
        assert "b.safetensors is not a whole safetensors file" in refusal(exported)
    (exported / "b.safetensors").unlink()
    assert "points to missing files: b.safetensors" in refusal(exported)
    (exported / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not JSON" in refusal(exported)
    (exported / "model.safetensors.index.json").unlink()
    assert "has neither model.safetensors nor" in refusal(exported)
    (exported / "config.json").unlink()
    assert "config.json is missing; expected a Hugging Face model" in refusal(exported)


def test_a_wrong_config_is_refused_in_few_words(exported):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(
        json.dumps({**config, "num_hidden_layers": 5, "layer_types": None})
    )
    message = refusal(exported)
    assert "missing model.layers.{3-4}.self_attn.q_proj.weight" in message and len(message) < 1500
    (exported / "config.json").write_text(json.dumps({**config, "intermediate_size": 90}))
    assert "model.layers.{0-2}.mlp.up_proj.weight has shape (96, 48), not (90" in refusal(exported)


def test_a_head_beside_a_tied_embedding_must_equal_it(tmp_path):
    params = random_params(SHAPE)
    export(tmp_path / "hf", SHAPE, params)

    def write_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def spoil_head(tensors):
        tensors["lm_head.weight"][3, 4] += 1

    respell(tmp_path / "hf", write_head)
    assert_trees_bit_equal(hf.import_hf(tmp_path / "hf")[1], params)
    respell(tmp_path / "hf", spoil_head)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(tmp_path / "hf")


def test_a_leaf_in_two_dtypes_has_none_of_its_own(exported):
    def halve(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.float16)

    respell(exported, halve)
    hf.import_hf(exported)
    assert "model.layers.{layer}.mlp.up_proj.weight is in F16 and F32" in refusal(
        exported, dtype=None
    )


def test_two_entries_of_one_name_in_a_header_are_refused(exported):
    """safetensors itself keeps the last, where both point to the same bytes."""
    path = exported / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip()
    twice = b'"model.norm.weight"' + header.split(b'"model.norm.weight"')[1].split(b"}")[0] + b"}"
    header = header[:-1] + b"," + twice + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert "duplicate model.norm.weight in the header of model.safetensors" in refusal(exported)


# --- export ---------------------------------------------------------------------------------------


def test_transformers_loads_the_export(tmp_path):
    torch = pytest.importorskip("torch", reason="transformers loads with torch")
    transformers = pytest.importorskip("transformers")
    params = random_params(SHAPE)
    said = {"eos_token_id": [3, 5], "pad_token_id": 0, "temperature": 0.6, "do_sample": True}
    save_tokenizer = lambda path: (path / "tokenizer.json").write_text("{}")
    export(tmp_path / "hf", SHAPE, params, dtype=jnp.bfloat16, generation=said,
           save_tokenizer=save_tokenizer)  # fmt: skip
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([3, 5], 0)
    assert model.generation_config.temperature == 0.6
    assert model.generation_config.eos_token_id == [3, 5]
    assert (tmp_path / "hf" / "tokenizer.json").read_text() == "{}"
    saved = model.model.layers[2].mlp.down_proj.weight.detach().float().numpy()
    ours = np.asarray(params["layers"]["w_down"][2].astype(jnp.bfloat16).astype(jnp.float32)).T
    np.testing.assert_array_equal(saved, ours)


def test_export_replaces_a_model_and_nothing_else(tmp_path):
    target = export(tmp_path / "hf", SHAPE, random_params(SHAPE, 0))
    (target / "stale.txt").write_text("from an older export")
    newer = random_params(SHAPE, 1)
    export(target, SHAPE, newer)
    assert_trees_bit_equal(hf.import_hf(target)[1], newer)
    assert not (target / "stale.txt").exists()

    def fail(path):
        raise PermissionError("not yours")

    with pytest.raises(PermissionError, match="not yours"):
        export(target, SHAPE, random_params(SHAPE, 2), save_tokenizer=fail)
    assert_trees_bit_equal(hf.import_hf(target)[1], newer)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no Hugging Face model to replace"):
        export(tmp_path / "thesis", SHAPE, newer)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"mounting a tmpfs is not allowed here: {done.stderr if done else 'no mount'}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "while writing"])
def test_a_full_disk_leaves_nothing(small_disk, monkeypatch, seen):
    config = dataclasses.replace(SHAPE, vocab_size=8000)
    params = random_params(config)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    if not seen:  # another process takes the room meanwhile
        free = dataclasses.make_dataclass("Usage", ["free"])(10**12)
        monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda path: free)
    with pytest.raises(ValueError, match=f"small/hf: the disk has no room for the {num_bytes:,} b"):
        export(small_disk / "hf", config, params)
    assert list(small_disk.iterdir()) == []


# --- more tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_new_tokens_are_the_mean_of_the_known_ones(tied):
    """Padding rows of the table are not known tokens: they are replaced and not averaged."""
    config = dataclasses.replace(SHAPE, tie_embeddings=tied)
    params = random_params(config)
    bigger, grown = resize_vocab(params, config, 170, used_rows=150)
    assert bigger == dataclasses.replace(config, vocab_size=170)
    for name in ("embedding",) if tied else ("embedding", "lm_head"):
        table, before = np.asarray(grown[name]), np.asarray(params[name])
        np.testing.assert_array_equal(table[:150], before[:150])
        # float32 sums of 150 numbers of order 1 in another order
        want = np.broadcast_to(before[:150].mean(0), (20, 48))
        np.testing.assert_allclose(table[150:], want, atol=1e-6)
    assert grown["layers"] is params["layers"]


def test_padded_vocabularies_keep_all_their_rows(tmp_path):
    """151,669 entries in 151,936 rows: the tokenizer is not asked, there and back."""
    config = dataclasses.replace(SHAPE, vocab_size=151_936, embed_dim=2, num_layers=1)
    params = random_params(config, dtype=jnp.bfloat16)
    export(tmp_path / "hf", config, params)
    assert load_file(tmp_path / "hf/model.safetensors")["model.embed_tokens.weight"].shape == (
        151_936, 2,
    )  # fmt: skip
    assert_trees_bit_equal(hf.import_hf(tmp_path / "hf", dtype=None)[1], params)


def test_no_pickle_is_read(exported):
    (exported / "model.safetensors").rename(exported / "pytorch_model.bin")
    assert "has neither model.safetensors nor" in refusal(pathlib.Path(exported))
