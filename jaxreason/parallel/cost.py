"""Arithmetic on numbers alone: how much work a token is."""


def flops_per_token(
    *,
    body_params: int,
    head_params: int,
    attention_dim: int,
    keys_per_query: float,
    frozen: bool = False,
) -> float:
    """Training FLOPs a token, forward and backward, without recomputation.

    6 a parameter that multiplies (the embedding lookup is free, a tied head counts once as head),
    plus attention: 12 a key that a query reads, in each layer, times heads * head_dim. With the
    keys of causal attention that reproduces prime-rl's and Megatron-Bridge's published figures; a
    full square is nanochat's and llm-foundry's count.

    Args:
      body_params: parameters of all layers that a token meets, embedding and head excluded; of
        experts, those of the ones it chooses.
      head_params: vocabulary x model dim.
      attention_dim: query heads x head dim.
      keys_per_query: of all layers together, the mean over a row: see `causal_keys`.
      frozen: the parameters have no gradient of their own (LoRA's base): 4 a parameter.
    """
    per_param = 4.0 if frozen else 6.0
    return per_param * (body_params + head_params) + 12 * attention_dim * keys_per_query


def causal_keys(length: int, window: int | None = None) -> float:
    """The mean number of keys that a query of a row of `length` reads in one layer.

    Half the length, to the half of a key that the published counts leave out; with a window, the
    window less what the first queries lack.
    """
    reach = length if window is None else min(window, length)
    return reach * (1 - reach / (2 * length))
