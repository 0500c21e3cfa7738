"""LoRA stages of a whole run: what they keep, how it is read, and what is refused at once."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from tiny_models import assert_trees_close, assert_trees_equal

from jaxreason import launch
from jaxreason.checkpoint import hf, hub, peft
from jaxreason.checkpoint.store import restore_params
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import BASE_DTYPE
from jaxreason.recipes import assemble, bases, checkpoints, defaults, pipeline, weights
from jaxreason.recipes.workdir import Workdir

LORA = {"rank": 2, "alpha": 4.0}
SHAPE = dict(
    vocab_size=264, num_layers=1, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8
)  # of 261 tokens; every number divides on the mesh


def even_start(completions, answers):
    """A reward that random parameters earn half of the time."""
    return [float(c.ids[0] % 2 == 0) for c in completions], {}


def config(folder: pathlib.Path) -> ConfigDict:
    """Two updates of all weights, then two of adapters, on lines of text."""
    path = folder / "lines.jsonl"
    lines = [json.dumps({"text": f"{n} + {n} = {2 * n}; "}) for n in range(200)]
    path.write_text("\n".join(lines))
    c = defaults.default_config("lora", "pipeline")
    c.chat.template = "plain"
    c.model = defaults.model_config("qwen3-tiny", **SHAPE)
    c.mesh.update(scan_layers="true", attention="reference")
    c.log.every = c.run.save_every = 1
    c.stages = {"base": stage(path), "tuned": stage(path)}
    c.stages.tuned.init["from"] = "@base"
    c.stages.tuned.train.lora.update(LORA)
    return c


def stage(path: pathlib.Path) -> dict:
    section = defaults.stage_config()
    lines = defaults.source(name="lines", path=str(path), text_field="text")
    section["data"].update(sources={"lines": lines}, rows=4, length=48)
    section["train"]["steps"] = 2
    section["train"]["optimizer"]["learning_rate"] = 1e-2
    return section


def taught(folder: pathlib.Path) -> dict:
    """Two steps of reinforcement learning of adapters, and a critic, from @tuned."""
    questions = [json.dumps({"q": f"{n}+{n}=", "a": str(2 * n)}) for n in range(9)]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(questions))
    section = defaults.rl_config()
    section["init"]["from"] = "@tuned"
    prompts = defaults.prompts(name="q", path=str(path), prompt_field="q", answer_field="a")
    section["data"]["sources"] = {"q": prompts}
    section["rewards"] = {"even": defaults.reward("test_lora_stage:even_start")}
    section["rollout"].update(
        num_prompts=4, num_generations=3, max_tokens=6, slots=16, solved_by="even"
    )
    section["train"].update(steps=2, length=32, updates=1, rows_multiple=4, algorithm="ppo")
    section["train"]["optimizer"]["learning_rate"] = 1e-2
    section["train"]["lora"].update(LORA, targets=("q_proj", "down_proj"))
    return section


@pytest.fixture(autouse=True)
def one_device(monkeypatch, request):
    """The suite's eight devices are for the test that asks for a mesh."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(assemble, "device_mesh", lambda mesh: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "device_mesh", lambda mesh: None)
        pipeline.run(config(folder), folder / "run")
    return folder / "run"


def plain(tokens: int = 261, **changes) -> LanguageModel:
    return LanguageModel(
        DecoderConfig(**{**SHAPE, "rope_theta": 1e4, **changes}), valid_vocab=tokens
    )


def load(text: str, model: LanguageModel):
    return weights.load(checkpoints.parse(text), model, None)


def test_a_stage_keeps_adapters_and_exports_both_forms(run):
    facts = json.loads((run / "config.json").read_text())
    whole, (base, merged) = plain(), [load(f"{run}@{name}", plain()) for name in ("base", "tuned")]
    assert facts["parameters"] == facts["trained_parameters"]["base"] == whole.num_params

    lora, adapters = peft.import_peft(run / "adapters" / "tuned", whole.config)
    assert (lora.rank, lora.alpha) == (2, 4.0)
    model = LanguageModel(whole.config, lora=lora)
    assert facts["trained_parameters"]["tuned"] == model.num_params
    saved = restore_params(run / "checkpoints" / "tuned", model.abstract())
    assert_trees_equal(adapters, saved)
    assert not (run / "adapters" / "base").exists()

    # What was trained is the sum with the base in bf16, and it is what is read and exported.
    half = jax.tree.map(lambda p: p.astype(BASE_DTYPE), base)
    want = model.merge(model.complete(saved, half))
    assert_trees_close(merged, jax.tree.map(lambda p: p.astype(np.float32), want), 1e-6)
    assert np.abs(merged["layers"]["wq"] - half["layers"]["wq"]).max() > 1e-3
    assert_trees_equal(hf.import_hf(run / "hf" / "tuned")[1], merged)


