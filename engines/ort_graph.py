"""The exported graphs as ONNX Runtime's CPU runs them fastest.

Dense: with GroupQueryAttention, ONNX Runtime's faster operator for single tokens at long contexts (128K: 2.3 times),
and with our own kernel (plugins/cpu). The comparison holds the sparse engine against whichever wins.

Sparse: with dense attention while the caches are short, and with our own kernels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

from engines.artifacts import GQA, OWN_ATTENTION, Graph
from plugins import cpu
from plugins.registry import DOMAIN as DSA_DOMAIN

GQA_DOMAIN = "com.microsoft"

# Names that all layers share: the slot of each row's last token, the longest row, shapes for Reshape.
LAST_SLOTS, LONGEST, ONE = "group_query/last_slots", "group_query/longest", "group_query/one"
FLAT, BY_HEAD = "group_query/flat", "group_query/by_head"


def group_query(graph: Graph) -> onnx.ModelProto | None:
    """The dense graph with every Attention, and the two cache updates before it, as one GroupQueryAttention.

    None for attention that the operator does not do: over latent rows, which are keys and values at once, and with
    heads that are no multiple of 8.
    """
    model = onnx.load(graph.path, load_external_data=False)
    made_by = {output: node for node in model.graph.node for output in node.output}
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    if _over_latent_rows(attention) or graph.model.head_dim % 8:
        return None
    (kv_lengths,) = {node.input[6] for node in attention}
    replaced: dict[str, list[NodeProto]] = {kv_lengths: [made_by[kv_lengths], *_shared_inputs(kv_lengths)]}
    for number, node in enumerate(attention):
        update_k, update_v = (made_by[cache] for cache in node.input[1:3])
        replaced |= {update_k.output[0]: [], update_v.output[0]: []}
        replaced[node.output[0]] = _layer(f"group_query/{number}/", node, update_k, update_v, graph)
    _replace(model, replaced)
    shapes = {FLAT: [0, 0, -1], BY_HEAD: [0, 0, graph.model.query_heads, graph.model.head_dim]}
    constants = [helper.make_tensor(name, TensorProto.INT64, [len(shape)], shape) for name, shape in shapes.items()]
    model.graph.initializer.extend([*constants, helper.make_tensor(ONE, TensorProto.INT64, [], [1])])
    model.opset_import.append(helper.make_opsetid(GQA_DOMAIN, 1))
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
    scale = _attribute(attention, "scale")
    attributes = {"num_heads": graph.model.query_heads, "kv_num_heads": graph.model.kv_heads, "scale": scale}
    return [
        *_flatten_heads(attention.input[0], q),
        *_flatten_heads(update_k.input[1], k),
        *_flatten_heads(update_v.input[1], v),
        helper.make_node(GQA, inputs, outputs, prefix + GQA, None, GQA_DOMAIN, **attributes),
        helper.make_node("Reshape", [prefix + "rows", BY_HEAD], [prefix + "by_head"]),
        helper.make_node("Transpose", [prefix + "by_head"], [attention.output[0]], perm=[0, 2, 1, 3]),
    ]


def _flatten_heads(value: str, name: str) -> list[NodeProto]:
    """[B, H, S, D] → [B, S, H D]."""
    return [
        helper.make_node("Transpose", [value], [name + "/by_token"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", [name + "/by_token", FLAT], [name]),
    ]


# ---------------------------------------------------------------- sparse

SLOTS, FEW_SLOTS = "short/slots", "short/few_slots"
EMBEDDED_BYTES = 2**30
"""Weights of a branch lie in model.onnx itself, which may have 2 GiB; beyond this they stay outside."""
ELEMENT_TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def dense_while_short(graph: Graph, slots: int) -> onnx.ModelProto:
    """The sparse graph with dense Attention in place of selection and gathered rows while the caches are short.

    Short are `slots` slots, or a layer's k if that is more. Up to k slots everything visible is selected anyway: only
    the time changes. Index queries, which nothing else reads, are then not computed; index keys are cached as ever.
    Slots decide, not tokens, because ONNX Runtime's Attention takes time and memory for all slots.

    For graphs that can_attend_densely.
    """
    model = onnx.load(graph.path, load_external_data=False)
    nodes, initializers = list(model.graph.node), list(model.graph.initializer)
    selections = [node for node in nodes if node.op_type == "IndexTopK"]
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in nodes:
        for value in node.input:
            users[value].append(node)

    element = ELEMENT_TYPES[graph.dtype]
    conditions: dict[int, str] = {}  # by k
    replaced: dict[str, list[NodeProto]] = {}  # by the first output of a node
    embedded: dict[str, TensorProto] = {}
    for selection in selections:
        k = _attribute(selection, "k")
        condition = conditions.setdefault(k, f"{FEW_SLOTS}/{k}")
        inside = _needed_only_by(selection, nodes, users)
        read = {value for node in inside for value in node.input}
        weights = [t for t in initializers if t.name in read and all(user in inside for user in users[t.name])]
        # In fp16 ONNX Runtime casts the scales of a branch's packed weights at run time, and the scores come out wrong.
        quantised = any(node.op_type == "DequantizeLinear" for node in inside)
        too_large = sum(map(_bytes, [*embedded.values(), *weights])) > EMBEDDED_BYTES
        if too_large or (quantised and graph.dtype != "fp32"):
            inside, weights = [selection], []
        weights = [_embed(tensor, graph) for tensor in weights]
        embedded |= {tensor.name: tensor for tensor in weights}
        replaced |= {node.output[0]: [] for node in inside}
        first, *followers = users[selection.output[0]]
        replaced[first.output[0]] = [_branches(first, selection, condition, element, inside, weights)]
        replaced |= {node.output[0]: [_branches(node, selection, condition, element)] for node in followers}

    first_cache = f"past_key_values.{graph.cache_names()[0][0]}"
    shared = [helper.make_node("Shape", [first_cache], [SLOTS], start=2, end=3)]
    limits = []
    for k, condition in conditions.items():
        limits.append(helper.make_tensor(f"{condition}/limit", TensorProto.INT64, [1], [max(k, slots)]))
        shared.append(helper.make_node("LessOrEqual", [SLOTS, limits[-1].name], [condition]))
    del model.graph.initializer[:]
    model.graph.initializer.extend([*(t for t in initializers if t.name not in embedded), *limits])
    _replace(model, replaced, first=shared)
    return model


def _branches(
    attention: NodeProto,
    selection: NodeProto,
    condition: str,
    element: int,
    inside: Sequence[NodeProto] = (),
    weights: Sequence[TensorProto] = (),
) -> NodeProto:
    """An If in place of a SparseAttention. With `inside`, which ends with the selection, indices come out of it too."""
    dense = helper.make_node(
        "Attention",
        [*attention.input[:3], "", "", "", selection.input[3]],
        [f"{attention.output[0]}/dense"],
        attention.name,
        is_causal=1,
        scale=_attribute(attention, "scale"),
    )
    sparse = _with_output(attention, f"{attention.output[0]}/sparse")
    short, long = [dense], [sparse]
    outputs = {attention.output[0]: (dense.output[0], sparse.output[0], element)}
    if inside:
        *queries, _ = inside
        indices = selection.output[0]
        select = _with_output(selection, f"{indices}/sparse")
        sparse.input[3] = select.output[0]
        nothing = helper.make_tensor("nothing", TensorProto.INT32, [0, 0, 0], [])
        short.append(helper.make_node("Constant", [], [f"{indices}/none"], value=nothing))
        long = [*queries, select, sparse]
        outputs[indices] = f"{indices}/none", f"{indices}/sparse", TensorProto.INT32
    short_results = [helper.make_tensor_value_info(name, kind, None) for name, _, kind in outputs.values()]
    long_results = [helper.make_tensor_value_info(name, kind, None) for _, name, kind in outputs.values()]
    return helper.make_node(
        "If",
        [condition],
        list(outputs),
        attention.name,
        then_branch=helper.make_graph(short, "short", [], short_results),
        else_branch=helper.make_graph(long, "long", [], long_results, weights),
    )


def _with_output(node: NodeProto, output: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.output[0] = output
    return copy


def _needed_only_by(selection: NodeProto, nodes: list[NodeProto], users: dict[str, list[NodeProto]]) -> list[NodeProto]:
    """The selection, behind what only its queries and their weights need, in the graph's order."""
    wanted = set(selection.input[:2])
    inside = [selection]
    for node in reversed(nodes[: nodes.index(selection)]):
        if wanted.intersection(node.output) and all(user in inside for value in node.output for user in users[value]):
            inside.insert(0, node)
            wanted.update(node.input)
    return inside


