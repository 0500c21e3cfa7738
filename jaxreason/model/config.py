"""The shape of a decoder, and the published shapes by name.

A config describes the network only; how it is executed (dtype, remat, attention implementation,
mesh) is `decoder.Execution`, because that may change between two runs of one model.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A dense Qwen3 decoder: GQA, QK-norm before RoPE, SwiGLU, pre-RMSNorm (arXiv 2505.09388)."""

    vocab_size: int  # rows of the embedding table; may exceed the tokenizer's entries
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    max_length: int = 32768  # positions the model was made for; written to config.json
    init_std: float = 0.02

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1:
                raise ValueError(f"model.{field.name} is {value}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads = {self.num_heads} is not a multiple of "
                f"model.num_kv_heads = {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"model.head_dim is {self.head_dim}; rotary embeddings need an even one"
            )


def _qwen3(num_layers, embed_dim, mlp_dim, num_heads, num_kv_heads, tie, **changes):
    defaults = dict(vocab_size=151_936, head_dim=128, tie_embeddings=tie, max_length=40_960)
    return DecoderConfig(
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        **{**defaults, **changes},
    )


PRESETS: dict[str, DecoderConfig] = {
    # Qwen3 technical report, table 1. Exact parameter counts are in tests/model/test_config.py.
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, 8, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, 8, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, 8, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 8, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, 8, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, 8, False),
    # This project's pretraining shape: 1,519,230,976 parameters.
    "qwen3-1.5b": _qwen3(24, 2048, 6144, 16, 8, True, max_length=4096),
    # Shapes for laptops; a config sets the vocabulary to its tokenizer's.
    "qwen3-tiny": _qwen3(
        4, 128, 384, 4, 2, True, vocab_size=320, head_dim=32, max_length=1024, rope_theta=1e4
    ),
    "qwen3-10m": _qwen3(
        6, 320, 960, 5, 5, True, vocab_size=8192, head_dim=64, max_length=2048, rope_theta=1e4
    ),
}


def preset(name: str, **changes) -> DecoderConfig:
    """The preset of that name with some fields replaced. Raises ValueError with the known names."""
    if name not in PRESETS:
        raise ValueError(f"model.preset is {name!r}; known presets: {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **changes)
