"""Faults found in other trainers (facts/peers.md, 2), each kept out by a test of its number."""

import ast
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compile_options import options_in_force
from hf_models import CASES, make
from jax.extend.core import jaxprs_in_params
from safetensors.numpy import load_file, save_file
from simulated_kernels import RUN_HERE
from tiny_models import (
    VOCAB,
    assert_trees_equal,
    mean_loss,
    packed_batch,
    tiny_model,
    tiny_params,
)

from jaxreason import launch
from jaxreason.checkpoint import hf
from jaxreason.checkpoint.compare import compare
from jaxreason.checkpoint.hf_config import config_from_hf, generation_settings
from jaxreason.checkpoint.store import Store
from jaxreason.data import pipeline
from jaxreason.data.prompts import PromptConfig, PromptSource, PromptStream
from jaxreason.model.execution import Execution
from jaxreason.objectives.distill import Distillation, TopKDistillation
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.objectives.policy import PolicyGradient, kl
from jaxreason.parallel import chips
from jaxreason.recipes import fit, rl
from jaxreason.recipes import pipeline as pipeline_recipe
from jaxreason.rewards import mix
from jaxreason.rewards.shaping import Length
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.train import state as state_lib
from jaxreason.train.collect import CollectConfig, Collector, Rollout
from jaxreason.train.groups import Group, RowsConfig, lay_out_updates
from jaxreason.train.step import make_train_step
from jaxreason.types import Batch, Completion, DistillBatch, PolicyBatch, Prompt, Sampling

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = ByteTokenizer()
ENGINE = EngineConfig(slots=4, steps=4)


