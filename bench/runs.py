"""Running the cases: the gate and the peak memory in processes of their own, the timings in this one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.progress import Progress

from bench import measure, parity
from bench.cases import TEACHER_FORCED, Case, floor_bytes
from dsa_export.cli import progress_bar
from dsa_export.topk import compact_topk
from engines.artifacts import Engine
from engines.session import Runner, Session, open_runner

PREFILL_RUNS = 5
"""At most so many timed prefill calls: each is as long as many decoding steps."""
PEAK_MIB = "most resident memory that the engine added to its process while running: weights, caches, workspace"

Engines = Mapping[str, Engine]
Record = dict[str, Any]


def gate(engines: Engines, prompt: np.ndarray, threads: int) -> parity.Gate:
    """parity.gate() in a process of its own."""
    return measure.in_child(_gate, engines, prompt, threads)


def peak_memory(
    engines: Engines, cases: Sequence[Case], rows: np.ndarray, threads: int
) -> dict[tuple[str, Case], float | None]:
    """PEAK_MIB of every variant and case, each variant in a process of its own. rows: text, [B, context]."""
    return {
        (variant, case): mib
        for variant, engine in engines.items()
        for case, mib in measure.in_child(_peak_memory, engine, cases, rows, threads).items()
    }


def timings(
    engines: Engines,
    cases: Sequence[Case],
    rows: np.ndarray,
    *,
    caches: str,
    runs: int,
    threads: int,
    progress: Progress,
) -> list[Record]:
    """One record per case and variant; dense and sparse are timed in turn, on caches of the same capacity.

    rows: text, [B, context]. caches: "prefill" (computed from the text) or "random".
    """
    runners = open_runners(engines, threads)
    bandwidth = measure.copy_bandwidth(threads)
    task = progress.add_task("timing", total=sum(runs_of(case, runs) for case in cases))
    records = []
    sessions: dict[str, Session] = {}
    for case in cases:
        text = rows[: case.batch]
        if not sessions or sessions["dense"].batch != case.batch:
            sessions = {}  # frees the caches of the last batch
            for variant, runner in runners.items():
                sessions[variant] = Session(runner, case.batch, capacity=case.capacity)
        if sessions["dense"].lengths[0] < case.context:
            compared, fill_seconds = fill(sessions, case, text, caches, progress)
        calls = {variant: call_of(session, case, text) for variant, session in sessions.items()}
        pair = measure.alternate(calls, runs_of(case, runs), lambda: progress.advance(task))
        for variant, engine in engines.items():
            timing = pair.timings[variant]
            records.append(
                {
                    "variant": variant,
                    "backend": engine.backend,
                    "phase": case.phase,
                    "context": case.context,
                    "batch": case.batch,
                    "queries": case.queries,
                    "capacity": sessions[variant].capacity,
                    "k": compact_topk(engine.topk),
                    "dtype": engine.dtype,
                    "caches": caches,
                    "random_indexer": engine.random_indexer,
                    "ms_median": timing.median,
                    "ms_p10": timing.p10,
                    "ms_p90": timing.p90,
                    "runs": timing.runs,
                    "tokens_per_s": case.batch * case.queries / timing.median * 1e3,
                    "speedup": pair.speedup,
                    "speedup_paired": pair.paired,
                    **floors(engines, case, variant, bandwidth, timing.median),
                    "agreement": vars(compared) if compared else None,
                    "fill_seconds": fill_seconds[variant],
                }
            )
    return records


def floors(engines: Engines, case: Case, variant: str, bandwidth: float, ms: float) -> Record:
    """The physical floor of a case: bytes that must be read, at the bandwidth measured in this run."""
    must_read = {name: floor_bytes(engine, case) for name, engine in engines.items()}
    floor_ms = must_read[variant] / bandwidth * 1e3
    return {
        "floor_bytes": must_read[variant],
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / ms,
        "speedup_by_bytes": must_read["dense"] / must_read["sparse"],
        "copy_bandwidth_gb_s": bandwidth / 1e9,
    }


def fill(
    sessions: Mapping[str, Session], case: Case, text: np.ndarray, caches: str, progress: Progress
) -> tuple[parity.Agreement | None, dict[str, float]]:
    """Brings both sessions to case.context tokens. text: [B, >= context].

    Returns the agreement over the last of them (None for random caches) and the seconds that each variant took from
    the previous context to this one.
    """
    seconds = {}
    start = int(sessions["dense"].lengths[0])
    forced = min(TEACHER_FORCED, (case.context - start) // 2) if caches == "prefill" else 0
    stop = case.context - forced
    task = progress.add_task(f"caches of {case.context:,} tokens", total=(stop - start) * len(sessions))
    for variant, session in sessions.items():
        began = time.perf_counter()
        session.prefill_chunk = None
        session.reserve(case.capacity, exact=True)
        if caches == "random":
            session.pretend(case.context)
        else:
            session.prefill(list(text[:, start:stop]), lambda tokens: progress.advance(task, tokens))
        seconds[variant] = time.perf_counter() - began
    progress.remove_task(task)
    return parity.agreement(sessions, text[:, stop : case.context]), seconds


def call_of(session: Session, case: Case, text: np.ndarray) -> Callable[[], Any]:
    """The timed call of a case: it overwrites the last case.queries tokens of the context, so it can be repeated."""
    start = case.context - case.queries

    def call() -> None:
        session.truncate(start)
        session.prefill_chunk = case.queries
        if case.phase == "decode":
            session.decode(text[:, start])
        else:
            session.prefill(list(text[:, start : case.context]))

    return call


def runs_of(case: Case, runs: int) -> int:
    return runs if case.phase == "decode" else min(runs, PREFILL_RUNS)


def open_runners(engines: Engines, threads: int) -> dict[str, Runner]:
    """The engines were verified when they were opened; they are not hashed again."""
    return {variant: open_runner(engine.folder, threads=threads, verify=False) for variant, engine in engines.items()}


def _gate(engines: Engines, prompt: np.ndarray, threads: int) -> parity.Gate:
    return parity.gate(open_runners(engines, threads), prompt)


def _peak_memory(engine: Engine, cases: Sequence[Case], rows: np.ndarray, threads: int) -> dict[Case, float | None]:
    """In the order of growing need: ONNX Runtime keeps the workspace of earlier calls."""
    peaks = {}
    memory = measure.PeakMemory()
    runner = open_runner(engine.folder, threads=threads, verify=False)
    ordered = sorted(cases, key=lambda case: (case.queries > 1, case.batch * case.context))
    with progress_bar() as progress:
        for case in progress.track(ordered, description=f"memory, {engine.variant}"):
            memory.reset()
            session = Session(runner, case.batch, capacity=case.capacity)
            session.pretend(case.context)
            call = call_of(session, case, rows[: case.batch])
            for _ in range(measure.WARM_UP):
                call()
            peaks[case] = memory.mib()
            del session, call
    return peaks