def _over_latent_rows(attention: Sequence[NodeProto]) -> bool:
    """Whether keys and values are the same rows."""
    return any(node.input[1] == node.input[2] for node in attention)


def _replace(model: onnx.ModelProto, replaced: Mapping[str, list[NodeProto]], first: Sequence[NodeProto] = ()) -> None:
    """Puts other nodes in the place of those whose first output is a key of `replaced`, and `first` before all."""
    nodes = [*first, *(new for node in model.graph.node for new in replaced.get(node.output[0], [node]))]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _attribute(node: NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == name)


def _external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _bytes(tensor: TensorProto) -> int:
    return int(_external(tensor).get("length", 0)) or tensor.ByteSize()


def _embed(tensor: TensorProto, graph: Graph) -> TensorProto:
    """The tensor with its data in it: ONNX Runtime opens no file with several links for the weights of a branch."""
    if not tensor.external_data:
        return tensor
    place = _external(tensor)
    with (graph.path.parent / graph.weights).open("rb") as file:
        file.seek(int(place.get("offset", 0)))
        data = file.read(int(place["length"]))
    return TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=data)


# ---------------------------------------------------------------- both


def fits_cpu_kernels(graph: Graph) -> bool:
    """Whether the kernels take the graph's types and sizes."""
    bytes_of_keys = [tensor.shape[3] for tensor in graph.cache if tensor.dtype == "uint8"]
    return graph.dtype == "fp32" and all(int(size) % 4 == 0 for size in bytes_of_keys)


