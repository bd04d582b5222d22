"""What a call must cost at least: bytes to read and operations to do, at the rates that this machine reaches.

Rates are measured in the same run: the bandwidth of large copies and reductions, and the rate of a large matrix
product in the runtime that is compared. A floor is the larger of the two times. The predicted speed-up is the ratio of
the floors: what sparsity would bring if every kernel of both engines were perfect.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.matrix import Case
from bench.measure import timed
from engines import ort
from engines.artifacts import Engine

COPY_BYTES = 64 * 2**20
PRODUCT = 1536
FEW_ROWS = 8
PACKED_BITS = {"int4": 4, "int8": 8}
PACKED_BLOCK = 32
TRIES = 7
WARM_UP_CALLS = 100


@dataclass(frozen=True)
class Rates:
    """bytes_per_s, flops_per_s: what the device reaches; `how`: by which measurement."""

    bytes_per_s: float
    flops_per_s: float
    how: str


@dataclass(frozen=True)
class Floor:
    bytes: int
    flops: int
    ms_by_bytes: float
    ms_by_flops: float

    @property
    def ms(self) -> float:
        return max(self.ms_by_bytes, self.ms_by_flops)


def floor(engine: Engine, case: Case, rates: Rates) -> Floor:
    must_read, must_do = call_bytes(engine, case), call_flops(engine, case)
    return Floor(must_read, must_do, must_read / rates.bytes_per_s * 1e3, must_do / rates.flops_per_s * 1e3)


def call_bytes(engine: Engine, case: Case) -> int:
    """Bytes that one call must read: every weight once, and the rows of the caches that it attends to."""
    cached = engine.cache_bytes_read(case.context, case.queries, case.capacity)
    return engine.manifest["step_weight_bytes"] + case.batch * cached


def call_flops(engine: Engine, case: Case) -> int:
    """Operations of one call, multiply and add counted: the weights (the head for one token a row; all experts, which
    the graph computes whatever the router chooses), scores and sums over the visible or selected tokens, and the
    indexer's scores over the visible ones, where there are more than k; of native sparse attention scores and sums over
    the compressed rows and the window instead."""
    model = engine.model
    head = model.hidden_size * model.vocab_size
    body = 2 * (engine.manifest["step_weights"] - head) * case.queries + 2 * head
    last = case.context
    visible = case.queries * (2 * last - case.queries + 1) // 2  # sum over the call's queries
    attention = 4 * model.query_heads * model.head_dim
    if engine.variant != "sparse" or case.capacity <= engine.dense_slots:
        return case.batch * (body + model.layers * attention * visible)
    selected = sum(min(position, k) for k in engine.topk for position in range(last - case.queries + 1, last + 1))
    options, others = engine.selection, 0
    if engine.reduces_to_dense:
        scoring = sum(last > k for k in engine.topk[:: options.get("index_share", 1)])
        others = scoring * 2 * model.index_heads * model.index_dim * visible // options.get("index_pool", 1)
    elif "nsa_window" in options:  # two more branches in the indexer's place
        spans = range(last - case.queries + 1, last + 1)
        window = sum(min(position, options["nsa_window"]) for position in spans)
        others = attention * model.layers * (visible // options["nsa_stride"] + window)
    return case.batch * (body + attention * selected + others)


def facts(engine_floor: Floor, dense_floor: Floor, ms: float) -> dict[str, Any]:
    """The fields of a record: the floor, the fraction of it that was reached, and the predicted speed-ups."""
    return {
        "floor_bytes": engine_floor.bytes,
        "floor_flops": engine_floor.flops,
        "floor_ms_by_bytes": engine_floor.ms_by_bytes,
        "floor_ms_by_flops": engine_floor.ms_by_flops,
        "floor_ms": engine_floor.ms,
        "floor_fraction": engine_floor.ms / ms,
        "speedup_predicted": dense_floor.ms / engine_floor.ms,
    }


def rates(backend: str, dtype: str, precision: str, threads: int) -> Rates:
    """Measures the device that the backend runs on: the GPU where torch sees one and the backend uses it.

    dtype: of activations; precision: of weights.
    """
    if runs_on_gpu(backend):
        from dsa_export.model.checkpoint import DTYPES

        return cuda_rates(DTYPES[dtype])
    bits = PACKED_BITS.get(precision) if backend == "ort" else None
    bandwidth, flops = cpu_bandwidth(threads), cpu_flops(threads, bits)
    product = f"{precision if bits else 'fp32'} product of {PRODUCT}² in ONNX Runtime"
    return Rates(bandwidth, flops, f"copies and sums of {COPY_BYTES >> 20} MiB, {threads} at a time; {product}")


def runs_on_gpu(backend: str) -> bool:
    if backend == "ort":
        return ort.runs_on_gpu()
    import torch

    return torch.cuda.is_available()


def cpu_bandwidth(threads: int) -> float:
    """Bytes per second: the faster of copying (both directions counted) and summing, the best of TRIES."""
    parts = [(np.ones(COPY_BYTES, np.uint8), np.empty(COPY_BYTES, np.uint8)) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:

        def copy_all() -> None:
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))

        def sum_all() -> None:
            list(pool.map(lambda part: part[0].view(np.float32).sum(), parts))

        copy_all()
        copying, summing = (min(timed(call) for _ in range(TRIES)) for call in (copy_all, sum_all))
    return max(2 * COPY_BYTES * threads / copying, COPY_BYTES * threads / summing)


def cpu_flops(threads: int, bits: int | None = None) -> float:
    """Operations per second of a matrix product in ONNX Runtime, the best of TRIES and of few and many rows.

    bits: of packed weights (None: fp32), which ONNX Runtime multiplies with activations that it rounds to 8 bits.
    """
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    if bits is None:
        weights = {"weights": np.ones((PRODUCT, PRODUCT), np.float32)}
        product = helper.make_node("MatMul", ["rows", *weights], ["out"])
    else:
        blocks = PRODUCT // PACKED_BLOCK
        weights = {
            "weights": np.full((PRODUCT, blocks, PACKED_BLOCK * bits // 8), 0x77, np.uint8),
            "scales": np.ones((PRODUCT, blocks), np.float32),
        }
        product = helper.make_node(
            "MatMulNBits", ["rows", *weights], ["out"], domain="com.microsoft",
            K=PRODUCT, N=PRODUCT, bits=bits, block_size=PACKED_BLOCK, accuracy_level=4,
        )  # fmt: skip
    rows, out = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", PRODUCT]) for name in ("rows", "out"))
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([product], "product", [rows], [out], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def rate(count: int) -> float:
        feed = {"rows": np.ones((count, PRODUCT), np.float32)}
        seconds = min(timed(lambda: session.run(None, feed)) for _ in range(TRIES))
        return 2 * count * PRODUCT**2 / seconds

    return max(rate(FEW_ROWS), rate(PRODUCT))


def cuda_rates(dtype: Any) -> Rates:
    """The same of a GPU: 1 GiB, and a product of 8192² in the engine's type."""
    import torch

    def seconds(call: Any) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(WARM_UP_CALLS):  # an idle GPU has low clocks
            call()
        times = []
        for _ in range(TRIES):
            start.record()
            call()
            stop.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(stop) * 1e-3)
        return min(times)

    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    matrix = torch.ones(8192, 8192, dtype=dtype, device="cuda")
    copying, summing = seconds(lambda: target.copy_(source)), seconds(source.sum)
    bandwidth = max(2 * source.nbytes / copying, source.nbytes / summing)
    flops = 2 * 8192**3 / seconds(lambda: matrix @ matrix)
    name = torch.cuda.get_device_name()
    return Rates(
        bandwidth, flops, f"copy and sum of 1 GiB and {str(dtype).removeprefix('torch.')} product of 8192² on {name}"
    )
