"""What both of NVIDIA's products are built from: which plans there are, and the graph in its parser's form."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsa_export.files import link_or_copy
from engines import nvidia_graph
from engines.artifacts import Export, Graph, Limits
from engines.profiles import Profile, as_json, profiles


def buildable(export: Export, variants: Sequence[str]) -> list[Graph]:
    """The graphs of these variants. Raises UserError, before time is spent on one, if another cannot be built."""
    graphs = [export.graphs[variant] for variant in variants]
    for graph in graphs:
        nvidia_graph.check_caches(graph)
    return graphs


def plans_of(graph: Graph, limits: Limits, args: argparse.Namespace) -> dict[str, list[Profile]]:
    """Plan file -> the profiles in it."""
    shapes = profiles(graph, limits)
    return {"engine.plan": shapes} if args.plans == "one" else {f"{one.name}.plan": [one] for one in shapes}


def profile_table(plans: Mapping[str, Sequence[Profile]]) -> list[dict[str, Any]]:
    """The manifest's list: name, plan file, number within the plan, shapes."""
    return [as_json(profile, file, number) for file, group in plans.items() for number, profile in enumerate(group)]


@contextmanager
def adapted_graph(graph: Graph, limits: Limits, folder: Path) -> Iterator[Path]:
    """The graph as NVIDIA's parser wants it, with its weights beside it, for as long as the build needs it."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="onnx-") as scratch:
        path = Path(scratch) / "model.onnx"
        nvidia_graph.write(graph, limits.max_context, path)
        link_or_copy(graph.path.parent / graph.weights, path.parent / graph.weights)
        yield path
