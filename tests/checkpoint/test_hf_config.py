"""config.json both ways: the spellings of transformers 4 and 5, and what is refused."""

import dataclasses
import json
import re

import pytest

from jaxreason.checkpoint import hf_config
from jaxreason.checkpoint.hf_config import config_from_hf, config_to_hf, generation_settings
from jaxreason.model.config import PRESETS, DecoderConfig
from jaxreason.model.rope import RopeScaling

NO_IDS = {"eos_id": None, "pad_id": None}
SHAPE = DecoderConfig(vocab_size=160, num_layers=4, embed_dim=48, mlp_dim=96, num_heads=6,
                      num_kv_heads=2, head_dim=24, rope_theta=1e4, max_length=1024)  # fmt: skip
YARN = RopeScaling("yarn", 4.0, 256, beta_fast=16.0, attention_factor=1.25, truncate=False)
LLAMA3 = RopeScaling("llama3", 8.0, 128, low_freq_factor=2.0, high_freq_factor=5.0)
EXPERTS = dict(family="qwen3_moe", num_experts=6, experts_per_token=2, norm_expert_weights=False)
GEMMA = dict(family="gemma3_text", attention_scale=0.5, window=8, sliding_layers=(0, 2, 3),
             local_rope_theta=2e4)  # fmt: skip
VARIANTS = {
    "yarn": dict(rope_scaling=YARN),
    "sliding": dict(family="qwen2", window=8, sliding_layers=(2, 3)),
    "sliding, no suffix": dict(window=8, sliding_layers=(0, 3)),
    "experts": EXPERTS,
    "experts, sliding": dict(**EXPERTS, window=8, sliding_layers=(0, 1, 2, 3)),
    "llama3": dict(family="llama", rope_scaling=LLAMA3, head_dim=20),
    "gemma": GEMMA,
    "gemma, linear": dict(**GEMMA, rope_scaling=RopeScaling("linear", 8.0)),
    "gemma, nothing slides": {**GEMMA, "window": None, "sliding_layers": ()},
}
OLD = ("rope_theta", "rope_scaling", "rope_local_base_freq", "torch_dtype")
NEW = ("rope_parameters", "dtype")
CONFIGS = PRESETS | {name: dataclasses.replace(SHAPE, **v) for name, v in VARIANTS.items()}


def written(config: DecoderConfig) -> dict:
    """As it comes back from the file."""
    return json.loads(json.dumps(config_to_hf(config, **NO_IDS)))


def without(content: dict, *keys: str) -> dict:
    return {key: value for key, value in content.items() if key not in keys}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_in_both_spellings(name):
    config, both = CONFIGS[name], written(CONFIGS[name])
    for content in (both, without(both, *OLD), without(both, *NEW)):
        assert config_from_hf(content) == config


def test_before_layer_types_the_rules_said_which_layers_slide():
    config = dataclasses.replace(SHAPE, **VARIANTS["sliding"])
    assert config_from_hf(without(written(config), "layer_types")) == config
    gemma = without(written(PRESETS["gemma-3-1b"]), "layer_types")
    assert config_from_hf({**gemma, "sliding_window_pattern": 6}) == PRESETS["gemma-3-1b"]
    other = config_from_hf({**gemma, "sliding_window_pattern": 2})
    assert other.sliding_layers == tuple(range(0, 26, 2))


def test_transformers_reads_what_is_written():
    transformers = pytest.importorskip("transformers")
    for name in (*VARIANTS, "qwen2.5-1.5b", "llama-3.2-1b", "gemma-3-27b", "qwen3-30b-a3b"):
        config = CONFIGS[name]
        theirs = transformers.AutoConfig.for_model(**written(config))
        assert config_from_hf(theirs.to_dict()) == config, name


