"""Nodes of a profile and the parts of the model that they are counted to."""

from __future__ import annotations

from typing import Any

from bench.profiling import CORE, HEAD, OTHER, PROJECTIONS, SELECTION, by_part

ATTENTION = "model.layers.{}.self_attn"


def node(name: str, operator: str, start: float, end: float) -> dict[str, Any]:
    args = {"op_name": operator}
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": args, "ts": start, "dur": end - start}


def step(start: float) -> list[dict[str, Any]]:
    """A layer with an indexer from 0 to 100, one that follows it from 100 to 200, the head; microseconds."""
    events = [
        node(f"{ATTENTION.format(0)}.q_proj/MatMul", "MatMul", 0, 10),
        node(f"{ATTENTION.format(0)}.indexer.q_proj/MatMul", "MatMul", 21, 30),  # in the If from 20 on
        node("MatMul_1", "MatMul", 30, 40),
        node("TopK_1", "TopK", 40, 50),
        node("GatherND_1", "GatherND", 50, 70),
        node("Where_1", "Where", 70, 80),
        node(f"{ATTENTION.format(0)}/SparseAttention", "If", 20, 90),
        node(f"{ATTENTION.format(0)}.o_proj/MatMul", "MatMul", 90, 100),
        node("GatherND_2", "GatherND", 121, 150),  # in the If from 120 on
        node("Softmax_2", "Softmax", 150, 160),
        node(f"{ATTENTION.format(1)}/SparseAttention", "If", 120, 170),
        node(f"{ATTENTION.format(1)}.o_proj/MatMul", "MatMul", 180, 190),
        node("lm_head/MatMul", "MatMul", 190, 200),
    ]
    events.append({"cat": "Session", "name": "model_run", "ts": 0, "dur": 205})
    return [{**event, "ts": event["ts"] + start} for event in events]


def test_cores_of_layers_without_an_indexer_are_cores() -> None:
    parts = by_part([*step(0), *step(1000)], skip=1)
    expected = {PROJECTIONS: 0.030, SELECTION: 0.029, CORE: 0.030 + 0.039, HEAD: 0.010, OTHER: 0.0}
    assert {part: round(ms, 6) for part, ms in parts.items()} == expected


def test_a_dense_engine_selects_nothing() -> None:
    events = [
        node("Add_1", "Add", 0, 10),
        node(f"{ATTENTION.format(0)}/Attention", "DenseAttention", 10, 30),
        {"cat": "Session", "name": "model_run", "ts": 0, "dur": 40},
    ]
    parts = by_part(events, skip=0)
    assert parts[SELECTION] == 0 and parts[OTHER] == 0.010
