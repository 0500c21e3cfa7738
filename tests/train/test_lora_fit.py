"""LoRA in both loops: the base stays, bit for bit; only adapters have gradients and momenta."""

import functools
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from tiny_models import CONFIG, QUICK, assert_trees_equal, tiny_model

from jaxreason.checkpoint.store import Store
from jaxreason.data import pipeline as pipeline_lib
from jaxreason.data.prompts import PromptConfig, PromptSource, PromptStream
from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.lora import BASE_DTYPE, LoraConfig
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.objectives.policy import PRESETS
from jaxreason.report.summary import read_metrics
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.text.tokenizer import ByteTokenizer
from jaxreason.train import rl
from jaxreason.train import state as state_lib
from jaxreason.train.collect import CollectConfig, Collector
from jaxreason.train.fit import Fit, FitConfig, fit
from jaxreason.train.groups import RowsConfig
from jaxreason.train.metrics import MetricsWriter, Progress
from jaxreason.train.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxreason.train.step import make_train_step
from jaxreason.types import Frozen, Prompt, Sampling

STEPS = 6
TOKENIZER = ByteTokenizer()
SHAPE = DecoderConfig(**{**CONFIG, "vocab_size": TOKENIZER.vocab_size, "num_layers": 1})
PLAIN = tiny_model(vocab_size=TOKENIZER.vocab_size, num_layers=1)
MODEL = LanguageModel(SHAPE, QUICK, lora=LoraConfig(rank=4, alpha=8.0))
SETTINGS = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.0)
OPTIMIZER = make_optimizer(SETTINGS, MODEL.axes)
SCHEDULE = make_schedule(SETTINGS, STEPS)
TRAIN_STEP = make_train_step(MODEL, LanguageModeling(), OPTIMIZER, SCHEDULE, clip_norm=1.0)


@functools.cache
def base():
    params = jax.jit(PLAIN.init)(jax.random.key(0))
    return jax.tree.map(lambda p: p.astype(BASE_DTYPE), params)


@pytest.fixture
def untouched():
    """The base is the same, bit for bit, when the test ends, and its buffers still live."""
    before = jax.tree.map(np.array, base())
    yield
    assert_trees_equal(jax.tree.map(np.array, base()), before)


def quiet() -> Progress:
    return Progress(rich.console.Console(file=io.StringIO()))


def log(workdir):
    timed = lambda name: name == "time" or name.startswith("perf/")
    return [{k: v for k, v in r.items() if not timed(k)} for r in read_metrics(workdir)]


def test_the_state_is_that_of_adapters_alone():
    state = state_lib.abstract(MODEL, OPTIMIZER)
    assert sorted(state.params) == ["lora"]
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    # Two moments a trained parameter, and counters.
    assert 2 * MODEL.num_params <= size(state.opt) <= 2 * MODEL.num_params + 4
    assert MODEL.num_params < PLAIN.num_params / 5


# --- training on data -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pipeline_lib.DataConfig:
    path = tmp_path_factory.mktemp("data") / "lines.jsonl"
    lines = [json.dumps({"text": f"{n} + {n} = {2 * n}; " * (1 + n % 2)}) for n in range(200)]
    path.write_text("\n".join(lines))
    return pipeline_lib.DataConfig(
        sources={"lines": {"path": str(path), "text_field": "text"}}, rows=4, length=48, seed=1
    )


@functools.partial(jax.jit)
def held_out_loss(params, batch):
    """Of a plain model, which reads the complete tree."""
    h_BTD = PLAIN.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
    return PLAIN.xent(params, h_BTD, batch.targets_BT, batch.weights_BT)[0] / batch.weights_BT.sum()


def fine_tune(workdir, data, steps=STEPS):
    batches = pipeline_lib.build(data, TOKENIZER, workdir)
    first = next(pipeline_lib.build(data, TOKENIZER, workdir))
    writer = MetricsWriter(workdir)
    with Store(workdir / "checkpoints") as store:
        job = Fit(
            stage="sft", config=FitConfig(steps=steps, log_every=1, save_every=3), model=MODEL,
            optimizer=OPTIMIZER, schedule=SCHEDULE, train_step=TRAIN_STEP, pipeline=batches,
            store=store, writer=writer, progress=quiet(),
            validate=lambda params: {"eval/loss": float(held_out_loss(params, first))},
        )  # fmt: skip
        state, _ = fit(job, jax.random.key(3), lambda: None, Frozen(base=base()))
    writer.close()
    batches.close()
    return state


