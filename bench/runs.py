"""Measuring one group of engines: gate, peak memory and timings, each in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.progress import Progress

from bench import floors, measure, parity
from bench.matrix import MARGIN_BYTES, Case, Group, core_of, host_bytes
from dsa_export.cli import progress_bar
from dsa_export.memory import PeakMemory
from engines.artifacts import Engine
from engines.memory import OutOfMemory
from engines.session import Runner, Session, open_runner

PREFILL_RUNS = 5
"""At most so many timed prefill calls: each is as long as many decoding steps."""
PEAK_MIB = "most memory that the engine added to its process, or on a GPU there: weights, caches, workspace"

Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """caches: "prefill" (computed from the text) or "random". scored: teacher-forced tokens per context."""

    caches: str
    budget: measure.Budget
    threads: int
    scored: int


@measure.alone
def gates(group: Group, prompt: np.ndarray, threads: int) -> dict[str, parity.Gate]:
    """parity.gates() of the group's engines."""
    *dense, (_, sparse) = open_runners(group.sides, threads).items()
    return parity.gates(dict(dense), sparse, prompt)


@measure.alone
def free_bytes(backend: str) -> int:
    """Bytes that engines of the backend may use: of the GPU's memory where they run on one, else of this machine's."""
    if not floors.runs_on_gpu(backend):
        return host_bytes()
    import torch

    return torch.cuda.mem_get_info()[0] - MARGIN_BYTES


@measure.alone
def timings(group: Group, cases: Sequence[Case], rows: np.ndarray, settings: Settings) -> list[Record]:
    """One record per case and side, sides timed in turn on caches of the same capacity. rows: [B, > context].

    A case for which there is no memory gives one record of kind "skipped".
    """
    types = group.sparse.dtype, group.sparse.precision
    rates = floors.rates(group.backend, *types, settings.threads)  # takes memory that engines will need
    runners = open_runners(group.sides, settings.threads)
    records: list[Record] = []
    sessions: dict[str, Session] = {}
    filled: Filled | None = None
    with progress_bar() as progress:
        task = progress.add_task(f"timing {group.name}", total=sum(rounds(case, settings) for case in cases))
        for case in cases:
            text = rows[: case.batch]
            try:
                if not sessions or next(iter(sessions.values())).batch != case.batch:
                    sessions, filled = {}, None  # frees the caches of the last batch
                    sessions = {
                        name: Session(runner, case.batch, capacity=case.capacity) for name, runner in runners.items()
                    }
                    if settings.caches == "prefill":
                        warm_up(sessions, text[:, : case.context])
                if filled is None or filled.context < case.context:
                    filled = fill(sessions, case, text, settings, filled, progress)
                calls = {name: call_of(session, case, text) for name, session in sessions.items()}
                budget = measure.Budget(rounds(case, settings), settings.budget.at_least, settings.budget.at_most)
                with measure.contention() as contention:
                    times = measure.alternate(calls, budget, lambda: progress.advance(task))
            except OutOfMemory as error:
                sessions, filled = {}, None
                where = {"phase": case.phase, "batch": case.batch, "context": case.context}
                records.append({"kind": "skipped", **group.facts(), **where, "reason": str(error)})
                continue
            capacity = next(iter(sessions.values())).capacity
            found = _records(group, case, times, filled, rates, settings, capacity)
            records += [record | {"contention": contention.share} for record in found]
    return records


def _records(
    group: Group,
    case: Case,
    times: Mapping[str, np.ndarray],
    filled: Filled,
    rates: floors.Rates,
    settings: Settings,
    capacity: int,
) -> list[Record]:
    """The sides of one case. The strongest dense side, which sparse is compared with, has the smallest median."""
    timing = {name: measure.Timing.of(ms) for name, ms in times.items()}
    *dense, sparse = timing
    strongest = min(dense, key=lambda name: timing[name].median)
    floor = {name: floors.floor(engine, case, rates) for name, engine in group.sides.items()}
    scored = filled.score
    return [
        {
            "kind": "timing",
            **group.facts(),
            "on_gpu": floors.runs_on_gpu(group.backend),
            "variant": engine.variant,
            "core": name,
            "strongest": name in (strongest, sparse),
            "phase": case.phase,
            "context": case.context,
            "batch": case.batch,
            "queries": case.queries,
            "capacity": capacity,
            "caches": settings.caches,
            "random_indexer": engine.random_indexer,
            "ms_median": timing[name].median,
            "ms_p10": timing[name].p10,
            "ms_p90": timing[name].p90,
            "runs": timing[name].runs,
            "tokens_per_s": case.batch * case.queries / timing[name].median * 1e3,
            "speedup": timing[strongest].median / timing[name].median,
            "speedup_paired": float(np.median(times[strongest] / times[name])),
            **floors.facts(floor[name], floor[strongest], timing[name].median),
            "rates": asdict(rates),
            "ttft_s": filled.seconds[name] if settings.caches == "prefill" else None,
            "loss": scored.loss[name] if scored else None,
            "agreement": asdict(scored.agreement[strongest if name == sparse else name]) if scored else None,
            "engine": str(engine.folder),
            "source": engine.manifest["source"],
        }
        for name, engine in group.sides.items()
    ]


