"""ONNX Runtime: the graph and its weights in a folder of their own, and what else makes it fast on CPUs."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass, replace
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


def build_ort(export: Export, limits: Limits, args: argparse.Namespace) -> None:
    from engines.ort import check_types, runs_on_gpu

    runtime_version("ort")
    for_cpu = not runs_on_gpu()
    for option in ("--dense-slots", "--standard-operators", "--kv-cache"):
        if not for_cpu and getattr(args, option[2:].replace("-", "_")):
            raise UserError(f"{option} is for CPUs, and ONNX Runtime would use the GPU here: leave it out")
    for variant in args.variant:  # all are checked before the first is written
        check_types(export.graphs[variant])
    adapted: Adapted | None = None
    if "sparse" in args.variant and for_cpu:
        adapted = sparse_for_cpus(export.graphs["sparse"], args)
    with_kernels = [variant for variant in args.variant if uses_kernels("ort", export.graphs[variant], args)]
    compiled = compiled_kernels() if with_kernels else None
    halved = [v for v in with_kernels if any(tensor.name in HALVED for tensor in export.graphs[v].cache)]
    if args.kv_cache and len(halved) < len(args.variant):
        raise UserError("--kv-cache fp16 is of keys and values and read by this project's kernels alone, which this "
                        "graph, or processor, or --standard-operators, leaves out: build without it")  # fmt: skip
    for variant in args.variant:
        graph = export.graphs[variant]
        library = compiled if variant in with_kernels else None
        with output_folder(args.out / "ort" / variant) as folder:
            if variant == "dense" or adapted is None:
                link_or_copy(graph.path, folder / "model.onnx")
                write_ort_engine(folder, graph, export, limits, graph.sha256)
            else:
                onnx.save(adapted.model, folder / "model.onnx")
                write_ort_engine(folder, adapted.graph, export, limits, None, library, **adapted.facts)
        report(args.out / "ort" / variant)
        if variant == "sparse":
            continue
        others: dict[str, tuple[str, onnx.ModelProto, Path | None]] = {}
        if for_cpu and (grouped := group_query(graph)) is not None:
            others[WITH_GQA] = GQA, grouped, None
        if library is not None:
            own = onnx.load(graph.path, load_external_data=False)
            if with_cpu_kernels(own):
                others[WITH_KERNELS] = OWN_ATTENTION, own, library
        for name in {WITH_GQA, WITH_KERNELS} - others.keys():  # an earlier build's, of other options
            if manifest_kind(args.out / "ort" / name) == "engine":
                shutil.rmtree(args.out / "ort" / name)
        for name, (operator, model, its_library) in others.items():
            with output_folder(args.out / "ort" / name) as folder:
                its_graph = keep_caches(model, graph, args) if its_library else graph
                onnx.save(model, folder / "model.onnx")
                write_ort_engine(folder, its_graph, export, limits, None, its_library, attention_operator=operator)
            report(args.out / "ort" / name)


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


@dataclass(frozen=True)
class Adapted:
    """A graph as CPUs run it fastest: the model, what the manifest is to say of it, and facts beside."""

    model: onnx.ModelProto
    graph: Graph
    facts: dict[str, Any]


def sparse_for_cpus(graph: Graph, args: argparse.Namespace) -> Adapted | None:
    """The sparse graph as CPUs run it fastest; None: as exported."""
    attends_densely = graph.can_attend_densely
    if attends_densely:
        model = dense_while_short(graph, args.dense_slots or min(graph.topk))
    else:
        model = onnx.load(graph.path, load_external_data=False)
    takes_kernels = uses_kernels("ort", graph, args) and with_cpu_kernels(model)
    if not (attends_densely or takes_kernels):
        return None
    graph = keep_caches(model, graph, args)
    facts: dict[str, Any] = {"standard_operators": True} if args.standard_operators else {}
    return Adapted(model, graph, facts | (dense_slots_facts(graph, args.dense_slots) if attends_densely else {}))


def compiled_kernels() -> Path:
    """The library of our CPU kernels. Raises UserError if it cannot be built."""
    try:
        with console.status("g++ compiles the kernels…"):
            return cpu.build()
    except BuildFailed as error:
        raise UserError(f"the kernels were not compiled: {error}; --standard-operators does without") from None


def write_ort_engine(
    folder: Path,
    graph: Graph,
    export: Export,
    limits: Limits,
    graph_sha256: str | None,
    library: Path | None = None,
    **facts: Any,
) -> None:
    """Completes a folder that holds model.onnx, and runs it once. graph_sha256: None is computed.

    library: of the custom operators in model.onnx.
    """
    link_or_copy(graph.path.parent / graph.weights, folder / graph.weights)
    files = {"model.onnx": graph_sha256, graph.weights: graph.weights_sha256}
    if library is not None:
        shutil.copyfile(library, folder / cpu.LIBRARY)
        files[cpu.LIBRARY] = None
    write_engine_manifest(folder, "ort", graph, export, limits, files, cpu=cpu_name(), **facts)
    check_engine(folder)
