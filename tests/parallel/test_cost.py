"""The arithmetic of memory and time, against published steps and what the compiler says."""

import pathlib
import re

import pytest

from jaxreason.model.config import DecoderConfig, preset
from jaxreason.parallel import chips, cost, step_time
from jaxreason.parallel.workload import KEPT, Layout
from jaxreason.recipes import tune_tables
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
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "scaling.md"
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


def compiled_layouts():
    """(machine, cells) of every row of docs/scaling.md that the compiler of an absent chip made."""
    rows, machine = [], ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("### "):
            machine = line[4:]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 11 and re.fullmatch(r"[\d.]+", cells[4]):
            rows.append((machine, cells))
    return rows


def bytes_by_arithmetic(machine, cells):
    label, mesh, microbatches, remat, *_ = cells
    model, _, attention = label.partition(", attention=")
    (chip, tokens), = [(chip, step) for name, chip, _, step in tune_tables.MACHINES
                       if name == machine]  # fmt: skip
    shape = {axis: int(size) for axis, size in (pair.split("=") for pair in mesh.split())}
    kept = execution(chip, remat).kept
    kept = None if kept is None else frozenset(kept)
    layout = Layout(shape, int(microbatches), kept, "flash" if attention else "blockwise")
    work = workload_of(preset(model), tokens // tune_tables.SEQUENCE, tune_tables.SEQUENCE)
    return sum(cost.memory_bytes(work, layout, chips.CHIPS[chip]).values())


def test_the_arithmetic_of_memory_is_the_compilers():
    """Within 15 % of nine in ten layouts of the page, and within 30 % of all."""
    rows = compiled_layouts()
    assert len(rows) >= 40
    off = [
        bytes_by_arithmetic(machine, cells) / (float(cells[4]) * 2**30) - 1
        for machine, cells in rows
    ]
    assert sum(abs(miss) < 0.15 for miss in off) >= 0.9 * len(rows), sorted(off)
    assert max(map(abs, off)) < 0.30, sorted(off)


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
