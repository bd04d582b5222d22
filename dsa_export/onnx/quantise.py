"""Weight-only quantisation of exported graphs in ONNX's standard form: DequantizeLinear in blocks, then MatMul.

A block is `block_size` consecutive input features of one output feature; it has one scale and no zero point. ONNX
Runtime fuses the pair into its MatMulNBits kernel when it loads the graph, NVIDIA's parsers read the int4 form. The
integers come from ONNX Runtime's own quantiser, or from calibrate.py. The indexer keeps its type, or takes int8 at
most: what it loses, no later layer can mend. A router of experts keeps its type: it is tiny, and it decides.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from dsa_export.model.checkpoint import INDEXER
from dsa_export.model.decoder import DSAForCausalLM
from dsa_export.model.feed_forward import ROUTER
from dsa_export.onnx.passes import cast_back, read_tensor
from dsa_export.onnx.stored import StoredModel

BITS = {"int4": 4, "int8": 8}
BLOCK_SIZES = (32, 64, 128)
LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Scheme:
    """Which weights become what: `weights` is a key of BITS; the indexer's become int8 or stay."""

    weights: str
    block_size: int
    lm_head: bool
    indexer: bool

    def bits(self, name: str) -> int | None:
        """Bits of a weight of this name; None leaves it as it is."""
        if INDEXER in name:
            return BITS["int8"] if self.indexer else None
        if ROUTER in name:
            return None
        return None if name == LM_HEAD and not self.lm_head else BITS[self.weights]


@dataclass(frozen=True)
class Rounded:
    """A weight [K, N] in int4: integers [K, N] int8 in -8..7, scales [⌈K / block⌉, N] fp32, values of its type."""

    integers: Tensor
    scales: Tensor


def quantise(
    graphs: Collection[ir.Model], stored: StoredModel, scheme: Scheme, rounded: Mapping[str, Rounded]
) -> set[str]:
    """Quantises the weights of all MatMul nodes that the scheme names, the same weight of several graphs once, and
    halves an embedding in fp32 that nothing multiplies.

    rounded: those that are rounded already, by name; all others are rounded to the nearest.

    Requires weights [K, N] as initializers with the names of the torch model's parameters [N, K], which then have the
    values that the graphs now hold: the torch model is the reference of the quantised graphs. Returns the names of the
    quantised ones.
    """
    names = set(stored.names.values())
    done: dict[str, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}
    for graph in graphs:
        dequantised: dict[ir.Value, ir.Value] = {}  # equal small weights were merged: several nodes may read one
        for node in list(graph.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if weight is None or weight.const_value is None or weight.name not in names:
                continue
            bits = scheme.bits(weight.name)
            if bits is None:
                continue
            if weight.name not in done:
                integers, scales = (
                    _packed(rounded[weight.name], weight.const_value)
                    if weight.name in rounded
                    else _quantise(weight.const_value, bits, scheme.block_size)
                )
                done[weight.name] = integers, scales
            if weight not in dequantised:
                inserted = _insert_dequantisation(graph, node, weight, *done[weight.name], scheme.block_size)
                stored.quantised.setdefault(weight.name, partial(_values, inserted, scheme.block_size))
                (dequantised[weight],) = inserted.outputs
            node.replace_input_with(1, dequantised[weight])
    _halve_embedding(graphs, stored)
    return set(done)


def _held(value: ir.Value) -> Tensor:
    """What an initializer holds, in fp32: in memory, or in a file once its graph is saved."""
    return torch.from_numpy(read_tensor(value.const_value).numpy().astype(np.float32))


def _values(dequantisation: ir.Node, block_size: int) -> Tensor:
    """[N, K] fp32: what a DequantizeLinear makes of the integers and scales [K, N] that it reads."""
    integers, scales = (_held(value) for value in dequantisation.inputs)
    return dequantise(integers, scales, block_size).T


def untie(model: DSAForCausalLM) -> None:
    """Gives the output projection a weight of its own: the embedding is looked up, not multiplied, and keeps its
    values."""
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach(), requires_grad=False)


