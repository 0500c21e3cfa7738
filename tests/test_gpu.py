"""On a real GPU: JAX_PLATFORMS=cuda python -m pytest -m gpu (no data packages needed).

bf16 tolerances: 8 bits of mantissa, so about 1e-2 relative to the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreason.kernels import blockwise, grouped, linear_xent, reference
from jaxreason.model import attention, decode_choice
from jaxreason.model.config import preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.parallel.mesh import capability
from jaxreason.rollout.engine import EngineConfig
from jaxreason.rollout.generate import build_generate
from jaxreason.train import optim
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step
from jaxreason.types import AttentionMask, Batch, Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU (JAX_PLATFORMS=cuda)"),
]
SHAPE = preset("qwen3-0.6b", num_layers=2, vocab_size=8192)


def random_batch(rows: int, length: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1).astype(np.int32)
    starts = np.stack([np.searchsorted(row, row) for row in segments])
    return Batch(
        tokens_BT=tokens[:, :-1],
        targets_BT=tokens[:, 1:],
        weights_BT=np.ones((rows, length), np.float32),
        segments_BT=segments,
        positions_BT=(np.arange(length) - starts).astype(np.int32),
    )


def close(found, wanted, tolerance: float) -> None:
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-6)


def test_blockwise_attention_and_its_gradients():
    batch = random_batch(2, 512)
    segments = jnp.asarray(batch.segments_BT)
    mask = AttentionMask(q_segments_BT=segments, kv_segments_BS=segments)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, g = (
        jax.random.normal(key, (2, 512, heads, 128), jnp.bfloat16)
        for key, heads in zip(keys, (16, 8, 8, 16))
    )

    def run(attention, *operands):
        out, pullback = jax.vjp(lambda *x: attention(*x, mask)[0], *operands)
        return out, *pullback(g.astype(out.dtype))

    wanted = run(reference.attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    for found, want in zip(jax.jit(lambda *x: run(blockwise.attention, *x))(q, k, v), wanted):
        close(found, want, 2e-2)


@pytest.mark.parametrize("deterministic", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize(
    "head_dim, use",
    [(h, "packed window") for h in (64, 80, 128, 256)] + [(128, "packed"), (128, "whole rows")],
)
@pytest.mark.parametrize("name", attention.IMPLEMENTATIONS)
def test_attention_of_every_kernel_and_its_gradients(name, head_dim, use, deterministic):
    """As at the start of a run that chose it; skipped with the reason that would refuse it."""
    if deterministic and attention.IMPLEMENTATIONS[name].ordered is None:
        pytest.skip("has one form only")
    asked = attention.Use(
        "gpu", "bfloat16", head_dim, capability(None), segments="packed" in use,
        window="window" in use,
    )  # fmt: skip
    if reasons := attention.IMPLEMENTATIONS[name].reasons(asked):
        pytest.skip("; ".join(reasons))
    attention.check(name, asked, deterministic)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("cache_dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", decode_choice.IMPLEMENTATIONS)
def test_decode_attention_of_every_kernel(name, cache_dtype, head_dim):
    asked = decode_choice.Use("gpu", "bfloat16", cache_dtype, head_dim, window=head_dim == 80)
    if reasons := decode_choice.IMPLEMENTATIONS[name].reasons(asked):
        pytest.skip("; ".join(reasons))
    decode_choice.check(name, asked)


def test_an_ordered_kernel_gives_the_same_bits_twice():
    """4,096 keys: so many blocks add to the gradient of a query that their order shows."""
    able = {
        n: i.ordered
        for n, i in attention.IMPLEMENTATIONS.items()
        if i.ordered and not i.reasons(attention.Use("gpu", "bfloat16", 128, capability(None)))
    }
    if not able:
        pytest.skip("no kernel for this GPU has a form of its own for that")
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (
        jax.random.normal(key, (1, 4096, heads, 128), jnp.bfloat16)
        for key, heads in zip(keys, (8, 4, 4))
    )
    for kernel in able.values():
        loss = lambda *qkv, k=kernel: k.attention(*qkv, AttentionMask())[0].astype("float32").sum()
        run = jax.jit(jax.grad(loss, (0, 1, 2)))
        for a, b in zip(run(q, k, v), run(q, k, v)):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_head_loss_and_its_gradients():
    keys = jax.random.split(jax.random.key(0), 3)
    h = jax.random.normal(keys[0], (512, 256), jnp.bfloat16)
    w = 0.05 * jax.random.normal(keys[1], (8192, 256), jnp.float32)
    targets, weights = jax.random.randint(keys[2], (512,), 0, 8192), jnp.ones(512)
    loss = lambda fn: jax.value_and_grad(lambda h, w: fn(h, w, targets, weights)[0], (0, 1))
    found, wanted = jax.jit(loss(linear_xent.linear_xent))(h, w), loss(reference.linear_xent)(h, w)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        close(a, b, 2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("implementation", ["loop", "pallas"])
def test_expert_product_and_its_gradients(implementation, dtype):
    grouped.check(implementation, jnp.dtype(dtype))


def test_training_in_bfloat16_learns_a_batch():
    model = LanguageModel(SHAPE, Execution(dtype="bfloat16", scan_layers=True, remat="full"))
    config = optim.OptimizerConfig(learning_rate=1e-3)
    optimizer, schedule = optim.make_optimizer(config, model.axes), optim.make_schedule(config, 20)
    step = make_train_step(model, LanguageModeling(), optimizer, schedule, clip_norm=1.0)
    state, losses = state_lib.create(model, optimizer, jax.random.key(0)), []
    for _ in range(20):
        state, metrics = step(state, random_batch(4, 512), None)
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 1.0


def test_sampled_logprobs_are_the_trainers():
    model = LanguageModel(SHAPE, Execution(dtype="float32", scan_layers=True))
    params = model.init(jax.random.key(0))
    generate = build_generate(model, list, str, 0, EngineConfig(slots=8))
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    rows = generate(params, prompts, Sampling(max_tokens=32, num_samples=4), jax.random.key(1))
    for prompt, completions in zip(prompts, rows):
        for completion in completions:
            ids = np.array([*prompt, *completion.ids], np.int32)[None]
            ones, positions = np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None]
            h_BTD = model.hidden(params, ids[:, :-1], ones[:, :-1], positions[:, :-1])
            logp_BT = model.logprobs(params, h_BTD, ids[:, 1:])[0]
            # TF32 matmuls keep 10 bits of mantissa
            close(completion.logprobs, logp_BT[0, len(prompt) - 1 :], 2e-3)


FAMILIES = {
    "qwen2.5-0.5b": dict(num_layers=2),
    "llama-3.2-1b": dict(num_layers=2),
    "gemma-3-1b": dict(num_layers=7, sliding_layers=(0, 1, 2, 3, 4, 6), window=100),
    "qwen3-30b-a3b": dict(num_layers=2, embed_dim=512, mlp_dim=256, num_heads=8, num_experts=16),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_in_bfloat16_is_near_float32(name):
    """Loss and gradients of packed rows, beside exact products and the plain attention."""
    config = preset(name, vocab_size=SHAPE.vocab_size, **FAMILIES[name])
    batch = random_batch(2, 512)
    params = jax.jit(LanguageModel(config).init)(jax.random.key(0))

    def run(execution: Execution):
        model = LanguageModel(config, execution)

        def loss(params):
            h = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
            return model.xent(params, h, batch.targets_BT, batch.weights_BT)[0]

        return jax.jit(jax.value_and_grad(loss))(params)

    with jax.default_matmul_precision("highest"):
        wanted, gradients = run(Execution("float32", attention="reference", scan_layers=True))
    found, ours = run(Execution("bfloat16", remat="full", scan_layers=True))
    close(found, wanted, 1e-2)
    # As a whole: a rounding may send a token to another expert, which changes single entries.
    norm = lambda tree: np.sqrt(sum(float((x.astype(jnp.float32) ** 2).sum()) for x in tree))
    difference = jax.tree.map(jnp.subtract, jax.tree.leaves(ours), jax.tree.leaves(gradients))
    assert norm(difference) <= 0.1 * norm(jax.tree.leaves(gradients))