def test_fault_01_rope_theta_is_honoured():
    """Three bases, three different outputs. Parity at each: tests/model/test_families.py."""
    batch = packed_batch([[32]], length=32)

    def hidden(theta):
        model = tiny_model(rope_theta=theta)
        arguments = (batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        return jax.jit(model.hidden)(tiny_params(), *arguments)

    small, middle, large = map(hidden, (1e4, 1e6, 5e6))
    # Hidden states are of order 1 after the final norm; another base moves them by 1e-2 and more.
    assert jnp.abs(small - middle).max() > 1e-2 and jnp.abs(middle - large).max() > 1e-2


@pytest.mark.usefixtures("simulated_kernels")
@pytest.mark.parametrize("implementation", RUN_HERE)
def test_fault_02_packed_documents_do_not_leak(implementation):
    """Document 1 changes, document 2 does not; without segments every weight's gradient does."""
    model = tiny_model(execution=Execution(attention=implementation))  # unrolled, as on CPU
    batch = packed_batch([[30, 40]], length=80)
    second = np.arange(80) >= 30
    batch = dataclasses.replace(batch, weights_BT=batch.weights_BT * second)
    other = packed_batch([[30, 40]], length=80, seed=1).tokens_BT
    changed = dataclasses.replace(batch, tokens_BT=np.where(second, batch.tokens_BT, other))
    run = jax.jit(jax.value_and_grad(functools.partial(summed_loss, model)))
    assert_trees_equal(run(tiny_params(), changed), run(tiny_params(), batch))

    one = np.ones_like(batch.segments_BT)
    before, after = (
        run(tiny_params(), dataclasses.replace(b, segments_BT=one)) for b in (batch, changed)
    )
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert (a != b).any()


def test_fault_02_what_is_no_implementation_raises_when_chosen():
    with pytest.raises(ValueError, match=r"mesh.attention is 'cudnn_flash_jax'"):
        tiny_model(execution=Execution(attention="cudnn_flash_jax"))


def summed_loss(model, params, batch):
    h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
    return model.xent(params, h_BTD, batch.targets_BT, batch.weights_BT)[0]


def generated(eos_id, key=0, **sampling):
    """One prompt's completions by the engine, with the tiny model and any id as the end."""
    decode = lambda ids: " ".join(map(str, ids))
    generate = build_generate(tiny_model(), lambda text: [1, 2, 3], decode, eos_id, ENGINE)
    asked = Sampling(**{**dict(max_tokens=12), **sampling})
    return generate(tiny_params(), ["?"], asked, jax.random.key(key))[0]


def test_fault_03_the_sampler_keeps_the_end_and_it_is_learnt():
    """The end of sequence is the last id, has weight 1, and its advantage moves the gradient."""
    (free,) = generated(eos_id=-1, temperature=0.0)
    end = free.ids[4]
    (ended,) = generated(eos_id=end, temperature=0.0)
    stop = free.ids.index(end) + 1
    assert ended.ids == free.ids[:stop] and not ended.truncated
    prompt = Prompt(id="s/0", text="?", answer="", source="s")
    group = Group(prompt, (1, 2, 3), (ended, free), (1.0, 0.0), {})
    (rows,) = lay_out_updates([[group]], RowsConfig(length=16, multiple=2))
    assert rows.gather(rows.batch.targets_BT)[0, stop - 1] == end
    assert rows.gather(rows.batch.weights_BT)[0, stop - 1] == 1

    def gradient(advantage_of_the_end):
        advantages_CT = np.zeros((2, rows.width))
        advantages_CT[0, stop - 1] = advantage_of_the_end
        fields = {f.name: getattr(rows.batch, f.name) for f in dataclasses.fields(rows.batch)}
        zeros = np.zeros_like(rows.batch.weights_BT)
        batch = PolicyBatch(
            **fields, advantages_BT=rows.spread(advantages_CT), old_logprobs_BT=zeros,
            rollout_logprobs_BT=zeros,
        )  # fmt: skip
        loss = lambda params: policy.loss(tiny_model(), params, None, batch).terms["policy"][0]
        return optax.tree.norm(jax.jit(jax.grad(loss))(tiny_params()))

    policy = PolicyGradient(clip="none")
    assert gradient(0.0) == 0 and gradient(1.0) > 1e-3


def test_fault_04_no_two_draws_share_a_key():
    """Rows of one prompt differ, another rollout's key differs, the same key repeats."""
    first = generated(eos_id=-1, num_samples=4)
    assert len({c.ids for c in first}) == 4
    assert generated(eos_id=-1, num_samples=4) == first
    assert not {c.ids for c in generated(eos_id=-1, key=1, num_samples=4)} & {c.ids for c in first}


class PadIsEos(ByteTokenizer):
    """Qwen and GPT-2 checkpoints often pad with the end of sequence."""

    pad_id = ByteTokenizer.eos_id


@pytest.mark.parametrize(
    "fields", [{"text_field": "a"}, {"prompt_field": "q", "response_field": "a"}]
)
def test_fault_05_the_end_of_sequence_is_trained_when_it_pads(tmp_path, fields):
    lines = [json.dumps({"q": f"what is {n}?", "a": f"it is {n}"}) for n in range(40)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "lines.jsonl"), **fields}
    config = pipeline.DataConfig(sources={"lines": source}, rows=4, length=128)
    batches = pipeline.build(config, PadIsEos(), tmp_path)
    batch = next(batches)
    batches.close()
    learnt = [0, 0]
    for row in range(4):
        for segment in range(1, batch.segments_BT[row].max() + 1):
            here = batch.segments_BT[row] == segment
            targets, weights = batch.targets_BT[row, here], batch.weights_BT[row, here]
            learnt[0] += 1
            learnt[1] += (weights[targets == PadIsEos.eos_id] > 0).sum()
    assert learnt[0] == learnt[1] > 4  # one for every document
    assert (batch.weights_BT[batch.segments_BT == 0] == 0).all()


def test_fault_06_lengths_are_tokens():
    """A text of ten thousand characters in as many tokens is worth the same."""
    shaped = Length(chat.split_reasoning, max_tokens=100, buffer_tokens=50, shape="overlong")
    of = lambda text: Completion(text=text, ids=(1,) * 75, logprobs=(0.0,) * 75, truncated=False)
    assert shaped([of("a"), of("a" * 10_000)], ["", ""])[0] == [-0.5, -0.5]


