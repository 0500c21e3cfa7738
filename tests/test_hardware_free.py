"""Steps for machines that are not here: lowered on CPU devices, compiled for absent GPUs."""

import importlib.util
import math
import re
import types

import jax
import jax.numpy as jnp
import pytest

from jaxreason import launch
from jaxreason.kernels import decode_pallas, flash
from jaxreason.model import moe
from jaxreason.model.config import PRESETS, preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.objectives.lm import LanguageModeling
from jaxreason.parallel import chips, rules
from jaxreason.parallel.mesh import make_mesh
from jaxreason.recipes import assemble, tune
from jaxreason.recipes import fit as fit_recipe
from jaxreason.recipes.pipeline import stages_of
from jaxreason.recipes.run import Run
from jaxreason.recipes.workdir import Workdir
from jaxreason.train import optim
from jaxreason.train import state as state_lib
from jaxreason.train.step import make_train_step
from jaxreason.types import AttentionMask, Batch


def abstract_batch(mesh, rows, length) -> Batch:
    place = jax.sharding.NamedSharding(mesh, rules.spec(("batch",)))
    shape = lambda dtype: jax.ShapeDtypeStruct((rows, length), dtype, sharding=place)
    return Batch(
        tokens_BT=shape(jnp.int32),
        targets_BT=shape(jnp.int32),
        weights_BT=shape(jnp.float32),
        segments_BT=shape(jnp.int32),
        positions_BT=shape(jnp.int32),
    )


class Captured(Exception):
    """Carries the job that a recipe was about to run."""


def the_job_of(config, stage, model, folder, monkeypatch):
    """What `recipes.fit.run_stage` hands to the loop; the data is not opened."""

    def capture(job, *_):
        raise Captured(job)

    monkeypatch.setattr(fit_recipe, "fit", capture)
    monkeypatch.setattr(fit_recipe.pipeline_lib, "build", lambda *_, **__: None)
    evaluation = types.SimpleNamespace(texts={}, validate=None)
    run = Run(config, Workdir(folder), None, model, evaluation, None, None)
    with pytest.raises(Captured) as captured:
        fit_recipe.run_stage(run, stage)
    return captured.value.args[0]


def test_pretraining_on_b200_lowers_its_exact_step(tmp_path, monkeypatch):
    """pretrain.py:b200 on eight devices: lowered, not compiled. `auto` is what it is on GPUs."""
    config = launch.load_config("pretrain:b200")
    config.mesh.update(dtype="bfloat16", scan_layers="true")
    (stage,) = stages_of(config)
    qwen3_entries = types.SimpleNamespace(vocab_size=151_669)
    shape = assemble.architecture(config, stage.start)
    model = assemble.language_model(config, shape, qwen3_entries)
    assert model.num_params == 1_519_230_976
    assert {axis: n for axis, n in model.mesh.shape.items() if n > 1} == {"fsdp": 8}
    job = the_job_of(config, stage, model, tmp_path, monkeypatch)
    assert job.flops_per_token == pytest.approx(10.32e9, rel=0.01)
    assert stage.data.rows * stage.data.length == 1_048_576
    assert 80e9 < stage.fit.steps * stage.data.rows * stage.data.length < 100e9
    assert stage.optimizer.schedule == "wsd"

    state = state_lib.abstract(model, job.optimizer)
    batch = abstract_batch(model.mesh, stage.data.rows, stage.data.length)
    lowered = job.train_step.lower(state, batch, None)
    text = lowered.as_text()
    assert "tensor<256x4096xi32>" in text  # the whole batch, cut into four microbatches inside
    assert "tensor<4x64x4096xi32>" in text
    assert "tensor<151936x2048xf32>" in text and "tensor<24x2048x6144xf32>" in text
    assert "64x4096x151936" not in text  # no logits_BTV, of any type
    donated = [leaf.donated for leaf in jax.tree.leaves(lowered.args_info[0][0])]
    assert all(donated) and len(donated) > 30


