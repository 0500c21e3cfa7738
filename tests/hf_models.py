"""Tiny random models of every family as transformers makes and saves them, in awkward sizes."""

import dataclasses
import pathlib

import numpy as np

VOCAB = 151  # no multiple of anything


@dataclasses.dataclass(frozen=True)
class Case:
    """A transformers config class and what the model differs in from BASE."""

    name: str
    config_class: str
    settings: dict


BASE = dict(
    vocab_size=VOCAB, hidden_size=72, intermediate_size=100, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=2048, rms_norm_eps=1e-6,
    initializer_range=0.1, eos_token_id=2, bos_token_id=1, pad_token_id=0,
)  # fmt: skip


def _rope(theta: float, kind: str = "default", **numbers) -> dict:
    return {"rope_theta": theta, "rope_type": kind, **numbers}


_YARN = dict(factor=4.0, original_max_position_embeddings=256)
_LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=128)  # fmt: skip
_EXPERTS = dict(moe_intermediate_size=36, num_experts=6, num_experts_per_tok=2, head_dim=20,
                rope_parameters=_rope(1e6))  # fmt: skip
_GEMMA = dict(head_dim=20, query_pre_attn_scalar=30, sliding_window=16, num_hidden_layers=5)
_SLIDES = ["sliding_attention", "sliding_attention", "full_attention"]

CASES = (
    Case("qwen3-tied", "Qwen3Config",
         dict(head_dim=20, tie_word_embeddings=True, rope_parameters=_rope(1e4))),
    Case("qwen3-untied-yarn", "Qwen3Config",
         dict(head_dim=20, tie_word_embeddings=False, rope_parameters=_rope(5e6, "yarn", **_YARN))),
    Case("qwen3_moe", "Qwen3MoeConfig",
         dict(tie_word_embeddings=False, norm_topk_prob=True, **_EXPERTS)),
    Case("qwen3_moe-tied-plain", "Qwen3MoeConfig",
         dict(tie_word_embeddings=True, norm_topk_prob=False, **_EXPERTS)),
    Case("qwen2-tied", "Qwen2Config",
         dict(tie_word_embeddings=True, rope_parameters=_rope(1e6))),
    Case("qwen2-untied-sliding", "Qwen2Config",
         dict(tie_word_embeddings=False, rope_parameters=_rope(1e4), use_sliding_window=True,
              sliding_window=24, max_window_layers=1)),
    Case("llama-tied-llama3", "LlamaConfig",
         dict(tie_word_embeddings=True, rope_parameters=_rope(5e5, "llama3", **_LLAMA3))),
    Case("llama-untied-linear", "LlamaConfig",
         dict(tie_word_embeddings=False, rope_parameters=_rope(1e4, "linear", factor=4.0))),
    Case("gemma3-tied", "Gemma3TextConfig",
         dict(tie_word_embeddings=True, layer_types=_SLIDES + _SLIDES[:2], **_GEMMA,
              rope_parameters={"full_attention": _rope(1e6, "linear", factor=8.0),
                               "sliding_attention": _rope(1e4)})),
    Case("gemma3-untied", "Gemma3TextConfig",
         dict(tie_word_embeddings=False, layer_types=["full_attention", *_SLIDES, *_SLIDES[:1]],
              **_GEMMA, rope_parameters={"full_attention": _rope(1e6),
                                         "sliding_attention": _rope(2e4)})),
)  # fmt: skip


def make(case: Case, seed: int = 0):
    """The torch model in float32, eager attention, no weight of a kind that hides a mistake."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, case.config_class)(**{**BASE, **case.settings})
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:  # ones (Gemma: zeros) would not notice one left out or swapped
                weight += torch.empty_like(weight).uniform_(-0.5, 0.5)
            elif name.endswith("bias") or "gate.weight" in name:  # router: clear choices
                weight.normal_(0, 0.5)
    return model


def gradients_as_checkpoint(model, directory: pathlib.Path) -> None:
    """Saves a model whose weights are the gradients of this one: they travel like weights."""
    import torch

    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.grad)
    model.save_pretrained(directory)


def rows_of_tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask) [3, 700]: a prompt of 700, one padded on the left, one on the right."""
    random = np.random.default_rng(seed)
    ids, mask = random.integers(3, VOCAB, (3, 700)), np.ones((3, 700), int)
    mask[1, :123] = 0
    mask[2, -234:] = 0
    return ids * mask, mask
