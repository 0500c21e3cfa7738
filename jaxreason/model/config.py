"""The shape of a decoder, the families of architectures, and the published shapes by name.

A config describes the network only; how it is executed (dtype, remat, attention implementation,
mesh) is `execution.Execution`, because that may change between two runs of one model.
"""

import dataclasses
from collections.abc import Mapping

from jaxreason.model.rope import RopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """What sets an architecture apart, beside the numbers of DecoderConfig."""

    qk_norm: bool = False  # queries and keys are normed over each head, before RoPE
    qkv_bias: bool = False
    post_norms: bool = False  # attention and MLP are normed again before they join the stream
    norm_offset: float = 0.0  # norms multiply by offset + weight
    activation: str = "silu"  # of the gated MLP: silu (SwiGLU) | gelu_tanh (GeGLU)
    scale_embeddings: bool = False  # by sqrt(D) as they enter
    experts: bool = False  # the MLP is a mixture of experts


# By the model_type of their config.json. All: GQA, pre-RMSNorm, gated MLP, rotary embeddings.
FAMILIES: dict[str, Family] = {
    "qwen3": Family(qk_norm=True),  # arXiv 2505.09388
    "qwen3_moe": Family(qk_norm=True, experts=True),
    "qwen2": Family(qkv_bias=True),  # Qwen2.5 too: arXiv 2412.15115
    "llama": Family(),  # Llama 3: arXiv 2407.21783
    "gemma3_text": Family(  # arXiv 2503.19786
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        activation="gelu_tanh",
        scale_embeddings=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The numbers of one decoder."""

    vocab_size: int  # rows of the embedding table; may exceed the tokenizer's entries
    num_layers: int
    embed_dim: int
    mlp_dim: int  # of each expert where there are experts
    num_heads: int
    num_kv_heads: int
    head_dim: int
    family: str = "qwen3"
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_scale: float | None = None  # of the scores; None: head_dim ** -0.5
    # Sliding layers read the last `window` positions only, with RoPE of their own base, unscaled.
    window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None  # None: rope_theta and rope_scaling there too
    num_experts: int = 0
    experts_per_token: int = 0
    norm_expert_weights: bool = True  # the chosen experts' weights sum to 1
    router_aux_coef: float = 0.001  # of the load-balancing loss, in training
    max_length: int = 32768  # positions the model was made for; written to config.json
    init_std: float = 0.02

    def __post_init__(self):
        if isinstance(self.rope_scaling, Mapping):  # as it comes back from JSON
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        object.__setattr__(self, "sliding_layers", tuple(self.sliding_layers))
        if self.family not in FAMILIES:
            raise ValueError(f"model.family is {self.family!r}; known: {', '.join(FAMILIES)}")
        may_be_zero = () if self.traits.experts else ("num_experts", "experts_per_token")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and value < 1 and field.name not in may_be_zero:
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
        self._check_choices()

    def _check_choices(self) -> None:
        if self.traits.experts and self.experts_per_token > self.num_experts:
            raise ValueError(
                f"model.experts_per_token is {self.experts_per_token}, more than "
                f"model.num_experts = {self.num_experts}"
            )
        if not self.traits.experts and self.num_experts:
            raise ValueError(
                f"model.num_experts is {self.num_experts}, but model.family = {self.family} has "
                "no experts; qwen3_moe has"
            )
        outside = [i for i in self.sliding_layers if not 0 <= i < self.num_layers]
        if outside:
            raise ValueError(
                f"model.sliding_layers names layer {outside[0]}; model.num_layers is "
                f"{self.num_layers}"
            )
        if self.sliding_layers and (self.window is None or self.window < 1):
            raise ValueError(
                f"model.window is {self.window}; the sliding layers need at least 1 position"
            )

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Whether each layer reads the last `window` positions only."""
        chosen = set(self.sliding_layers)
        return tuple(i in chosen for i in range(self.num_layers))


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


def _qwen3_moe(num_layers, embed_dim, mlp_dim, num_heads):
    experts = dict(family="qwen3_moe", num_experts=128, experts_per_token=8)
    return _qwen3(num_layers, embed_dim, mlp_dim, num_heads, 4, False, **experts)


def _qwen2(num_layers, embed_dim, mlp_dim, num_heads, num_kv_heads, tie, **changes):
    own = dict(family="qwen2", head_dim=embed_dim // num_heads, max_length=131_072)
    sizes = (num_layers, embed_dim, mlp_dim, num_heads, num_kv_heads, tie)
    return _qwen3(*sizes, **{**own, **changes})


def _llama(num_layers, embed_dim, mlp_dim, num_heads, tie, factor):
    scaling = RopeScaling("llama3", factor, original_length=8192) if factor else None
    return DecoderConfig(
        family="llama",
        vocab_size=128_256,
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=embed_dim // num_heads,
        rope_theta=5e5,
        rope_scaling=scaling,
        norm_eps=1e-5,
        tie_embeddings=tie,
        max_length=131_072 if factor else 8192,
    )


def _gemma3(num_layers, embed_dim, mlp_dim, num_heads, num_kv_heads, **changes):
    own = dict(vocab_size=262_208, head_dim=256, window=1024, max_length=131_072,
               rope_scaling=RopeScaling("linear", 8.0))  # fmt: skip
    return DecoderConfig(
        family="gemma3_text",
        num_layers=num_layers,
        embed_dim=embed_dim,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        sliding_layers=tuple(i for i in range(num_layers) if (i + 1) % 6),
        local_rope_theta=1e4,
        **{"attention_scale": 256**-0.5, **own, **changes},
    )


_GEMMA3_TEXT_ONLY = dict(vocab_size=262_144, window=512, max_length=32_768, rope_scaling=None)

# Exact parameter counts are in tests/model/test_config.py.
PRESETS: dict[str, DecoderConfig] = {
    # Qwen3 technical report, tables 1 and 2.
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, 8, True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, 8, True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, 8, True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, 8, False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, 8, False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, 8, False),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 768, 32),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 1536, 64),
    # Qwen2.5 technical report, table 1.
    "qwen2.5-0.5b": _qwen2(24, 896, 4864, 14, 2, True, max_length=32_768),
    "qwen2.5-1.5b": _qwen2(28, 1536, 8960, 12, 2, True),
    "qwen2.5-3b": _qwen2(36, 2048, 11008, 16, 2, True, max_length=32_768),
    "qwen2.5-7b": _qwen2(28, 3584, 18944, 28, 4, False, vocab_size=152_064),
    "qwen2.5-14b": _qwen2(48, 5120, 13824, 40, 8, False, vocab_size=152_064, norm_eps=1e-5),
    "qwen2.5-32b": _qwen2(64, 5120, 27648, 40, 8, False, vocab_size=152_064, norm_eps=1e-5),
    "qwen2.5-72b": _qwen2(80, 8192, 29568, 64, 8, False, vocab_size=152_064, norm_eps=1e-5),
    # Llama 3 and 3.1: arXiv 2407.21783, table 3 (3.3-70b has 3.1's shape); 3.2: its model cards.
    "llama-3-8b": _llama(32, 4096, 14336, 32, False, None),
    "llama-3-70b": _llama(80, 8192, 28672, 64, False, None),
    "llama-3.1-8b": _llama(32, 4096, 14336, 32, False, 8.0),
    "llama-3.1-70b": _llama(80, 8192, 28672, 64, False, 8.0),
    "llama-3.1-405b": _llama(126, 16384, 53248, 128, False, 8.0),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, True, 32.0),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, True, 32.0),
    "llama-3.3-70b": _llama(80, 8192, 28672, 64, False, 8.0),
    # Gemma 3 technical report, table 1, and the model card of 270m; the text decoder of each.
    "gemma-3-270m": _gemma3(18, 640, 2048, 4, 1, **_GEMMA3_TEXT_ONLY),
    "gemma-3-1b": _gemma3(26, 1152, 6912, 4, 1, **_GEMMA3_TEXT_ONLY),
    "gemma-3-4b": _gemma3(34, 2560, 10240, 8, 4),
    "gemma-3-12b": _gemma3(48, 3840, 15360, 16, 8),
    "gemma-3-27b": _gemma3(62, 5376, 21504, 32, 16, head_dim=128, attention_scale=168**-0.5),
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