def test_fine_tuning_lowers_the_loss_resumes_and_leaves_the_base(tmp_path, data, untouched):
    whole = fine_tune(tmp_path / "whole", data)
    losses = [r["eval/loss"] for r in log(tmp_path / "whole") if "eval/loss" in r]
    assert losses[-1] < losses[0] - 0.2
    trained = [r["loss"] for r in log(tmp_path / "whole") if "loss" in r]
    assert len(trained) == STEPS and trained[-1] < trained[0] - 0.2
    fine_tune(tmp_path / "parts", data, steps=3)
    assert_trees_equal(fine_tune(tmp_path / "parts", data), whole)


# --- reinforcement learning -----------------------------------------------------------------------

RL_STEPS = 4
ALGORITHM = PRESETS["grpo"]  # has a KL to the reference, which the base is
QUESTIONS = [Prompt(id=f"s/{i}", text=f"{i}+{i}=", answer=str(2 * i), source="s") for i in range(9)]
GENERATE = build_generate(
    PLAIN, TOKENIZER.encode, TOKENIZER.decode, TOKENIZER.eos_id, EngineConfig(slots=16, steps=4)
)


def even_start(completions, answers):
    """A reward that random parameters earn half of the time."""
    values = [float(c.ids[0] % 2 == 0) for c in completions]
    return values, {"even": values}


@functools.cache
def rl_step():
    schedule = make_schedule(SETTINGS, RL_STEPS)
    return make_train_step(MODEL, ALGORITHM.policy, OPTIMIZER, schedule, clip_norm=1.0)


def reinforce(workdir, **changes):
    workdir.mkdir(exist_ok=True)
    source = PromptSource(name="s", path="unread.jsonl", prompt_field="q", answer_field="a")
    collector = Collector(
        config=CollectConfig(num_prompts=4, max_gen_batches=9),
        sampling=Sampling(max_tokens=6, num_samples=3),
        prompts=PromptStream(PromptConfig(sources={"s": source}), {"s": QUESTIONS}, say=print),
        encode=TOKENIZER.encode, generate=GENERATE, reward=even_start, solved_by="even",
        key=jax.random.key(7),
    )  # fmt: skip
    writer = MetricsWriter(workdir)
    with Store(workdir / "checkpoints") as store:
        job = rl.RL(
            stage="rl", config=rl.RLConfig(steps=RL_STEPS, save_every=2, **changes),
            algorithm=ALGORITHM, rows=RowsConfig(length=16, multiple=4, pad_id=TOKENIZER.pad_id),
            model=MODEL, optimizer=OPTIMIZER, train_step=rl_step(),
            score=rl.make_score(MODEL, ALGORITHM.policy), collector=collector, store=store,
            writer=writer, progress=quiet(), samples=workdir / "samples.jsonl", seed=0,
        )  # fmt: skip
        state, _ = rl.train(job, jax.random.key(0), lambda: None, rl.Kept(base, base))
    writer.close()
    return state


@pytest.mark.parametrize("asynchronous", [False, True])
def test_reinforcement_learning_resumes_and_leaves_the_base(tmp_path, untouched, asynchronous):
    changes = dict(asynchronous=asynchronous, max_mult_prob_error=1.5 if asynchronous else 1.001)
    whole = reinforce(tmp_path / "whole", **changes)
    records = log(tmp_path / "whole")
    assert sorted(whole.params) == ["lora"]
    assert all(np.abs(pair["b"]).max() > 0 for pair in whole.params["lora"]["layers"].values())
    # Before the first update the policy is its reference; afterwards it is not.
    assert abs(records[0]["kl"]) < 1e-6 and records[-1]["kl"] > 1e-6
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(RL_STEPS))  # dies after step 2
    assert_trees_equal(reinforce(tmp_path / "parts", **changes), whole)
    assert log(tmp_path / "parts") == records


def test_the_sampler_follows_the_adapters():
    """What a rollout reads is what the trainer scores: log-probs of both agree."""
    trained = jax.tree.map(lambda s: 0.2 * jnp.ones(s.shape), MODEL.shapes)
    complete = MODEL.complete(trained, base())
    sampling = Sampling(max_tokens=6, num_samples=2)
    draw = lambda params: GENERATE(params, ["7*8="], sampling, jax.random.key(0))[0]
    prompt = TOKENIZER.encode("7*8=")
    for completion in draw(complete):
        ids = np.array([[*prompt, *completion.ids]])
        ones, positions = np.ones_like(ids), np.arange(ids.shape[1])[None]
        h_BTD = MODEL.hidden(complete, ids, ones, positions)
        logp_BT = MODEL.logprobs(complete, h_BTD, np.roll(ids, -1, 1))[0]
        own = logp_BT[0, len(prompt) - 1 : -1]
        np.testing.assert_allclose(own, completion.logprobs, atol=1e-4)
    assert draw(complete) != draw(base())
