"""The dense graph with ONNX Runtime's own operator for grouped queries.

On CPUs GroupQueryAttention is the faster one for single tokens at long contexts (128K: 2.3 times), Attention up to some
thousand tokens. The comparison holds the sparse engine against whichever wins.
"""

from __future__ import annotations

import onnx
from onnx import NodeProto, TensorProto, helper

from engines.artifacts import Graph

OPERATOR = "GroupQueryAttention"
DOMAIN = "com.microsoft"

# Names that all layers share: the slot of each row's last token, the longest row, shapes for Reshape.
LAST_SLOTS, LONGEST, ONE = "group_query/last_slots", "group_query/longest", "group_query/one"
FLAT, BY_HEAD = "group_query/flat", "group_query/by_head"


def group_query(graph: Graph) -> onnx.ModelProto | None:
    """The dense graph with every Attention, and the two cache updates before it, as one GroupQueryAttention.

    None for attention that the operator does not do: over latent rows, which are keys and values at once.
    """
    model = onnx.load(graph.path, load_external_data=False)
    made_by = {output: node for node in model.graph.node for output in node.output}
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    if any(node.input[1] == node.input[2] for node in attention):
        return None
    (kv_lengths,) = {node.input[6] for node in attention}
    replaced: dict[str, list[NodeProto]] = {kv_lengths: [made_by[kv_lengths], *_shared_inputs(kv_lengths)]}
    for number, node in enumerate(attention):
        update_k, update_v = (made_by[cache] for cache in node.input[1:3])
        replaced |= {update_k.output[0]: [], update_v.output[0]: []}
        replaced[node.output[0]] = _layer(f"group_query/{number}/", node, update_k, update_v, graph)
    nodes = [new for node in model.graph.node for new in replaced.get(node.output[0], [node])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shapes = {FLAT: [0, 0, -1], BY_HEAD: [0, 0, graph.model.query_heads, graph.model.head_dim]}
    constants = [helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape) for name, shape in shapes.items()]
    model.graph.initializer.extend([*constants, helper.make_tensor(ONE, TensorProto.INT64, [], [1])])
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def _shared_inputs(kv_lengths: str) -> list[NodeProto]:
    return [
        helper.make_node("Sub", [kv_lengths, ONE], [LAST_SLOTS + "_long"]),
        helper.make_node("Cast", [LAST_SLOTS + "_long"], [LAST_SLOTS], to=TensorProto.INT32),
        helper.make_node("ReduceMax", [kv_lengths], [LONGEST + "_long"], keepdims=0),
        helper.make_node("Cast", [LONGEST + "_long"], [LONGEST], to=TensorProto.INT32),
    ]


def _layer(
    prefix: str, attention: NodeProto, update_k: NodeProto, update_v: NodeProto, graph: Graph
) -> list[NodeProto]:
    q, k, v = (prefix + name for name in "qkv")
    inputs = [q, k, v, update_k.input[0], update_v.input[0], LAST_SLOTS, LONGEST]
    outputs = [prefix + "rows", update_k.output[0], update_v.output[0]]
    (scale,) = (helper.get_attribute_value(a) for a in attention.attribute if a.name == "scale")
    attributes = {"num_heads": graph.model.query_heads, "kv_num_heads": graph.model.kv_heads, "scale": scale}
    return [
        *_flatten_heads(attention.input[0], q),
        *_flatten_heads(update_k.input[1], k),
        *_flatten_heads(update_v.input[1], v),
        helper.make_node(OPERATOR, inputs, outputs, prefix + OPERATOR, None, DOMAIN, **attributes),
        helper.make_node("Reshape", [prefix + "rows", BY_HEAD], [prefix + "by_head"]),
        helper.make_node("Transpose", [prefix + "by_head"], [attention.output[0]], perm=[0, 2, 1, 3]),
    ]


def _flatten_heads(value: str, name: str) -> list[NodeProto]:
    """[B, H, S, D] → [B, S, H D]."""
    return [
        helper.make_node("Transpose", [value], [name + "/by_token"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [name + "/by_token", FLAT], [name]),
    ]
