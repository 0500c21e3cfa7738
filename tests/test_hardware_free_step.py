"""The real train step of qwen3-1.7b, compiled for an H200 and a B200 that are not here, alone and
eight of them: what it holds and how often it passes over it. Nothing is run."""

import collections
import dataclasses
import functools
import importlib.util
import math
import re

import jax
import jax.numpy as jnp
import pytest

from jaxreason.model.config import preset
from jaxreason.parallel import hlo_arrays
from jaxreason.parallel.mesh import make_mesh
from jaxreason.recipes import tune, tune_step
from jaxreason.train import state as state_lib

LENGTH, ROWS = 4096, 6  # of a row; rows of a device, so that no activation is as large as a weight
MODEL = preset("qwen3-1.7b")
CHIPS, WAYS, ATTENTION = ("h200", "b200"), (1, 8), ("blockwise", "flash")

pytestmark = [
    pytest.mark.hardware_free,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_plugins") is None
        or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
        reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
    ),
]
each_step = pytest.mark.parametrize(
    "chip, ways, attention", [(c, w, a) for c in CHIPS for w in WAYS for a in ATTENTION]
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    program: hlo_arrays.Program
    alias_bytes: int
    wide: collections.Counter  # elements -> weights of so many, whole

    @functools.cached_property
    def arrays(self) -> list[hlo_arrays.Array]:
        return self.program.arrays()

    @functools.cached_property
    def state(self) -> dict[str, hlo_arrays.Array]:
        """Argument -> its array."""
        made = {maker.op_name: a for a in self.arrays for maker in a.makers
                if maker.opcode == "parameter" and maker.op_name.startswith("state.")}  # fmt: skip
        return {name.replace("\\", ""): array for name, array in made.items()}


@functools.cache
def compiled(chip: str, ways: int, attention: str, num_layers: int = 28) -> Compiled:
    """The step as the tuner builds it: bfloat16, float32 masters, AdamW, clipping, scanned."""
    config = dataclasses.replace(MODEL, num_layers=num_layers)
    shape = dict.fromkeys(tune.AXES, 1) | {"fsdp": ways}
    step = tune_step.Step(
        chip, 1, 8, dataclasses.asdict(config), "fit", ROWS * ways, LENGTH, shape, 1,
        "save_projections",
    )  # fmt: skip
    mesh = make_mesh(step.shape, tune_step._devices(step)[:ways])
    with pytest.MonkeyPatch.context() as patch:
        chosen = dataclasses.replace(
            tune_step.execution(chip, step.remat), attention=attention, scan_layers=True
        )
        patch.setattr(tune_step, "execution", lambda *_: chosen)
        model, optimizer, train_step = tune_step.build(step, mesh)
    state = state_lib.abstract(model, optimizer)
    done = train_step.lower(state, tune_step.abstract_batch(step, mesh), None).compile()
    sizes = collections.Counter(math.prod(s.shape) for s in jax.tree.leaves(model.shapes))
    return Compiled(
        hlo_arrays.program(done.as_text()), done.memory_analysis().alias_size_in_bytes, sizes
    )


def dense_scores(step: Compiled) -> list[hlo_arrays.Array]:
    return [array for array in step.arrays if array.dims.count(LENGTH) >= 2]


def logits_of_all(step: Compiled) -> list[hlo_arrays.Array]:
    """Larger than a chunk's, which has as many rows as the head has columns."""
    most = MODEL.vocab_size * MODEL.embed_dim
    return [a for a in step.arrays if MODEL.vocab_size in a.dims and a.size > most]


def float32_copies(step: Compiled) -> dict[int, tuple[int, int]]:
    """Elements -> (float32 arrays of so many, those that there may be), of the larger weights.

    There may be master, two moments and a gradient, of a tied embedding one more. Of weights in
    parts the parts count so. A gradient before it is summed over devices is whole: of the head two,
    added up in one order and sent in another; of layers none but the current one's.
    """
    own = collections.Counter(
        array.size for name, array in step.state.items() if name.startswith("state.params")
    )
    embedding = MODEL.vocab_size * MODEL.embed_dim
    found = collections.Counter(
        array.size for array in step.arrays
        if array.dtype == "f32" and not any("CD,VD->CV" in m.op_name for m in array.makers)
    )  # fmt: skip
    allowed = {size: 4 * number for size, number in own.items()}
    for size in step.wide.keys() - own.keys():
        allowed[size] = 2 if size == embedding else 0
    if embedding in own:
        allowed[embedding] += 1
    return {size: (found[size], allowed[size]) for size in sorted(allowed) if size > 2**20}


@each_step
def test_it_holds_no_scores_no_logits_and_no_copies(chip, ways, attention):
    """No dense [T, S], no [B, T, V], and of float32 no more than state and gradient."""
    step = compiled(chip, ways, attention)
    assert not dense_scores(step) and not logits_of_all(step)
    copies = float32_copies(step)
    assert len(copies) >= 4
    assert all(found <= allowed for found, allowed in copies.values()), copies


@each_step
def test_all_products_are_of_bfloat16(chip, ways, attention):
    """Forward and backward: a product of float32 takes at least twice the time."""
    program = compiled(chip, ways, attention).program
    types = collections.Counter(
        tuple(body[name].shapes[()][0] for name in one.operands[:2])
        for body in program.computations.values()
        for one in body.values()
        if one.opcode == "dot" or re.search("cublas", one.target)
    )
    assert set(types) == {("bf16", "bf16")} and types.total() > 12


@each_step
def test_the_update_is_one_pass_in_place(chip, ways, attention):
    """All of the state is donated; of each weight one fusion reads master, moments and gradient,
    clips, and writes master and moments where they were. The norm reads gradients once before."""
    step = compiled(chip, ways, attention)
    masters = {n: a for n, a in step.state.items() if n.startswith("state.params")}
    leaves = {name.removeprefix("state.params") for name in masters}
    for leaf in leaves:
        held = [a for n, a in step.state.items() if n.startswith("state.") and n.endswith(leaf)]
        writers = [{m.name for m in a.makers if m.opcode != "parameter"} for a in held]
        assert len(held) == 3 and len(writers[0]) == 1, (leaf, writers)
        assert writers[0] == writers[1] == writers[2], (leaf, writers)
    assert len(step.program.donated) == len(step.state)
    assert step.alias_bytes >= 12 * sum(a.size for a in masters.values())
    main = step.program.computations[step.program.entry]
    large = lambda one: any(math.prod(dims) > 2**20 for _, dims in one.shapes.values())
    readers = collections.Counter(
        name
        for one in main.values()
        if "/optimizer/" in one.op_name and one.opcode == "fusion"
        for name in one.operands
        if large(main[name])
    )
    assert readers and max(readers.values()) <= 2, readers  # the norm, and the update


@pytest.mark.parametrize("chip, ways", [(c, w) for c in CHIPS for w in WAYS])
def test_nothing_is_transposed_around_flash_attention(chip, ways):
    """What the three kernels read and write as [B, T, heads, H] is made and used as it lies."""
    program = compiled(chip, ways, "flash").program
    shape = lambda one: one.shapes.get((), ("", ()))[1]
    is_qkv = lambda dims: len(dims) == 4 and dims[1] == LENGTH and dims[3] == MODEL.head_dim
    calls = 0
    for computation, one in list(program.outside()):
        if "flash" not in one.op_name or one.opcode != "custom-call":
            continue
        calls += 1
        body = program.computations[computation]
        makers = [behind(body, body[name]) for name in one.operands]
        ours = {one.name} | {o.name for o in body.values() if o.operands[:1] == (one.name,)}
        users = [o for o in body.values() if set(o.operands) & ours and o.name not in ours]
        around = [maker for maker in makers if is_qkv(shape(maker))] + users
        assert len(around) > 2
        moved = [o.name for o in around if o.opcode in ("copy", "transpose")
                 or ("transpose" in o.name and moves_only(program, o))]  # fmt: skip
        assert not moved, moved
    assert calls >= 3  # forward, of queries, of keys; more where XLA peels a round off a loop


def behind(body, one):
    while one.opcode in ("bitcast", "get-tuple-element") and one.operands[0] in body:
        one = body[one.operands[0]]
    return one


def moves_only(program: hlo_arrays.Program, one: hlo_arrays.Instruction) -> bool:
    """Whether a fusion does nothing but move."""
    inside = program.computations[one.named("calls")[0]].values()
    return {o.opcode for o in inside} <= {"parameter", "transpose", "copy", "bitcast", "tuple"}


def test_the_checks_find_what_they_forbid():
    """Scores of `reference`, logits of the whole batch, and gradients that are kept twice."""
    scores = compiled("h200", 1, "reference", num_layers=1)
    assert dense_scores(scores)

    with pytest.MonkeyPatch.context() as patch:
        from jaxreason.kernels import linear_xent
        from jaxreason.train import step as step_lib

        patch.setattr(linear_xent, "_chunk_rows", lambda num_rows, *_: num_rows)
        accumulated = step_lib._accumulated

        def twice(*arguments):
            loss, grads = accumulated(*arguments)
            kept = jax.lax.optimization_barrier(jax.tree.map(lambda g: g + 1e-9, grads))
            return loss, jax.tree.map(jnp.add, grads, kept)

        patch.setattr(step_lib, "_accumulated", twice)
        broken = compiled("b200", 1, "flash", num_layers=1)
    assert logits_of_all(broken)
    assert any(found > allowed for found, allowed in float32_copies(broken).values())
