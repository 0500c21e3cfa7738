"""Checkpoints of a run: Orbax, asynchronous, complete or absent."""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any, Self

import jax

from jaxreason.parallel import hosts

# What is saved, under DIRECTORY/STEP, and the order of resuming:
#   state  the TrainState: step, params, optimizer state, PRNG key      arrays, sharded (OCDBT)
#   data   where the data stream stands: iterator, packer, shard states  JSON
#   host   what the loop keeps on the host: counters, tables             JSON
#   later.json  {"data", "host"} of a second save of the step, which replace the first ones
# Resuming: 1. build the config, mesh and abstract state; 2. latest() is the newest complete step;
# 3. restore() checks every shape, then loads the arrays straight into their shardings; 4. the data
# stream is set to `data`; 5. the loop takes `host`, cuts its logs back to the step and goes on.
_STATE, _DATA, _HOST = "state", "data", "host"
_LATER = "later.json"


class Store:
    """The checkpoints of one run in one directory; the last `keep` complete ones stay.

    A step becomes visible by a rename once all of it is written, and an older one is deleted only
    after that, so a kill at any moment leaves the newest complete step intact. Opening removes what
    a killed process left half written; one run writes a directory at a time. Several processes call
    everything together, in a directory that all see: each writes its part of the state, and process
    0 `data` and `host`, so its own must tell of all.
    """

    def __init__(self, directory: pathlib.Path, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
        from orbax.checkpoint import v1 as ocp

        self._checkpointer = _open(
            pathlib.Path(directory),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, items: Mapping[str, Any], *, wait: bool = False) -> None:
        """Saves {"state": pytree, "data": JSON, "host": JSON}.

        A step already saved keeps its state, which is the same one; data and host, which go on
        between two steps, are replaced together, at once.

        Returns once the state is safe from donation, the writing goes on behind; `wait` waits for
        that too. A save still running is waited for, never skipped. An error of an earlier save is
        raised here. Raises TypeError when data or host is not JSON.
        """
        self.wait()
        text = json.dumps({name: items[name] for name in (_DATA, _HOST)})
        if step in _steps(self._checkpointer):
            # Not overwrite=True: Orbax deletes the old step before it writes the new one.
            hosts.first(lambda: _replace(self._checkpointer.directory / str(step) / _LATER, text))
            return
        # Orbax encodes JSON in the background; the loop may change these dicts meanwhile.
        snapshot = json.loads(text)
        # force: no policy of Orbax's may skip a save (its default one drops those in a hurry).
        response = self._checkpointer.save_checkpointables_async(
            step, {_STATE: items[_STATE], **snapshot}, force=True
        )
        assert response is not None, f"Orbax skipped the save of step {step}"
        if wait:
            self.wait()

    def latest(self) -> int | None:
        """The newest complete step, or None. Waits for a save that is running."""
        self.wait()
        return hosts.told(lambda: max(_steps(self._checkpointer), default=None))

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """(step, {"state", "data", "host"}) of that step, or of the latest.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct with the shardings to restore into, which
            need not be those of the run that saved.

        Raises ValueError when there is no such step, or naming the first leaf that differs.
        """
        step = _resolve(self._checkpointer, self.latest() if step is None else step)
        saved = self._checkpointer.checkpointables_metadata(step).metadata[_STATE]
        where = self._checkpointer.directory / str(step)
        _check_same_leaves(where, _leaves(saved), _leaves(abstract_state))
        wanted = {_STATE: abstract_state, _DATA: None, _HOST: None}
        items = self._checkpointer.load_checkpointables(step, wanted)
        if (where / _LATER).exists():
            items |= json.loads((where / _LATER).read_text(encoding="utf-8"))
        return step, items

    def wait(self) -> None:
        """Until the save that is running is complete. Raises its error."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then releases Orbax's threads."""
        self._checkpointer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def restore_params(
    directory: pathlib.Path,
    abstract_params: dict[str, Any],
    step: int | None = None,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """The parameters alone of a saved TrainState, cast to the dtypes asked for.

    Args:
      abstract_params: of jax.ShapeDtypeStruct with shardings.
      step: None is the latest complete one.
      optional: entries that are left out where the checkpoint or `abstract_params` has none.

    Reads only, so it may look at the checkpoints of a run in progress. Raises ValueError when there
    is no such step, or naming the first leaf that differs.
    """
    from orbax.checkpoint import v1 as ocp

    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory of checkpoints")
    with _open(directory) as checkpointer:
        step = _resolve(checkpointer, step)
        saved = checkpointer.checkpointables_metadata(step).metadata[_STATE]["params"]
    for name in optional:
        if not (name in saved and name in abstract_params):
            saved, abstract_params = _without(name, saved), _without(name, abstract_params)
    where = directory.absolute() / str(step)
    _check_same_leaves(where, _leaves(saved), _leaves(abstract_params), dtypes=False)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        loaded = ocp.load(where, {"params": abstract_params}, checkpointable_name=_STATE)
    return loaded["params"]


def when_saved(directory: pathlib.Path, step: int | None = None) -> tuple[int, int]:
    """(that step, or the latest complete one; the time it was saved, ns), by which it is known.

    Raises ValueError when there is no such step.
    """
    directory = pathlib.Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory of checkpoints")
    with _open(directory) as checkpointer:
        step = _resolve(checkpointer, step)
        return step, checkpointer.checkpointables_metadata(step).init_timestamp_nsecs


def _without(name: str, tree: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key != name}


def _open(directory: pathlib.Path, **options: Any) -> Any:
    """An Orbax Checkpointer that writes `data` and `host` as JSON, whatever they hold."""
    from orbax.checkpoint import v1 as ocp

    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in (_DATA, _HOST):
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    return ocp.training.Checkpointer(directory.absolute(), context=context, **options)


def _replace(path: pathlib.Path, text: str) -> None:
    """The file holds its old text or all of the new one, whenever the process is killed."""
    half = path.with_name(f"{path.name}.tmp")
    with half.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(half, path)


def _steps(checkpointer: Any) -> list[int]:
    return [checkpoint.step for checkpoint in checkpointer.checkpoints]


def _resolve(checkpointer: Any, step: int | None) -> int:
    steps = _steps(checkpointer)
    if not steps:
        raise ValueError(f"{checkpointer.directory} holds no complete checkpoint")
    if step is not None and step not in steps:
        raise ValueError(f"{checkpointer.directory} has no step {step}; it has {sorted(steps)}")
    return max(steps) if step is None else step


def _leaves(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """{path: (shape, dtype)}; a PRNG key counts as the integers it is saved as."""

    def describe(leaf: Any) -> tuple[tuple[int, ...], str]:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return tuple(leaf.shape), str(leaf.dtype)

    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): describe(leaf)
        for path, leaf in flat
    }


def _check_same_leaves(
    where: pathlib.Path, saved: dict[str, Any], wanted: dict[str, Any], *, dtypes: bool = True
) -> None:
    """Raises a ValueError naming the first leaf, in the wanted order, that the two disagree on."""

    def show(leaf: tuple[tuple[int, ...], str] | None) -> str:
        return "absent" if leaf is None else f"{leaf[1]}{list(leaf[0])}"

    for path in [*wanted, *(path for path in saved if path not in wanted)]:
        here, there = wanted.get(path), saved.get(path)
        same = here == there if dtypes or not (here and there) else here[0] == there[0]
        if not same:
            raise ValueError(
                f"{where} does not fit this run: {path} is {show(there)} in the checkpoint and "
                f"{show(here)} in this run"
            )
