"""config.json and generation_config.json both ways, in the spelling of transformers 4 and of 5.

transformers 5 gathers RoPE in `rope_parameters` (Gemma 3: one for each kind of layer) and says
`dtype`; what was published before says `rope_theta`, `rope_scaling`, `rope_local_base_freq` and
`torch_dtype`. Both are read and have to agree; both are written, for vLLM and older tools.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.checkpoint.safetensors_files import read_json
from jaxreason.model.config import FAMILIES, DecoderConfig
from jaxreason.model.rope import RopeScaling

GENERATION = "generation_config.json"
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
# What a config.json of the family may leave out, as transformers fills it in: the published Gemma 3
# of 4b and more state the few numbers that differ.
_UNSAID: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131_072,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
}
# (keys, the one value that this decoder computes, families or None for all): anything else raises.
_FIXED: tuple[tuple[tuple[str, ...], Any, tuple[str, ...] | None], ...] = (
    (("attention_bias",), False, ("qwen3", "qwen3_moe", "llama", "gemma3_text")),
    (("mlp_bias",), False, None),
    (("final_logit_softcapping", "attn_logit_softcapping"), None, None),
    (("use_bidirectional_attention",), False, None),
    (("partial_rotary_factor",), 1.0, None),
    (("decoder_sparse_step",), 1, ("qwen3_moe",)),
    (("mlp_only_layers",), [], ("qwen3_moe",)),
)


# --- reading --------------------------------------------------------------------------------------


def config_from_hf(hf_config: Mapping[str, Any]) -> DecoderConfig:
    """The shape that a config.json describes; of a multimodal Gemma 3, that of its text part.

    Raises ValueError, one line, for what this decoder would not compute as transformers does, and
    for missing keys: rope_theta in particular has no default (Gemma 3 apart).
    """
    hf = _of_text(hf_config)
    family = hf.get("model_type")
    if family not in FAMILIES:
        known = ", ".join([*FAMILIES, "gemma3"])
        raise ValueError(f"config.json: model_type is {family!r}; known: {known}")
    hf = {**_UNSAID.get(family, {}), **{k: v for k, v in hf.items() if v is not None}}
    _refuse_what_differs(family, hf)
    return DecoderConfig(
        family=family,
        vocab_size=_need(hf, "vocab_size"),
        num_layers=_need(hf, "num_hidden_layers"),
        embed_dim=_need(hf, "hidden_size"),
        num_heads=_need(hf, "num_attention_heads"),
        num_kv_heads=_need(hf, "num_key_value_heads"),
        head_dim=hf.get("head_dim") or _need(hf, "hidden_size") // _need(hf, "num_attention_heads"),
        norm_eps=_need(hf, "rms_norm_eps"),
        tie_embeddings=_need(hf, "tie_word_embeddings"),
        max_length=_need(hf, "max_position_embeddings"),
        init_std=hf.get("initializer_range", 0.02),
        **_rope(hf),
        **_sliding(family, hf),
        **_mlp(family, hf),
        **_scale(family, hf),
    )


def _of_text(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The text part's config; what the whole says of the vocabulary's two ends counts too."""
    if hf_config.get("model_type") != "gemma3":
        return dict(hf_config)
    text = hf_config.get("text_config")
    if not isinstance(text, Mapping):
        raise ValueError("config.json: model_type is 'gemma3', which needs a text_config")
    shared = ("tie_word_embeddings", "quantization_config", "initializer_range")
    above = {key: hf_config[key] for key in shared if key in hf_config}
    return {"model_type": "gemma3_text", **above, **text}


def _need(hf: Mapping[str, Any], key: str) -> Any:
    if hf.get(key) is None:
        raise ValueError(f"config.json has no {key}; a {hf['model_type']} checkpoint states it")
    return hf[key]