def with_cpu_kernels(model: onnx.ModelProto) -> bool:
    """Gives our kernels' library what it does faster, in branches too; whether there is anything.

    That is our operators, and causal Attention.
    """
    taken = _take_kernels(model.graph)
    if taken:
        model.opset_import.append(helper.make_opsetid(cpu.DOMAIN, 1))
        kept = [function for function in model.functions if function.name not in cpu.OPERATORS]
        del model.functions[:]
        model.functions.extend(kept)
    return taken


HALVED = ("key", "value")
"""Caches that the kernels read in fp16 too."""


def with_half_caches(model: onnx.ModelProto) -> None:
    """Keeps keys and values in fp16, which our kernels read.

    For graphs that with_cpu_kernels() changed.
    """
    ends = [*model.graph.input, *model.graph.output]
    halved = {end.name for end in ends if end.name.rpartition(".")[2] in HALVED}
    for end in ends:
        if end.name in halved:
            end.type.tensor_type.elem_type = TensorProto.FLOAT16
    del model.graph.value_info[:]
    nodes = []
    for node in model.graph.node:
        if node.op_type == "TensorScatter" and node.input[0] in halved:
            update = f"{node.input[1]}/half"
            nodes.append(helper.make_node("Cast", [node.input[1]], [update], to=TensorProto.FLOAT16))
            node.input[1] = update
            halved.add(node.output[0])
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _take_kernels(graph: onnx.GraphProto) -> bool:
    """Whether the library takes over any operator."""
    taken = False
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                taken |= _take_kernels(attribute.g)
        if node.domain == DSA_DOMAIN and node.op_type in cpu.OPERATORS:
            node.domain = cpu.DOMAIN
            taken = True
        elif node.op_type == "Attention" and _attends_to_all_before(node):
            node.CopyFrom(_own_attention(node))
            taken = True
    return taken


def _attends_to_all_before(attention: NodeProto) -> bool:
    """Whether it is dense causal attention over a cache of keys and one of values, without a mask or another option."""
    options = {attribute.name for attribute in attention.attribute} == {"is_causal", "scale"}
    given = [bool(value) for value in attention.input] == [True, True, True, False, False, False, True]
    plain = options and given and len(attention.output) == 1
    return plain and _attribute(attention, "is_causal") == 1 and not _over_latent_rows([attention])


def _own_attention(attention: NodeProto) -> NodeProto:
    inputs, scale = [*attention.input[:3], attention.input[6]], _attribute(attention, "scale")
    return helper.make_node(OWN_ATTENTION, inputs, attention.output, attention.name, domain=cpu.DOMAIN, scale=scale)
