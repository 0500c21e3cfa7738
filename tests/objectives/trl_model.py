"""The tiny model and the pairs on which this package's preference losses are held against TRL's.

numpy alone: make_trl_values.py reads it beside torch, test_preference.py beside JAX.
"""

import numpy as np

# As a config.json of transformers has it.
CONFIG = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=61, hidden_size=32,
    intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=True,
    hidden_act="silu", attention_bias=False, rope_theta=1e4, torch_dtype="float32",
    eos_token_id=2, bos_token_id=1, pad_token_id=0,
)  # fmt: skip
POLICY, REFERENCE = 0, 1  # seeds

# Of each: prompt, chosen, rejected.
_SIZES = ((4, 6, 3), (3, 2, 7), (5, 5, 5), (2, 8, 4))


def shapes() -> dict[str, tuple[int, ...]]:
    c = CONFIG
    D, F, H = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    N, K = c["num_attention_heads"], c["num_key_value_heads"]
    found = {"model.embed_tokens.weight": (c["vocab_size"], D), "model.norm.weight": (D,)}
    for layer in range(c["num_hidden_layers"]):
        of_layer = {
            "input_layernorm": (D,), "post_attention_layernorm": (D,),
            "self_attn.q_norm": (H,), "self_attn.k_norm": (H,),
            "self_attn.q_proj": (N * H, D), "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D), "self_attn.o_proj": (D, N * H),
            "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{k}.weight": shape for k, shape in of_layer.items()}
    return found


def weights(seed: int) -> dict[str, np.ndarray]:
    """float32 tensors by their names. RandomState's stream never changes between versions."""
    random = np.random.RandomState(seed)
    draw = lambda shape: 0.2 * random.standard_normal(shape)
    named = {name: draw(shape) for name, shape in sorted(shapes().items())}
    return {n: (x + (1 if "norm" in n else 0)).astype(np.float32) for n, x in named.items()}


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected), token ids."""
    random = np.random.RandomState(2)
    draw = lambda size: random.randint(3, CONFIG["vocab_size"], size).tolist()
    return [tuple(map(draw, sizes)) for sizes in _SIZES]
