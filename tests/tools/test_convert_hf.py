"""tools/convert_hf.py, and the same checkpoints in a launch: there and back, and what is broken."""

import importlib.util
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from jaxreason import launch
from jaxreason.checkpoint import hf, hf_names, hub, whole_folder
from jaxreason.checkpoint.safetensors_files import INDEX
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.parallel.mesh import make_mesh
from jaxreason.recipes import assemble, checkpoints, defaults, weights
from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer

ROOT = pathlib.Path(__file__).parents[2]
BYTES = ByteTokenizer()
SHAPE = DecoderConfig(vocab_size=264, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4,
                      num_kv_heads=2, head_dim=8, init_std=0.3, max_length=256)  # fmt: skip
SAID = {"bos_token_id": None, "eos_token_id": [BYTES.eos_id, 256], "pad_token_id": BYTES.pad_id,
        "do_sample": True, "temperature": 0.6, "top_p": 0.95}  # fmt: skip


@pytest.fixture(scope="module")
def convert_hf():
    spec = importlib.util.spec_from_file_location("convert_hf", ROOT / "tools/convert_hf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def write(folder: pathlib.Path, config: DecoderConfig = SHAPE, **options) -> pathlib.Path:
    params = jax.jit(LanguageModel(config).init)(jax.random.key(0))
    jinja = chat.template_for("qwen3", BYTES).jinja
    save = lambda path: BYTES.save(path, chat_template=jinja)
    hf.export_hf(folder, config, params, generation=SAID, save_tokenizer=save, **options)
    return folder


@pytest.fixture
def source(tmp_path):
    """A bf16 directory with a byte tokenizer, in one file."""
    return write(tmp_path / "source", dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def imported(convert_hf, tmp_path_factory):
    """(directory, the workdir that `import` made of it); to be read only."""
    folder = tmp_path_factory.mktemp("imported")
    write(folder / "source", dtype=jnp.bfloat16)
    assert convert_hf(["import", str(folder / "source"), str(folder / "ours")]) == 0
    return folder / "source", folder / "ours"


# --- there and back -------------------------------------------------------------------------------


def test_import_then_export_is_the_same_directory(convert_hf, imported, tmp_path, capsys):
    source, ours = imported
    back, said = tmp_path / "back", tmp_path / "said.json"
    assert convert_hf(["export", str(ours), str(back)]) == 0
    assert "export: 100 %  model.norm.weight" in capsys.readouterr().err
    assert convert_hf(["check", str(source), str(back), f"--json={said}"]) == 0
    assert "24 tensors in both: equal" in capsys.readouterr().out
    result = json.loads(said.read_text())
    assert result == {
        "equal": True, "tensors": 24, "only_in_a": [], "only_in_b": [], "differences": [],
    }  # fmt: skip
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            assert (back / path.name).read_bytes() == path.read_bytes(), path.name


def test_an_export_in_another_dtype(convert_hf, imported, tmp_path, capsys):
    source, ours = imported
    back = tmp_path / "back"
    assert convert_hf(["export", f"{ours}@imported@0", str(back), "--dtype=float32"]) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "float32"
    assert convert_hf(["check", str(source), str(back)]) == 1  # float32 holds every bfloat16
    shown = capsys.readouterr().out
    assert "BF16[32] | F32[32]" in shown and "and 4 more, none further apart" in shown


@pytest.mark.parametrize("name", ["ours", "ours@imported", "ours@imported@0", "source"])
def test_what_was_imported_is_a_start(imported, name):
    source, ours = imported
    start = checkpoints.parse(f"{ours.parent}/{name}")
    assert start.architecture() == SHAPE
    assert start.tokenizer().encode("<|im_end|>") == [BYTES.eos_id]
    assert start.generation() == {k: v for k, v in SAID.items() if v is not None}
    model = LanguageModel(SHAPE, valid_vocab=BYTES.vocab_size)
    loaded = weights.load(start, model, None)
    jax.tree.map(np.testing.assert_array_equal, loaded, hf.import_hf(source)[1])
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}


def test_a_hub_is_a_start_and_has_tokenizers(imported, monkeypatch):
    """What the hub itself answers: tests/checkpoint/test_hub.py."""
    asked = []

    def resolve(address, weights=True):
        asked.append((address, weights))
        return imported[0]

    monkeypatch.setattr(hub, "resolve", resolve)
    start = checkpoints.parse("hf://org/tiny@v1")
    assert start.architecture() == SHAPE and start.name == "tiny"
    assert assemble._one_path("hf://org/other", "tokenizer.path") == imported[0]
    assert asked == [("hf://org/tiny@v1", True), ("hf://org/other", False)]


def test_sampling_settings_travel_with_a_run(imported):
    """A run from the directory says them again; the ends are those of its own tokenizer."""
    config = defaults.default_config("later", "fit")
    config.update(defaults.stage_config())
    config.init["from"] = str(imported[0])
    config.tokenizer.kind = "checkpoint"
    said = assemble.generation(config, BYTES)
    assert said["temperature"] == 0.6 and said["top_p"] == 0.95
    assert said["eos_token_id"] == BYTES.eos_id and said["pad_token_id"] == BYTES.pad_id
    config.init["from"] = "random"
    assert set(assemble.generation(config, BYTES)) == {"eos_token_id", "pad_token_id"}


def test_an_exported_model_answers_alike_in_transformers(tmp_path):
    """Greedy, 32 tokens, in float32: rounding cannot swap a best two that are 1e-3 apart."""
    torch = pytest.importorskip("torch", reason="transformers generates with torch")
    transformers = pytest.importorskip("transformers")
    slides = dict(family="gemma3_text", window=8, sliding_layers=(0,), local_rope_theta=1e4,
                  attention_scale=0.5)  # fmt: skip
    config = DecoderConfig(**{**vars(SHAPE), **slides})
    folder = write(tmp_path / "hf", config)
    prompt, total = list(b"Why is the sky"), 46
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    said = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False
    )[0].tolist()

    model, params = LanguageModel(config), hf.import_hf(folder)[1]
    positions, ones = jnp.arange(total)[None], jnp.ones((1, total), jnp.int32)

    @jax.jit
    def logits(ids_BT):
        h_BTD = model.hidden(params, ids_BT, ones, positions)
        return jnp.einsum("BTD,VD->BTV", h_BTD, model.head_weight(params))[0]

    ids = list(prompt)
    for at in range(len(prompt), total):
        padded = jnp.asarray([ids + [0] * (total - at)])
        row = np.array(logits(padded)[at - 1])
        row[SAID["eos_token_id"]] = -np.inf  # min_new_tokens
        best, second = np.sort(row)[[-1, -2]]
        assert best - second > 1e-3
        ids.append(int(row.argmax()))
    assert ids == said


