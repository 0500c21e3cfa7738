"""The steps that `run.profile.steps` names: traced, and a table of where their time went."""

import pathlib
import time
from collections.abc import Callable

import jax

from jaxreason.parallel import hosts
from jaxreason.report import profile
from jaxreason.train.step import TrainStep
from jaxreason.types import TrainState


def check_steps(traced: tuple[int, ...], steps: int) -> None:
    """Raises ValueError where a stage of so many steps does not have those; () is none."""
    if not traced:
        return
    whole = len(traced) == 2 and all(type(step) is int for step in traced)
    if not whole or not 1 <= traced[0] <= traced[1] <= steps:
        raise ValueError(
            f"run.profile.steps is {traced}; it must be (first, last) with "
            f"1 <= first <= last <= train.steps = {steps}, or () for none"
        )


class Trace:
    """Within it, `before` and `after` each step. Of several processes the first traces.

    A loop that ends inside the traced steps ends the trace too; those that it took are in it.
    """

    def __init__(self, steps: tuple[int, ...], folder: str, say: Callable[[str], None]):
        self._steps = steps if hosts.is_first() else ()
        self._folder, self._say = pathlib.Path(folder), say
        self._train_step = self._arguments = self._state = None
        self._first = self._last = 0  # steps traced; 0: not begun
        self._began = 0.0

    def watched(self, train_step: TrainStep) -> TrainStep:
        """The step, whose program is asked for after the trace."""
        if not self._steps:
            return train_step

        def run(*arguments):
            if self._first:  # the shapes alone: the state is donated
                self._train_step, self._arguments = train_step, jax.tree.map(_abstract, arguments)
            return train_step(*arguments)

        return run

    def before(self, done: int, state: TrainState) -> None:
        """Begins the trace when the step after `done` is the first, or a run resumed after it."""
        if self._first or not self._steps or not self._steps[0] - 1 <= done < self._steps[1]:
            return
        jax.block_until_ready(state)  # what was dispatched before does not count
        self._first = done + 1
        jax.profiler.start_trace(self._folder)
        self._began = time.perf_counter()

    def after(self, done: int, state: TrainState) -> None:
        """Ends the trace when `done` is its last step."""
        if not self._first or self._last == self._steps[1]:
            return
        self._last, self._state = done, state
        if done == self._steps[1]:
            self._end()

    def _end(self) -> None:
        jax.block_until_ready(self._state)
        seconds = time.perf_counter() - self._began
        jax.profiler.stop_trace()
        self._state, program = None, ""
        if self._train_step is not None:
            program = self._train_step.lower(*self._arguments).compile().as_text()
        try:
            found = profile.table(self._folder, seconds, (self._first, self._last), program)
        except ValueError as error:  # as where a driver keeps its counters from users
            self._say(f"no table of where time goes: {error}")
            return
        for line in profile.lines(found):
            self._say(line)
        self._say(f"  {self._folder}/where_time_goes.json; the trace is beside it, for xprof")

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if not self._first or self._last == self._steps[1]:
            return
        if self._last and (error is None or issubclass(error, SystemExit)):  # SIGTERM: as saved
            self._end()
        else:
            jax.profiler.stop_trace()


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
