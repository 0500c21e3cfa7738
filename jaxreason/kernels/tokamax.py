"""Attention by the package tokamax (openxla), if installed: no packed segments, no offset."""

import jax

from jaxreason.types import AttentionMask


def package():
    """The package, whose flags would otherwise be looked for among those of this program."""
    from absl import flags

    flags.FLAGS.mark_as_parsed()
    import tokamax

    return tokamax


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: AttentionMask,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, None]:
    """(out_BTNH of q's dtype, None), as `reference.attention`.

    Args:
      implementation: of tokamax; None is its own choice for the chip.
    Raises NotImplementedError for what it would honour by a mask of every pair, or not at all.
    """
    has = {
        "packed segments": mask.q_segments_BT is not None,
        "an offset": mask.q_offset_B is not None,
        "more keys than queries": q_BTNH.shape[1] != k_BTKH.shape[1],
        "a window that is not causal": mask.window is not None and not mask.causal,
    }
    if any(has.values()):
        asked = ", ".join(name for name, given in has.items() if given)
        raise NotImplementedError(f"tokamax attention cannot honour {asked}")
    out_BTNH = package().dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, scale=mask.scale, is_causal=mask.causal,
        logits_soft_cap=mask.soft_cap, implementation=implementation,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
    )  # fmt: skip
    return out_BTNH, None
