"""A Hopper or a Blackwell in Python: runs the code of our Mosaic GPU kernels on numbers.

There is a thread for each warpgroup, and for each warp where a warpgroup's warps part. Memories are
NumPy arrays that begin as NaN, barriers count. What is asynchronous is as late as it may be:

- A copy to shared memory destroys its destination when it begins, and is made only when it is
  waited for; one from shared memory reads its source only then.
- A product of tensor cores (`tcgen05`) destroys its accumulator when it begins, and is made only
  when somebody waits for a barrier at which it, or a later product of its thread, arrives. Its
  operands must be there when it begins, and still the same when it is made.
- What is stored to tensor memory is there once it is committed. What is loaded from it must not
  change before the load is waited for.
- Who arrives at a barrier or begins a product must have committed and waited for what is its own.

So a schedule that reads or overwrites too early gives NaN or an error, and so does one that waits
for ever or ends too early. Hopper's products (`wgmma`) are made at once: their fences are not
tested, nor is anything between a thread's own lanes.
"""

import contextlib
import dataclasses
import functools
import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxreason.kernels import reference
from jaxreason.types import AttentionMask

_PATIENCE = 60  # seconds that a thread waits before it waits for ever
_ME = threading.local()  # of the thread: axes, and what it has not yet waited for or committed


def _begin(axes):
    _ME.axes, _ME.leaving, _ME.dirty, _ME.loads, _ME.stores, _ME.products = axes, [], [], [], [], []


def _settled(what: str):
    assert not _ME.loads, f"{what}, but loads from tensor memory were not waited for"
    assert not _ME.stores, f"{what}, but stores to tensor memory were not committed"
    assert not _ME.dirty, f"{what}, but writes to shared memory were not committed"


