"""Rotary position embeddings: the angles of each position, and their scaling to longer contexts."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

KINDS = ("linear", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How the frequencies were changed so that a model reads further than it was trained to.

    linear: all are divided by `factor` (arXiv 2306.15595). yarn: slow ones are divided, fast ones
    kept, with a ramp between them, and cos and sin are multiplied (arXiv 2309.00071). llama3: the
    same with another ramp, between two wavelengths (Llama 3.1; arXiv 2407.21783).
    """

    kind: str = ""  # linear | yarn | llama3
    factor: float = 1.0
    original_length: int = 0  # positions before scaling; yarn and llama3
    beta_fast: float = 32.0  # yarn: turns within original_length above which nothing changes
    beta_slow: float = 1.0  # yarn: and below which all of `factor` applies
    truncate: bool = True  # yarn: the ends of the ramp are whole dims
    attention_factor: float | None = None  # yarn: of cos and sin; None: 0.1 ln(factor) + 1
    low_freq_factor: float = 1.0  # llama3: turns below which all of `factor` applies
    high_freq_factor: float = 4.0  # llama3: and above which nothing changes

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"rope_scaling.kind is {self.kind!r}; it must be {', '.join(KINDS)}")
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if self.kind != "linear" and self.original_length < 1:
            raise ValueError(
                f"rope_scaling.original_length is {self.original_length}; {self.kind} needs the "
                "positions that the model was first trained on"
            )


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[np.ndarray, float]:
    """(radians a position [H/2] float32, what cos and sin are multiplied by).

    Source: arXiv 2104.09864, and those of RopeScaling.
    """
    # In float64 on the host: XLA's float32 pow is a few ulp off, which grows with the position.
    plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    amplitude = 1.0
    if scaling is None:
        scaled = plain
    elif scaling.kind == "linear":
        scaled = plain / scaling.factor
    elif scaling.kind == "yarn":
        scaled = _between(_yarn_share(head_dim, theta, scaling), plain, plain / scaling.factor)
        amplitude = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    else:
        turns = scaling.original_length * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        share = np.clip((turns - low) / (high - low), 0, 1)
        scaled = _between(share, plain, plain / scaling.factor)
    return scaled.astype(np.float32), amplitude


def _yarn_share(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """[H/2]: how much of each frequency is kept as it was."""

    def dim_of(turns: float) -> float:
        """The (fractional) dim that turns so often within the original length."""
        wavelength = scaling.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    low, high = dim_of(scaling.beta_fast), dim_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)


def _between(share: np.ndarray, kept: np.ndarray, changed: np.ndarray) -> np.ndarray:
    return share * kept + (1 - share) * changed


def tables(positions_BT, head_dim: int, theta: float, scaling: RopeScaling | None = None):
    """cos and sin [B, T, 1, H/2] of the rotary angles, float32."""
    radians, amplitude = frequencies(head_dim, theta, scaling)
    angle = positions_BT[..., None, None].astype(jnp.float32) * radians
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if amplitude == 1 else (amplitude * cos, amplitude * sin)


def rotate(x_BTNH, cos, sin):
    """Rotary embedding on halves (x_i, x_{i + H/2}), the convention of Hugging Face's weights."""
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x_BTNH.dtype)
