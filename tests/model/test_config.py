"""Every preset is the network it says it is, counted without building it."""

import pytest

from jaxreason.model.config import PRESETS, preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.recipes.fit import flops_per_token

# facts/methods.md 10.1; the two small ones by hand, for one layer and then for all:
# tiny: wq wo 2 x 16,384, wk wv 2 x 8,192, MLP 147,456, norms 320: 196,928; x 4 + 320 x 128 + 128.
# 10m: wq wk wv wo 4 x 102,400, MLP 921,600, norms 768: 1,331,968; x 6 + 8,192 x 320 + 320.
NUM_PARAMS = {
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    # What the safetensors files of the published checkpoints hold.
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    # The text decoder: the whole less the vision tower's 416,866,032 and the projector's.
    "gemma-3-4b": 3_880_263_168,
    "gemma-3-12b": 11_766_034_176,
    "gemma-3-27b": 27_009_346_304,
    "qwen3-1.5b": 1_519_230_976,
    "qwen3-tiny": 828_800,
    "qwen3-10m": 10_613_568,
}


def test_every_preset_has_a_stated_count():
    assert set(NUM_PARAMS) == set(PRESETS)


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_parameter_count(name):
    assert LanguageModel(preset(name)).num_params == NUM_PARAMS[name]


def test_flops_of_a_pretraining_token():
    """10.32 GFLOP, causal at 4,096 tokens, within 1 %."""
    flops = flops_per_token(LanguageModel(preset("qwen3-1.5b")), 4096)
    assert flops == pytest.approx(10.32e9, rel=0.01)


def test_active_parameters():
    """What a token meets: the reports' 3.3 of 30.5 billion, 22 of 235 billion, with the head."""
    for name, billions in (("qwen3-30b-a3b", 3.35), ("qwen3-235b-a22b", 22.2)):
        model = LanguageModel(preset(name))
        tables = 2 * model.config.vocab_size * model.config.embed_dim
        assert model.body_params + tables == pytest.approx(billions * 1e9, rel=0.01)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"model.preset is 'qwen4'; known presets: qwen3-0.6b"):
        preset("qwen4")
    with pytest.raises(ValueError, match=r"num_heads = 16 is not a multiple of .* = 3"):
        preset("qwen3-0.6b", num_kv_heads=3)
    with pytest.raises(ValueError, match=r"model.head_dim is 7"):
        preset("qwen3-tiny", head_dim=7)
    with pytest.raises(ValueError, match=r"model.num_layers is 0"):
        preset("qwen3-tiny", num_layers=0)
    with pytest.raises(ValueError, match=r"vocab_size = 320 is smaller than .* 321 entries"):
        LanguageModel(preset("qwen3-tiny"), valid_vocab=321)
