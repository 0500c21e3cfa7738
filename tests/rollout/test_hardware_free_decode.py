"""The engine's whole step for GPUs that are not here: its kernels, and no copy of its caches."""

import collections
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxreason.model.config import preset
from jaxreason.model.decoder import LanguageModel
from jaxreason.model.execution import Execution
from jaxreason.parallel import chips, rules
from jaxreason.parallel.mesh import make_mesh
from jaxreason.rollout.engine import Engine, EngineConfig, Reads
from jaxreason.rollout.flight import Flight
from jaxreason.rollout.sample import Features
from jaxreason.types import Sampling

pytestmark = [
    pytest.mark.hardware_free,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
    ),
]
KERNEL_CALL = 'custom_call_target="__gpu$xla.gpu.triton"'
LAYERS, SLOTS, OWN, PROMPTS, PROMPT = 2, 256, 1024, 64, 512  # 4 samples a prompt


def compiled_step(chip: str, cache: str, shape: dict[str, int]):
    """(the compiled step of every slot at full length, the model, bytes of pool and slots).

    Slots, prompts and sizes are those of each lane.
    """
    mesh = make_mesh(shape, chips.absent_gpus(chip)[: math.prod(shape.values())])
    execution = Execution(
        "bfloat16", attention="blockwise", decode_attention="pallas", kv_cache_dtype=cache
    )
    model = LanguageModel(preset("qwen3-0.6b", num_layers=LAYERS), execution, mesh, 151_669)
    engine = Engine(model, EngineConfig(slots=SLOTS, group=SLOTS, streams=1))
    features = Features.of([Sampling(max_tokens=OWN)])
    sizes = dict(stops=16, slots=SLOTS, entries=PROMPTS, slot_size=OWN, prompt_size=PROMPT)
    # The state that a flight asks for, in shapes alone.
    init = lambda unused, **sizes: jax.eval_shape(lambda x: engine._init(x, **sizes), unused)
    engine.init, lanes = init, [[] for _ in range(engine.lanes)]
    state = Flight(engine, lanes, features, sizes, jax.random.key(0), lambda s: (1,)).state

    def abstract(x, *axes):
        place = jax.sharding.NamedSharding(mesh, rules.spec(axes))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    keys = lambda x: abstract(x, "lane", "kv_heads", "whole", "head_dim")
    state = jax.tree.map(lambda x: keys(x) if x.ndim == 4 else abstract(x, "lane"), state)
    params = jax.tree.map(lambda x, axes: abstract(x, *axes), model.shapes, model.axes)
    lowered = jax.jit(model.decode_weights).lower(params)
    weights = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        lowered.out_info,
        lowered.compile().output_shardings,
    )
    slots_XW = abstract(jax.ShapeDtypeStruct((engine.lanes * PROMPTS, 4), jnp.int32), "lane")
    step = jax.jit(
        engine._step, donate_argnums=1, static_argnames=("features", "reads", "steps")
    ).lower(weights, state, slots_XW, features=features, reads=Reads(PROMPT, OWN), steps=32)
    caches = [x for c in (state.pool, state.slots) for x in (*c.k, *c.v)]
    return step.compile(), model, sum(x.size * x.dtype.itemsize for x in caches)


def arrays_of(text: str, numbers: set[int]) -> collections.Counter:
    """(dtype, dims, layout, operation) of every array in the program of so many numbers."""
    line = r"^\s*(?:ROOT )?%[\w.\-]+ = (\w+)\[([\d,]+)\](\{[\d,]+)?\S* ([\w\-]+)\("
    found = re.findall(line, text, re.MULTILINE)
    size = lambda dims: math.prod(map(int, dims.split(",")))
    return collections.Counter(array for array in found if size(array[1]) in numbers)


@pytest.mark.parametrize("chip", ["b200", "h200"])
@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_the_step_has_its_kernels_and_no_copy_of_a_cache(chip, cache):
    """Of one GPU: a kernel for the prefix and one for the slots, a layer. An array as large as a
    layer's cache is in the cache's dtype, in its order, and made once, by the gather of the slots
    that decode; the rest are writes in place.
    """
    compiled, model, held = compiled_step(chip, cache, {"data": 1})
    text, c = compiled.as_text(), model.config
    assert text.count(KERNEL_CALL) == 2 * LAYERS
    own, shared = (rows * c.num_kv_heads * c.head_dim for rows in (SLOTS * OWN, PROMPTS * PROMPT))
    slots = (SLOTS + 1) * own // SLOTS
    pool = (PROMPTS + 1) * shared // PROMPTS
    arrays = arrays_of(text, {own, shared, slots, pool})
    dtype = {"auto": "bf16", "fp8_e4m3": "f8e4m3fn"}[cache]
    order = (str(c.num_kv_heads), "1024", "128"), (str(c.num_kv_heads), "512", "128")
    for kind, dims, layout, operation in arrays:
        assert kind == dtype, (kind, dims)
        assert tuple(dims.split(",")[-3:]) in order, dims
        assert layout in ("{3,2,1,0", "{4,3,2,1,0"), (dims, layout)  # as it was declared
        assert operation not in ("copy", "convert", "transpose", "copy-start"), (dims, operation)
    made = sum(n for (*_, operation), n in arrays.items() if operation == "gather")
    assert made == 2 * 2 * LAYERS  # k and v of slots and of prompts
    # The state is written in place; beside what was gathered there are logits, once or twice.
    memory, logits = compiled.memory_analysis(), 4 * SLOTS * c.vocab_size
    gathered = 2 * LAYERS * (own + shared) * model.cache_dtype.itemsize
    assert memory.alias_size_in_bytes > held
    assert memory.temp_size_in_bytes < gathered + 3 * logits


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3"])
def test_on_a_mesh_every_gpu_reads_its_own_heads(cache):
    """Two lanes, heads split in two: kernels of 4 of 8 heads, and keys never leave their GPU."""
    compiled, model, _ = compiled_step("h200", cache, {"data": 2, "tensor": 2})
    text, c = compiled.as_text(), model.config
    assert text.count(KERNEL_CALL) == 2 * LAYERS
    dtype, heads = {"auto": "bf16", "fp8_e4m3": "f8e4m3fn"}[cache], c.num_kv_heads // 2
    for line in text.splitlines():
        if KERNEL_CALL in line:
            read = re.findall(rf"{dtype}\[\d+,{heads},(?:512|1024),128\]", line)
            assert len(read) >= 2, line[:400]
        if re.search(r" (all-gather|all-to-all|collective-permute)(-start)?\(", line):
            dims = re.search(r"\[([\d,]*)\]", line).group(1)
            assert dims.count(",") < 3, line[:400]