@dataclass(frozen=True)
class Filled:
    """Caches of `context` tokens: what the sides say there, and the seconds that each took from an empty cache."""

    context: int
    seconds: Mapping[str, float]
    score: parity.Score | None


def fill(
    sessions: Mapping[str, Session],
    case: Case,
    text: np.ndarray,
    settings: Settings,
    before: Filled | None,
    progress: Progress,
) -> Filled:
    """Brings all sessions from the context before to case.context tokens. text: [B, > context].

    It begins anew where the sparse engine begins to select: what it keeps of shorter contexts attended to everything,
    which is not what it would compute for the whole text.
    """
    sparse = list(sessions.values())[-1]
    if before and sparse.capacity < sparse.engine.selecting_slots <= case.capacity:
        before = None
        for session in sessions.values():
            session.truncate(0)
    start = before.context if before else 0
    seconds = dict(before.seconds) if before else dict.fromkeys(sessions, 0.0)
    task = progress.add_task(f"caches of {case.context:,} tokens", total=(case.context - start) * len(sessions))
    for name, session in sessions.items():
        session.reserve(case.capacity, exact=True)
        began = time.perf_counter()
        if settings.caches == "random":
            session.pretend(case.context)
        else:
            session.prefill(list(text[:, start : case.context]), lambda tokens: progress.advance(task, tokens))
        seconds[name] += time.perf_counter() - began
    progress.remove_task(task)
    scored = min(settings.scored, case.context // 2) if settings.caches == "prefill" else 0
    for session in sessions.values():
        session.truncate(case.context - scored)
    result = parity.score(sessions, text[:, case.context - scored : case.context + 1])
    return Filled(case.context, seconds, result)


def warm_up(sessions: Mapping[str, Session], text: np.ndarray) -> None:
    """One call of each, so that no first token is timed on an engine's very first call. text: [B, >= 1]."""
    for session in sessions.values():
        session.prefill(list(text[:, : session.chunk_tokens()]))
        session.truncate(0)


def call_of(session: Session, case: Case, text: np.ndarray) -> Callable[[], Any]:
    """The timed call of a case: it overwrites the last case.queries tokens of the context, so it can be repeated."""
    start = case.context - case.queries

    def call() -> None:
        session.truncate(start)
        if case.phase == "decode":
            session.decode(text[:, start])
        else:
            session.prefill(list(text[:, start : case.context]), chunk=case.queries)

    return call


def rounds(case: Case, settings: Settings) -> int:
    return settings.budget.runs if case.phase == "decode" else min(settings.budget.runs, PREFILL_RUNS)


def open_runners(sides: Mapping[str, Engine], threads: int) -> dict[str, Runner]:
    """The engines were verified when they were opened; they are not hashed again."""
    return {name: open_runner(engine.folder, threads=threads, verify=False) for name, engine in sides.items()}


@measure.alone
def peak_memory(engine: Engine, cases: Sequence[Case], rows: np.ndarray, threads: int) -> dict[Case, float | None]:
    """PEAK_MIB of every case. rows: text, [B, > context].

    In the order of growing need: ONNX Runtime keeps the workspace of earlier calls.
    """
    peaks = {}
    memory = PeakMemory(outside_torch=engine.backend != "torch" and floors.runs_on_gpu(engine.backend))
    runner = open_runner(engine.folder, threads=threads, verify=False)
    ordered = sorted(cases, key=lambda case: (case.queries > 1, case.batch * case.context))
    with progress_bar() as progress:
        for case in progress.track(ordered, description=f"memory of {core_of(engine)}"):
            memory.reset()
            session = Session(runner, case.batch, capacity=case.capacity)
            session.pretend(case.context)
            call = call_of(session, case, rows[: case.batch])
            for _ in range(measure.WARM_UP):
                call()
            peaks[case] = memory.mib()
            del session, call
    return peaks