def _product(a, b):
    """In pieces so small that BLAS keeps them to this thread: others would only get in its way."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return np.concatenate([a[i : i + 16] @ b for i in range(0, len(a), 16)])


def _same(a, b) -> bool:
    return a.tobytes() == b.tobytes()  # NaN or not


# --- memory ---------------------------------------------------------------------------------------


class Ref:
    """A window of an array: zeros are read beyond its end and nothing is written there."""

    def __init__(self, base, space, window=None, turned=False):
        self.base, self.space, self.turned = base, space, turned
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
        return Ref(self.base, self.space, self.window, not self.turned)

    def __getitem__(self, index):
        return self.at[index].read()

    def __setitem__(self, index, value):
        assert self.space != "tensor"
        if self.space == "shared":
            _ME.dirty.append(self)
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
            assert self.space == "global" or high - low == size
            there.append(slice(low, max(high, low)))
            here.append(slice(low - start, max(high, low) - start))
        return tuple(there), tuple(here)

    def read(self):
        there, here = self._inside()
        values = np.zeros([size for _, size in self.window if size is not None], self.dtype)
        values[here] = self.base[there]
        return values.T.copy() if self.turned else values[()]

    def write(self, values, add=False):
        assert values.shape == self.shape and values.dtype == self.dtype
        there, here = self._inside()
        values = (values.T if self.turned else values)[here]
        self.base[there] = self.base[there] + values if add else values

    def poison(self):
        self.base[self._inside()[0]] = _poison(self.dtype)

    def meets(self, other) -> bool:
        """Of two in tensor memory, whose lanes are all taken: whether they share a column."""
        (a, a_end), (b, b_end) = self._bytes(), other._bytes()
        return np.may_share_memory(self.base, other.base) and a < b_end and b < a_end

    def _bytes(self):
        first, size = self.window[-1]
        return first * self.dtype.itemsize, (first + size) * self.dtype.itemsize


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
        return Ref(self.ref.base, self.ref.space, window, self.ref.turned)


def _poison(dtype):
    return 0x7FFFFFF if jnp.issubdtype(dtype, jnp.integer) else np.nan


@dataclasses.dataclass(frozen=True)
class _Memory:
    """Of shared or tensor memory, as `plgpu.SMEM` and `plgpu.TMEM` describe it."""

    space: str
    shape: tuple[int, ...]
    dtype: object

    def __call__(self):
        return _Union(self)()[0]

    @property
    def bytes(self):
        """(lanes, bytes of each)."""
        whole = self.shape if self.space == "tensor" else (1, *self.shape)
        return whole[0], int(np.prod(whole[1:])) * np.dtype(self.dtype).itemsize


def _shared(shape, dtype, transforms=()):
    return _Memory("shared", shape, dtype)


def _tensor(shape, dtype, packed=False):
    assert shape[0] == 128 and packed == (np.dtype(dtype).itemsize == 2)
    return _Memory("tensor", shape, dtype)


class _Union:
    """Several in one place."""

    def __init__(self, *memories):
        self.memories = memories

    def __call__(self):
        lanes = self.memories[0].bytes[0]
        raw = np.full((lanes, max(m.bytes[1] for m in self.memories)), 0xFF, np.uint8)
        refs = []
        for memory in self.memories:
            base = raw[:, : memory.bytes[1]].view(memory.dtype).reshape(memory.shape)
            assert np.shares_memory(base, raw)
            refs.append(Ref(base, memory.space))
        refs[0].poison()
        return tuple(refs)


# --- what happens later ---------------------------------------------------------------------------


class Barrier:
    """`num_barriers` that complete a phase at every `num_arrivals`-th arrival."""

    def __init__(self, gpu, num_arrivals=1, num_barriers=1, orders_tensor_core=False):
        self.gpu, self.arrivals, self.changed = gpu, num_arrivals, threading.Condition()
        self.of_products = orders_tensor_core
        self.counts, self.late = [0] * num_barriers, [[] for _ in range(num_barriers)]
        self.seen = {}  # by (thread, barrier): phases waited for

    @property
    def at(self):
        return _Nth(self)


class _Nth:
    def __init__(self, barrier, n=0):
        self.barrier, self.n = barrier, n

    def __getitem__(self, n):
        assert 0 <= int(n) < len(self.barrier.counts)
        return _Nth(self.barrier, int(n))

    def arrive(self, late=None):
        with self.barrier.changed:
            if late is not None:
                self.barrier.late[self.n].append(late)
            self.barrier.counts[self.n] += 1
            self.barrier.changed.notify_all()

    def wait(self):
        b, me = self.barrier, (threading.get_ident(), self.n)
        phase = b.seen.get(me, 0) + 1
        with b.changed:
            for _ in range(_PATIENCE * 10):
                if b.counts[self.n] >= phase * b.arrivals:
                    break
                assert not b.gpu.failed, "another thread has failed"
                b.changed.wait(timeout=0.1)
            assert b.counts[self.n] >= phase * b.arrivals, "a warpgroup waits for ever"
            assert b.counts[self.n] < (phase + 1) * b.arrivals, "a phase was missed"
            with b.gpu.lock:
                for late in b.late[self.n]:
                    late()
            b.late[self.n].clear()
        b.seen[me] = phase


def _nth(barrier):
    return barrier if isinstance(barrier, _Nth) else _Nth(barrier)


class _Product:
    """Of tensor cores, begun and not yet made."""

    def __init__(self, into, a, b, accumulate: bool):
        self.into, self.a, self.b = into, a, b
        self.operands = a.read(), b.read()
        same = [p for p in _ME.products if (p.into.base is into.base) and p.into.meets(into)]
        assert all(p.into.window == into.window for p in same), "accumulators overlap"
        self.sum = into.read() if accumulate and not same else None
        self.after = same[-1] if accumulate and same else None
        self.queue = _ME.products
        into.poison()
        self.queue.append(self)

    def make(self):
        for ref, value in zip((self.a, self.b), self.operands):
            assert _same(ref.read(), value), "an operand changed before its product was made"
        self.queue.remove(self)
        self.sum = _product(*self.operands) + (0 if self.sum is None else self.sum)
        again = [p for p in self.queue if p.into.window == self.into.window]
        again = [p for p in again if p.into.base is self.into.base]
        for product in again:
            if product.after is self:
                product.sum = self.sum
        if not again:
            self.into.write(self.sum)


# --- the machine ----------------------------------------------------------------------------------


class Gpu:
    """What kernels call, run by threads."""

    def __init__(self):
        self.lock = threading.RLock()
        self.failed = []
        self.unmade = []  # copies to shared memory and products that have begun

    def kernel(self, body, *, out_type, mesh, compiler_params, name):
        grid, grid_names = mesh["grid"], mesh["grid_names"]
        num_threads, thread_name = mesh["num_threads"], mesh["thread_name"]
        types = out_type if isinstance(out_type, tuple) else (out_type,)

        def call(*operands):
            is_ref = lambda x: isinstance(x, jax.Ref)
            ins = [np.array(x[...] if is_ref(x) else x) for x in operands]
            outs = [np.full(t.shape, np.nan, t.dtype) for t in types]
            self.sizes = dict(zip(grid_names, grid)) | {thread_name: num_threads}
            for place in itertools.product(*map(range, grid)):
                axes = dict(zip(grid_names, place))
                self.scratch, self.registers = None, {}

                def run(warpgroup):
                    _ME.warpgroup = warpgroup
                    _begin(axes | {thread_name: warpgroup})
                    body(*(Ref(x, "global") for x in (*ins, *outs)))

                self.run_threads(run, num_threads)
                assert not self.unmade, "a program ends before what it began"
                self.check_registers(num_threads)
            for x, value in zip(operands, ins):
                if is_ref(x):
                    x[...] = jnp.asarray(value)
            outs = tuple(map(jnp.asarray, outs))
            return outs if isinstance(out_type, tuple) else outs[0]

        return call

    def run_threads(self, run, number):
        def guarded(index):
            try:
                with np.errstate(invalid="ignore", over="ignore"):
                    run(index)
                _settled("a program ends")
                assert not _ME.leaving, "a program ends before its copies"
            except BaseException as error:
                self.failed.append(error)

        threads = [threading.Thread(target=guarded, args=(i,)) for i in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0]

    def set_registers(self, number, action):
        self.registers[_ME.warpgroup] = number

    def check_registers(self, warpgroups):
        """Who asks for more than others have given up waits for ever."""
        each = min(65536 // (128 * warpgroups) // 8 * 8, 255)  # of a thread, when a program begins
        asked = sum(self.registers.get(w, each) for w in range(warpgroups))
        assert asked <= each * warpgroups, f"{asked} registers asked for, of {each * warpgroups}"

    def warp_map(self, body):
        _settled("warps part")

        def run(warp):
            _begin({})  # no other axis is known to a warp
            body(np.int32(warp))

        self.run_threads(run, 4)

    def into_shared(self, source, to, barrier):
        values = source.read()
        assert values.nbytes % 128 == 0 and to.space == "shared"
        to.poison()

        def make():
            to.write(values)
            self.unmade.remove(make)

        with self.lock:
            self.unmade.append(make)
        _nth(barrier).arrive(make)

    def out_of_shared(self, source, to, reduction_op=None):
        assert not _ME.dirty, "a copy begins, but writes to shared memory were not committed"
        assert source.space == "shared"
        _ME.leaving.append(lambda: to.write(source.read(), add=reduction_op == "add"))

    def wait_for_leaving(self, n, wait_read_only=False):
        while len(_ME.leaving) > n:
            with self.lock:
                _ME.leaving.pop(0)()

    def wgmma(self, into, a, b):
        into.base[...] += _product(*(x.read() if isinstance(x, Ref) else x for x in (a, b)))

    def mma(self, into, a, b, barrier=None, *, accumulate):
        _settled("a product begins")
        assert into.space == "tensor" and b.space == "shared" and a.space in ("tensor", "shared")
        assert into.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
        with self.lock:
            self.unmade.append(_Product(into, a, b, bool(accumulate)))
        if barrier is not None:
            self.commit(barrier)

    def commit(self, barrier):
        barrier = _nth(barrier)
        assert barrier.barrier.of_products
        with self.lock:
            products = list(_ME.products)

        def make():
            for product in products:
                if product in self.unmade:
                    product.make()
                    self.unmade.remove(product)

        barrier.arrive(make)

    def arrive(self, barrier):
        _settled("a thread arrives")
        _nth(barrier).arrive()

    def load(self, ref, layout=None):
        assert ref.space == "tensor"
        value = ref.read()
        _ME.loads.append((ref, value.copy()))
        return value

    def wait_for_loads(self):
        for ref, value in _ME.loads:
            assert _same(ref.read(), value), "tensor memory changed before its load was made"
        _ME.loads.clear()

    def store(self, ref, value):
        assert ref.space == "tensor"
        value = np.asarray(value)
        assert value.shape == ref.shape and value.dtype == ref.dtype
        assert not any(ref.meets(other) for other, _ in _ME.loads), "a load was not waited for"
        ref.poison()
        _ME.stores.append((ref, value))

    def commit_stores(self):
        for ref, value in _ME.stores:
            ref.write(value)
        _ME.stores.clear()

    def run_scoped(self, body, *types, collective_axes=None, **named):
        if collective_axes is None:
            return body(*(make() for make in types))
        with self.lock:  # the program's: the first warpgroup makes them
            if self.scratch is None:
                self.scratch = {name: make() for name, make in named.items()}
        return body(**self.scratch)

    def run_state(self, body):
        def run(initial):
            refs = jax.tree.map(lambda x: Ref(np.array(x), "registers"), initial)
            body(refs)
            return jax.tree.map(lambda ref: ref.base, refs)

        return run

    @contextlib.contextmanager
    def instead_of_jax(self):
        class Accumulator:
            def __new__(cls, shape, dtype):
                return lambda: Ref(np.zeros(shape, dtype), "registers")

            init = staticmethod(lambda x: x)

        def fori_loop(low, high, body, state):
            state = jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else np.int32(x), state)
            for i in range(int(low), int(high)):
                state = body(np.int32(i), state)
            return state

        def when(condition):
            return lambda then: then() if bool(condition) else None

        def barrier(**sizes):
            return lambda: Barrier(self, **sizes)

        def iota(dtype, shape, dim, layout):
            numbers = np.arange(shape[dim], dtype=dtype)
            return np.broadcast_to(np.expand_dims(numbers, 1 - dim), shape)

        nothing = lambda *_, **__: None
        with pytest.MonkeyPatch.context() as patch:
            set_ = functools.partial(patch.setattr)
            set_(jax.lax, "fori_loop", fori_loop)
            set_(jax.lax, "axis_index", lambda name: np.int32(_ME.axes[name]))
            set_(jax.lax, "axis_size", lambda name: self.sizes[name])
            set_(jax.lax, "optimization_barrier", lambda x: x)
            for room, name, mine in _IN_NUMPY:
                set_(room, name, _here(getattr(room, name), mine))
            set_(pl, "when", when)
            set_(pl, "run_scoped", self.run_scoped)
            set_(pl, "run_state", self.run_state)
            set_(pl, "kernel", self.kernel)
            for name, mine in dict(
                Mesh=dict, SMEM=_shared, TMEM=_tensor, RefUnion=_Union, Barrier=barrier,
                ACC=Accumulator, warp_map=self.warp_map, wgmma=self.wgmma, wgmma_wait=nothing,
                copy_gmem_to_smem=self.into_shared, copy_smem_to_gmem=self.out_of_shared,
                wait_smem_to_gmem=self.wait_for_leaving, commit_smem=lambda: _ME.dirty.clear(),
                tcgen05_mma=self.mma, tcgen05_commit_arrive=self.commit,
                async_load_tmem=self.load, wait_load_tmem=self.wait_for_loads,
                async_store_tmem=self.store, commit_tmem=self.commit_stores,
                barrier_arrive=self.arrive, barrier_wait=lambda b: _nth(b).wait(),
                broadcasted_iota=iota, layout_cast=lambda x, layout: x,
                load=lambda ref, *_, **__: ref.read(), set_max_registers=self.set_registers,
            ).items():  # fmt: skip
                set_(plgpu, name, mine)
            yield


def _where(condition, a, b):
    kept = a if isinstance(a, (np.ndarray, np.generic)) else b
    return np.where(condition, a, b).astype(np.asarray(kept).dtype)


def _broadcast_in_dim(x, shape, dims):
    (dim,) = dims
    return np.broadcast_to(np.expand_dims(x, 1 - dim), shape)


# What kernels compute with, at once and without a compiler.
_IN_NUMPY = [
    (jnp, "where", _where),
    (jnp, "full", np.full),
    *(
        (jnp, name, getattr(np, name))
        for name in ("exp2", "log2", "tanh", "maximum", "logical_not")
    ),
    (jax.lax, "div", lambda a, b: np.int32(a) // np.int32(b)),
    (jax.lax, "rem", lambda a, b: np.int32(a) % np.int32(b)),
    (jax.lax, "broadcast_in_dim", _broadcast_in_dim),
]


def _here(theirs, mine):
    """`mine` in the threads of a kernel."""
    return lambda *args, **options: (mine if hasattr(_ME, "axes") else theirs)(*args, **options)


# --- what is asked of it --------------------------------------------------------------------------


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


def check_forward(kernels, case, heads, head_dim, config):
    """Of a module of kernels, simulated, beside the reference."""
    T, S, mask = CASES[case]
    q, k, v, _ = qkv(0, T, S, *heads, head_dim)
    with Gpu().instead_of_jax():
        out, lse = kernels._forward(q, k, v, mask, config=config)
    true, true_lse = reference.attention(*float32(q, k, v), mask)
    np.testing.assert_allclose(np.asarray(out, np.float32), true, atol=0.02)
    np.testing.assert_allclose(lse, true_lse, atol=1e-3)


def check_gradients(kernels, case, heads, head_dim, config):
    T, S, mask = CASES[case]
    q, k, v, dout = qkv(1, T, S, *heads, head_dim)
    out, lse = reference.attention(*float32(q, k, v), mask)
    delta = (dout.astype(jnp.float32) * out).sum(-1)
    with Gpu().instead_of_jax():
        ours = kernels.gradients(q, k, v, mask, lse, delta, dout, config=config)
    true = reference.attention_gradients(*float32(q, k, v), mask, lse, delta, *float32(dout))
    for name, got, want in zip("qkv", ours, true):
        assert got.shape == want.shape and got.dtype == q.dtype
        got = np.asarray(got, np.float32)
        np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max(), err_msg=f"d{name}")


def check_packing(kernels, config):
    """Another first document in the row leaves every bit of the second one's as it was."""
    length, first = 320, 150
    mask = AttentionMask(q_segments_BT=PACKED, kv_segments_BS=PACKED)
    ours, other = qkv(2, length, length, 2, 1, 64), qkv(3, length, length, 2, 1, 64)
    mixed = [jnp.concatenate([b[:, :first], a[:, first:]], axis=1) for a, b in zip(ours, other)]
    second = slice(first, 290)

    def of_second(q, k, v, dout):
        with Gpu().instead_of_jax():
            out, lse = kernels._forward(q, k, v, mask, config=config)
            delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
            gradients = kernels.gradients(q, k, v, mask, lse, delta, dout, config=config)
        return [np.asarray(x[:, second]) for x in (out, lse, *gradients)]

    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), of_second(*ours), of_second(*mixed)):
        assert np.isfinite(a.astype(np.float32)).all() and np.abs(a.astype(np.float32)).max() > 0
        assert _same(a, b), name
