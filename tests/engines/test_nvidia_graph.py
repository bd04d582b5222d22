"""The graph that NVIDIA's parsers get computes what the export computes, and says causality in their terms."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from dsa_export.files import link_or_copy
from engines import nvidia_graph
from engines.artifacts import open_export

CAPACITY = 64


def run(path, chunks):
    """Two rows with different pasts, chunk by chunk; logits after each."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    sizes = {"batch": 2, "capacity": CAPACITY}
    caches = {
        value.name: np.zeros([sizes.get(size, size) for size in value.shape], np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    lengths, logits = np.zeros(2, np.int64), []
    for tokens, valid in chunks:
        feeds = {"input_ids": tokens, "past_lengths": lengths, "input_lengths": valid, **caches}
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        caches = {name: outputs[name.replace("past_key_values", "present")] for name in caches}
        lengths = lengths + valid
        logits.append(outputs["logits"])
    return np.stack([step.squeeze(1) for step in logits])


def test_adapted_dense_graph_is_the_same_function(export, tmp_path):
    graph = open_export(export).graphs["dense"]
    path = tmp_path / "model.onnx"
    nvidia_graph.write(graph, CAPACITY, path)
    link_or_copy(graph.path.parent / graph.weights, tmp_path / graph.weights)
    rng = np.random.default_rng(0)
    chunks = [
        (rng.integers(3, graph.model.vocab_size, (2, size)), np.array(valid))
        for size, valid in ((9, [9, 4]), (1, [1, 1]), (6, [2, 6]), (1, [1, 1]))
    ]
    np.testing.assert_allclose(run(path, chunks), run(graph.path, chunks), atol=1e-5)


def test_no_attention_keeps_a_causality_that_nvidia_reads_otherwise(export, tmp_path):
    graph = open_export(export).graphs["dense"]
    nvidia_graph.write(graph, CAPACITY, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    assert attention
    for node in attention:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["is_causal"] == 0 and len(node.input) == 4 and node.input[3].startswith("visible_slots/")
    assert all(size.dim_param != "capacity" for value in model.graph.input for size in value.type.tensor_type.shape.dim)


def test_adapted_sparse_graph_is_the_same_function_without_conditionals(export, tmp_path):
    graph = open_export(export).graphs["sparse"]
    path = tmp_path / "model.onnx"
    nvidia_graph.write(graph, CAPACITY, path)
    link_or_copy(graph.path.parent / graph.weights, tmp_path / graph.weights)
    operators = [[node.op_type for function in onnx.load(file, load_external_data=False).functions
                  for node in function.node] for file in (graph.path, path)]  # fmt: skip
    assert "If" in operators[0] and "If" not in operators[1]
    rng = np.random.default_rng(1)
    chunks = [(rng.integers(3, graph.model.vocab_size, (2, size)), np.full(2, size)) for size in (9, 1, 1)]
    np.testing.assert_allclose(run(path, chunks), run(graph.path, chunks), atol=1e-5)
