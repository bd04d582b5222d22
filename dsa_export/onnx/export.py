"""From a torch model to ONNX graphs, dense and sparse, that share one weight file.

One graph serves prefill chunks and decoding (B batch, S tokens, C capacity are dynamic):

    input_ids [B, S] int64, past_lengths [B] int64, input_lengths [B] int64, past_key_values.{i}.{name}
    → logits [B, 1, V] float32 (at each row's last valid token), present.{i}.{name}

Rows are padded on the right; past_lengths + S <= C; the sparse graph needs C >= k. Caches must hold finite numbers
from the start (zeros); bind one buffer to past and present, and TensorScatter updates it in place.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from dsa_export.files import link_or_copy
from dsa_export.model.cache import CacheEntry
from dsa_export.model.checkpoint import parameter_names
from dsa_export.model.decoder import DSAForCausalLM
from dsa_export.model.step import StepGraph
from dsa_export.onnx import passes
from dsa_export.onnx.stored import StoredModel
from dsa_export.selection import INDEX_CACHES
from plugins.registry import ONNX_OPSET

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"

# Example sizes: different from each other and from 1, so that torch.export keeps them dynamic.
EXAMPLE_B, EXAMPLE_S, EXAMPLE_C = 2, 3, 64


def cache_names(model: DSAForCausalLM) -> list[tuple[str, CacheEntry]]:
    """("{layer}.{entry name}", entry) for every cached tensor, in the order of the graph's inputs."""
    return [
        (f"{layer}.{entry.name}", entry) for layer, layout in enumerate(model.model.cache_layouts) for entry in layout
    ]


def export_graph(stored: StoredModel) -> ir.Model:
    """Exports one variant; its weights are computed from the model's when they are read."""
    entries = cache_names(stored.model)
    past = [entry.zeros(EXAMPLE_B, EXAMPLE_C, stored.dtype) for _, entry in entries]
    lengths = torch.full((EXAMPLE_B,), EXAMPLE_S)
    arguments = (torch.zeros(EXAMPLE_B, EXAMPLE_S, dtype=torch.int64), torch.zeros_like(lengths), lengths, past)
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx._internal.exporter").setLevel(logging.ERROR)
        program = torch.onnx.export(
            StepGraph(stored.outline()).eval(),
            arguments,
            dynamo=True,
            opset_version=ONNX_OPSET,
            optimize=False,
            verbose=False,
            input_names=["input_ids", "past_lengths", "input_lengths", *(f"past_key_values.{n}" for n, _ in entries)],
            output_names=["logits", *(f"present.{n}" for n, _ in entries)],
            dynamic_shapes={
                "input_ids": {0: dynamic, 1: dynamic},
                "past_lengths": {0: dynamic},
                "input_lengths": {0: dynamic},
                "past": [{0: dynamic, 2: dynamic} for _ in entries],
            },
        )
    assert program is not None
    passes.set_weights(program.model, {name: stored.tensor(name) for name in parameter_names(stored.model)})
    graph_shapes: dict[str, tuple[Any, ...]] = {
        "input_ids": ("batch", "sequence"),
        "past_lengths": ("batch",),
        "input_lengths": ("batch",),
        "logits": ("batch", 1, stored.model.config.vocab_size),
    }
    for name, entry in entries:
        graph_shapes[f"past_key_values.{name}"] = entry.shape("batch", "capacity")
        graph_shapes[f"present.{name}"] = entry.shape("batch", "capacity")
    return passes.finish(program.model, graph_shapes)


def dense_from_sparse(sparse: ir.Model) -> ir.Model:
    """The dense graph of the same model: every SparseAttention becomes Attention over the whole cache.

    Spares torch a second export. That this is the dense model's graph is for the parity check to say, which runs it
    against the dense torch model.
    """
    dense = sparse.clone()
    for value in [value for value in dense.graph.outputs if value.name.rpartition(".")[2] in INDEX_CACHES]:
        dense.graph.outputs.remove(value)
    for node in list(dense.graph):
        if node.op_type != "SparseAttention":
            continue
        q, k, v, indices = node.inputs
        kv_lengths = indices.producer().inputs[3]
        attributes = {"is_causal": 1, "scale": node.attributes["scale"].as_float()}
        name = node.name.replace("SparseAttention", "Attention")
        attention = ir.node("Attention", [q, k, v, None, None, None, kv_lengths], attributes, name=name)
        ir.convenience.replace_nodes_and_values(
            dense.graph, node, [node], [attention], list(node.outputs), list(attention.outputs)
        )
    passes.remove_unused(dense)
    return dense


def save_graphs(graphs: dict[str, ir.Model], out: Path) -> None:
    """Writes out/<variant>/model.onnx for every graph and one model.onnx.data, hard-linked into each folder.

    Runtimes refuse weights outside the model's folder, and symbolic links; a hard link is one file under two names.
    Where the file system has none, the file is copied.
    """
    weights: dict[str, ir.Value] = {}
    for graph in graphs.values():
        for name, value in graph.graph.initializers.items():
            if value.const_value is not None and value.const_value.nbytes >= passes.EXTERNAL_BYTES:
                weights.setdefault(name, value)
    folders = {variant: out / variant for variant in graphs}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    first, *others = folders.values()
    tensors = [value.const_value for value in weights.values() if value.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(tensors, first, WEIGHTS_FILE)
    by_name = dict(zip(weights, external, strict=True))
    for folder in others:
        link_or_copy(first / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    for variant, graph in graphs.items():
        for name, value in graph.graph.initializers.items():
            if name in by_name:
                value.const_value = by_name[name]
        ir.save(graph, folders[variant] / MODEL_FILE)