def test_fault_07_groups_that_agree_are_dropped_and_refilled():
    """As tests/train/test_rl.py has it with a model; here the draws are counted by hand."""
    completion = Completion(text="x", ids=(1,), logprobs=(0.0,), truncated=False)
    source = PromptSource(name="s", path="unread", prompt_field="q", answer_field="a")
    questions = [Prompt(id=f"s/{i}", text="?", answer=str(i), source="s") for i in range(8)]

    def varies_for_even(completions, answers):
        values = [float(i % 2 and int(a) % 2 == 0) for i, a in enumerate(answers)]
        return values, {"right": values}

    def collect(**changes):
        collector = Collector(
            config=CollectConfig(num_prompts=4, **changes),
            sampling=Sampling(max_tokens=1, num_samples=2),
            prompts=PromptStream(PromptConfig(sources={"s": source}), {"s": questions}, print),
            encode=lambda text: [1],
            generate=lambda params, prompts, *_, **__: [[completion] * 2 for _ in prompts],
            reward=varies_for_even,
            solved_by="right",
            key=jax.random.key(0),
        )
        return collector.collect(Rollout(1), None)

    kept = collect()
    assert len(kept.groups) == 4 and kept.gen_batches > 1
    assert all(int(group.prompt.answer) % 2 == 0 for group in kept.groups)
    assert len(collect(max_gen_batches=1).groups) < 4
    assert collect(filter_zero_std=False).gen_batches == 1


def test_fault_08_padding_does_not_change_the_loss():
    """Longer rows, and padding on the left; a mean over all positions would change with both."""
    batch = packed_batch([[9, 7], [12]], length=16, loss_share=0.7)
    loss = jax.jit(functools.partial(mean_loss, tiny_model()))
    want = float(loss(tiny_params(), batch))
    for left, right in ((0, 24), (8, 0)):
        padded = jax.tree.map(lambda x: np.pad(x, ((0, 0), (left, right))), batch)
        # The same float32 terms in another order: a few ulp of 6e-8.
        assert float(loss(tiny_params(), padded)) == pytest.approx(want, rel=1e-6)


def distilled(kind: str, vocab: int, rows: Batch):
    """(objective, batch): a teacher in the step, or log-probs of 4 ids that were stored."""
    if kind == "teacher":
        known = tiny_model(vocab_size=vocab, num_layers=1)
        return Distillation(teacher=known, divergence="jsd", nll_coef=0.5), rows
    ids_BTK = (rows.targets_BT[..., None] + np.arange(4, dtype=np.int32)) % vocab
    logprobs_BTK = np.broadcast_to(np.log([0.5, 0.2, 0.1, 0.1]), ids_BTK.shape)
    stored = dict(teacher_ids_BTK=ids_BTK, teacher_logprobs_BTK=logprobs_BTK.astype(np.float32))
    return TopKDistillation(nll_coef=0.5), DistillBatch(**vars(rows), **stored)


@pytest.mark.parametrize("kind", ["teacher", "stored"])
def test_fault_08_padding_does_not_change_distillation(kind):
    """Nor any metric of it, nor whatever a store holds where there is nothing to learn."""
    rows = packed_batch([[9, 7], [12]], length=16, loss_share=0.7)
    objective, batch = distilled(kind, VOCAB, rows)
    frozen = None
    if kind == "teacher":
        frozen = {"teacher": jax.jit(objective.teacher.init)(jax.random.key(1))}

    @jax.jit
    def means(batch):
        loss = objective.loss(tiny_model(), tiny_params(), frozen, batch)
        sums = {"loss": loss.terms["distill"][0], **loss.metrics}
        return {name: x / objective.weights(batch)["distill"] for name, x in sums.items()}

    want = means(batch)
    assert want["kl"] > 0.01
    for left, right in ((0, 24), (8, 0)):
        pad = lambda x: np.pad(x, [(0, 0), (left, right)] + [(0, 0)] * (x.ndim - 2))
        padded = jax.tree.map(pad, batch)
        if kind == "stored":
            junk = np.where(padded.weights_BT > 0, 0, -7)[..., None]
            logprobs_BTK = padded.teacher_logprobs_BTK + junk.astype(np.float32)
            padded = dataclasses.replace(padded, teacher_logprobs_BTK=logprobs_BTK)
        for name, value in means(padded).items():
            # The same float32 terms in another order, as above.
            assert float(value) == pytest.approx(float(want[name]), rel=2e-6), name