def test_an_exported_adapter_starts_a_run_over_the_exported_base(run):
    start = checkpoints.parse(str(run / "adapters" / "tuned"))
    assert start.base.directory == run / "hf" / "base" and start.name == "tuned"
    # With the run's tokenizer and template beside it, as hf/STAGE has them.
    beside = {path.name for path in start.directory.iterdir()} - {peft.CONFIG, peft.WEIGHTS}
    assert {"tokenizer_config.json", "chat_template.jinja"} <= beside
    for name in beside:
        assert (start.directory / name).read_text() == (run / "hf/tuned" / name).read_text()
    assert start.tokenizer().vocab_size == 261
    assert start.chat_template() == str(run / "adapters" / "tuned")
    # The base is in float32 there, and was in bf16 (8 bits) in training.
    assert_trees_close(weights.load(start, plain(), None), load(f"{run}@tuned", plain()), 2**-8)


def test_new_tokens_come_with_a_base_of_adapters(run):
    grown = load(f"{run}@tuned", plain(272, vocab_size=272))
    same = load(f"{run}@tuned", plain())
    assert_trees_equal(grown["layers"], same["layers"])
    table = grown["embedding"]
    assert table.shape[0] == 272
    np.testing.assert_array_equal(table[:261], same["embedding"][:261])
    np.testing.assert_array_equal(table[261:], np.tile(table[261], (11, 1)))


def test_a_base_that_is_gone_is_named(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    moved_to(tmp_path / "run", str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"@tuned', adapters to a base: .*gone holds no config"):
        load(f"{tmp_path}/run@tuned", plain())


def moved_to(run: pathlib.Path, text: str, **facts) -> None:
    """As if stage `tuned` had begun from there."""
    path = run / "config.json"
    content = json.loads(path.read_text()) | facts
    content["config"]["stages"]["tuned"]["init"]["from"] = text
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("base", ["@base", "{}/run", "{}/run@base"])
def test_adapters_keep_to_the_step_they_were_trained_on(run, tmp_path, base):
    want = load(f"{run}@tuned", plain())
    for copy in ("mine", "run"):
        shutil.copytree(run, tmp_path / copy)
    moved_to(tmp_path / "mine", base.format(tmp_path))
    steps = tmp_path / ("mine" if base == "@base" else "run") / "checkpoints" / "base"
    shutil.copytree(steps / "1", steps / "3")  # the base trains further
    assert_trees_equal(load(f"{tmp_path}/mine@tuned", plain()), want)
    shutil.rmtree(steps / "2")
    gone = r"mine@tuned holds adapters to '.*' as it was at stage base, step 2, saved \d+: .*"
    with pytest.raises(ValueError, match=gone + r"/base has no step 2; it has \[1, 3\]$"):
        load(f"{tmp_path}/mine@tuned", plain())
    shutil.copytree(steps / "1", steps / "2")  # another training of as many steps
    with pytest.raises(ValueError, match=r"there now is stage base, step 2, saved \d+, to which"):
        load(f"{tmp_path}/mine@tuned", plain())


def other_weights(file: pathlib.Path) -> None:
    save_file({name: -array for name, array in load_file(file).items()}, file)


def other_alpha(file: pathlib.Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 5}))


CHANGES = {
    "hf/base/model.safetensors": other_weights,
    "adapters/tuned/adapter_model.safetensors": other_weights,
    "adapters/tuned/adapter_config.json": other_alpha,
}


@pytest.mark.parametrize("file", CHANGES)
def test_adapters_to_a_folder_refuse_other_weights_there(run, tmp_path, file):
    for part in ("hf/base", "adapters/tuned"):
        shutil.copytree(run / part, tmp_path / part)
    other_base = {"base_model_name_or_path": str(tmp_path / "hf" / "base")}
    settings = tmp_path / "adapters" / "tuned" / peft.CONFIG
    settings.write_text(json.dumps(json.loads(settings.read_text()) | other_base))
    text = str((tmp_path / file).parent)

    new = Workdir(tmp_path / "new")
    new.path.mkdir()
    new.config.write_text("{}")
    bases.begun(new, "tuned", checkpoints.parse(text))
    record = json.loads(new.config.read_text())["bases"]
    shutil.copytree(run, tmp_path / "run")
    moved_to(tmp_path / "run", text, bases=record)
    load(f"{tmp_path}/run@tuned", plain())

    CHANGES[file](tmp_path / file)
    with pytest.raises(ValueError, match="there now is sha256") as error:
        load(f"{tmp_path}/run@tuned", plain())
    assert repr(text) in str(error.value) and record["tuned"]["sha256"] in str(error.value)
    assert "\n" not in str(error.value)
    # So does the stage when it goes on; one that has no checkpoint yet begins with what is there.
    with pytest.raises(ValueError, match="there now is sha256"):
        bases.begun(Workdir(tmp_path / "run"), "tuned", checkpoints.parse(text))
    bases.begun(new, "tuned", checkpoints.parse(text))
    assert json.loads(new.config.read_text())["bases"] != record


