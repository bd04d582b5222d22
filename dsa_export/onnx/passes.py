"""Graph passes between torch's exporter and the saved file. Each states what it requires and ensures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common

from plugins.registry import DOMAIN, function_protos

EXTERNAL_BYTES = 1024
"""Initializers of at least this size live in the weight file."""

STEP_PREFIX = "model."
"""What the exported step (`dsa_export.model.step`) puts before the names of the model's own parameters."""

EIGHT_BIT_KEYS = {ir.DataType.FLOAT8E4M3FN: "fp8", ir.DataType.UINT8: "int8"}
"""Cached types of index keys that are not the model's own, and what DSAConfig.index_keys calls them."""


def finish(model: ir.Model, shapes: dict[str, tuple[Any, ...]]) -> ir.Model:
    """All passes in their order. `shapes`: the final shape of every graph input and output."""
    strip_weight_prefix(model)
    simplify(model)
    pretranspose_weights(model)
    name_dimensions(model, shapes)
    name_nodes(model)
    append_functions(model)
    return model


def set_weights(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> None:
    """Ensures that the parameters of a traced step have these values, by the model's own names; buffers keep theirs.

    Requires all names of tied ones: which of them torch's exporter takes is not said.
    """
    for name, value in model.graph.initializers.items():
        if (parameter := name.removeprefix(STEP_PREFIX)) in weights and name.startswith(STEP_PREFIX):
            value.const_value = weights[parameter]


def strip_weight_prefix(model: ir.Model) -> None:
    """Ensures that initializers carry the checkpoint's parameter names."""
    for value in list(model.graph.initializers.values()):
        assert value.name is not None
        if value.name.startswith(STEP_PREFIX):
            value.name = value.name.removeprefix(STEP_PREFIX)


def simplify(model: ir.Model) -> None:
    """Folds constants and shape arithmetic, removes what is computed twice or unused. Weights stay as they are.

    onnxscript's optimize() does the same and also tries its rewrite rules, which find nothing here and take most time.
    """

    def should_fold(node: ir.Node) -> bool | None:
        return False if node.op_type == "Transpose" else None

    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=should_fold)
    for tidy in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(size_limit=EXTERNAL_BYTES),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        tidy(model)


def pretranspose_weights(model: ir.Model) -> None:
    """Stores Linear weights as MatMul wants them, under the parameter's name.

    Requires Linear as MatMul(x, Transpose(weight)). Ensures that no weight which only a Transpose reads is transposed
    at run time. A weight that something else reads too (tied embeddings) stays single, with its Transpose.
    """
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if weight is None or weight.const_value is None or weight.name not in model.graph.initializers:
            continue
        if len(weight.uses()) > 1:
            continue
        tensor, perm = weight.const_value, node.attributes["perm"].as_ints()
        name = weight.name
        transposed = ir.Value(
            name=f"{name}.transposed",
            type=weight.type,
            shape=ir.Shape([tensor.shape[axis] for axis in perm]),
            const_value=ir.LazyTensor(
                lambda tensor=tensor, perm=perm, name=name: ir.tensor(
                    tensor.numpy().transpose(perm).copy(), dtype=tensor.dtype, name=name
                ),
                dtype=tensor.dtype,
                shape=ir.Shape([tensor.shape[axis] for axis in perm]),
                name=name,
            ),
        )
        ir.convenience.replace_all_uses_with(node.outputs[0], transposed)
        model.graph.remove(node, safe=True)
        del model.graph.initializers[name]
        transposed.name = name
        model.graph.register_initializer(transposed)


def name_dimensions(model: ir.Model, shapes: dict[str, tuple[Any, ...]]) -> None:
    """Ensures readable dimension names on the graph's inputs and outputs; inner shapes are left to the runtimes."""
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
            output.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs]:
        assert value.name is not None
        value.shape = ir.Shape(shapes[value.name])


def name_nodes(model: ir.Model) -> None:
    """Ensures node names that tell the module they come from: model.layers.0.self_attn.indexer/IndexTopK."""
    seen: dict[str, int] = {}
    for node in model.graph:
        scope = module_of(node)
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        count = seen[name] = seen.get(name, 0) + 1
        node.name = name if count == 1 else f"{name}_{count}"
        node.metadata_props.clear()


