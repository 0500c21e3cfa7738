"""Checkpoints are bit-equal, complete or absent, never skipped, and safe from donation and kill."""

import functools
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxreason.checkpoint.store import Store, restore_params
from jaxreason.types import TrainState

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed=0, rows=32):
    """A TrainState of 0.4 million parameters, no two leaves alike."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (rows, 64)),
        "layers": {"w_up": jax.random.normal(keys[1], (8, 128, 384))},
        "final_norm": jax.random.normal(keys[2], (64,)),
    }
    opt = jax.tree.map(lambda x: x + jnp.ones_like(x), OPTIMIZER.init(params))
    return TrainState(step=jnp.int32(seed), params=params, opt=opt, key=keys[3],
                      nonfinite=jnp.int32(seed + 1))  # fmt: skip


def items(state, note=0):
    return {"state": state, "data": {"cursor": [note, None, {"shard": "a"}]}, "host": {"n": note}}


def abstract(state, sharding=lambda x: x.sharding):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), state
    )


def plain(tree):
    """The tree in numpy, copied, PRNG keys as integers."""

    def copy(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.array(x)

    return jax.tree.map(copy, tree)


def assert_bit_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, plain(a), plain(b))


def test_round_trip_is_bit_equal(tmp_path):
    state = make_state()
    with Store(tmp_path / "new" / "pretrain") as store:
        assert store.latest() is None
        store.save(7, items(state, 3), wait=True)
        assert store.latest() == 7
    with Store(tmp_path / "new" / "pretrain") as store:
        step, restored = store.restore(abstract(state))
    assert step == 7
    assert_bit_equal(restored["state"], state)
    assert jax.random.uniform(restored["state"].key) == jax.random.uniform(state.key)
    assert restored["data"] == {"cursor": [3, None, {"shard": "a"}]}
    assert restored["host"] == {"n": 3}
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".pkl", ".pickle")]


def test_restores_onto_another_mesh(tmp_path):
    auto = (jax.sharding.AxisType.Auto,)
    line = jax.make_mesh((8,), ("fsdp",), axis_types=auto)
    square = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=auto * 2)

    def on_line(x):
        return jax.NamedSharding(line, jax.P("fsdp") if x.ndim > 1 else jax.P())

    def on_square(x):
        return jax.NamedSharding(square, jax.P("fsdp", "tensor") if x.ndim > 1 else jax.P())

    state = make_state()
    placed = jax.tree.map(lambda x: jax.device_put(x, on_line(x)), state)
    with Store(tmp_path) as store:
        store.save(1, items(placed), wait=True)
        _, restored = store.restore(abstract(state, on_square))
    assert_bit_equal(restored["state"], state)
    jax.tree.map(lambda x: np.testing.assert_equal(x.sharding, on_square(x)), restored["state"])


def test_donating_the_state_during_the_save_is_safe(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def bump(tree):
        return jax.tree.map(lambda x: x + jnp.ones_like(x), tree)

    with Store(tmp_path, keep=100) as store:
        wanted = {}
        for seed in range(4):
            state = make_state(seed)
            wanted[seed] = plain(state)
            store.save(seed, items(state))
            new = (state.params, state.opt)
            for _ in range(5):  # overwrites the buffers again and again while they are written
                new = bump(new)
            jax.block_until_ready(new)
        for seed, saved in wanted.items():
            _, restored = store.restore(abstract(make_state()), seed)
            jax.tree.map(np.testing.assert_array_equal, plain(restored["state"]), saved)


def test_host_data_is_the_data_at_the_call(tmp_path):
    moving = items(make_state())
    with Store(tmp_path) as store:
        store.save(1, moving)
        moving["host"]["n"] = -1
        moving["data"]["cursor"].clear()
        _, restored = store.restore(abstract(make_state()))
        assert restored["host"] == {"n": 0}
        assert restored["data"] == {"cursor": [0, None, {"shard": "a"}]}
        with pytest.raises(TypeError, match="not JSON serializable"):
            store.save(2, {**moving, "host": {"table": np.zeros(2)}})
        assert store.latest() == 1


def test_quick_saves_all_land_and_the_last_two_stay(tmp_path):
    state = make_state()
    with Store(tmp_path / "all", keep=100) as store:
        for step in range(1, 9):
            store.save(step, items(state, step))
        for step in range(1, 9):
            assert store.restore(abstract(state), step)[1]["host"] == {"n": step}
    with Store(tmp_path / "two") as store:
        for step in range(1, 9):
            store.save(step, items(state, step))
        store.wait()
        assert sorted(p.name for p in (tmp_path / "two").iterdir()) == ["7", "8"]


def test_a_step_saved_again_takes_the_new_data_and_host(tmp_path, monkeypatch):
    """Killed before the one rename that replaces them, the step is whole and the old one."""

    def killed(*args):
        raise KeyboardInterrupt

    def check(store, note):
        step, restored = store.restore(abstract(state))
        assert step == 1
        assert_bit_equal(restored["state"], state)
        assert (restored["data"], restored["host"]) == (items(state, note)["data"], {"n": note})

    state = make_state()
    with Store(tmp_path) as store:
        store.save(1, items(state, 0))  # still being written when it is saved again
        for note in (1, 2):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(os, "replace", killed)
                store.save(1, items(state, note))
            check(store, note - 1)
            store.save(1, items(state, note))
            check(store, note)
    with Store(tmp_path, keep=1) as store:
        check(store, 2)
        assert_bit_equal(restore_params(tmp_path, abstract(state.params)), state.params)
        store.save(2, items(state, 3), wait=True)
        assert store.restore(abstract(state))[1]["host"] == {"n": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_an_older_checkpoint_goes_only_after_the_newer_is_complete(tmp_path):
    """Watches the directory during saves with keep=1: some complete step is always there."""
    state = make_state()
    seen = []
    with Store(tmp_path, keep=1) as store:
        store.save(0, items(state), wait=True)
        for step in range(1, 4):
            store.save(step, items(state))
            older, newer = tmp_path / str(step - 1) / "state" / "_METADATA", tmp_path / str(step)
            while not newer.is_dir():
                seen.append(older.is_file() or newer.is_dir())
            store.wait()
    assert len(seen) > 3 and all(seen)


def test_an_error_of_an_async_save_surfaces_at_the_next_call(tmp_path):
    store = Store(tmp_path)
    store.save(1, items(make_state()))
    (tmp_path / "1").write_text("in the way of the rename that completes the save")
    with pytest.raises(OSError, match="already exists"):
        store.save(2, items(make_state()))
    assert not (tmp_path / "2").exists()


def test_params_alone(tmp_path):
    state = make_state()
    with Store(tmp_path) as store:
        store.save(1, items(make_state(1)))
        store.save(2, items(state), wait=True)
        # A run in progress: a half-written step that a reader must leave alone.
        (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
        assert_bit_equal(restore_params(tmp_path, abstract(state.params)), state.params)
        older = restore_params(tmp_path, abstract(state.params), step=1)
        assert_bit_equal(older, make_state(1).params)
        assert (tmp_path / "3.orbax-checkpoint-tmp").is_dir()
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding),
                        state.params)  # fmt: skip
    assert_bit_equal(
        restore_params(tmp_path, half), jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    )


def test_errors_name_the_thing(tmp_path):
    state = make_state()
    with Store(tmp_path / "run") as store:
        with pytest.raises(ValueError, match="run holds no complete checkpoint"):
            store.restore(abstract(state))
        store.save(1, items(state), wait=True)
        with pytest.raises(ValueError, match=r"has no step 5; it has \[1\]"):
            store.restore(abstract(state), 5)
        with pytest.raises(ValueError, match=r"params/embedding is float32\[32, 64\] in the "
                           r"checkpoint and float32\[40, 64\] in this run"):  # fmt: skip
            store.restore(abstract(make_state(rows=40)))
        sgd = TrainState(**{**vars(state), "opt": optax.sgd(0.1, momentum=0.9).init(state.params)})
        with pytest.raises(ValueError, match=r"opt/0/trace/embedding is absent in the checkpoint"):
            store.restore(abstract(sgd))
        less = TrainState(**{**vars(state), "opt": ()})
        with pytest.raises(
            ValueError, match=r"opt/1/0/count is int32\[\] in the checkpoint and ab"
        ):
            store.restore(abstract(less))
        with pytest.raises(ValueError, match=r"embedding is float32\[32, 64\]") as error:
            restore_params(tmp_path / "run", abstract(make_state(rows=40).params))
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="nowhere is not a directory of checkpoints"):
        restore_params(tmp_path / "nowhere", abstract(state.params))
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(ValueError, match="keep is 0"):
        Store(tmp_path / "none", keep=0)


SAVE_FOREVER = """
import pathlib, sys, time
sys.path.insert(0, "tests/checkpoint")
import test_store
with test_store.Store(pathlib.Path(sys.argv[1])) as store:
    step = 1 + (store.latest() or 0)
    while True:
        store.save(step, test_store.items(test_store.make_state(step % 3), step))
        print(step, flush=True)
        step += 1
"""


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    """kill -9 at random moments of back-to-back saves, each process going on where one died."""
    states, killed_in_save, rng, before = [make_state(i) for i in range(3)], 0, random.Random(0), 0
    writing = lambda: any("tmp" in path.name for path in tmp_path.iterdir())
    for attempt in range(12):
        if attempt >= 4 and killed_in_save:
            break
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        for _ in range(3):  # the first save compiles
            assert process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        while attempt >= 3 and not writing():  # luck alone need not hit a save
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed_in_save += writing()
        with Store(tmp_path) as store:
            step, restored = store.restore(abstract(states[0]))
            assert step == store.latest() == restored["host"]["n"] > before
            assert_bit_equal(restored["state"], states[step % 3])
            before = step
        assert not writing()
    assert killed_in_save
