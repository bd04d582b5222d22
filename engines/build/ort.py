"""ONNX Runtime: the graph and its weights in a folder of their own, and what else makes it fast on CPUs."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx

from dsa_export.cli import UserError, console, cpu_name
from dsa_export.files import link_or_copy, manifest_kind, output_folder
from engines.artifacts import GQA, OWN_ATTENTION, Export, Graph, Limits, runtime_version
from engines.build.folder import check_engine, dense_slots_facts, report, write_engine_manifest
from engines.ort_graph import (
    HALVED,
    dense_while_short,
    fits_cpu_kernels,
    group_query,
    with_cpu_kernels,
    with_half_caches,
)
from plugins import cpu
from plugins.cxx import BuildFailed

WITH_GQA, WITH_KERNELS = "dense-gqa", "dense-kernels"
"""Folders of the dense engines whose attention is ONNX Runtime's other operator, and ours."""


@dataclass(frozen=True)
class Planned:
    """An engine to be written. model: None as exported; library: of its custom operators; facts: for its manifest."""

    name: str
    graph: Graph
    model: onnx.ModelProto | None = None
    library: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def build_ort(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.ort import check_types, runs_on_gpu

    runtime_version("ort")
    for_cpu = not runs_on_gpu()
    for option in ("--dense-slots", "--standard-operators", "--kv-cache"):
        if not for_cpu and getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{option} is for CPUs, and ONNX Runtime would use the GPU here: leave it out")
    graphs = [export.graphs[variant] for variant in args.variant]
    for graph in graphs:  # all are checked before the first is written
        check_types(graph)
    with_kernels = [graph for graph in graphs if uses_kernels("ort", graph, args)]
    compiled = compiled_kernels() if with_kernels else None
    halved = [graph for graph in with_kernels if any(tensor.name in HALVED for tensor in graph.cache)]
    if args.kv_cache and len(halved) < len(graphs):
        raise UserError("--kv-cache fp16 is of keys and values and read by this project's kernels alone, which this "
                        "graph, or processor, or --standard-operators, leaves out: build without it")  # fmt: skip
    planned: list[Planned] = []
    for graph in graphs:
        library = compiled if graph in with_kernels else None
        if not for_cpu:
            planned.append(Planned(graph.variant, graph))
        elif graph.variant == "sparse":
            planned.append(sparse_for_cpus(graph, library, args))
        else:
            planned += dense_for_cpus(graph, library, args)
    if "dense" in args.variant:
        remove_stale(args.out / "ort", {WITH_GQA, WITH_KERNELS} - {engine.name for engine in planned})
    for engine in planned:
        write_ort_engine(engine, export, limits, args.out / "ort" / engine.name)


def remove_stale(folder: Path, names: Iterable[str]) -> None:
    """Removes what an earlier build, of other options, has left of engines."""
    for name in names:
        if manifest_kind(folder / name) == "engine":
            shutil.rmtree(folder / name)


def keep_caches(model: onnx.ModelProto, graph: Graph, args: argparse.Namespace) -> Graph:
    """Gives the model the caches that were asked for; returns what its manifest is to say."""
    if args.kv_cache:
        with_half_caches(model)
    return as_cached(graph, args)


def as_cached(graph: Graph, args: argparse.Namespace) -> Graph:
    """The graph as an engine with our kernels caches its keys and values."""
    if not args.kv_cache:
        return graph
    halved = (replace(tensor, dtype="float16") if tensor.name in HALVED else tensor for tensor in graph.cache)
    return replace(graph, cache=tuple(halved), selection=graph.selection | {"kv_cache": args.kv_cache})


def uses_kernels(backend: str, graph: Graph, args: argparse.Namespace) -> bool:
    """Whether our CPU kernels are to select and attend."""
    from engines.ort import runs_on_gpu

    wanted = backend == "ort" and not args.standard_operators
    return wanted and cpu.fast_here() and fits_cpu_kernels(graph) and not runs_on_gpu()


def dense_for_cpus(graph: Graph, library: Path | None, args: argparse.Namespace) -> list[Planned]:
    """The dense graph as exported, and with the other operators that attend, where they fit."""
    planned = [Planned("dense", graph)]
    if (grouped := group_query(graph)) is not None:
        planned.append(Planned(WITH_GQA, graph, grouped, facts={"attention_operator": GQA}))
    if library is not None:
        own = onnx.load(graph.path, load_external_data=False)
        if with_cpu_kernels(own):
            kept = keep_caches(own, graph, args)
            planned.append(Planned(WITH_KERNELS, kept, own, library, {"attention_operator": OWN_ATTENTION}))
    return planned


def sparse_for_cpus(graph: Graph, library: Path | None, args: argparse.Namespace) -> Planned:
    """The sparse graph as CPUs run it fastest."""
    if graph.can_attend_densely:
        model = dense_while_short(graph, args.dense_slots or min(graph.topk))
    else:
        model = onnx.load(graph.path, load_external_data=False)
    takes_kernels = library is not None and with_cpu_kernels(model)
    if not (graph.can_attend_densely or takes_kernels):
        return Planned("sparse", graph)
    kept = keep_caches(model, graph, args)
    facts: dict[str, Any] = {"standard_operators": True} if args.standard_operators else {}
    facts |= dense_slots_facts(kept, args.dense_slots) if graph.can_attend_densely else {}
    return Planned("sparse", kept, model, library, facts)


def compiled_kernels() -> Path:
    """The library of our CPU kernels. Raises UserError if it cannot be built."""
    try:
        with console.status("g++ compiles the kernels…"):
            return cpu.build()
    except BuildFailed as error:
        raise UserError(f"the kernels were not compiled: {error}; --standard-operators does without") from None


def write_ort_engine(engine: Planned, export: Export, limits: Limits, out: Path) -> None:
    """Writes an engine's folder, and runs it once."""
    graph = engine.graph
    files: dict[str, str | None] = {"model.onnx": None, graph.weights: graph.weights_sha256}
    with output_folder(out) as folder:
        if engine.model is None:
            link_or_copy(graph.path, folder / "model.onnx")
            files["model.onnx"] = graph.sha256
        else:
            onnx.save(engine.model, folder / "model.onnx")
        link_or_copy(graph.path.parent / graph.weights, folder / graph.weights)
        if engine.library is not None:
            shutil.copyfile(engine.library, folder / cpu.LIBRARY)
            files[cpu.LIBRARY] = None
        write_engine_manifest(folder, "ort", graph, export, limits, files, cpu=cpu_name(), **engine.facts)
        check_engine(folder)
    report(out)