def _halve_embedding(graphs: Iterable[ir.Model], stored: StoredModel) -> None:
    """Stores the embedding in fp16 and casts the rows that are looked up, if nothing else reads it.

    In fp32 it is as large as all that is quantised of a small model. What a bf16 checkpoint holds stays as it is, but
    for numbers below 2^-17, which move by 3e-8 at most.
    """
    fp32, fp16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
    tables = [graph.graph.initializers[EMBEDDING] for graph in graphs if EMBEDDING in graph.graph.initializers]
    tables = [t for t in tables if t.dtype == fp32 and [node.op_type for node in t.consumers()] == ["Gather"]]
    if not tables:
        return
    narrow = stored.value(EMBEDDING).half()
    if not narrow.isfinite().all():
        return
    stored.quantised[EMBEDDING] = partial(_held, tables[0])
    halves = ir.tensor(narrow.numpy(), name=EMBEDDING)
    for table in tables:
        table.const_value, table.type = halves, ir.TensorType(fp16)
        (gather,) = table.consumers()
        cast_back(gather.outputs[0], fp16)


def _quantise(weight: ir.TensorProtocol, bits: int, block_size: int) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """weight [K, N] → int4 or int8 [K, N], scales [⌈K / block⌉, N] of the weight's type."""
    # The module calls logging.basicConfig(level=INFO) when it is imported, which does nothing if there is a handler.
    logging.getLogger().addHandler(logging.NullHandler())
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
        QuantFormat,
    )

    values = weight.numpy().astype(np.float32)
    K, N = values.shape
    # The quantiser writes DequantizeLinear's layout for 4 bits only.
    layout = QuantFormat.QDQ if bits == 4 else QuantFormat.QOperator
    config = DefaultWeightOnlyQuantConfig(block_size, is_symmetric=True, quant_format=layout, bits=bits)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(values)
    integers: ir.TensorProtocol
    if bits == 4:
        integers = ir.PackedTensor(packed, ir.DataType.INT4, shape=ir.Shape((K, N)), name=weight.name)
    else:
        signed = (packed ^ 0x80).view(np.int8)  # [N, blocks, block]: offset binary → two's complement
        # NVIDIA's parsers take negative scales with int4 only; -128 has no counterpart and becomes 127.
        signed = np.where(scales.reshape(N, -1, 1) < 0, -np.maximum(signed, -127), signed)
        integers = ir.tensor(np.ascontiguousarray(signed.reshape(N, -1)[:, :K].T), name=weight.name)
        scales = np.ascontiguousarray(np.abs(scales).reshape(N, -1).T)
    narrow = ir.tensor(scales.astype(weight.dtype.numpy()), dtype=weight.dtype, name=f"{weight.name}.scales")
    return integers, narrow


def _packed(rounded: Rounded, weight: ir.TensorProtocol) -> tuple[ir.TensorProtocol, ir.TensorProtocol]:
    """The same as tensors of the graph: two integers to a byte, the first in its lower half."""
    flat = rounded.integers.numpy().reshape(-1).view(np.uint8) & 0xF
    flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
    shape = ir.Shape(rounded.integers.shape)
    integers = ir.PackedTensor(flat[::2] | flat[1::2] << 4, ir.DataType.INT4, shape=shape, name=weight.name)
    scales = rounded.scales.numpy().astype(weight.dtype.numpy())
    return integers, ir.tensor(scales, dtype=weight.dtype, name=f"{weight.name}.scales")


def dequantise(integers: Tensor, scales: Tensor, block_size: int) -> Tensor:
    """[K, N] and [⌈K / block⌉, N] → [K, N] fp32."""
    values = integers.float()
    for block, scale in zip(values.split(block_size), scales, strict=True):
        block *= scale
    return values


def _insert_dequantisation(
    model: ir.Model,
    node: ir.Node,
    weight: ir.Value,
    integers: ir.TensorProtocol,
    scales: ir.TensorProtocol,
    block_size: int,
) -> ir.Node:
    """Inserts DequantizeLinear(integers, scales) before `node` and returns it; the integers get the weight's name."""
    name = weight.name
    assert name is not None
    del model.graph.initializers[name]
    inputs = [
        ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
        for tensor in (integers, scales)
    ]
    for value in inputs:
        model.graph.register_initializer(value)
    dequantise = ir.node(
        "DequantizeLinear", inputs, {"axis": 0, "block_size": block_size}, name=f"{node.name}/DequantizeLinear"
    )
    dequantise.outputs[0].name = f"{name}.dequantised"
    model.graph.insert_before(node, dequantise)
    return dequantise
