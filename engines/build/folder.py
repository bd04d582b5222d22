"""What every engine folder holds besides the engine: manifest, tokenizer; and the run that checks a fresh one."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dsa_export.cli import UserError, console
from dsa_export.files import read_manifest, write_manifest
from dsa_export.selection import describe_selection
from dsa_export.topk import compact_topk
from engines.artifacts import Export, Graph, Limits, content_hash, runtime_version
from engines.session import Session, bucket, open_runner
from engines.text import tokenizer_files

PACKED_BITS: dict[int, int] = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
"""Of element types that share a byte."""
CHECK_TOKENS = 4
"""Tokens that the check after a build (ort, torch) runs."""


def write_engine_manifest(
    folder: Path,
    backend: str,
    graph: Graph,
    export: Export,
    limits: Limits,
    files: Mapping[str, str | None],
    *,
    runtime: str | None = None,
    **facts: Any,
) -> None:
    """files: name -> SHA-256 (None: computed here). runtime: its version, if not that of the installed package.

    The tokenizer comes with every engine.
    """
    tokenizer = tokenizer_files(export.folder)
    for file in tokenizer:
        shutil.copyfile(file, folder / file.name)
    files = {**files, **{file.name: None for file in tokenizer}}
    write_manifest(
        folder,
        "engine",
        source_of(graph, export),
        backend=backend,
        variant=graph.variant,
        dtype=graph.dtype,
        precision=graph.precision,
        topk=compact_topk(graph.topk),
        random_indexer=graph.random_indexer,
        model=asdict(graph.model),
        cache=[asdict(tensor) for tensor in graph.cache],
        limits=asdict(limits),
        beyond_positions=limits.max_context > graph.model.max_position_embeddings,
        versions={"runtime": runtime or runtime_version(backend), "python": platform.python_version()},
        **asdict(step_weights(graph.path)),
        files={
            name: {"bytes": (folder / name).stat().st_size, "sha256": digest or content_hash(folder / name)}
            for name, digest in files.items()
        },
        **{"selection": graph.selection, "compute_capability": [], "plugin": None, "profiles": [], **facts},
    )


def dense_slots_facts(graph: Graph, wanted: int | None) -> dict[str, Any]:
    """Of an engine that attends to everything up to `wanted` slots (None: k) and to a layer's k."""
    slots = wanted or min(graph.topk)
    slots = slots if slots >= graph.max_topk else 0  # a session's caches have max_topk slots at least
    later = {"dense_slots": slots} if slots > graph.max_topk else {}
    return {"dense_slots": slots, "selection": graph.selection | later}


def source_of(graph: Graph, export: Export) -> dict[str, str]:
    return {"path": str(export.folder.resolve()), "sha256": graph.sha256, "weights_sha256": graph.weights_sha256}


@dataclass(frozen=True)
class StepWeights:
    """Weights that one call of a graph must read, scales of quantised ones included. Tables that are only looked up
    (embedding, angles) do not count: a token reads one row of them."""

    step_weight_bytes: int
    step_weights: int


def step_weights(path: Path) -> StepWeights:
    graph = onnx.load(path, load_external_data=False).graph
    lookups = {"Gather": (0,), "RotaryEmbedding": (1, 2)}
    read = {
        value
        for node in graph.node
        for position, value in enumerate(node.input)
        if position not in lookups.get(node.op_type, ())
    }
    tensors = [tensor for tensor in graph.initializer if tensor.name in read]
    return StepWeights(sum(map(stored_bytes, tensors)), sum(math.prod(tensor.dims) for tensor in tensors))


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's elements, wherever they lie."""
    bits = PACKED_BITS.get(tensor.data_type) or 8 * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def check_engine(folder: Path) -> None:
    """Loads a fresh engine folder and runs calls of every kind. Raises UserError if a logit is not finite."""
    runner = open_runner(folder, verify=False)
    engine = runner.engine
    tokens = np.arange(min(CHECK_TOKENS, engine.model.vocab_size, engine.limits.max_context))
    # All forms of attention: torch.compile keeps what it makes of them. The first is as large as an answer's at first.
    capacities = [bucket(engine, 1), engine.max_topk, min(engine.selecting_slots, engine.limits.max_context)]
    logits = []
    for capacity in dict.fromkeys(capacities):
        session = Session(runner, capacity=capacity)
        logits += [session.prefill([tokens[:-1]]), session.decode(tokens[-1:]).copy()]
    if not np.isfinite(logits).all():
        raise UserError(f"{folder}: the engine's logits are not finite; check the checkpoint that was exported")


def report(folder: Path) -> None:
    manifest = read_manifest(folder, "engine", "python -m engines.build")
    mib = sum(facts["bytes"] for facts in manifest["files"].values()) / 2**20
    k = describe_selection(manifest["topk"], manifest["selection"])
    console.print(f"wrote {folder}: {manifest['variant']}, {manifest['precision']}, k = {k}, {mib:,.1f} MiB")
