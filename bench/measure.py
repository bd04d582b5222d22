"""Measuring: alternating timings, and memory in a process of its own."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, wraps
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from dsa_export.cli import UserError, cpu_name, user_message

P = ParamSpec("P")
R = TypeVar("R")

WARM_UP = 2
TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls."""

    median: float
    p10: float
    p90: float
    runs: int

    @classmethod
    def of(cls, ms: np.ndarray) -> Timing:
        p10, median, p90 = (float(value) for value in np.percentile(ms, (10, 50, 90)))
        return cls(median, p10, p90, len(ms))


@dataclass(frozen=True)
class Budget:
    """How often a case is timed: `runs` times; up to ten times as often while that takes less than `at_least` seconds;
    less often, but MIN_RUNS times, once `at_most` seconds are spent."""

    runs: int
    at_least: float = 1.0
    at_most: float = float("inf")


MIN_RUNS = 3


def alternate(
    calls: Mapping[str, Callable[[], Any]], budget: Budget, on_run: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Times the calls in turn, in reverse order every second time. Returns milliseconds [runs] of each.

    Entry i of every array belongs to the same round: ratios of such neighbours do not see slow drifts of the machine.
    """
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for number in range(10 * budget.runs):
        spent = time.perf_counter() - start
        enough = spent > budget.at_least if number >= budget.runs else spent > budget.at_most
        if number >= min(MIN_RUNS, budget.runs) and enough:
            break
        for name in list(calls)[:: 1 if number % 2 else -1]:
            times[name].append(timed(calls[name]))
        if number < budget.runs:
            on_run()
    return {name: np.array(values) * 1e3 for name, values in times.items()}


@dataclass
class Contention:
    """What other programs took meanwhile: of the time in which this process's threads wanted a processor, the share in
    which they had none. It lengthens long calls more than short ones. None where the system does not tell."""

    share: float | None = None


@contextmanager
def contention() -> Iterator[Contention]:
    """Sets the share at the end of the context."""
    found = Contention()
    waited, used = _waited(), time.process_time()
    yield found
    if waited is not None and (still := _waited()) is not None:
        waited, used = still - waited, time.process_time() - used
        found.share = waited / (waited + used) if waited + used > 0 else 0.0


def _waited() -> float | None:
    """Seconds that the threads of this process have waited for a processor; None where there is no schedstat."""
    waited = []
    for file in TASKS.glob("*/schedstat"):
        with suppress(OSError):  # the thread has ended
            waited.append(int(file.read_text().split()[1]))
    return sum(waited) / 1e9 if waited else None


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class ChildDied(UserError):
    """A measuring process ended by a bug, or was killed."""


def in_child(function: Callable[..., Any], *args: Any, method: str = "fork") -> Any:
    """function(*args) in a process of its own, so that its memory is its own. A user's errors are passed on.

    For the main thread. Raises ChildDied where the process ended without a result.
    method: "fork", or "spawn" for what computes in torch, whose threads do not survive a fork.
    """
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args, method == "fork"))
    # Ctrl-C waits until it can be answered: what libraries have registered to run at a fork would swallow it. (Another
    # thread would take a signal that this one blocks, and Python then has this one answer it all the same.)
    held: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:  # as of a background job
        signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        if held:
            raise KeyboardInterrupt
        sender.close()
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        killed = (process.exitcode or 0) < 0
        hint = " (out of memory?): try fewer tokens" if killed else ": its error stands above"
        raise ChildDied(f"the measuring process ended with exit code {process.exitcode}{hint}") from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if kind == "error":
        raise UserError(value)
    return value


def alone(function: Callable[P, R]) -> Callable[P, R]:
    """A function that is always called in a process of its own, as by in_child()."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        return in_child(partial(function, *args, **kwargs))

    return call


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...], is_forked: bool) -> None:
    if is_forked:  # a runtime's session among the parent's garbage would wait for threads that a fork does not copy
        gc.freeze()
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sender.send(("value", function(*args)))
    except KeyboardInterrupt:
        os._exit(130)  # the parent got the signal too and reports it
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        sender.send(("error", message))


def machine(threads: int) -> Mapping[str, Any]:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu_name(), "threads": threads, "memory_gib": round(memory, 1)}