def test_fault_09_accumulation_does_not_change_the_loss():
    """8 rows of 1 to 31 target tokens as 1 x 8, 2 x 4 and 8 x 1: loss and gradient norm."""
    model = tiny_model()
    batch = packed_batch([[2], [32], [5, 6], [30], [3], [16, 16], [9], [28]], length=32)
    assert len(set(batch.weights_BT.sum(1))) == 8

    optimizer = optax.sgd(1.0)
    state = state_lib.create(model, optimizer, jax.random.key(0), tiny_params())

    def run(microbatches):
        step = make_train_step(
            model, LanguageModeling(), optimizer, lambda s: 1.0, microbatches=microbatches
        )
        return step(jax.tree.map(jnp.copy, state), batch, None)[1]

    want = run(1)
    for microbatches in (2, 8):
        got = run(microbatches)
        for name in ("loss", "grad_norm"):
            assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-6), name


def test_fault_10_the_loss_holds_no_logits():
    """Temp memory of the loss and its gradients grows by a few copies of h_TD, not by T x V."""
    V, D = 16_384, 32  # logits would be 512 times as large as h
    model = tiny_model(vocab_size=V, num_layers=1)

    def temp(T):
        h_BTD = jax.ShapeDtypeStruct((1, T, D), jnp.float32)
        ids_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)
        loss = lambda p, h, t: model.xent(p, h, t, jnp.ones(t.shape))[0]
        fn = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return fn.lower(model.shapes, h_BTD, ids_BT).compile().memory_analysis().temp_size_in_bytes

    few, many = 512, 4096
    assert temp(many) - temp(few) < 8 * (many - few) * D * 4


