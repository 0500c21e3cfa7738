"""The arithmetic of memory and time, against published steps and what the compiler says."""

import pytest

from jaxreason.model.config import DecoderConfig, preset
from jaxreason.parallel import chips, cost, step_time
from jaxreason.parallel.workload import KEPT, Layout
from jaxreason.recipes.tune import workload_of
from jaxreason.recipes.tune_step import execution

LLAMA2_7B = DecoderConfig(
    family="llama", vocab_size=32_000, num_layers=32, embed_dim=4096, mlp_dim=11_008, num_heads=32,
    num_kv_heads=32, head_dim=128, tie_embeddings=False,
)  # fmt: skip
# nanochat's MLP has two matrices of 4 x 2048; three of 5461 are as many parameters.
NANOCHAT_D32 = DecoderConfig(
    family="llama", vocab_size=65_536, num_layers=32, embed_dim=2048, mlp_dim=5461, num_heads=16,
    num_kv_heads=16, head_dim=128, tie_embeddings=False,
)  # fmt: skip

ALL = frozenset(KEPT)
# name: (chip, model, rows, length, layout, published tokens/s a GPU). From facts/performance.md 1a;
# layouts from where they were published. All ran flash attention.
PUBLISHED = {
    # Megatron-Bridge's card.yaml: 16 GPUs, TP1 PP1 CP1, GBS 1024, MBS 1, no recomputation.
    "megatron-bridge qwen3-8b": ("h100", preset("qwen3-8b"), 1024, 4096,
        Layout({"data": 16}, 64, None, "flash", sums_once=True), 10_456),
    # JAX-Toolbox's README: FSDP 8, 2 rows a GPU, minimal_flash: projections and attention kept.
    "maxtext llama2-7b": ("h100", LLAMA2_7B, 16, 4096,
        Layout({"fsdp": 8}, 1, ALL, "flash"), 11_361),
    # 524,288 tokens a step, 8 rows a GPU: 4 microbatches, nothing recomputed.
    "nanochat d32": ("h100", NANOCHAT_D32, 256, 2048,
        Layout({"data": 8}, 4, None, "flash", sums_once=True), 41_700),
    # Every layer recomputed ("full AC"). The number of rows is not published; it hardly matters.
    "kempnerforge llama-3-8b": ("h200", preset("llama-3-8b"), 64, 4096,
        Layout({"data": 1}, 16, frozenset(), "flash"), 10_471),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_time_model_gives_published_steps(name):
    """Within 20 %. No constant was fitted to any of the four: chips.py says where each is from."""
    chip, model, rows, length, layout, published = PUBLISHED[name]
    predicted = cost.estimate(workload_of(model, rows, length), layout, chips.CHIPS[chip])
    rate = predicted.tokens_per_second / layout.num_devices
    assert abs(rate / published - 1) < 0.20, f"{rate:,.0f} tokens/s a GPU, {published:,} published"


# (chip, model, rows, length, mesh, microbatches, remat, bytes[, attention]): arguments + temp, in
# GB, of the train step compiled by jax 0.10.2 for machines that were not there.
COMPILED = [
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 8}, 1, "full", 13.53),
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 8}, 1, "none", 134.40),
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 8}, 1, "save_projections", 47.11),
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 8}, 1, "save_attention", 16.80),
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 8}, 1, "attention+gate_up", 35.74),
    ("b200", "qwen3-1.5b", 128, 4096, {"fsdp": 8}, 2, "full", 15.17),
    ("b200", "qwen3-1.5b", 16, 4096, {"fsdp": 8}, 1, "full", 9.30),
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 4, "tensor": 2}, 1, "full", 14.32),
    ("b200", "qwen3-1.5b", 64, 4096, {"data": 8}, 1, "full", 32.92),
    ("b200", "qwen3-1.5b", 64, 4096, {"fsdp": 4, "context": 2}, 1, "full", 14.47),
    ("b200", "qwen3-1.5b", 512, 4096, {"data": 8}, 16, "none", 96.6),
    ("b200", "qwen3-1.5b", 512, 4096, {"data": 4, "fsdp": 2}, 8, "none", 146.4),
    ("b200", "qwen3-1.5b", 512, 4096, {"fsdp": 8}, 16, "none", 71.3),
    ("b200", "qwen3-8b", 32, 4096, {"fsdp": 8}, 1, "full", 30.39),
    ("b200", "qwen3-30b-a3b", 32, 4096, {"fsdp": 8}, 1, "full", 74.44),
    ("b200", "qwen3-30b-a3b", 32, 4096, {"expert": 8}, 1, "full", 71.32),
    ("b200", "qwen3-30b-a3b", 512, 4096, {"fsdp": 8}, 8, "save_projections", 146.7),
    ("h200", "qwen3-30b-a3b", 512, 4096, {"fsdp": 4, "expert": 2}, 8, "attention+gate_up", 105.9),
    ("v5p", "qwen3-8b", 64, 4096, {"fsdp": 64}, 1, "full", 9.40),
    ("b200", "qwen3-1.5b", 512, 4096, {"fsdp": 8}, 8, "none", 132.76, "flash"),
    ("b200", "qwen3-0.6b", 16, 4096, {"fsdp": 8}, 1, "none", 26.18, "flash"),
    ("b200", "qwen3-0.6b", 16, 4096, {"fsdp": 8}, 1, "none", 266.26, "reference"),
    ("b200", "qwen3-0.6b", 16, 4096, {"fsdp": 8}, 1, "full", 11.92, "reference"),
]


