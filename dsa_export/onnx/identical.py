"""Proof that dense and sparse graphs differ only in the attention core and the indexer that feeds it.

    python -m dsa_export.onnx.identical out/onnx

Both graphs are walked from their outputs to their inputs in lockstep. Every pair of nodes must have the same operator,
attributes and inputs, and every pair of weights the same bytes. Where the dense graph has `Attention` the sparse graph
must have `dsa::SparseAttention` on the same queries and caches. What the walk did not reach must be the indexer: nodes
that only lead to `dsa::IndexTopK`, and the caches of the index keys.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from google.protobuf.message import DecodeError

from dsa_export.cli import UserError, console, path, run
from dsa_export.files import read_manifest
from dsa_export.onnx.passes import read_tensor
from dsa_export.selection import INDEX_CACHES
from plugins.registry import DOMAIN

DENSE_CORE = ("", "Attention", "")
SPARSE_CORE = (DOMAIN, "SparseAttention", "")
SELECTION = (DOMAIN, "IndexTopK", "")


@dataclass
class Comparison:
    """Counts of nodes: shared ones, cores of either graph, and the sparse graph's indexer."""

    shared: int
    dense_core: int
    sparse_core: int
    indexer: int
    weights: int

    def __str__(self) -> str:
        return (
            f"{self.shared} nodes and {self.weights} weights are the same in both graphs; they differ in "
            f"{self.dense_core} Attention against {self.sparse_core} SparseAttention nodes, fed by {self.indexer} "
            "nodes of the indexer, and in nothing else"
        )


def compare_graphs(dense: ir.Model, sparse: ir.Model) -> Comparison:
    """Raises UserError at the first difference outside the attention core and the indexer."""
    pairs: dict[ir.Value, ir.Value] = {}
    dense_cores: list[ir.Node] = []
    sparse_cores: list[ir.Node] = []
    seen_dense: set[ir.Node] = set()
    seen_sparse: set[ir.Node] = set()
    weights: set[str] = set()

    sparse_outputs = {value.name: value for value in sparse.graph.outputs}
    names = [value.name for value in dense.graph.outputs]
    extra = [name for name in sparse_outputs if name not in names]
    if [name for name in extra if not _is_index_cache(name)] or [n for n in names if n not in sparse_outputs]:
        raise UserError(f"the graphs' outputs differ by more than the index caches: {extra}")

    todo = [(value, sparse_outputs[value.name]) for value in dense.graph.outputs]
    while todo:
        a, b = todo.pop()
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise UserError(f"an input is given in one graph only: {(a or b).name}")
        if a in pairs:
            if pairs[a] is not b:
                raise UserError(f"{a.name} (dense) stands for both {pairs[a].name} and {b.name} (sparse)")
            continue
        pairs[a] = b
        node, other = a.producer(), b.producer()
        if node is None or other is None:
            _compare_leaves(a, b, weights)
            continue
        if a.index() != b.index():
            raise UserError(f"{node.name} and {other.name} are read at different outputs")
        seen_dense.add(node)
        seen_sparse.add(other)
        if _operator(node) == DENSE_CORE and _operator(other) == SPARSE_CORE:
            dense_cores.append(node)
            sparse_cores.append(other)
            if node.attributes["scale"].as_float() != other.attributes["scale"].as_float():
                raise UserError(f"{node.name}: the cores scale differently")
            if "is_causal" not in node.attributes or node.attributes["is_causal"].as_int() != 1:
                raise UserError(f"{node.name} is not causal, as the selection is")
            more = sorted(node.attributes.keys() - {"scale", "is_causal"})
            if more or len(node.inputs) != 7 or any(node.inputs[3:6]):
                raise UserError(
                    f"{node.name} does more than attend to the tokens of a row ({', '.join(more) or 'inputs'})"
                )
            todo += list(zip(node.inputs[:3], other.inputs[:3], strict=True))
            selection = _selection(other)
            if selection is None or _operator(selection) != SELECTION:
                raise UserError(f"{other.name} is not fed by an IndexTopK")
            todo.append((node.inputs[6], selection.inputs[3]))  # the tokens that a query may see
            continue
        _compare_nodes(node, other)
        todo += list(zip(node.inputs, other.inputs, strict=True))

    _check_rest(dense, seen_dense, {core.inputs[6] for core in dense_cores}, "dense")
    indexer = _check_rest(sparse, seen_sparse, {core.inputs[3] for core in sparse_cores}, "sparse")
    selections = {node for node in sparse.graph if _operator(node) == SELECTION}
    if not sparse_cores or selections != {_selection(core) for core in sparse_cores}:
        raise UserError(f"{len(sparse_cores)} sparse cores are fed by {len(selections)} selections")
    return Comparison(len(seen_dense) - len(dense_cores), len(dense_cores), len(sparse_cores), indexer, len(weights))


