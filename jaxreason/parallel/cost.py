"""Arithmetic on numbers alone: how much work a token is."""


def flops_per_token(
    *,
    body_params: int,
    head_params: int,
    num_layers: int,
    attention_dim: int,
    length: int,
    causal: bool = True,
) -> float:
    """Training FLOPs a token, forward and backward, without recomputation.

    6 a parameter that multiplies (the embedding lookup is free, a tied head counts once as head),
    plus attention: 12 * layers * (heads * head_dim) * length for full attention, half of it for
    causal. The causal count reproduces prime-rl's and Megatron-Bridge's published figures; the full
    count is nanochat's and llm-foundry's.

    Args:
      body_params: parameters of all layers, embedding and head excluded.
      head_params: vocabulary x model dim.
      attention_dim: query heads x head dim.
      length: tokens that attend to each other (the row's length when documents are not cut).
    """
    attention = (6 if causal else 12) * num_layers * attention_dim * length
    return 6.0 * (body_params + head_params) + attention