def test_a_run_alone_is_its_last_stage(imported, tmp_path):
    """The one that trained last, not the last by name."""
    shutil.copytree(imported[1], tmp_path / "run")
    stages = tmp_path / "run/checkpoints"
    for name in ("base", "aligned"):
        shutil.copytree(stages / "imported", stages / name)
    shutil.rmtree(stages / "imported")
    (stages / "later").mkdir()  # no checkpoint in it yet
    lines = [{"stage": stage, "step": 1} for stage in ("base", "aligned", "later")]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run/metrics.jsonl").write_text(metrics)
    assert checkpoints.parse(str(tmp_path / "run")).stage == "aligned"
    with pytest.raises(ValueError, match=r"the stages of .*/run: base, aligned"):
        checkpoints.parse(f"{tmp_path}/run@later")


# --- more tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["source", "ours"])
def test_a_larger_tokenizer_starts_from_mean_rows(imported, name):
    source, ours = imported
    start = checkpoints.parse(str(ours.parent / name))
    config = ConfigDict({"model": defaults.model_config()})
    config.model.vocab_size = 280
    shape = assemble.architecture(config, start)
    assert shape.vocab_size == 280
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    model = LanguageModel(shape, Execution(), mesh, valid_vocab=279)
    table = weights.load(start, model, None)["embedding"]
    assert table.shape == (280, 32) and table.sharding == model.shardings()["embedding"]
    before = np.asarray(hf.import_hf(source)[1]["embedding"])
    known = BYTES.vocab_size  # 261 of its 264 rows
    np.testing.assert_array_equal(table[:known], before[:known])
    want = np.broadcast_to(before[:known].mean(0), (280 - known, 32))
    np.testing.assert_allclose(table[known:], want, atol=1e-6)  # sums in another order
    # Two more tokens fit the padding of the table as it is.
    padded = LanguageModel(SHAPE, valid_vocab=263)
    table = weights.load(start, padded, None)["embedding"]
    np.testing.assert_allclose(table[known:], want[:3], atol=1e-6)


def test_a_table_only_grows(imported):
    config = ConfigDict({"model": defaults.model_config()})
    config.model.vocab_size = 200
    with pytest.raises(ValueError, match=r"model\.vocab_size is 200, fewer than the 264 rows"):
        assemble.architecture(config, checkpoints.parse(str(imported[0])))
    config.model.update(vocab_size=300, num_layers=3)
    with pytest.raises(
        ValueError, match=r"model\.num_layers is 3, but the model's shape comes from"
    ):
        assemble.architecture(config, checkpoints.parse(str(imported[0])))


def test_another_models_parameters_are_refused(imported):
    start = checkpoints.parse(str(imported[0]))
    model = LanguageModel(DecoderConfig(**{**vars(SHAPE), "mlp_dim": 64}))
    with pytest.raises(ValueError, match=r"where layers/w_down is \(2, 48, 32\); in this run's"):
        weights.load(start, model, None)


# --- what is broken -------------------------------------------------------------------------------


def edit(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut_off(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def add_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "extra": np.zeros(3, np.float32)}, folder / "model.safetensors")


