"""The Hopper kernel without a Hopper: its schedule simulated here, its code compiled for one."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels import flash_sm90, mosaic_gpu, reference
from jaxreason.model.config import PRESETS
from jaxreason.parallel import chips
from jaxreason.types import AttentionMask

# --- a Hopper in Python ---------------------------------------------------------------------------
# One thread for each warpgroup runs the kernel's own code on numbers. Memories are NumPy arrays
# that begin as NaN, barriers count. A copy destroys its destination when it begins, and is made
# only when it is waited for; so a schedule that reads or overwrites too early gives NaN, and one
# that waits for ever an error. Matrix products are done at once: nothing here tests their fences.


class Ref:
    """A window of an array: zeros are read beyond its end and nothing is written there."""

    def __init__(self, base, window=None, turned=False):
        self.base, self.turned = base, turned
        self.window = [(0, size) for size in base.shape] if window is None else window

    @property
    def shape(self):
        shape = tuple(size for _, size in self.window if size is not None)
        return shape[::-1] if self.turned else shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def at(self):
        return _At(self)

    def transpose(self, permutation):
        assert tuple(permutation) == (1, 0) and len(self.shape) == 2
        return Ref(self.base, self.window, not self.turned)

    def __getitem__(self, index):
        return self.at[index].read()

    def __setitem__(self, index, value):
        self.at[index].write(np.asarray(value))

    def _inside(self):
        """(where the window meets the array, the same place in the window)."""
        there, here = [], []
        for (start, size), whole in zip(self.window, self.base.shape):
            if size is None:
                assert 0 <= start < whole
                there.append(start)
                continue
            low, high = max(start, 0), min(start + size, whole)
            there.append(slice(low, max(high, low)))
            here.append(slice(low - start, max(high, low) - start))
        return tuple(there), tuple(here)

    def read(self):
        there, here = self._inside()
        values = np.zeros([size for _, size in self.window if size is not None], self.dtype)
        values[here] = self.base[there]
        return values.T.copy() if self.turned else values

    def write(self, values, add=False):
        assert values.shape == self.shape and values.dtype == self.dtype
        there, here = self._inside()
        values = (values.T if self.turned else values)[here]
        self.base[there] = self.base[there] + values if add else values


class _At:
    def __init__(self, ref):
        self.ref = ref

    def __getitem__(self, index):
        index = [] if index is Ellipsis else index
        index = list(index) if isinstance(index, (tuple, list)) else [index]
        window = []
        for start, size in self.ref.window:
            if size is None or not index:
                window.append((start, size))
                continue
            found = index.pop(0)
            if isinstance(found, pl.Slice):
                window.append((start + int(found.start), int(found.size)))
            elif isinstance(found, slice):
                low, high, step = found.indices(size)
                assert step == 1
                window.append((start + low, high - low))
            else:
                window.append((start + int(found), None))
        assert not index
        return Ref(self.ref.base, window, self.ref.turned)


class Barrier:
    """`num_barriers` that complete a phase at every `num_arrivals`-th arrival."""

    def __init__(self, num_arrivals=1, num_barriers=1):
        self.arrivals, self.changed = num_arrivals, threading.Condition()
        self.counts, self.late = [0] * num_barriers, [[] for _ in range(num_barriers)]
        self.seen = {}  # by (thread, barrier): phases waited for

    @property
    def at(self):
        return _Nth(self)


class _Nth:
    def __init__(self, barrier, n=0):
        self.barrier, self.n = barrier, n

    def __getitem__(self, n):
        return _Nth(self.barrier, int(n))

    def arrive(self, copy=None):
        with self.barrier.changed:
            if copy is not None:
                self.barrier.late[self.n].append(copy)
            self.barrier.counts[self.n] += 1
            self.barrier.changed.notify_all()

    def wait(self):
        b, me = self.barrier, (threading.get_ident(), self.n)
        phase = b.seen.get(me, 0) + 1
        with b.changed:
            done = lambda: b.counts[self.n] >= phase * b.arrivals
            assert b.changed.wait_for(done, timeout=20), "a warpgroup waits for ever"
            assert b.counts[self.n] < (phase + 1) * b.arrivals, "a phase was missed"
            for copy in b.late[self.n]:
                copy()
            b.late[self.n].clear()
        b.seen[me] = phase


def _nth(barrier):
    return barrier if isinstance(barrier, _Nth) else _Nth(barrier)


class Hopper:
    """What kernels call, run by threads."""

    def __init__(self):
        self.me, self.lock = threading.local(), threading.Lock()

    def kernel(self, body, *, out_type, mesh, compiler_params, name):
        grid, grid_names = mesh["grid"], mesh["grid_names"]
        num_threads, thread_name = mesh["num_threads"], mesh["thread_name"]
        types = out_type if isinstance(out_type, tuple) else (out_type,)

        def call(*operands):
            is_ref = lambda x: isinstance(x, jax.Ref)
            ins = [np.array(x[...] if is_ref(x) else x) for x in operands]
            outs = [np.full(t.shape, np.nan, t.dtype) for t in types]
            for place in itertools.product(*map(range, grid)):
                axes = dict(zip(grid_names, place))
                sizes = dict(zip(grid_names, grid)) | {thread_name: num_threads}
                self.scratch, failed = None, []

                def run(warpgroup):
                    self.me.axes, self.me.sizes = axes | {thread_name: warpgroup}, sizes
                    self.me.leaving = []
                    try:
                        body(*map(Ref, ins), *map(Ref, outs))
                        assert not self.me.leaving, "a program ends before its copies"
                    except BaseException as error:
                        failed.append(error)

                threads = [threading.Thread(target=run, args=(w,)) for w in range(num_threads)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if failed:
                    raise failed[0]
            for x, value in zip(operands, ins):
                if is_ref(x):
                    x[...] = jnp.asarray(value)
            outs = tuple(map(jnp.asarray, outs))
            return outs if isinstance(out_type, tuple) else outs[0]

        return call

    def memory(self, shape, dtype, transforms=()):
        return lambda: Ref(np.full(shape, self.poison(dtype), dtype))

    def poison(self, dtype):
        return 0x7FFFFFF if jnp.issubdtype(dtype, jnp.integer) else np.nan

    def barrier(self, **sizes):
        return lambda: Barrier(**sizes)

    def into_shared(self, source, to, barrier):
        values = source.read()
        assert values.nbytes % 128 == 0
        to.base[to._inside()[0]] = self.poison(values.dtype)
        _nth(barrier).arrive(functools.partial(to.write, values))

    def out_of_shared(self, source, to, reduction_op=None, **_):
        self.me.leaving.append(lambda: to.write(source.read(), add=reduction_op == "add"))

    def wait_for_leaving(self, n, wait_read_only=False):
        while len(self.me.leaving) > n:
            self.me.leaving.pop(0)()

    def multiply(self, into, a, b):
        a, b = (np.asarray(x.read() if isinstance(x, Ref) else x, np.float32) for x in (a, b))
        into.base[...] += a @ b

    def run_scoped(self, body, *types, collective_axes=None, **named):
        if collective_axes is None:
            return body(*(make() for make in types))
        with self.lock:  # the program's: the first warpgroup makes them
            if self.scratch is None:
                self.scratch = {name: make() for name, make in named.items()}
        return body(**self.scratch)

    def run_state(self, body):
        def run(initial):
            refs = jax.tree.map(lambda x: Ref(np.array(x)), initial)
            body(refs)
            return jax.tree.map(lambda ref: jnp.asarray(ref.base), refs)

        return run

    @contextlib.contextmanager
    def instead_of_jax(self):
        class Accumulator:
            def __new__(cls, shape, dtype):
                return lambda: Ref(np.zeros(shape, dtype))

            init = staticmethod(lambda x: x)

        def fori_loop(low, high, body, state):
            for i in range(int(low), int(high)):
                state = body(jnp.int32(i), state)
            return state

        def when(condition):
            return lambda then: then() if bool(condition) else None

        iota = lambda dtype, shape, dim, layout: jax.lax.broadcasted_iota(dtype, shape, dim)
        nothing = lambda *_, **__: None
        with pytest.MonkeyPatch.context() as patch:
            set_ = functools.partial(patch.setattr)
            set_(jax.lax, "fori_loop", fori_loop)
            set_(jax.lax, "axis_index", lambda name: jnp.int32(self.me.axes[name]))
            set_(jax.lax, "axis_size", lambda name: self.me.sizes[name])
            set_(jax.lax, "optimization_barrier", lambda x: x)
            set_(pl, "when", when)
            set_(pl, "run_scoped", self.run_scoped)
            set_(pl, "run_state", self.run_state)
            set_(pl, "kernel", self.kernel)
            for name, mine in dict(
                Mesh=dict, SMEM=self.memory, Barrier=self.barrier, ACC=Accumulator,
                copy_gmem_to_smem=self.into_shared, copy_smem_to_gmem=self.out_of_shared,
                wait_smem_to_gmem=self.wait_for_leaving, wgmma=self.multiply,
                barrier_arrive=lambda b: _nth(b).arrive(), barrier_wait=lambda b: _nth(b).wait(),
                broadcasted_iota=iota, layout_cast=lambda x, layout: x,
                load=lambda ref, *_, **__: ref.read(), commit_smem=nothing, wgmma_wait=nothing,
                set_max_registers=nothing,
            ).items():  # fmt: skip
                set_(plgpu, name, mine)
            yield


def qkv(seed, T, S, N, K, H, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(2, T, N, H), (2, S, K, H), (2, S, K, H), (2, T, N, H)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


def ids(*lengths):
    """Segments of those lengths, the last of them padding."""
    ids = [*range(1, len(lengths)), 0]
    return jnp.repeat(jnp.array([ids] * 2, jnp.int32), jnp.array(lengths), axis=1)


PACKED = ids(150, 140, 30)
# (T, S, mask): every edge that a block can have.
CASES = {
    "causal": (320, 320, AttentionMask()),
    "packed": (320, 320, AttentionMask(q_segments_BT=PACKED, kv_segments_BS=PACKED)),
    "packed window": (
        320, 320, AttentionMask(q_segments_BT=PACKED, kv_segments_BS=PACKED, window=70)),
    "any id": (
        320, 320,
        AttentionMask(q_segments_BT=PACKED[:, ::-1], kv_segments_BS=PACKED[:, ::-1], causal=False)),
    "full, odd": (130, 330, AttentionMask(causal=False, scale=0.2)),
    "offset": (100, 300, AttentionMask(q_offset_B=jnp.array([200, 130], jnp.int32))),
    "blind": (256, 256, AttentionMask(q_offset_B=jnp.array([-150, 0], jnp.int32))),
    "cap": (256, 256, AttentionMask(soft_cap=2.0, window=100)),
}  # fmt: skip


def float32(*arrays):
    return [x.astype(jnp.float32) for x in arrays]


@pytest.mark.parametrize("case", CASES)
def test_the_forward_schedule_gives_the_reference(case):
    T, S, mask = CASES[case]
    q, k, v, _ = qkv(0, T, S, 2, 1, 64)
    tiles = flash_sm90.Tiles(128, 64, 2, 3)
    config = dataclasses.replace(flash_sm90.CONFIGS[64], forward=tiles, programs=5)
    with Hopper().instead_of_jax():
        out, lse = flash_sm90._forward(q, k, v, mask, config=config)
    true, true_lse = reference.attention(*float32(q, k, v), mask)
    np.testing.assert_allclose(np.asarray(out, np.float32), true, atol=0.02)
    np.testing.assert_allclose(lse, true_lse, atol=1e-3)


def check_gradients(T, S, mask, head_dim, ordered):
    heads = (4, 2) if head_dim == 64 else (2, 1)
    q, k, v, dout = qkv(1, T, S, *heads, head_dim)
    out, lse = reference.attention(*float32(q, k, v), mask)
    delta = (dout.astype(jnp.float32) * out).sum(-1)
    config = dataclasses.replace(flash_sm90.config_for(head_dim), ordered=ordered)
    with Hopper().instead_of_jax():
        ours = flash_sm90.gradients(q, k, v, mask, lse, delta, dout, config=config)
    true = reference.attention_gradients(*float32(q, k, v), mask, lse, delta, *float32(dout))
    for name, got, want in zip("qkv", ours, true):
        assert got.shape == want.shape and got.dtype == q.dtype
        got = np.asarray(got, np.float32)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max(), err_msg=f"d{name}")


@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("case", CASES)
def test_the_backward_schedules_give_the_reference(case, ordered):
    check_gradients(*CASES[case], 64, ordered)


@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("head_dim", [80, 256])
def test_the_backward_schedules_of_larger_heads_give_the_reference(head_dim, ordered):
    check_gradients(*CASES["packed window"], head_dim, ordered)


# --- who does what --------------------------------------------------------------------------------


@pytest.mark.parametrize("programs, work", [(1, 5), (4, 4), (4, 6), (5, 23), (132, 1000)])
def test_every_item_is_dealt_to_one_program(programs, work):
    dealt = []
    for program in range(programs):
        mine, item_of = mosaic_gpu.share(jnp.int32(program), programs, work)
        dealt += [int(item_of(r)) for r in range(int(mine))]
    assert sorted(dealt) == list(range(work))


def test_the_longest_blocks_are_first_and_programs_are_balanced():
    lengths_BI = jnp.array([[1, 2, 3, 4], [4, 9, 0, 1]], jnp.int32)
    ranges_BI4 = jnp.stack([lengths_BI * 0, lengths_BI, lengths_BI, lengths_BI], -1)
    order = mosaic_gpu.longest_first(ranges_BI4)
    assert order.tolist() == [5, 3, 4, 2, 1, 0, 7, 6]
    # Causal rows of 8,192 tokens and 16 heads, on the cores of an H200.
    lengths = np.repeat(np.arange(64, 0, -1), 16)
    of_program = []
    for program in range(132):
        mine, item_of = mosaic_gpu.share(jnp.int32(program), 132, lengths.size)
        of_program.append(sum(lengths[int(item_of(r))] for r in range(int(mine))))
    assert max(of_program) < 1.07 * np.mean(of_program)


def test_shapes_and_dtypes_are_those_of_the_reference():
    for T, head_dim, dtype in [(300, 80, jnp.bfloat16), (37, 256, jnp.float16)]:
        q, k, v, _ = qkv(0, T, T + 5, 4, 2, head_dim, dtype)
        outputs = jax.eval_shape(flash_sm90.attention, q, k, v, AttentionMask())
        wanted = jax.eval_shape(reference.attention, q, k, v, AttentionMask())
        assert outputs == wanted
        loss = lambda *qkv: flash_sm90.attention(*qkv, AttentionMask())[0].sum()
        gradients = jax.eval_shape(jax.grad(loss, (0, 1, 2)), q, k, v)
        assert gradients == jax.eval_shape(lambda *same: same, q, k, v)


def test_what_it_cannot_do_is_refused_with_the_reason():
    q, k, v, _ = qkv(0, 128, 128, 2, 1, 64)
    attention = flash_sm90.attention
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, all alike: not float32"):
        attention(*float32(q, k, v), AttentionMask())
    with pytest.raises(NotImplementedError, match="not bfloat16, float16"):
        attention(q, k.astype(jnp.float16), v, AttentionMask())
    with pytest.raises(NotImplementedError, match="head_dim 320 is above flash_sm90's 256"):
        attention(*(jnp.tile(x, 5) for x in (q, k, v)), AttentionMask())
    with pytest.raises(NotImplementedError, match="a positive scale, not -1"):
        attention(q, k, v, AttentionMask(scale=-1.0))
    with pytest.raises(ValueError, match=r"Tiles\.keys is 96; it must be 64 or 128"):
        flash_sm90.Tiles(128, 96, 2, 2)
    with pytest.raises(ValueError, match=r"Tiles\.value_stages is 0"):
        flash_sm90.Tiles(128, 128, 2, 0)
    right = flash_sm90.CONFIGS[64]
    with pytest.raises(ValueError, match=r"Config\.forward\.queries is 64; it must be 128"):
        dataclasses.replace(right, forward=flash_sm90.Tiles(64, 64, 2, 2))
    with pytest.raises(ValueError, match="which head_dim 64 cannot have"):
        wrong = dataclasses.replace(right, of_keys=flash_sm90.CONFIGS[128].of_keys)
        loss = lambda q: attention(q, k, v, AttentionMask(), config=wrong)[0].sum()
        jax.eval_shape(jax.grad(loss), q)


# --- the compiler ---------------------------------------------------------------------------------

needs_cuda_plugin = pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is None
    or importlib.util.find_spec("jax_plugins.xla_cuda13") is None,
    reason="compiling for a GPU that is not here needs the CUDA plugin: pip install .[cuda]",
)
HEADS = sorted({(c.head_dim, c.num_heads // c.num_kv_heads) for c in PRESETS.values()})


def compiled(chip: str, head_dim: int, group: int, ordered: bool, length=2048, **mask):
    """The gradients of packed rows."""
    place = jax.sharding.SingleDeviceSharding(chips.absent_gpus(chip)[0])
    abstract = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    B, T, K, H = 4, length, 2, head_dim
    q_BTNH, ids_BT = abstract(jnp.bfloat16, B, T, K * group, H), abstract(jnp.int32, B, T)
    k_BTKH = abstract(jnp.bfloat16, B, T, K, H)
    config = dataclasses.replace(flash_sm90.config_for(H), ordered=ordered)

    def loss(q_BTNH, k_BTKH, v_BTKH, ids_BT):
        packed = AttentionMask(q_segments_BT=ids_BT, kv_segments_BS=ids_BT, **mask)
        out_BTNH, _ = flash_sm90.attention(q_BTNH, k_BTKH, v_BTKH, packed, config=config)
        return out_BTNH.astype(jnp.float32).sum()

    step = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q_BTNH, k_BTKH, k_BTKH, ids_BT)
    return step.compile().as_text()


def num_kernels(text: str) -> int:
    return text.count('custom_call_target="mosaic_gpu')


@pytest.mark.hardware_free
@needs_cuda_plugin
@pytest.mark.parametrize("ordered", [False, True], ids=["added", "ordered"])
@pytest.mark.parametrize("head_dim, group", HEADS)
def test_hopper_kernels_compile_for_an_absent_one(head_dim, group, ordered):
    text = compiled("h200", head_dim, group, ordered, window=1000)
    assert num_kernels(text) == (3 if ordered else 2)


@pytest.mark.hardware_free
@needs_cuda_plugin
def test_hopper_kernels_compile_with_a_cap_and_odd_lengths():
    assert num_kernels(compiled("h200", 128, 2, False, length=2050, soft_cap=30.0)) == 2
