"""Times the operators' CPU kernels in ONNX Runtime against their function bodies in standard operators.

    python -m bench.cpu_operators [--out out/bench/cpu_operators.jsonl] [--threads 2]

A graph holds one node for each of several layers, with keys and caches of their own, so that these come from memory as
they do in a model and threads are awake. Both forms run in turn; a time is the median per layer. Shapes are those of
Qwen2.5-0.5B (14 query heads, 2 KV heads of 64, indexer 8 x 64), caches fp32, index keys fp32 or 8-bit integers.
Attention is dense: our kernel against ONNX Runtime's own operator. Both kinds of attention are timed with caches in
fp16 too, which the standard operators have in fp32. The floor: the bytes that must be read, at the bandwidth of a large
copy or sum on this machine, whichever is faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from rich.table import Table

from bench import measure
from bench.floors import cpu_bandwidth
from dsa_export.cli import UserError, console, not_negative, path, positive, run, thread_count, usable_cpus
from dsa_export.files import check_output_file, write_lines
from engines.ort_graph import with_cpu_kernels
from plugins import cpu
from plugins.cxx import BuildFailed
from plugins.registry import DOMAIN, ONNX_OPSET, PLUGIN_ATTRIBUTES, function_protos

HQ, HKV, D, HI, DI = 14, 2, 64, 8, 64
CONTEXTS = (2048, 8192, 32768, 131072)
LAYERS = 8
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32,
         "int64": TensorProto.INT64, "int8": TensorProto.INT8, "uint8": TensorProto.UINT8}  # fmt: skip


@dataclass(frozen=True)
class Case:
    operator: str
    keys: str  # fp32 | int8: of the indexer; of attention, fp32 | fp16: its caches for our kernel
    queries: int
    context: int
    k: int

    def bytes_read(self) -> int:
        """What one layer must read at least: of K and V the rows that some query selects, of random selections so many
        on average."""
        if self.operator == "IndexTopK":
            return self.context * (DI + 4 if self.keys == "int8" else 4 * DI)
        selected = self.context if self.operator == "Attention" else self.k
        rows = self.context * (1 - (1 - selected / self.context) ** self.queries)
        return round(rows) * 2 * HKV * D * (2 if self.keys == "fp16" else 4)

    def inputs(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One layer's, in the order of the operator's inputs."""
        S, C = self.queries, self.context

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        lengths = {"kv_lengths": np.array([C], np.int64)}
        if self.operator != "IndexTopK":
            attended = {"q": normal(1, HQ, S, D), **{name: normal(1, HKV, C, D) for name in ("k_cache", "v_cache")}}
            if self.operator == "Attention":
                return attended | lengths
            chosen = [np.sort(rng.choice(C, self.k, replace=False)) for _ in range(S)]
            return attended | {"indices": np.array([chosen], np.int32)}
        weights = {"index_weights": normal(1, S, HI)}
        if self.keys == "fp32":
            return {"index_q": normal(1, S, HI, DI), **weights, "index_k": normal(1, C, DI), **lengths}
        index_q = rng.integers(-63, 64, (1, S, HI, DI)).astype(np.int8)
        index_k = rng.integers(0, 256, (1, C, DI)).astype(np.uint8)
        scale = {"index_scale": rng.uniform(0.5, 1.5, (1, C)).astype(np.float32)}
        return {"index_q": index_q, **weights, "index_k": index_k, **lengths, **scale}


def cases(contexts: list[int]) -> Iterator[Case]:
    for queries in (1, 128):
        for keys in ("int8", "fp32"):
            yield from (Case("IndexTopK", keys, queries, context, 512) for context in contexts)
        for caches in ("fp32", "fp16"):
            yield from (Case("SparseAttention", caches, queries, context, 512) for context in contexts)
            yield from (Case("Attention", caches, queries, context, 0) for context in contexts)