@pytest.mark.parametrize("case", COMPILED, ids=lambda c: " ".join(map(str, (c[1], *c[4:]))))
def test_the_arithmetic_of_memory_is_the_compilers(case):
    """Within 15 % of each, though the tuner promises that of nine in ten."""
    chip, model, rows, length, shape, microbatches, remat, compiled, *attention = case
    kept = execution(chip, remat).kept
    kept = None if kept is None else frozenset(kept)
    layout = Layout(shape, microbatches, kept, *attention)
    memory = cost.memory_bytes(workload_of(preset(model), rows, length), layout, chips.CHIPS[chip])
    assert abs(sum(memory.values()) / (compiled * 1e9) - 1) < 0.15, memory


def test_memory_by_hand():
    """State and gradients: 12 and 4 bytes a parameter, split eight ways; twice the second where
    microbatches add up. Kept: the stream of each layer, in bf16."""
    work = workload_of(preset("qwen3-1.5b"), 64, 4096)
    of = lambda **kw: cost.memory_bytes(work, Layout({"fsdp": 8}, **kw), chips.CHIPS["b200"])
    once, twice = of(kept=frozenset()), of(kept=frozenset(), microbatches=2)
    assert once["weights and optimizer"] == pytest.approx(12 * 1_519_230_976 / 8, rel=1e-3)
    assert twice["gradients"] == 2 * once["gradients"]
    assert once["kept activations"] == 2 * 24 * (8 * 4096) * 2048
    assert twice["kept activations"] == once["kept activations"] / 2
    assert of(kept=ALL)["kept activations"] > of(kept=frozenset({"qkv"}))["kept activations"]


def test_links_between_hosts_are_slow():
    """A gather over two hosts of eight is bound by what arrives over eight cards of 50 GB/s."""
    chip = chips.CHIPS["h100"]
    seconds = lambda shape, axes: step_time.exchange_seconds(chip, Layout(shape), axes, 1e9)
    link = chip.efficiency.link
    inside = seconds({"fsdp": 8}, ("fsdp",)) - chip.efficiency.latency
    assert inside == pytest.approx(7 / 8 * 1e9 / (450e9 * link))
    across = seconds({"fsdp": 16}, ("fsdp",)) - 2 * chip.efficiency.latency
    assert across == pytest.approx(max(15 / 16 / 450, 1 / 2 / (50 * 8)) * 1e9 / 1e9 / link)
    # Copies, one a host, while the inner axis fills each host: every card for itself.
    copies = seconds({"data": 2, "fsdp": 8}, ("data",)) - 2 * chip.efficiency.latency
    assert copies == pytest.approx(1 / 2 * 1e9 / (50e9 * link))
    assert seconds({"data": 2, "fsdp": 8}, ("tensor",)) == 0


def test_recomputing_costs_time_and_saves_memory():
    work = workload_of(preset("qwen3-8b"), 32, 4096)
    of = lambda kept: cost.estimate(work, Layout({"fsdp": 8}, 1, kept), chips.CHIPS["b200"])
    full, some, none = of(frozenset()), of(ALL), of(None)
    assert full.step_seconds > some.step_seconds > none.step_seconds
    assert full.total_bytes < some.total_bytes < none.total_bytes
    assert full.tokens_per_second * full.step_seconds == pytest.approx(work.tokens)
    assert full.binds in full.seconds and 0.05 < full.mfu < none.mfu < 0.7
