"""The list of operators, and what is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import onnx

if TYPE_CHECKING:
    from torch import Tensor

DOMAIN = "dsa"
PLUGIN_VERSION = "1"
ONNX_OPSET = 24

# NVIDIA's ONNX parser prefers a registered plugin to the function body only if the node names version and namespace.
PLUGIN_ATTRIBUTES = {"plugin_version": PLUGIN_VERSION, "plugin_namespace": DOMAIN}


def shapes(tensors: Mapping[str, Tensor]) -> str:
    """For messages: names and shapes."""
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())


def function_proto(body: str) -> onnx.FunctionProto:
    """Parses an operator's ONNX function body (the text in its op.py) into a FunctionProto of domain `dsa`."""
    header = f'<domain: "{DOMAIN}", opset_import: ["" : {ONNX_OPSET}]>\n'
    return onnx.parser.parse_function(header + body)


def function_protos(index_options: bool = False, index_keys: str = "model") -> list[onnx.FunctionProto]:
    """The function bodies of all operators, to be appended to a model that uses them.

    index_options: its IndexTopK nodes carry sinks, window and pool. index_keys: the type of their keys.
    """
    from plugins.block_topk.op import FUNCTION_BODY as block_topk
    from plugins.index_topk.op import function_body as index_topk
    from plugins.index_topk.rounding import FUNCTION_BODIES as rounding
    from plugins.sparse_attention.op import FUNCTION_BODY as sparse_attention

    bodies = (index_topk(index_options, index_keys), *rounding, sparse_attention, block_topk)
    return [function_proto(body) for body in bodies]