def _refuse_what_differs(family: str, hf: Mapping[str, Any]) -> None:
    """Raises on the first setting that this decoder would not compute as transformers does."""
    for keys, value, families in _FIXED:
        for key in keys:
            given = hf.get(key, value)
            if (families is None or family in families) and given != value:
                raise ValueError(f"config.json: {key} is {given!r}; only {value!r} is known")
    if hf.get("quantization_config"):
        raise ValueError("config.json: weights are quantised; only plain floats are known")
    key = _activation_key(family)
    wanted = _ACTIVATIONS[FAMILIES[family].activation]
    if hf.get(key, wanted) != wanted:
        raise ValueError(f"config.json: {key} is {hf[key]!r}; only {wanted!r} is known")


def _activation_key(family: str) -> str:
    return "hidden_activation" if family == "gemma3_text" else "hidden_act"


def _mlp(family: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    if not FAMILIES[family].experts:
        return {"mlp_dim": _need(hf, "intermediate_size")}
    num_experts = hf.get("num_experts") or _need(hf, "num_local_experts")
    return {
        "mlp_dim": _need(hf, "moe_intermediate_size"),
        "num_experts": num_experts,
        "experts_per_token": _need(hf, "num_experts_per_tok"),
        "norm_expert_weights": _need(hf, "norm_topk_prob"),
        "router_aux_coef": hf.get("router_aux_loss_coef", 0.001),
    }


def _scale(family: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    if family != "gemma3_text":
        return {}
    return {"attention_scale": _need(hf, "query_pre_attn_scalar") ** -0.5}


def _sliding(family: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """`window` and `sliding_layers`, from layer_types or the rule that was there before it."""
    num_layers = _need(hf, "num_hidden_layers")
    layers = range(num_layers)
    if family == "llama":  # transformers reads none of these keys
        return {}
    if family == "gemma3_text":
        pattern = hf.get("sliding_window_pattern", hf.get("_sliding_window_pattern", 6))
        sliding, window = [i for i in layers if (i + 1) % pattern], hf["sliding_window"]
    elif hf.get("use_sliding_window"):
        first = 0 if family == "qwen3_moe" else hf.get("max_window_layers", 28)
        sliding, window = [i for i in layers if i >= first], _need(hf, "sliding_window")
    else:
        sliding, window = [], None
    types = hf.get("layer_types") if family != "qwen3_moe" else None
    if types is not None:
        unknown = set(types) - {"full_attention", "sliding_attention"}
        if unknown or len(types) != num_layers:
            raise ValueError(
                f"config.json: layer_types has {len(types)} entries for {num_layers} layers, of "
                f"kinds {', '.join(sorted(set(types)))}; known: full_attention, sliding_attention"
            )
        sliding = [i for i in layers if types[i] == "sliding_attention"]
        if sliding and window is None:
            raise ValueError(
                "config.json: layer_types has sliding_attention, but use_sliding_window is false"
            )
    return {"window": window, "sliding_layers": tuple(sliding)} if sliding else {}


def _rope(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of RoPE; Gemma 3 has one for each kind of layer."""
    gemma, new = hf["model_type"] == "gemma3_text", hf.get("rope_parameters") or {}
    if new and gemma != any(isinstance(value, Mapping) for value in new.values()):
        raise ValueError(
            f"config.json: rope_parameters of {hf['model_type']} is "
            f"{'one for each kind of layer' if gemma else 'a single one'}; here it is {new}"
        )
    old = {"rope_theta": hf.get("rope_theta"), **(hf.get("rope_scaling") or {})}
    if not gemma:
        theta, scaling = _agreed(hf, "rope_theta", new, old)
        return {"rope_theta": theta, "rope_scaling": scaling}
    whole = {"rope_theta": None, **(new.get("full_attention") or {})}
    theta, scaling = _agreed(hf, "rope_theta", whole, old, default=1e6)
    local = {"rope_theta": None, **(new.get("sliding_attention") or {})}
    old_local = {"rope_theta": hf.get("rope_local_base_freq")}
    local_theta, scaled = _agreed(hf, "rope_local_base_freq", local, old_local, default=1e4)
    if scaled is not None:
        raise ValueError(f"config.json: RoPE of sliding layers is scaled: {local}; unknown")
    return {"rope_theta": theta, "rope_scaling": scaling, "local_rope_theta": local_theta}


def _agreed(
    hf: Mapping[str, Any], key: str, *spellings: Mapping[str, Any], default: float | None = None
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from whichever spelling states it. Raises ValueError for two of one."""
    thetas = {float(rope["rope_theta"]) for rope in spellings if rope.get("rope_theta") is not None}
    if not thetas and default is None:
        raise ValueError("config.json has no rope_theta (nor rope_parameters.rope_theta)")
    if len(thetas) > 1:
        raise ValueError(f"config.json states two values of {key}: {sorted(thetas)}")
    # transformers 4 left a null rope_scaling beside a rope_theta: none says nothing.
    scalings = {_scaling(hf, rope) for rope in spellings} - {None}
    if len(scalings) > 1:
        raise ValueError(f"config.json states two scalings of RoPE: {scalings}")
    return next(iter(thetas), default), next(iter(scalings), None)


def _scaling(hf: Mapping[str, Any], rope: Mapping[str, Any]) -> RopeScaling | None:
    """Raises ValueError for a kind, or a key of a kind, that is not computed here."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise ValueError(f"config.json: partial_rotary_factor is {partial!r}; only 1.0 is known")
    if kind == "default":
        return None
    if kind not in ("linear", "yarn", "llama3"):
        raise ValueError(
            f"config.json: rope_type is {kind!r}; known: default, linear, yarn, llama3"
        )
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ValueError("config.json: yarn with mscale is unknown; only attention_factor is")
    if rope.get("factor") is None:
        raise ValueError(f"config.json: rope_type is {kind!r}, which needs a factor")
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    # transformers takes the key beside the RoPE ones first, and max_position_embeddings last.
    original = hf.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", _need(hf, "max_position_embeddings")
    )
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            float(rope["factor"]),
            original,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            truncate=rope.get("truncate", True),
            attention_factor=rope.get("attention_factor"),
        )
    low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
    if low is None or high is None:
        raise ValueError("config.json: rope_type llama3 needs low_freq_factor and high_freq_factor")
    ends = dict(low_freq_factor=float(low), high_freq_factor=float(high))
    return RopeScaling("llama3", float(rope["factor"]), original, **ends)


# --- writing --------------------------------------------------------------------------------------


def config_to_hf(
    config: DecoderConfig,
    *,
    eos_id: int | Sequence[int] | None,
    pad_id: int | None,
    bos_id: int | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 and vLLM read.

    Raises ValueError, one line, for a shape that the family's config.json cannot say.
    """
    _refuse_what_cannot_be_said(config)
    c, family = config, config.family
    written = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.embed_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_length,
        "initializer_range": c.init_std,
        _activation_key(family): _ACTIVATIONS[c.traits.activation],
        "attention_bias": False,  # of Qwen2 the biases are no option, and the key is not read
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": bos_id,
        "eos_token_id": list(eos_id) if isinstance(eos_id, Sequence) else eos_id,
        "pad_token_id": pad_id,
    }
    return written | _rope_to_hf(c) | _layers_to_hf(c) | _experts_to_hf(c)


def _refuse_what_cannot_be_said(c: DecoderConfig) -> None:
    gemma = c.family == "gemma3_text"

    def refuse(when: bool, key: str, why: str) -> None:
        if when:
            raise ValueError(f"model.{key} is {getattr(c, key)}; a config.json of {c.family} {why}")

    refuse(gemma and c.local_rope_theta is None, "local_rope_theta", "states it")
    refuse(not gemma and c.local_rope_theta is not None, "local_rope_theta", "cannot say it")
    refuse(not gemma and c.attention_scale is not None, "attention_scale", "cannot say it")
    scalar = _attention_scalar(c)
    refuse(gemma and abs(scalar - round(scalar)) > 1e-6 * scalar, "attention_scale",
           "holds 1 / its square, a whole number")  # fmt: skip
    refuse(c.family == "llama" and bool(c.sliding_layers), "sliding_layers", "cannot say it")
    some = 0 < len(c.sliding_layers) < c.num_layers
    refuse(c.family == "qwen3_moe" and some, "sliding_layers", "has all of them or none")


def _attention_scalar(c: DecoderConfig) -> float:
    return c.head_dim if c.attention_scale is None else c.attention_scale**-2


def _rope_to_hf(c: DecoderConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if c.rope_scaling is not None:
        s = c.rope_scaling
        scaling = {"rope_type": s.kind, "factor": s.factor}
        if s.kind != "linear":
            scaling["original_max_position_embeddings"] = s.original_length
        if s.kind == "yarn":
            scaling |= dict(beta_fast=s.beta_fast, beta_slow=s.beta_slow, truncate=s.truncate)
            if s.attention_factor is not None:
                scaling["attention_factor"] = s.attention_factor
        if s.kind == "llama3":
            ends = dict(low_freq_factor=s.low_freq_factor, high_freq_factor=s.high_freq_factor)
            scaling |= ends
    new = {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})}
    old = {"rope_theta": c.rope_theta, "rope_scaling": scaling}
    if c.family != "gemma3_text":
        return {**old, "rope_parameters": new}
    local = {"rope_theta": c.local_rope_theta, "rope_type": "default"}
    by_kind = {"full_attention": new, "sliding_attention": local}
    return {**old, "rope_local_base_freq": c.local_rope_theta, "rope_parameters": by_kind}


def _layers_to_hf(c: DecoderConfig) -> dict[str, Any]:
    types = ["sliding_attention" if sliding else "full_attention" for sliding in c.sliding]
    if c.family == "llama":
        return {"mlp_bias": False}
    if c.family == "gemma3_text":
        scalar = round(_attention_scalar(c))
        return {
            "layer_types": types,
            # A window is stated even where no layer has one: transformers wants a number.
            "sliding_window": c.window or c.max_length,
            "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        }
    used = {"use_sliding_window": bool(c.sliding_layers), "sliding_window": c.window}
    if c.family == "qwen3_moe":
        return used
    # Layers before max_window_layers are full: what transformers 4 and vLLM read of layer_types.
    return {**used, "max_window_layers": min(c.sliding_layers, default=c.num_layers),
            "layer_types": types}  # fmt: skip


def _experts_to_hf(c: DecoderConfig) -> dict[str, Any]:
    if not c.traits.experts:
        return {}
    return {
        # Of dense layers, of which there are none; as wide as the experts that a token has.
        "intermediate_size": c.mlp_dim * c.experts_per_token,
        "moe_intermediate_size": c.mlp_dim,
        "num_experts": c.num_experts,
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.experts_per_token,
        "norm_topk_prob": c.norm_expert_weights,
        "router_aux_loss_coef": c.router_aux_coef,
        "output_router_logits": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


# --- the ends of a sequence, and sampling ---------------------------------------------------------

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# What transformers writes of itself.
_OF_THE_LIBRARY = re.compile(r"_|transformers_version$|output_|use_cache$|return_dict")


def generation_settings(directory: pathlib.Path) -> dict[str, Any]:
    """What a directory says of generation: token ids, several ends too, temperature, top_p, ...

    From generation_config.json, and for ids that it lacks from config.json. {} where there is
    neither. Raises ValueError when one is no JSON.
    """
    said: dict[str, Any] = {}
    if (directory / "config.json").is_file():
        whole = read_json(directory / "config.json")
        config = {**_of_text(whole), **whole}
        said = {key: config[key] for key in _IDS if key in config}
    if (directory / GENERATION).is_file():
        said |= read_json(directory / GENERATION)
    return {k: v for k, v in said.items() if v is not None and not _OF_THE_LIBRARY.match(k)}
