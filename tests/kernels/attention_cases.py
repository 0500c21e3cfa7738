"""Seeded random attention: shapes, masks and operands for every implementation's test."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxreason.types import AttentionMask


@dataclasses.dataclass(frozen=True)
class Case:
    seed: int
    queries: int
    keys: int
    kv_heads: int
    group: int
    head_dim: int
    causal: bool
    segments: bool
    window: int | None
    soft_cap: float | None

    def __str__(self):
        flags = "causal" * self.causal, "segments" * self.segments
        flags += ("window" * (self.window is not None), "cap" * (self.soft_cap is not None))
        sizes = f"{self.queries}x{self.keys}-{self.kv_heads * self.group}/{self.kv_heads}"
        return "-".join(filter(None, (f"{self.seed}", f"{sizes}x{self.head_dim}", *flags)))

    @property
    def work(self) -> int:
        """Multiplications of the scores."""
        return 2 * self.queries * self.keys * self.kv_heads * self.group * self.head_dim

    def mask(self) -> AttentionMask:
        offset = self.keys - self.queries
        segments = {}
        if self.segments:
            k_BS = np.stack([_segments(self.seed + b, self.keys) for b in range(2)])
            q_BT = k_BS[:, offset:] if offset >= 0 else np.pad(k_BS, ((0, 0), (0, -offset)))
            segments = dict(q_segments_BT=jnp.array(q_BT), kv_segments_BS=jnp.array(k_BS))
        if offset > 0:
            segments["q_offset_B"] = jnp.full(2, offset, jnp.int32)
        return AttentionMask(
            causal=self.causal, window=self.window, soft_cap=self.soft_cap, **segments
        )

    def operands(self, dtype=jnp.float32):
        """(q, k, v, dout, dlse)."""
        N, keys = self.kv_heads * self.group, jax.random.split(jax.random.key(self.seed), 5)
        q, dout = (jax.random.normal(k, (2, self.queries, N, self.head_dim)) for k in keys[:2])
        k, v = (
            jax.random.normal(k, (2, self.keys, self.kv_heads, self.head_dim)) for k in keys[2:4]
        )
        dlse = jax.random.normal(keys[4], (2, self.queries, N))
        return *(x.astype(dtype) for x in (q, k, v, dout)), dlse


def _segments(seed: int, length: int) -> np.ndarray:
    """A packed row: documents of rising ids, then padding."""
    random = np.random.default_rng(seed)
    ends = np.sort(random.integers(0, length + 1, random.integers(1, 5)))
    ids = 1 + np.searchsorted(ends[:-1], np.arange(length), side="right")
    return np.where(np.arange(length) < max(1, ends[-1]), ids, 0).astype(np.int32)


def case(seed: int) -> Case:
    """Lengths from 1 to 1,100, as many short as long; queries are the last of the keys."""
    random = np.random.default_rng(seed)
    length = lambda: int(np.exp(random.uniform(0, np.log(1101))))
    keys = length()
    queries = keys if random.random() < 0.6 else length()
    of = lambda choices: random.choice(choices).item()
    return Case(
        seed=seed, queries=queries, keys=keys, kv_heads=of([1, 2]), group=of([1, 2, 4, 8]),
        head_dim=of([64, 80, 128, 256]), causal=random.random() < 0.7,
        segments=random.random() < 0.6,
        window=int(random.integers(1, keys + 1)) if random.random() < 0.4 else None,
        soft_cap=of([0.5, 5.0]) if random.random() < 0.3 else None,
    )  # fmt: skip
