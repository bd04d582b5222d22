"""The graph passes that make an export acceptable to NVIDIA's parsers, for TensorRT and TensorRT-RTX alike.

TensorScatter becomes their cache update (IKVCacheUpdateLayer): it asks for a cache that is an input of the network, has
four dimensions [B, N, C, D] (the export sees to both) and a capacity C that is known at build time.

Attention becomes IAttention, whose `is_causal` is anchored at the upper left: query 0 would see slot 0 only, whatever
stands before it in the cache. ONNX, given nonpad_kv_seqlen, anchors at the lower right. The mask is therefore explicit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from onnx import helper

from dsa_export.capacity import cache_rows, stride_of
from dsa_export.cli import UserError
from engines.artifacts import Graph


def fix_capacity(model: onnx.ModelProto, capacity: int) -> None:
    """Requires: dimensions named as in dsa_export.capacity. Ensures: they are numbers, for `capacity` tokens."""
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        for size in value.type.tensor_type.shape.dim:
            if stride := stride_of(size.dim_param):
                size.dim_value = cache_rows(capacity, stride)  # a oneof: this clears dim_param


VISIBLE_SLOTS = """
visible_slots (int64[B, S] input_ids, int64[B] kv_lengths) => (bool[B, 1, S, C] visible_slots)
{
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    heads_axis = Constant <value_ints = [1]> ()
    last_axis = Constant <value_ints = [-1]> ()
    C = Constant <value_int = CAPACITY> ()
    S_1 = Shape <start = 1, end = 2> (input_ids)
    S = Squeeze (S_1)
    past = Sub (kv_lengths, S_1)
    past_column = Unsqueeze (past, last_axis)
    steps = Range (zero, S, one)
    positions_row = Add (past_column, steps)
    positions = Unsqueeze (positions_row, last_axis)
    slots = Range (zero, C, one)
    visible = LessOrEqual (slots, positions)
    visible_slots = Unsqueeze (visible, heads_axis)
}
"""


def mask_explicitly(model: onnx.ModelProto, capacity: int) -> None:
    """Requires: Attention nodes with either a mask (NSA's window) or is_causal and nonpad_kv_seqlen, all with the same
    lengths (the dense export's).

    Ensures: the latter carry the mask slot <= position [B, 1, S, C] instead, computed once for all layers.
    """
    attention = [node for node in model.graph.node if node.op_type == "Attention" and not node.domain]
    nodes = [node for node in attention if len(node.input) > 6]
    if not nodes:
        return
    (kv_lengths,) = {node.input[6] for node in nodes}
    mask = onnx.parser.parse_graph(VISIBLE_SLOTS.replace("CAPACITY", str(capacity)))
    prefix = "visible_slots/"
    given = {"input_ids": "input_ids", "kv_lengths": kv_lengths}
    first = list(model.graph.node).index(nodes[0])
    for offset, node in enumerate(mask.node):
        node.input[:] = [given.get(name, prefix + name) for name in node.input]
        node.output[:] = [prefix + name for name in node.output]
        node.name = prefix + node.op_type + f"_{offset}"
        model.graph.node.insert(first + offset, node)
    for node in nodes:
        node.input[:] = [*node.input[:3], prefix + mask.output[0].name]
        kept = [attribute for attribute in node.attribute if attribute.name != "is_causal"]
        node.ClearField("attribute")
        node.attribute.extend([*kept, helper.make_attribute("is_causal", 0)])


def take_general_branches(model: onnx.ModelProto) -> None:
    """Requires: function bodies whose `If` nodes have an else-branch that is right in every case, as ours have.

    Ensures: the bodies hold that branch's nodes instead. The other branch is a shortcut for CPUs with an operand order
    that a GPU does not care about, and a conditional would split the engine.
    """
    for function in model.functions:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in _without_branches(function.node)]
        function.ClearField("node")
        function.node.extend(kept)


def _without_branches(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        if node.op_type != "If":
            yield node
            continue
        branch = next(attribute.g for attribute in node.attribute if attribute.name == "else_branch")
        renamed = dict(zip((value.name for value in branch.output), node.output, strict=True))
        for inner in branch.node:
            inner.output[:] = [renamed.get(name, name) for name in inner.output]
        yield from _without_branches(branch.node)


def check_caches(graph: Graph) -> None:
    """Raises UserError for caches of a type that NVIDIA's cache update does not take."""
    for option, dtype in (("int8", "uint8"), ("fp8", "float8_e4m3fn")):
        if any(tensor.dtype == dtype for tensor in graph.cache):
            raise UserError(
                "TensorRT and TensorRT-RTX update caches in fp32, fp16 and bf16 only: export without "
                f"--index-keys {option}"
            )


def write(graph: Graph, capacity: int, path: Path) -> None:
    """Writes the adapted graph, whose caches must be such as check_caches() accepts, to `path`; its weight file must
    be put beside it.
    """
    model = onnx.load(graph.path, load_external_data=False)
    fix_capacity(model, capacity)
    mask_explicitly(model, capacity)
    take_general_branches(model)
    onnx.save(model, path)