def session(case: Case, layers: list[dict[str, np.ndarray]], library: Path | None, threads: int) -> Callable[[], Any]:
    """A call of all layers' nodes; library: of our kernels, None for the function bodies."""
    nodes, infos, outputs = [], [], []
    feeds: dict[str, np.ndarray] = {}
    fixed: dict[str, Any] = {"k": case.k} if case.operator == "IndexTopK" else {"scale": D**-0.5}
    domain = "" if case.operator == "Attention" else DOMAIN
    fixed |= PLUGIN_ATTRIBUTES if domain else {"is_causal": 1}
    for number, layer in enumerate(layers):
        if case.keys == "fp16" and library is not None:
            halved = {name: array.astype(np.float16) for name, array in layer.items() if name.endswith("_cache")}
            layer = layer | halved
        names = [f"{name}_{number}" for name in layer]
        feeds |= dict(zip(names, layer.values(), strict=True))
        infos += [helper.make_tensor_value_info(name, TYPES[str(feeds[name].dtype)], None) for name in names]
        kind = TensorProto.INT32 if case.operator == "IndexTopK" else TensorProto.FLOAT
        outputs.append(helper.make_tensor_value_info(f"output_{number}", kind, None))
        if case.operator == "Attention":
            names[3:] = ["", "", "", *names[3:]]
        nodes.append(helper.make_node(case.operator, names, [outputs[-1].name], domain=domain, **fixed))
    bodies = function_protos(False, "int8" if case.keys == "int8" else "model")
    model = helper.make_model(
        helper.make_graph(nodes, "layers", infos, outputs),
        functions=[body for body in bodies if body.name == case.operator],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        with_cpu_kernels(model)
        options.register_custom_ops_library(str(library.resolve()))
    runner = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: runner.run(None, feeds)


def timings(case: Case, library: Path, threads: int, budget: measure.Budget, seed: int) -> dict[str, Any]:
    """One record: median ms per layer of both forms, and how far their results differ."""
    rng = np.random.default_rng(seed)
    layers = [case.inputs(rng) for _ in range(LAYERS)]
    calls = {"kernels": session(case, layers, library, threads), "body": session(case, layers, None, threads)}
    ours, theirs = (np.stack(call()) for call in calls.values())
    if case.operator == "IndexTopK":
        rows = zip(ours.reshape(-1, case.k), theirs.reshape(-1, case.k), strict=True)
        difference: dict[str, float] = {"not_selected_by_both": sum(len(np.setdiff1d(a, b)) for a, b in rows)}
    else:
        difference = {"largest_difference": float(np.abs(ours - theirs).max())}
    times = measure.alternate(calls, budget, on_run=lambda: None)
    per_layer = {f"{form}_ms": round(median(ms) / LAYERS, 4) for form, ms in times.items()}
    return {**asdict(case), **per_layer, **difference}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu_operators", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=path, default=Path("out/bench/cpu_operators.jsonl"), metavar="FILE",
                        help="records as JSON lines (default: %(default)s)")  # fmt: skip
    parser.add_argument("--context", type=positive, nargs="+", default=list(CONTEXTS), metavar="N",
                        help="cached tokens, 512 and more (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--threads", type=thread_count, default=usable_cpus(), metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--runs", type=positive, default=9, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--seed", type=not_negative, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if min(args.context) < 512:
        parser.error("--context must be 512 or more: the operators select 512 tokens")
    check_output_file(args.out)
    try:
        library = cpu.build()
    except BuildFailed as error:
        raise UserError(f"no kernels to time: {error}") from None
    bandwidth = cpu_bandwidth(args.threads)
    machine = {
        **measure.machine(args.threads),
        "gb_per_s": round(bandwidth / 1e9, 1),
        "onnxruntime": onnxruntime.__version__,
    }
    table = Table("operator", "keys, caches", "queries", "context", "kernels, ms", "body, ms", "", "floor")
    records = []
    for case in cases(args.context):
        try:
            record = timings(case, library, args.threads, measure.Budget(args.runs, 0.2, 10.0), args.seed)
        except MemoryError:
            raise UserError(f"no memory for {LAYERS} layers of {case.context:,} tokens: a shorter --context") from None
        floor_ms = case.bytes_read() / bandwidth * 1e3
        records.append(record | {"floor_ms": round(floor_ms, 4), "machine": machine})
        ours, body = record["kernels_ms"], record["body_ms"]
        shape = (case.operator, case.keys, str(case.queries), f"{case.context:,}")
        figures = (f"{ours:.3f}", f"{body:.3f}", f"{body / ours:.1f}×", f"{floor_ms / ours:.0%}")
        table.add_row(*shape, *figures)
        console.print(f"{case.operator} {case.keys} {case.queries} x {case.context:,}: {ours:.3f} ms, {body:.3f} ms")
    write_lines(args.out, records)
    console.print(table)
    console.print(f"{args.threads} threads, {bandwidth / 1e9:.0f} GB/s. Wrote {args.out}")


if __name__ == "__main__":
    run(main)
