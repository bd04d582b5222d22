"""Where a decoding step spends its time: ONNX Runtime's profiler, its nodes grouped into parts of the model."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bench import measure
from bench.matrix import Case, core_of
from bench.runs import call_of
from engines.artifacts import Engine
from engines.session import Session, open_runner

PROJECTIONS, CORE, SELECTION, HEAD, OTHER = PARTS = (
    "projections, MLP", "attention core", "indexer, selection", "head", "other",
)  # fmt: skip
STEPS = 8

ATTENTION_OPERATORS = ("Attention", "GroupQueryAttention", "SparseAttention", "DenseAttention")
CHOOSING_OPERATORS = ("TopK", "IndexTopK")
CONTROL_FLOW = ("If", "Loop", "Scan")


@measure.alone
def profile(engine: Engine, context: int, threads: int) -> dict[str, Any]:
    """Milliseconds of the parts of one decoding step at `context` tokens (random caches), in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        runner: Any = open_runner(engine.folder, threads=threads, verify=False, profile=Path(scratch) / "profile")
        session = Session(runner, 1, capacity=context)
        session.pretend(context)
        case = Case("decode", 1, context, session.capacity, 1)
        call = call_of(session, case, np.zeros((1, context), np.int64))
        for _ in range(measure.WARM_UP + STEPS):
            call()
        events = json.loads(Path(runner.session.end_profiling()).read_text())
    return {
        "kind": "profile",
        "variant": engine.variant,
        "core": core_of(engine),
        "precision": engine.precision,
        "context": context,
        "ms": by_part(events, skip=measure.WARM_UP),
    }


def by_part(events: Iterable[dict[str, Any]], skip: int) -> dict[str, float]:
    """Median milliseconds of every part over the runs in a profile, the first `skip` runs left out.

    ONNX Runtime inlines the bodies of our operators and forgets where their nodes came from. Nodes run in the order of
    the graph: within a layer, what runs without a module's name belongs to the selection up to its TopK (its If, where
    everything is selected and nothing scored), and to the sparse core behind it. Our CPU kernels are nodes themselves.
    In an engine that has an If in the core's place, which layers without an indexer have too, a layer's nodes are those
    that run while it does.
    """
    runs: list[dict[str, float]] = []
    pending: dict[str, float] = defaultdict(float)
    events = list(events)
    operators = {event.get("args", {}).get("op_name") for event in events}
    last_of_selection = next((operator for operator in (*CHOOSING_OPERATORS, "If") if operator in operators), None)
    before = SELECTION if last_of_selection else OTHER
    inlined = before
    cores = _spans_of_cores(events)
    for event in sorted(events, key=_end):
        if event.get("cat") == "Session" and event.get("name") == "model_run":
            runs.append(dict(pending))
            pending = defaultdict(float)
        elif _is_node(event):
            operator = event["args"]["op_name"]
            part = part_of(event["name"].removesuffix("_kernel_time"), operator) or inlined
            behind_the_choice = any(start < _end(event) <= end for start, end in cores)
            if part == SELECTION and operator not in CHOOSING_OPERATORS and behind_the_choice:
                part = CORE
            if operator == last_of_selection:
                inlined = CORE
            elif ".o_proj" in event["name"]:
                inlined = before
            if operator not in CONTROL_FLOW:  # its inner nodes have events of their own
                pending[part] += event["dur"] / 1e3
    kept = runs[skip:]
    return {part: median(run.get(part, 0.0) for run in kept) for part in PARTS}


def _end(event: dict[str, Any]) -> float:
    return event.get("ts", 0) + event.get("dur", 0)


def _is_node(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Node" and event.get("name", "").endswith("_kernel_time")


def _spans_of_cores(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """(start, end) of the core in every If that stands in its place: what follows the last choice in it, or all."""
    nodes = [event for event in events if _is_node(event)]
    chosen = sorted(_end(event) for event in nodes if event["args"]["op_name"] in CHOOSING_OPERATORS)
    spans = []
    for event in nodes:
        if event["args"]["op_name"] == "If" and "SparseAttention" in event["name"]:
            start, end = event["ts"], _end(event)
            inside = chosen[bisect_right(chosen, start) : bisect_right(chosen, end)]
            spans.append((inside[-1] if inside else start, end))
    return spans


def part_of(node: str, operator: str) -> str | None:
    """The part that a node belongs to; None for a node of an inlined body.

    node: its name, which tells the module that it was exported from: "model.layers.0.self_attn.indexer.q_proj/MatMul".
    """
    module = node.partition("/")[0]
    if operator in (*CHOOSING_OPERATORS, "RoundKeys", "RoundQueries") or ".indexer" in module or "IndexTopK" in node:
        return SELECTION
    if operator in ATTENTION_OPERATORS or "SparseAttention" in node:
        return CORE
    if "." not in module:  # "MatMul_235", "/MatmulTransposeFusion/"
        return HEAD if module == "lm_head" else None
    if module.endswith("_proj") or ".mlp" in module:
        return PROJECTIONS
    return OTHER
