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
from tiny_models import assert_trees_equal, mean_loss, packed_batch, tiny_model, tiny_params

from jaxreason.checkpoint.store import Store
from jaxreason.data import pipeline
from jaxreason.model import attention
from jaxreason.model.decoder import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.text import chat
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = ByteTokenizer()


def test_fault_01_rope_theta_is_honoured():
    """Three bases, three different outputs. Parity at each: tests/checkpoint/test_hf.py."""
    batch = packed_batch([[32]], length=32)

    def hidden(theta):
        model = tiny_model(rope_theta=theta)
        arguments = (batch.tokens_BT, batch.segments_BT, batch.positions_BT)
        return jax.jit(model.hidden)(tiny_params(), *arguments)

    small, middle, large = map(hidden, (1e4, 1e6, 5e6))
    # Hidden states are of order 1 after the final norm; another base moves them by 1e-2 and more.
    assert jnp.abs(small - middle).max() > 1e-2 and jnp.abs(middle - large).max() > 1e-2


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
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


def test_fault_08_padding_does_not_change_the_loss():
    """Longer rows, and padding on the left; a mean over all positions would change with both."""
    batch = packed_batch([[9, 7], [12]], length=16, loss_share=0.7)
    loss = jax.jit(functools.partial(mean_loss, tiny_model()))
    want = float(loss(tiny_params(), batch))
    for left, right in ((0, 24), (8, 0)):
        padded = jax.tree.map(lambda x: np.pad(x, ((0, 0), (left, right))), batch)
        # The same float32 terms in another order: a few ulp of 6e-8.
        assert float(loss(tiny_params(), padded)) == pytest.approx(want, rel=1e-6)


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
