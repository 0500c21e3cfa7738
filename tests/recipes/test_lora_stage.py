"""LoRA stages of a whole run: what they keep, how it is read, and what is refused at once."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_models import assert_trees_close, assert_trees_equal

from jaxreason import launch
from jaxreason.checkpoint import hf, peft
from jaxreason.checkpoint.store import restore_params
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import BASE_DTYPE
from jaxreason.recipes import assemble, checkpoints, defaults, pipeline

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
    return checkpoints.parse(text).load(model, None)


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
    assert start.tokenizer().vocab_size == 261
    assert start.chat_template() == str(run / "hf" / "base")
    # The base is in float32 there, and was in bf16 (8 bits) in training.
    assert_trees_close(start.load(plain(), None), load(f"{run}@tuned", plain()), 2**-8)


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
    path = tmp_path / "run" / "config.json"
    facts = json.loads(path.read_text())
    facts["config"]["stages"]["tuned"]["init"]["from"] = str(tmp_path / "gone")
    path.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"@tuned', adapters to a base: .*gone holds no config"):
        load(f"{tmp_path}/run@tuned", plain())


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
