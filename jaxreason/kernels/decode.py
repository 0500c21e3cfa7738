"""One query per row against its own keys and values, and those of the prefix it shares."""

import jax
import jax.numpy as jnp

_HIDDEN = -1e30  # score of a key that may not be read
_FLOOR = -1e20  # least row maximum: exp(_HIDDEN - _FLOOR) is exactly 0, even if no key is visible

Prefix = tuple[jax.Array, jax.Array, jax.Array]  # k_PKSH, v_PKSH, lengths_P


def decode_attention(
    q_BNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    lengths_B: jax.Array,
    *,
    prefix: Prefix | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Attention of the newest token of each row: out_BNH of q's dtype.

    Row b reads positions [0, lengths_b) of its cache; its own key and value are already there, at
    lengths_b - 1. Before them come the first lengths_p positions of its prefix: rows are in P runs
    of B / P neighbours, and the keys of prefix p are read once for all rows of run p. With `window`
    only the last so many positions are read. What lies beyond a length is ignored as long as it is
    finite. A row that reads nothing gives zeros. `scale` defaults to H ** -0.5; `soft_cap` as in
    AttentionMask. The cache is read as it lies, [B, K, S, H]: each head's keys are contiguous and
    the einsum needs no transpose: about twice as fast on CPU as [B, S, K, H]. Raises
    NotImplementedError for a cache of another dtype than q's.

    One softmax runs over the scores of both parts side by side. Merging two by their log-sum-exp
    needs more passes and is for kernels that never hold the scores.
    """
    if k_BKSH.dtype != q_BNH.dtype:  # XLA would copy the whole cache in the wider of the two
        raise NotImplementedError(
            f"the cache is {k_BKSH.dtype} and q_BNH {q_BNH.dtype}; XLA's products read one dtype "
            "(decode_pallas.py reads float8_e4m3fn as it is)"
        )
    B, N, H = q_BNH.shape
    K, S = k_BKSH.shape[1:3]
    q_BKGH = q_BNH.reshape(B, K, N // K, H)
    keys, values, seen = [k_BKSH], [v_BKSH], []
    before_B = jnp.zeros_like(lengths_B)
    if prefix is not None:
        keys, values = [prefix[0], k_BKSH], [prefix[1], v_BKSH]
        before_B = repeat_rows(prefix[2], B)
        seen.append(
            _visible(prefix[0].shape[2], 0 * before_B, before_B, before_B + lengths_B, window)
        )
    seen.append(_visible(S, before_B, lengths_B, before_B + lengths_B, window))
    s_BKGS = jnp.concatenate([_scores(q_BKGH, k_PKSH) for k_PKSH in keys], axis=-1)
    see_BS = jnp.concatenate(seen, axis=-1)
    s_BKGS *= H**-0.5 if scale is None else scale
    if soft_cap is not None:
        s_BKGS = soft_cap * jnp.tanh(s_BKGS / soft_cap)
    s_BKGS = jnp.where(see_BS[:, None, None], s_BKGS, _HIDDEN)
    e_BKGS = jnp.exp(s_BKGS - jnp.maximum(s_BKGS.max(-1, keepdims=True), _FLOOR))
    total_BKG1 = e_BKGS.sum(-1, keepdims=True)
    parts = jnp.split(e_BKGS, [keys[0].shape[2]] if prefix is not None else [], axis=-1)
    out_BKGH = sum(_mix(e_BKGS, v_PKSH) for e_BKGS, v_PKSH in zip(parts, values, strict=True))
    out_BKGH = out_BKGH / jnp.where(total_BKG1 == 0, 1.0, total_BKG1)
    return out_BKGH.reshape(B, N, H).astype(q_BNH.dtype)


def repeat_rows(x_P: jax.Array, rows: int) -> jax.Array:
    """[P, ...] -> [rows, ...]: each entry for its run of rows / P neighbours."""
    P = x_P.shape[0]
    return jnp.broadcast_to(x_P[:, None], (P, rows // P, *x_P.shape[1:])).reshape(
        rows, *x_P.shape[1:]
    )


def _visible(size: int, first_B, length_B, total_B, window: int | None) -> jax.Array:
    """[B, size]: which keys of a part are read, its first at position first_B of total_B."""
    index_1S = jnp.arange(size)[None]
    see_BS = index_1S < length_B[:, None]
    if window is not None:
        see_BS &= index_1S + first_B[:, None] >= total_B[:, None] - window
    return see_BS


def _scores(q_BKGH: jax.Array, k_PKSH: jax.Array) -> jax.Array:
    """float32 [B, K, G, S]; the queries of a run meet the keys of their prefix in one product."""
    B, K, G, _ = q_BKGH.shape
    P, _, S, H = k_PKSH.shape
    q_PKRH = jnp.swapaxes(q_BKGH.reshape(P, B // P, K, G, H), 1, 2).reshape(P, K, -1, H)
    # Keys as the left operand: a quarter of a decode step of 640 rows on CPU. Without the barrier
    # XLA folds the transpose back into the product.
    s_PKSR = jnp.einsum("PKSH,PKRH->PKSR", k_PKSH, q_PKRH, preferred_element_type=jnp.float32)
    s_PKRS = jnp.swapaxes(jax.lax.optimization_barrier(s_PKSR), 2, 3)
    return jnp.swapaxes(s_PKRS.reshape(P, K, B // P, G, S), 1, 2).reshape(B, K, G, S)


def _mix(e_BKGS: jax.Array, v_PKSH: jax.Array) -> jax.Array:
    """float32 [B, K, G, H]: values weighted by e."""
    B, K, G, S = e_BKGS.shape
    P, _, _, H = v_PKSH.shape
    e_PKRS = jnp.swapaxes(e_BKGS.reshape(P, B // P, K, G, S), 1, 2).reshape(P, K, -1, S)
    out_PKRH = jnp.einsum(
        "PKRS,PKSH->PKRH", e_PKRS.astype(v_PKSH.dtype), v_PKSH, preferred_element_type=jnp.float32
    )
    return jnp.swapaxes(out_PKRH.reshape(P, K, B // P, G, H), 1, 2).reshape(B, K, G, H)