def test_pretraining_on_b200_has_the_mesh_that_the_tuner_finds():
    config = launch.load_config("pretrain:b200")
    request = tune.Request("b200", 1, "qwen3-1.5b", config.data.length, 2**20)
    found = next(c for c in tune.candidates(request) if tune.fits(request, c))
    assert {axis: n for axis, n in found.layout.shape.items() if n > 1} == {"fsdp": 8}
    assert found.layout.microbatches == config.mesh.microbatches
    assert found.remat == config.mesh.remat


needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="the TPU compiler is not installed: .[tpu]"
)
needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
)


def compiled_step(model: LanguageModel, rows: int, length: int):
    optimizer = optim.make_optimizer(optim.OptimizerConfig(), model.axes)
    schedule = optim.make_schedule(optim.OptimizerConfig(warmup_steps=10), 100)
    step = make_train_step(model, LanguageModeling(), optimizer, schedule, clip_norm=1.0)
    state = state_lib.abstract(model, optimizer)
    return step.lower(state, abstract_batch(model.mesh, rows, length), None).compile()


KERNEL_CALLS = {"cuda": '"__gpu$xla.gpu.triton"', "tpu": '"tpu_custom_call"'}
# (head_dim, query heads of a key/value head) of every preset: the rest is the size of the grid.
HEADS = sorted({(c.head_dim, c.num_heads // c.num_kv_heads) for c in PRESETS.values()})


@pytest.mark.hardware_free
@needs_cuda_plugin
@pytest.mark.parametrize("chip", ["b200", "h200"])
@pytest.mark.parametrize("head_dim, group", HEADS)
def test_attention_kernels_compile_for_absent_gpus(chip, head_dim, group):
    """Flash forward and backward on packed, windowed rows, and decode over a prefix in fp8."""
    place = jax.sharding.SingleDeviceSharding(chips.absent_gpus(chip)[0])
    abstract = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    B, T, K, H = 4, 2048, 2, head_dim
    q_BTNH, ids_BT = abstract(jnp.bfloat16, B, T, K * group, H), abstract(jnp.int32, B, T)
    k_BTKH = abstract(jnp.bfloat16, B, T, K, H)

    def loss(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        mask = AttentionMask(q_segments_BT=ids_BT, kv_segments_BS=ids_BT, window=1000)
        return flash.attention(q_BTNH, k_BTKH, v_BTKH, mask)[0].astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q_BTNH, k_BTKH, k_BTKH, ids_BT)
    assert step.compile().as_text().count(f"custom_call_target={KERNEL_CALLS['cuda']}") == 3

    def decode(q_BNH, k_BKSH, lengths_B, k_PKSH, lengths_P):
        prefix = (k_PKSH, k_PKSH, lengths_P)
        return decode_pallas.decode_attention(q_BNH, k_BKSH, k_BKSH, lengths_B, prefix=prefix)

    fp8, ints = jnp.float8_e4m3fn, jnp.int32
    lowered = jax.jit(decode).lower(
        abstract(jnp.bfloat16, 32, K * group, H), abstract(fp8, 32, K, T, H), abstract(ints, 32),
        abstract(fp8, 2, K, T, H), abstract(ints, 2),
    )  # fmt: skip
    assert lowered.compile().as_text().count(f"custom_call_target={KERNEL_CALLS['cuda']}") == 2


@pytest.mark.hardware_free
@needs_cuda_plugin
@pytest.mark.parametrize("chip", ["b200", "h200"])
@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_the_step_compiles_for_absent_gpus(chip, shape):
    """Two layers as wide as qwen3-0.6b, 64 rows of 1,024, on eight GPUs."""
    mesh = make_mesh(shape, chips.absent_gpus(chip))
    config = preset("qwen3-0.6b", num_layers=2, vocab_size=8192)
    model = LanguageModel(
        config, Execution(dtype="bfloat16", remat="full", scan_layers=True), mesh, valid_vocab=8000
    )
    compiled = compiled_step(model, 64, 1024)
    memory = compiled.memory_analysis()
    held = 3 * 4 * model.num_params  # float32 weights and two moments
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert held / ways < memory.argument_size_in_bytes < 1.1 * held / ways + 2**20
    assert memory.alias_size_in_bytes >= held / ways
    total = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert total < chips.CHIPS[chip].memory
    text = compiled.as_text()
    assert "all-gather" in text and ("reduce-scatter" in text or "all-reduce" in text)


@pytest.mark.hardware_free
@needs_cuda_plugin
@pytest.mark.parametrize("chip", ["b200", "h200"])
@pytest.mark.parametrize(
    "name, changes",
    [
        ("gemma-3-1b", dict(num_layers=7, sliding_layers=(0, 1, 2, 3, 4, 6))),
        ("qwen3-30b-a3b", dict(num_layers=2)),
    ],
)
def test_other_families_compile_for_absent_gpus(chip, name, changes):
    """Sliding layers in rounds of six and one left over; 128 experts on one GPU."""
    experts = "moe" in preset(name).family
    devices = chips.absent_gpus(chip)
    mesh = make_mesh({"fsdp": 1}, devices[:1]) if experts else make_mesh({"fsdp": 8}, devices)
    config = preset(name, vocab_size=8192, **changes)
    model = LanguageModel(config, Execution("bfloat16", remat="full", scan_layers=True), mesh)
    compiled = compiled_step(model, 8, 1024)
    memory = compiled.memory_analysis()
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < chips.CHIPS[chip].memory
    if experts:  # 8,192 tokens x 8 choices; never every choice with every expert
        assert "[128,65536," not in compiled.as_text()


@pytest.mark.hardware_free
@pytest.mark.parametrize(
    "chip, shape",
    [
        pytest.param("b200", {"fsdp": 1}, marks=needs_cuda_plugin),
        pytest.param("b200", {"expert": 4, "fsdp": 2}, marks=needs_cuda_plugin),
        pytest.param("h200", {"fsdp": 1}, marks=needs_cuda_plugin),
        pytest.param("h200", {"expert": 4, "fsdp": 2}, marks=needs_cuda_plugin),
        pytest.param("v5p", {"fsdp": 8}, marks=needs_libtpu),
        pytest.param("v5p", {"expert": 4, "fsdp": 2}, marks=needs_libtpu),
    ],
    ids=str,
)
def test_the_expert_product_compiles_for_absent_chips(chip, shape):
    """A layer's experts as wide as Qwen3-30B-A3B's, forward and gradients: Pallas kernels, bf16,
    and no array of tokens times experts, nor of experts times rows."""
    ways, platform = math.prod(shape.values()), chips.chip(chip).platform
    devices = chips.absent_tpus(chip, 2) if platform == "tpu" else chips.absent_gpus(chip)
    mesh = make_mesh(shape, devices[:ways])
    kernels = "auto" if platform == "tpu" else "pallas"
    (experts, _), c = moe.build(kernels, mesh), preset("qwen3-30b-a3b")
    E, D, F = c.num_experts, c.embed_dim, c.mlp_dim

    def loss(h_BTD, router_DE, weights, real_BT):
        out_BTD, _ = experts(
            h_BTD, real_BT, router_DE, weights, num_chosen=8, normalised=True,
            activation=jax.nn.silu,
        )  # fmt: skip
        return out_BTD.astype(jnp.float32).sum()

    def abstract(shape, dtype, *axes):
        place = jax.sharding.NamedSharding(mesh, rules.spec(axes))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    into = abstract((E, D, F), jnp.bfloat16, "expert", "expert_embed", "mlp")
    out = abstract((E, F, D), jnp.bfloat16, "expert", "mlp", "expert_embed")
    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    lowered = step.lower(
        abstract((8 * ways, 1024, D), jnp.bfloat16, "batch", "residual", "model"),
        abstract((D, E), jnp.float32, "embed", "router"),
        (into, into, out),
        abstract((8 * ways, 1024), jnp.bool_, "batch", "residual"),
    )
    text = lowered.compile().as_text()
    assert text.count(f"custom_call_target={KERNEL_CALLS[platform]}") >= 8
    arrays = {math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", text)}
    tokens, here = 8 * 1024 * shape.get("expert", 1), E // shape.get("expert", 1)
    rows = 8 * 8 * 1024
    # The largest: all weights of the device, its rows (one device) or its peers' tokens.
    assert max(arrays) <= max(here * D * F, rows * D) < tokens * here * F < here * rows * D
