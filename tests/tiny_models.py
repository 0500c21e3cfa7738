"""A two-layer decoder and packed rows, for tests that need a model rather than a good one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxreason.model.config import DecoderConfig
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.types import Batch, Params

VOCAB = 64

# init_std is large, so that logits are of order 1 and a wrong mask or rotation shows.
CONFIG = dict(
    vocab_size=VOCAB, num_layers=2, embed_dim=32, mlp_dim=48, num_heads=4, num_kv_heads=2,
    head_dim=8, rope_theta=1e4, init_std=0.2,
)  # fmt: skip

# Compiles in half the time of the default; tests of attention and of execution name their own.
QUICK = Execution(scan_layers=True, attention="reference")


def tiny_model(
    mesh: Mesh | None = None,
    valid_vocab: int | None = None,
    execution: Execution = QUICK,
    value_head: bool = False,
    **changes,
) -> LanguageModel:
    config = DecoderConfig(**{**CONFIG, **changes})
    return LanguageModel(config, execution, mesh, valid_vocab, value_head)


@functools.cache
def tiny_params() -> Params:
    """Of `tiny_model()`; its executions and meshes share them."""
    return jax.jit(tiny_model().init)(jax.random.key(0))


def packed_batch(
    rows: list[list[int]], length: int, vocab: int = VOCAB, seed: int = 0, loss_share: float = 1.0
) -> Batch:
    """Rows of random documents of these lengths, then padding.

    The weight of a target is 1 with probability `loss_share`, and 0 on each document's last input.
    """
    random = np.random.default_rng(seed)
    tokens, weights, segments, positions = (np.zeros((len(rows), length), int) for _ in range(4))
    for row, documents in enumerate(rows):
        start = 0
        for number, size in enumerate(documents, start=1):
            here = slice(start, start + size)
            tokens[row, here] = random.integers(0, vocab, size)
            weights[row, here] = random.random(size) < loss_share
            weights[row, start + size - 1] = 0
            segments[row, here] = number
            positions[row, here] = np.arange(size)
            start += size
    return Batch(
        tokens_BT=tokens.astype(np.int32),
        targets_BT=np.roll(tokens, -1, axis=1).astype(np.int32),
        weights_BT=weights.astype(np.float32),
        segments_BT=segments.astype(np.int32),
        positions_BT=positions.astype(np.int32),
    )


def mean_loss(model: LanguageModel, params: Params, batch: Batch) -> jax.Array:
    """The mean cross-entropy of a batch."""
    h_BTD = model.hidden(params, batch.tokens_BT, batch.segments_BT, batch.positions_BT)
    total, _ = model.xent(params, h_BTD, batch.targets_BT, batch.weights_BT)
    return total / batch.weights_BT.sum()


def loss_and_gradients(model: LanguageModel, params: Params, batch: Batch):
    return jax.jit(jax.value_and_grad(functools.partial(mean_loss, model)))(params, batch)


def assert_trees_close(got, want, relative: float) -> None:
    """Every leaf within `relative` of the largest magnitude of the leaf it should be."""

    def check(path, a, b):
        a, b = np.asarray(a), np.asarray(b)
        scale = np.abs(b).max()
        assert np.abs(a - b).max() <= relative * scale, (jax.tree_util.keystr(path), scale)

    jax.tree_util.tree_map_with_path(check, got, want)


def moved_by_an_ulp(tree, seed: int):
    """Every weight moved to its next number, up or down: as much as any rounding may differ."""
    random = np.random.default_rng(seed)
    to = lambda w: random.choice([-np.inf, np.inf], np.shape(w)).astype(w.dtype)
    return jax.tree.map(lambda w: np.nextafter(np.asarray(w), to(w)), tree)


def assert_gradients_close(got, want, moved: list) -> None:
    """Every leaf within 1e-5, in relative L2 and by its largest entry; or, where rounding does
    more, within what a random ulp in all weights does to any leaf.

    Args:
      moved: `want` of weights that are `moved_by_an_ulp`, of several seeds.
    """
    for size in (np.linalg.norm, lambda x: np.abs(x).max()):
        off = lambda a, b: size(np.asarray(a) - np.asarray(b)) / size(np.asarray(b))
        worst = lambda tree: max(jax.tree.leaves(jax.tree.map(off, tree, want)))
        limit = max(1e-5, *map(worst, moved))
        assert worst(got) <= limit, (jax.tree.map(off, got, want), limit)


def assert_trees_equal(got, want) -> None:
    def check(path, a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, got, want)
