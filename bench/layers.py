"""compare.py --debug-layers: where do the dense and the sparse graph part? Polygraphy runs both, layer by layer.

Tensors are matched by the node that makes them, whose name tells its module. Up to k tokens all of them must agree;
beyond, the attention core of the first layer is the first that may differ.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from bench.parity import allowance
from dsa_export.cli import UserError
from dsa_export.files import link_or_copy
from engines.artifacts import Engine
from engines.ort import load

CORES = ("Attention", "GroupQueryAttention", "SparseAttention", "If")
"""If stands for SparseAttention where short caches are attended to densely (engines.ort_graph)."""


@dataclass(frozen=True)
class Difference:
    tensor: str
    error: float  # largest absolute difference
    allowed: float
    agrees: bool


def compare_layers(dense: Engine, sparse: Engine, tokens: np.ndarray) -> list[Difference]:
    """Every tensor that both graphs compute, in the order of the dense graph, for one call on tokens [n].

    Raises UserError if Polygraphy is missing, or an engine is no ONNX graph.
    """
    try:
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.comparator import Comparator, CompareFunc
        from polygraphy.logger import G_LOGGER
    except ImportError:
        raise UserError("--debug-layers needs Polygraphy: pip install polygraphy") from None
    graphs = {}
    for engine in (dense, sparse):
        path = engine.folder / "model.onnx"
        if engine.backend != "ort" or not path.is_file():
            raise UserError(f"--debug-layers compares ONNX graphs: {engine.folder} is an engine of {engine.backend}")
        graphs[engine.variant] = onnx.load(path, load_external_data=False)
    names = {variant: name_tensors(graph) for variant, graph in graphs.items()}
    shared = [name for name in names["dense"] if name in set(names["sparse"])]
    with tempfile.TemporaryDirectory(dir=dense.folder.parent, prefix=".layers-") as scratch:
        runners, feeds = [], {}
        for engine in (dense, sparse):
            folder = Path(scratch) / engine.variant
            folder.mkdir()
            mark(graphs[engine.variant], shared)
            onnx.save(graphs[engine.variant], folder / "model.onnx")
            for name in engine.manifest["files"]:
                if name != "model.onnx":
                    link_or_copy(engine.folder / name, folder / name)
            session = partial(load, folder / "model.onnx", library=engine.cpu_library)
            runners.append(OnnxrtRunner(session, name=engine.variant))
            feeds[engine.variant] = feed(engine, tokens)
        onnxruntime.set_default_logger_severity(3)  # without bound buffers every cache update warns of a copy
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
            results = Comparator.run(runners[:1], data_loader=[feeds["dense"]])
            results.extend(Comparator.run(runners[1:], data_loader=[feeds["sparse"]]))
            allowed = {name: allowance(dense, results["dense"][0][name]) for name in shared}
            accuracy = Comparator.compare_accuracy(
                results, compare_func=CompareFunc.simple(atol=allowed, rtol=0.0, check_error_stat="max")
            )
    verdicts = next(iter(accuracy[0].values()))[0]
    return [Difference(name, float(verdicts[name].max_absdiff), allowed[name], bool(verdicts[name])) for name in shared]


def first_difference(differences: list[Difference]) -> Difference | None:
    return next((difference for difference in differences if not difference.agrees), None)


def name_tensors(graph: onnx.ModelProto) -> list[str]:
    """Names every floating result of the graph's named nodes after its node; an attention core becomes "…/core".

    Returns the names in the order of the graph.
    """
    renamed: dict[str, str] = {}
    outputs = {value.name for value in graph.graph.output}
    for node in graph.graph.node:
        scope = node.name.partition("/")[0]
        if "." not in scope or ".indexer" in scope or node.op_type in ("Shape", "IndexTopK"):
            continue
        if node.output[0] not in outputs:
            renamed[node.output[0]] = f"{scope}/core" if node.op_type in CORES else node.name
    _rename(graph.graph, renamed)
    del graph.graph.value_info[:]
    return [*renamed.values(), "logits"]


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for node in graph.node:
        for values in (node.input, node.output):
            for i, name in enumerate(values):
                values[i] = renamed.get(name, name)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, renamed)


def mark(graph: onnx.ModelProto, names: list[str]) -> None:
    """Makes the named tensors, and nothing else, the graph's outputs."""
    from polygraphy.backend.onnx import modify_outputs

    modify_outputs(graph, outputs=names)


def feed(engine: Engine, tokens: np.ndarray) -> dict[str, Any]:
    """The inputs of a first call on tokens [n]: empty caches of the smallest capacity with which a selection runs."""
    n = len(tokens)
    capacity = max(n, engine.selecting_slots)
    inputs: dict[str, Any] = {
        "input_ids": tokens[None].astype(np.int64),
        "past_lengths": np.zeros(1, np.int64),
        "input_lengths": np.full(1, n, np.int64),
    }
    for name, tensor in engine.cache_names():
        inputs[f"past_key_values.{name}"] = np.zeros(tensor.concrete(1, capacity), tensor.dtype)
    return inputs