@pytest.mark.parametrize("kind", ["teacher", "stored"])
def test_fault_10_distillation_holds_no_logits(kind):
    """The whole objective with its gradients, at Qwen3's vocabulary: what has an entry's dim has at
    most 64 rows, those of a chunk. Bytes: tests/kernels/test_linear_xent_memory.py."""
    vocab = 151_936
    rows = packed_batch([[200, 120]], length=320, vocab=vocab)
    model = tiny_model(vocab_size=vocab, num_layers=1)
    objective, batch = distilled(kind, vocab, rows)
    frozen = {"teacher": objective.teacher.shapes} if kind == "teacher" else None
    loss = lambda p, frozen: objective.loss(model, p, frozen, batch).terms["distill"][0]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(model.shapes, frozen)
    sizes = (v.aval.size for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars)
    assert max(size // vocab for size in sizes if size % vocab == 0) == 64


def equations(jaxpr):
    """Those of a jaxpr and of all within it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def test_fault_11_rollouts_sample_the_distribution_that_is_trained():
    """No filter can be asked for, and the trainer's temperature is the sampler's."""
    config = launch.load_config("rl")
    launch.override(config, "rollout.temperature", "0.8")
    config.init["from"] = "random"
    (stage,) = pipeline_recipe.stages_of(config)
    assert stage.sampling == Sampling(
        max_tokens=stage.sampling.max_tokens, num_samples=stage.sampling.num_samples,
        temperature=0.8,
    )  # fmt: skip
    assert stage.algorithm.policy.temperature == 0.8
    for name in ("top_k", "top_p", "min_p"):
        with pytest.raises(ValueError, match=f"rollout has no '{name}'"):
            launch.override(config, f"rollout.{name}", "0.5")


@pytest.mark.parametrize("packing", ["first_fit", "concat"])
def test_fault_12_the_data_iterator_is_in_every_checkpoint(tmp_path, packing):
    """The next batch after a restore is bit-equal to the one that was not read. In a whole run:
    tests/train/test_fit.py. A checkpoint without the iterator cannot be written."""
    lines = [json.dumps({"text": f"{n} squared is {n * n}"}) for n in range(100)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "lines.jsonl"), "text_field": "text"}
    config = pipeline.DataConfig(
        sources={"lines": source}, rows=4, length=64, num_shards=2, packing=packing
    )
    state = {"step": jnp.int32(3)}
    first = pipeline.build(config, TOKENIZER, tmp_path)
    with Store(tmp_path / "checkpoints") as store:
        for _ in range(3):
            next(first)
        with pytest.raises(KeyError, match="data"):
            store.save(2, {"state": state, "host": {}})
        store.save(3, {"state": state, "data": first.get_state(), "host": {}}, wait=True)
        want = next(first)
        resumed = pipeline.build(config, TOKENIZER, tmp_path)
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
        )
        resumed.set_state(store.restore(abstract)[1]["data"])
    assert_trees_equal(next(resumed), want)
    first.close()
    resumed.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_fault_13_every_tensor_is_the_same_after_the_round_trip(tmp_path, dtype):
    """transformers -> here -> Hugging Face, bit for bit, and transformers finds every key."""
    torch = pytest.importorskip("torch", reason="transformers makes the checkpoints")
    transformers = pytest.importorskip("transformers")
    for case in CASES:
        there, back = tmp_path / case.name, tmp_path / f"{case.name}-back"
        make(case).to(getattr(torch, dtype)).save_pretrained(there)
        config, params = hf.import_hf(there, dtype=None)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
        hf.export_hf(back, config, params, generation=generation_settings(there))
        compared = compare(there, back)
        assert compared.equal and compared.num_tensors > 20, (case.name, compared)
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            back, output_loading_info=True
        )
        assert not any(info.values()), (case.name, info)
        assert config_from_hf(model.config.to_dict()) == config
        assert generation_settings(there) == generation_settings(back) != {}


def test_fault_14_an_unparsable_gold_answer_is_refused():
    reward = mix.build({"right": mix.RewardConfig("math")}, chat.split_reasoning)
    prompt = lambda answer: Prompt(id="s/7", text="?", answer=answer, source="s")
    reward.check([prompt("42")])
    with pytest.raises(ValueError, match=r"^s/7: rewards\.right: gold answer is 'none'"):
        reward.check([prompt("none")])


def test_fault_15_a_kl_in_the_loss_is_never_negative():
    with pytest.raises(ValueError, match=r"train\.policy\.kl is 'k1'"):
        PolicyGradient(kl="k1", beta=0.1)
    logp, ref = -jax.random.exponential(jax.random.key(0), (2, 10_000))
    for estimator in ("k2", "k3"):
        assert (kl(logp, ref, estimator) >= 0).all()
        assert (kl(logp, logp * (1 + 1e-6), estimator) >= 0).all()  # where rounding bites


@pytest.mark.parametrize("recipe", ["fit", pytest.param("rl", marks=pytest.mark.slow)])
def test_fault_16_the_options_of_a_config_are_those_of_the_step_that_runs(
    tmp_path, monkeypatch, recipe
):
    """Of the one executable that the recipe's jitted step holds after it has run."""
    config = launch.load_config(f"{ROOT}/tests/process_config.py:{recipe}")
    config.mesh.xla_options = chips.xla_options(chips.CHIPS["b200"], 8)  # XLA takes them on CPU
    config.mesh.shape.update(data=1, fsdp=4, tensor=2)
    config.train.steps = 1
    config.eval.sets, config.run.export = {}, False
    module, steps = {"fit": fit, "rl": rl}[recipe], []

    def kept(*args, **kwargs):  # alive until its executable was looked at
        steps.append(make_train_step(*args, **kwargs))
        return steps[-1]

    monkeypatch.setattr(module, "make_train_step", kept)
    client = jax.devices()[0].client
    before = client.live_executables()
    pipeline_recipe.run(config, tmp_path / "run")
    made = [e for e in client.live_executables() if e not in before]
    (step,) = [e for e in made if e.hlo_modules()[0].name == "jit_step_fn"]
    assert steps[0]._cache_size() == len(steps) == 1
    assert options_in_force(step) == config.mesh.xla_options.to_dict()
    said = json.loads((tmp_path / "run/config.json").read_text())["xla_options"]
    assert said == config.mesh.xla_options.to_dict()


def test_fault_16_an_option_that_there_is_not_fails_the_step_that_runs():
    model = tiny_model()
    optimizer = optax.identity()
    step = make_train_step(
        model, LanguageModeling(), optimizer, lambda step: 0.0, xla_options={"xla_no_such": 1}
    )
    state = state_lib.create(model, optimizer, jax.random.key(0))
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such'"):
        step(state, packed_batch([[32]], length=32), None)


@pytest.mark.parametrize("name", sorted(chat.TEMPLATES))
def test_fault_17_training_tokens_are_prefix_plus_generated(name):
    """What is learnt is, token for token, what the sampler is given and what it should answer."""
    template = chat.template_for(name, TOKENIZER)
    turns = [
        chat.Message("user", "2+2?"),
        chat.Message("assistant", "4", reasoning="two and two"),
        chat.Message("user", "and 3+3?"),
        chat.Message("assistant", "6", reasoning="three and three"),
    ]
    ids_T, weights_T = chat.encode_conversation(TOKENIZER, template, turns)
    for last in (1, 3):
        prefix = chat.encode_prompt(TOKENIZER, template, turns[:last])
        answer = TOKENIZER.encode(template.render_completion(turns[last]))
        generated = answer[: answer.index(TOKENIZER.eos_id) + 1]
        start, stop = len(prefix), len(prefix) + len(generated)
        assert ids_T[:stop].tolist() == prefix + generated
        assert weights_T[start:stop].all() and not weights_T[stop : stop + 1].any()
    # Earlier reasoning is not dropped: both chains are in what is learnt.
    learnt = TOKENIZER.decode(ids_T[weights_T > 0].tolist())
    assert "two and two" in learnt and "three and three" in learnt


def test_fault_18_every_wrong_tensor_is_in_one_error(tmp_path):
    """Unknown, missing, duplicate, misshapen, of a wrong dtype: one line lists them all."""
    model = tiny_model(tie_embeddings=False)
    folder = tmp_path / "hf"
    params = jax.jit(model.init)(jax.random.key(0))
    hf.export_hf(folder, model.config, params, generation={})
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.norm.weight"] = np.ones(31, np.float32)
    tensors["model.layers.1.self_attn.k_norm.weight"] = np.ones(8, np.int8)
    (folder / "model.safetensors").unlink()
    again = {"model.embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    save_file(tensors, folder / "a.safetensors")
    save_file(again, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(again, "b.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError) as error:
        hf.import_hf(folder)
    for part in (
        "missing model.layers.1.mlp.up_proj.weight",
        "missing lm_head.weight",
        "unknown model.layers.0.self_attn.q_proj.bias",
        "duplicate model.embed_tokens.weight in a.safetensors, b.safetensors",
        "model.norm.weight has shape (31,), not (32,)",
        "model.layers.1.self_attn.k_norm.weight has dtype I8, not one of F32, BF16, F16",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_fault_19_accelerators_are_extras():
    """The base install is CPU: no jax[cuda], jax[tpu] or libtpu among install_requires."""
    (call,) = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    base = ast.unparse(arguments["install_requires"])
    assert "jax" in base and not any(word in base for word in ("cuda", "tpu", "jax[", "nvidia"))
    extras = ast.unparse(arguments["extras_require"])
    assert "'cuda': [f'jax[cuda13]" in extras and "'tpu': [f'jax[tpu]" in extras