def test_adapters_to_a_hub_s_model_keep_to_its_commit(run, tmp_path, monkeypatch):
    for commit in ("c0ffee", "decaf"):
        shutil.copytree(run / "hf" / "base", tmp_path / commit)
    other_weights(tmp_path / "decaf" / "model.safetensors")
    places = {"hf://org/base": tmp_path / "c0ffee", "hf://org/base@c0ffee": tmp_path / "c0ffee"}
    monkeypatch.setattr(hub, "resolve", lambda address, **_: places[address])
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    workdir.config.write_text("{}")
    bases.begun(workdir, "s", checkpoints.parse("hf://org/base"))
    (workdir.checkpoints("s") / "1").mkdir(parents=True)
    places["hf://org/base"] = tmp_path / "decaf"  # its owner pushes
    start = checkpoints.parse("hf://org/base")
    assert start.directory == tmp_path / "decaf"
    assert bases.begun(workdir, "s", start).directory == tmp_path / "c0ffee"


@pytest.mark.parametrize("exported", [True, False])
def test_an_adapter_without_a_base_s_folder_says_so(run, tmp_path, exported, capsys):
    shutil.copytree(run, tmp_path / "run")
    if not exported:
        shutil.rmtree(tmp_path / "run" / "hf" / "base")
        (tmp_path / "run" / "stages" / "base.export.json").write_text(
            (run / "stages" / "tuned.export.json").read_text()
        )
    (tmp_path / "run" / "stages" / "tuned.export.json").unlink()
    pipeline.run(config(run.parent), tmp_path / "run")
    said = "the base of adapters/tuned, @base, has no Hugging Face folder of its own; use hf/tuned"
    output = capsys.readouterr()
    assert (said in output.out + output.err) == (not exported)


@pytest.mark.parametrize("key, value", [("alpha", 8.0), ("targets", ("q_proj",))])
def test_settings_of_adapters_without_a_rank_are_refused(tmp_path, key, value):
    c = config(tmp_path)
    c.stages.base.train.lora[key] = value
    message = f"train.lora.rank is 0, so train.lora.{key} = {value!r} would be ignored; set the"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline.stages_of(c)


MISTAKES = {
    ("train.lora.rank", 17): r"stages\.tuned: train\.lora\.rank is 17; k_proj has at most rank 16",
    (
        "train.lora.rank",
        -1,
    ): r"stages\.tuned: train\.lora\.rank is -1; it must be 0 \(off\) or more",
    ("train.lora.targets", ("wq",)): r"stages\.tuned: train\.lora\.targets holds 'wq'; known: ",
    ("init.from", "random"): r"stages\.tuned: train\.lora\.rank is 2 and init\.from is 'random'",
}


@pytest.mark.parametrize("key, value", MISTAKES)
def test_what_cannot_be_adapted_is_named_before_anything_is_trained(tmp_path, key, value):
    c = config(tmp_path)
    launch.override(c, f"stages.tuned.{key}", str(value))
    with pytest.raises(ValueError, match=MISTAKES[key, value]) as error:
        pipeline.run(c, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [{}, {"data": 4, "tensor": 2}], ids=["one mesh", "two meshes"])
def test_reinforcement_learning_of_adapters_on_a_mesh_resumes(tmp_path, sampler):
    """From a stage of adapters, with a critic beside them; step 2 is lost and taken again."""

    def again():
        c = config(tmp_path)
        c.mesh.shape.update(data=2, fsdp=2, tensor=2)
        c.stages.taught = taught(tmp_path)
        c.stages.taught.rollout.mesh.update(sampler)
        pipeline.run(c, tmp_path / "run")
        return load(f"{tmp_path}/run@taught", plain()), hf.import_hf(tmp_path / "run/hf/taught")[1]

    first = again()
    assert_trees_equal(*first)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints" / "taught" / "2")
    for marker in ("taught", "taught.export", "taught.eval"):
        (run / "stages" / f"{marker}.json").unlink()
    assert_trees_equal(again(), first)
    assert set(peft.import_peft(run / "adapters" / "taught", plain().config)[0].targets) == {
        "q_proj", "down_proj",
    }  # fmt: skip