# As published: the numbers of Llama-3.2-1B, Qwen2.5-1.5B and gemma-3-4b, in transformers 4's words.
PUBLISHED = {
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "tie_word_embeddings": True, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "eos_token_id": 151643,
        "hidden_act": "silu", "hidden_size": 1536, "initializer_range": 0.02,
        "intermediate_size": 8960, "max_position_embeddings": 131072, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 12, "num_hidden_layers": 28,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma-3-4b": {
        "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
        "initializer_range": 0.02, "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_presets(name):
    assert config_from_hf(PUBLISHED[name]) == PRESETS[name]


def test_qwens_advice_for_yarn():
    """A reader's own `rope_scaling`, with the key of transformers before 4.45."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = config_from_hf({**PUBLISHED["qwen2.5-1.5b"], "rope_scaling": scaling})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 32768)


PLAIN = without(written(SHAPE), *NEW)
ROPE = "rope_parameters"


@pytest.mark.parametrize(
    "start, change, message",
    [
        ({}, {"model_type": "mistral"}, "model_type is 'mistral'; known: qwen3, qwen3_moe, qwen2,"),
        ({}, {"rope_theta": None}, "no rope_theta"),
        ({}, {ROPE: {"rope_theta": 5e6}}, "two values of rope_theta: [10000.0, 5000000.0]"),
        ({}, {ROPE: {"full_attention": {"rope_theta": 1e4}}}, "is a single one"),
        ({}, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({}, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ({}, {"rope_scaling": {"type": "linear"}}, "'linear', which needs a factor"),
        ({}, {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, "mscale is unknown"),
        ({}, {"rope_scaling": {"type": "llama3", "factor": 2.0}}, "needs low_freq_factor"),
        ({}, {ROPE: {"rope_type": "linear", "factor": 2.0}, "rope_scaling": {"type": "linear",
          "factor": 4.0}}, "two scalings of RoPE"),
        ({}, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({}, {"use_sliding_window": True}, "no sliding_window"),
        ({}, {"layer_types": ["full_attention", *["sliding_attention"] * 3]},
         "layer_types has sliding_attention, but use_sliding_window is false"),
        ({}, {"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
        ({}, {"layer_types": ["chunked_attention"] * 4}, "of kinds chunked_attention"),
        ({}, {"attention_bias": True}, "attention_bias is True; only False"),
        ({}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu'"),
        ({}, {"quantization_config": {"bits": 4}}, "quantised"),
        ({}, {"num_key_value_heads": None}, "no num_key_value_heads; a qwen3 checkpoint states it"),
        ({"family": "llama"}, {"mlp_bias": True}, "mlp_bias is True"),
        (EXPERTS, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
        (EXPERTS, {"mlp_only_layers": [0]}, "mlp_only_layers is [0]"),
        (EXPERTS, {"norm_topk_prob": None}, "no norm_topk_prob"),
        (GEMMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (GEMMA, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        (GEMMA, {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        (GEMMA, {"hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
        (GEMMA, {ROPE: {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
         "RoPE of sliding layers is scaled"),
        (GEMMA, {"model_type": "gemma3"}, "needs a text_config"),
    ],
)  # fmt: skip
def test_what_it_cannot_honour_is_refused(start, change, message):
    plain = without(written(dataclasses.replace(SHAPE, **start)), *NEW)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        config_from_hf({**plain, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(attention_scale=0.5), "model.attention_scale is 0.5; a config.json of qwen3"),
        ({**GEMMA, "attention_scale": 0.3}, "model.attention_scale is 0.3; a config.json of gemma"),
        ({**GEMMA, "local_rope_theta": None}, "model.local_rope_theta is None; a config.json of"),
        (dict(family="llama", window=8, sliding_layers=(1,)), "model.sliding_layers is (1,)"),
        (dict(**EXPERTS, window=8, sliding_layers=(1,)), "has all of them or none"),
    ],
)
def test_what_a_config_json_cannot_say_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        written(dataclasses.replace(SHAPE, **change))


def test_head_dim_defaults_to_the_embedding_over_the_heads():
    assert config_from_hf(without(PLAIN, "head_dim")).head_dim == 48 // 6


def test_generation_settings_are_both_files(tmp_path):
    assert generation_settings(tmp_path) == {}
    config = {**PUBLISHED["gemma-3-4b"], "pad_token_id": 0}
    config["text_config"] = {**config["text_config"], "bos_token_id": 2, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": [1, 106]}
    assert generation_settings(tmp_path) == ids
    said = {"eos_token_id": [1, 106, 50], "top_p": 0.95, "do_sample": True}
    mark = {"transformers_version": "4.50.0", "_from_model_config": True, "output_attentions": 0}
    (tmp_path / hf_config.GENERATION).write_text(json.dumps({**said, **mark}))
    assert generation_settings(tmp_path) == {"bos_token_id": 2, "pad_token_id": 0, **said}