def leave_an_entry_out(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    names = [name for name in load_file(folder / "a.safetensors") if name != "model.norm.weight"]
    weight_map = dict.fromkeys(names, "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


BROKEN = {
    "a truncated shard": (cut_off, "model.safetensors is not a whole safetensors file"),
    "a wrong config": (
        lambda folder: edit(folder / "config.json", num_key_value_heads=4),
        "model.layers.{0-1}.self_attn.k_proj.weight has shape (16, 32), not (32, 32)",
    ),
    "an unknown config": (
        lambda folder: edit(folder / "config.json", model_type="mistral"),
        "model_type is 'mistral'; known: qwen3",
    ),
    "a missing index entry": (leave_an_entry_out, "index.json has no entry for model.norm.weight"),
    "an extra tensor": (add_a_tensor, "unknown extra"),
    "a tokenizer with other ends": (
        lambda folder: edit(folder / "generation_config.json", eos_token_id=[BYTES.eos_id, 7]),
        "eos_token_id is 7, which is no special token of the tokenizer beside it",
    ),
    "a tokenizer with other padding": (
        lambda folder: edit(folder / "generation_config.json", pad_token_id=0),
        "pad_token_id is 0, which is no special token of the tokenizer beside it",
    ),
    "a larger tokenizer": (
        lambda folder: write(folder, DecoderConfig(**{**vars(SHAPE), "vocab_size": 200})),
        "the tokenizer has 261 entries, the embedding table 200 rows; it is another model's",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_inputs_are_one_line_and_exit_2(name, convert_hf, source, tmp_path, capsys):
    spoil, says = BROKEN[name]
    spoil(source)
    talk = [f"--config={ROOT}/configs/generate.py", f"--config.init.from={source}",
            f"--workdir={tmp_path}/run", "--config.run.compilation_cache="]  # fmt: skip
    for run in (lambda: convert_hf(["import", str(source), str(tmp_path / "out")]),
                lambda: launch.main(talk)):  # fmt: skip
        assert run() == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and says in error
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_one_line_and_leaves_nothing(
    convert_hf, imported, tmp_path, capsys, monkeypatch
):
    """A disk that fills up, as the file system says it. On a real one: checkpoint/test_hf.py."""
    source, ours = imported
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(whole_folder.shutil, "disk_usage", lambda path: usage)
    for command, start in (("export", ours), ("import", source)):
        assert convert_hf([command, str(start), str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {tmp_path}/out: the disk has no room for the ")
        assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way_or_is_no_checkpoint_is_refused(convert_hf, imported, tmp_path, capsys):
    source, ours = imported
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    for arguments, says in (
        (["import", source, tmp_path / "thesis"], "thesis is there already; an import makes a new"),
        (["export", ours, tmp_path / "thesis"], "is not empty and holds no Hugging Face model"),
        (["import", ours, tmp_path / "x"], "is no Hugging Face directory and no hf://ORG/NAME"),
        (["export", "random", tmp_path / "x"], "'random' names no folder; give WORKDIR"),
        (["export", tmp_path / "gone", tmp_path / "x"], "gone holds no config.json"),
        (["import", "hf://nobody", tmp_path / "x"], "'hf://nobody' is no repository"),
        (["check", source, tmp_path / "gone"], "gone/config.json is missing"),
        (["export", ours, tmp_path / "thesis/chapter/x"], "Not a directory"),
    ):
        assert convert_hf([str(argument) for argument in arguments]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        convert_hf(["convert"])
    assert usage.value.code == 2
    with pytest.raises(SystemExit) as helped:
        convert_hf(["--help"])
    assert helped.value.code == 0 and "hf://ORG/NAME[@REV]" in capsys.readouterr().out


# --- check ----------------------------------------------------------------------------------------


def test_check_names_the_worst(convert_hf, source, tmp_path, capsys):
    other, said = tmp_path / "other", tmp_path / "said.json"
    shutil.copytree(source, other)
    tensors = load_file(other / "model.safetensors")
    table = tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    table[3, 4] = 2 * np.abs(table).max()
    moved = table[3, 4] - load_file(source / "model.safetensors")["model.embed_tokens.weight"][3, 4]
    tensors["model.norm.weight"] = tensors["model.norm.weight"].copy()
    tensors["model.norm.weight"][0] = np.nan
    del tensors["model.layers.0.self_attn.k_norm.weight"]
    tensors["extra"] = np.zeros(3, np.float32)
    save_file(tensors, other / "model.safetensors")
    assert convert_hf(["check", str(source), str(other), f"--json={said}"]) == 1
    shown = capsys.readouterr().out
    assert "only in A" in shown and "only in B" in shown and "23 tensors in both" in shown
    result = json.loads(said.read_text())
    assert result["only_in_a"] == ["model.layers.0.self_attn.k_norm.weight"]
    assert result["only_in_b"] == ["extra"]
    norm, embedding = result["differences"]
    assert (norm["name"], norm["absolute"]) == ("model.norm.weight", float("inf"))
    assert embedding["name"] == "model.embed_tokens.weight"
    assert embedding["absolute"] == pytest.approx(abs(float(moved)), rel=0.01)  # bfloat16's digits
    assert embedding["relative"] == pytest.approx(2, rel=0.6)


def test_the_names_of_our_leaves_are_those_of_the_import(imported):
    dtypes = json.loads((imported[1] / "config.json").read_text())["dtypes"]
    assert set(dtypes) == {row.path for row in hf_names.rows(SHAPE)}