@dataclass
class SharedWeights:
    """Counts of weights. For variants whose branches have no counterpart in the dense graph."""

    shared: int
    sparse_only: int

    def __str__(self) -> str:
        return (
            f"all {self.shared} weights of the dense graph are the sparse graph's; the sparse graph has "
            f"{self.sparse_only} more, and its attention is other operators"
        )


def compare_weights(dense: ir.Model, sparse: ir.Model) -> SharedWeights:
    """Raises UserError unless every weight of the dense graph is, by name and bytes, one of the sparse graph."""
    weights = [{n: v for n, v in g.graph.initializers.items() if _is_parameter(n)} for g in (dense, sparse)]
    for name, value in weights[0].items():
        if name not in weights[1]:
            raise UserError(f"the sparse graph lacks the weight {name}")
        _compare_leaves(value, weights[1][name], set())
    return SharedWeights(len(weights[0]), len(weights[1]) - len(weights[0]))


def _is_parameter(name: str) -> bool:
    """Not a constant, such as a shape, which the exporter numbers."""
    return name.startswith(("model.", "lm_head."))


def _compare_nodes(node: ir.Node, other: ir.Node) -> None:
    if _operator(node) != _operator(other):
        raise UserError(f"dense has {node.op_type} ({node.name}) where sparse has {other.op_type} ({other.name})")
    attributes = [{k: v.value for k, v in n.attributes.items()} for n in (node, other)]
    if str(attributes[0]) != str(attributes[1]) or len(node.inputs) != len(other.inputs):
        raise UserError(f"{node.op_type} differs: {node.name} {attributes[0]}, {other.name} {attributes[1]}")


def _compare_leaves(a: ir.Value, b: ir.Value, weights: set[str]) -> None:
    """Leaves are graph inputs, the same by name, or weights, the same by bytes."""
    if (a.const_value is None) != (b.const_value is None) or (a.producer() is None) != (b.producer() is None):
        raise UserError(f"{a.name} (dense) and {b.name} (sparse) are not the same kind of value")
    if a.const_value is None:
        if a.name != b.name:
            raise UserError(f"dense reads the input {a.name} where sparse reads {b.name}")
        return
    assert b.const_value is not None
    same_file = _location(a.const_value) is not None and _location(a.const_value) == _location(b.const_value)
    same = (
        a.const_value.dtype == b.const_value.dtype
        and list(a.const_value.shape) == list(b.const_value.shape)
        and (same_file or read_tensor(a.const_value).tobytes() == read_tensor(b.const_value).tobytes())
    )
    if not same:
        raise UserError(f"the weights {a.name} (dense) and {b.name} (sparse) differ")
    weights.add(str(a.name))


def _location(tensor: ir.TensorProtocol) -> tuple[int, int, int] | None:
    """Inode, offset and length of a tensor in the shared weight file: equal places hold equal bytes."""
    if not isinstance(tensor, ir.ExternalTensor):
        return None
    return Path(tensor.path).stat().st_ino, int(tensor.offset or 0), int(tensor.length or 0)


def _check_rest(model: ir.Model, seen: set[ir.Node], feeds_core: set[ir.Value | None], which: str) -> int:
    """The nodes outside the lockstep must all lead into the core's extra inputs or the index caches."""
    allowed: set[ir.Node] = set()
    todo = [*feeds_core, *(value for value in model.graph.outputs if _is_index_cache(value.name))]
    while todo:
        value = todo.pop()
        node = value.producer() if value is not None else None
        if node is None or node in allowed or node in seen:
            continue
        allowed.add(node)
        todo += list(node.inputs)
    for node in model.graph:
        if node not in seen and node not in allowed:
            raise UserError(
                f"{node.name} ({node.op_type}) of the {which} graph belongs neither to both nor to the core"
            )
    return len(allowed)


def _operator(node: ir.Node) -> tuple[str, str, str]:
    return (node.domain, node.op_type, node.overload)


def _selection(core: ir.Node) -> ir.Node | None:
    indices = core.inputs[3]
    return indices.producer() if indices is not None else None


def _is_index_cache(name: str | None) -> bool:
    return name is not None and name.startswith("present.") and name.rpartition(".")[2] in INDEX_CACHES


def compare_folder(folder: Path) -> Comparison:
    """compare_graphs() for an export folder (out/onnx)."""
    made_by = "python -m dsa_export.onnx"
    manifest = read_manifest(folder, "onnx", made_by)
    try:
        if manifest["identical_operators"] is None:
            raise UserError(f"{folder}: its two kinds of attention are other operators, not DSA beside its dense twin")
        paths = [folder / manifest["graphs"][variant]["path"] for variant in ("dense", "sparse")]
        return compare_graphs(*(ir.load(path) for path in paths))
    except (KeyError, TypeError, ValueError, OSError, DecodeError) as error:
        raise UserError(f"{folder} is not as `{made_by}` wrote it ({error}): run that again") from None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dsa_export.onnx.identical", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", nargs="?", type=path, default=Path("out/onnx"), help="the export (default: out/onnx)")
    console.print(str(compare_folder(parser.parse_args(argv).folder)))


if __name__ == "__main__":
    run(main)
