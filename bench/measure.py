"""Measuring: alternating timings, memory in a process of its own, the machine's copy bandwidth."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dsa_export.cli import UserError
from engines.build import cpu_name

WARM_UP = 2
COPY_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls."""

    median: float
    p10: float
    p90: float
    runs: int


@dataclass(frozen=True)
class Pair:
    """Dense and sparse, timed in turn. speedup: ratio of the medians; paired: median of the ratios of neighbours."""

    timings: Mapping[str, Timing]
    speedup: float
    paired: float


def alternate(
    calls: Mapping[str, Callable[[], Any]], runs: int, on_run: Callable[[], None], seconds: float = 1.0
) -> Pair:
    """Times calls["dense"] and calls["sparse"] in turn, each going first every second time.

    Makes `runs` pairs, and up to ten times as many while they take less than `seconds` together.
    """
    for _ in range(WARM_UP):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {variant: [] for variant in calls}
    start = time.perf_counter()
    for number in range(10 * runs):
        if number >= runs and time.perf_counter() - start > seconds:
            break
        for variant in list(calls)[:: 1 if number % 2 else -1]:
            times[variant].append(timed(calls[variant]))
        if number < runs:
            on_run()
    ms = {variant: np.array(values) * 1e3 for variant, values in times.items()}
    timings = {variant: _timing(values) for variant, values in ms.items()}
    return Pair(
        timings,
        speedup=timings["dense"].median / timings["sparse"].median,
        paired=float(np.median(ms["dense"] / ms["sparse"])),
    )


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def copy_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads copy, read and written bytes counted: the median of 7 tries."""
    parts = [(np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy_all() -> None:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

        copy_all()
        seconds = float(np.median([timed(copy_all) for _ in range(7)]))
    return 2 * COPY_BYTES * threads / seconds


class PeakMemory:
    """Resident memory that this process gained at most since it was created, in MiB. Linux only: elsewhere None."""

    STATUS = Path("/proc/self/status")

    def __init__(self) -> None:
        self.before = self._kib("VmRSS")

    def reset(self) -> None:
        """Forgets the highest mark so far."""
        if self.STATUS.is_file():
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float | None:
        peak = self._kib("VmHWM")
        return None if peak is None or self.before is None else (peak - self.before) / 1024

    def _kib(self, field: str) -> float | None:
        if not self.STATUS.is_file():
            return None
        line = next(line for line in self.STATUS.read_text().splitlines() if line.startswith(field))
        return float(line.split()[1])


def in_child(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args) in a forked process, so that its memory is its own. UserErrors are passed on."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        kind, value = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"the measuring process ended with exit code {process.exitcode} (out of memory?): try a shorter --context"
        ) from None
    except BaseException:
        process.terminate()
        raise
    finally:
        process.join()
    if kind == "error":
        raise UserError(value)
    return value


def _answer(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        sender.send(("value", function(*args)))
    except UserError as error:
        sender.send(("error", str(error)))
    except KeyboardInterrupt:
        os._exit(130)  # the parent got the signal too and reports it


def _timing(ms: np.ndarray) -> Timing:
    p10, median, p90 = (float(value) for value in np.percentile(ms, (10, 50, 90)))
    return Timing(median, p10, p90, len(ms))


def machine(threads: int) -> Mapping[str, Any]:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": cpu_name(), "threads": threads, "memory_gib": round(memory, 1)}