def module_of(node: ir.Node) -> str:
    """The dotted path of the torch module that a node was exported from, as torch's exporter recorded it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
    paths = [part.strip(" '\"[]") for part in scopes.split(",")]
    # The last entry is the node itself, the first the exported wrapper; torch marks nodes of no module with a "_" name.
    scope = paths[-2] if len(paths) >= 2 else ""
    return "" if scope.startswith("_") else scope.removeprefix("model.")


def append_functions(model: ir.Model) -> None:
    """Ensures that the body of every operator of domain `dsa` in the graph stands in the file."""
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    used = {node.op_type for node in nodes}
    selections = [node for node in nodes if node.op_type == "IndexTopK"]
    options = any("pool" in node.attributes for node in selections)
    stored = {node.inputs[2].dtype for node in selections}
    keys = next((name for dtype, name in EIGHT_BIT_KEYS.items() if dtype in stored), "model")
    for proto in function_protos(options, keys):
        if proto.name in used:
            function = ir.serde.deserialize_function(proto)
            model.functions[function.identifier()] = function
    if used:
        model.opset_imports[DOMAIN] = 1


def remove_unused(model: ir.Model) -> None:
    """Ensures that every node, weight, function and input leads to an output."""
    for tidy in (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()):
        tidy(model)
    for value in [value for value in model.graph.inputs if not value.uses()]:
        model.graph.inputs.remove(value)


def upcast_bf16(model: ir.Model) -> None:
    """Ensures that nothing in the graph is bf16: weights, inputs and casts become fp32 (for runtimes without bf16)."""
    bf16, fp32 = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.dtype == bf16:
            value.const_value = ir.LazyTensor(
                lambda tensor=tensor, name=value.name: ir.tensor(
                    read_tensor(tensor).numpy().astype("float32"), name=name
                ),
                dtype=fp32,
                shape=ir.Shape(tensor.shape),
                name=value.name,
            )
            value.type = ir.TensorType(fp32)
        else:
            value.const_value = read_tensor(tensor)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.dtype == bf16:
            value.type = ir.TensorType(fp32)
    for node in model.graph:
        for output in node.outputs:
            if output.dtype == bf16:
                output.type = ir.TensorType(fp32)
        for attribute in list(node.attributes.values()):
            if node.op_type == "Cast" and attribute.name == "to" and attribute.as_int() == bf16:
                node.attributes["to"] = ir.AttrInt64("to", fp32)
            elif attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == bf16:
                wide = ir.tensor(attribute.as_tensor().numpy().astype("float32"))
                node.attributes[attribute.name] = ir.AttrTensor(attribute.name, wide)


def upcast_fp8_caches(model: ir.Model) -> None:
    """Ensures that no cache is fp8: what is rounded to fp8 goes back to fp32 before it is stored.

    For runtimes that round to fp8 but have no cache update in it; the same numbers are cached.
    """
    fp8, fp32 = ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.dtype == fp8:
            value.type = ir.TensorType(fp32)
    for node in list(model.graph):
        for output in node.outputs:
            if output.dtype == fp8:
                output.type = ir.TensorType(fp32)
        if node.op_type == "Cast" and node.attributes["to"].as_int() == fp8:
            cast_back(node.outputs[0], fp8)


def cast_back(value: ir.Value, narrow: ir.DataType) -> None:
    """Gives what a node makes the type `narrow`, and its readers a cast of it to the type that it had."""
    node = value.producer()
    assert node is not None and node.graph is not None and value.dtype is not None
    back = ir.node("Cast", [value], {"to": ir.AttrInt64("to", value.dtype)}, name=f"{node.name}/raised")
    (wide,) = back.outputs
    wide.type, wide.shape = value.type, value.shape
    ir.convenience.replace_all_uses_with(value, wide)
    back.replace_input_with(0, value)
    value.type = ir.TensorType(narrow)
    node.graph.insert_after(node, back)


def read_tensor(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor, mapped if external: onnx_ir itself reads no weight file that has several hard links, as ours has."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    offset, shape = int(tensor.offset or 0), ir.Shape(tensor.shape)
    if tensor.dtype == ir.DataType.INT4:
        packed = np.memmap(tensor.path, np.uint8, mode="r", offset=offset, shape=(tensor.nbytes,))
        return ir.PackedTensor(packed, tensor.dtype, shape=shape, name=tensor.name)
    sizes = tuple(int(size) for size in tensor.shape)
    values = np.memmap(tensor.path, tensor.dtype.numpy(), mode="r", offset=offset, shape=sizes)
    return ir.Tensor(values, dtype=tensor.dtype, shape=shape, name=tensor.name)
