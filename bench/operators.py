"""Times the operators on a GPU against what torch offers, with the physical floor beside each number.

    python -m bench.operators [--out out/bench/operators.jsonl] [--minutes 8]

Every case is checked first; a case that is wrong gets no time. One JSON line per timing. Shapes are those of
Qwen2.5-0.5B (14 query heads, 2 KV heads of 64, indexer 8 x 64) and of 7B (28 heads, 4 of 128), bf16. A time is the
median of replays of a CUDA graph that runs through several sets of inputs, so that they do not come from the L2 cache.

Floors: the bytes that must travel (each input row read once, the output written once) at the bandwidth of a large copy
or sum on this GPU, whichever is faster, and the floating-point operations at the rate of a large bf16 matrix product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from dsa_export.cli import UserError, console, first_line, path, run
from dsa_export.files import check_output_file
from plugins.index_topk import index_scores, index_topk
from plugins.index_topk.rounding import round_keys
from plugins.sparse_attention import sparse_attention
from plugins.sparse_attention.op import sparse_attention_torch

HI, DI = 8, 64
DTYPE = torch.bfloat16
OURS = ("index_topk", "sparse_attention", "both operators")
Call = Callable[[dict[str, Tensor]], Any]
CACHED_BYTES = 256 * 2**20  # what input sets read of each cache together: several times the L2 cache of any GPU
MEMORY, MEMORY_SHARE = 24 * 2**30, 0.6  # input sets take at most so many bytes, and at most this share of what is free
MAX_SETS, MAX_CACHES = 1024, 256
WARM_UP_COPIES = 400
FLEX_CASE = (8, 128 * 1024, 2048)  # B, C, k
MIN_CALLS = 8  # in a graph, whose launch then weighs little
BUDGET_MS = 100


@dataclass
class Case:
    name: str
    B: int
    S: int
    C: int
    k: int
    sinks: int = 0
    window: int = 0
    pool: int = 1
    fp8: bool = False
    Hq: int = 14
    Hkv: int = 2
    D: int = 64
    sets: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def options(self) -> dict[str, int]:
        """Attributes of IndexTopK beside k."""
        return {"sinks": self.sinks, "window": self.window, "pool": self.pool}

    @property
    def row_bytes(self) -> int:
        """K and V of a token."""
        return 4 * self.Hkv * self.D

    @property
    def index_rows(self) -> int:
        """Index keys of a sequence."""
        return -(-self.C // self.pool)

    @property
    def index_row_bytes(self) -> int:
        return DI + 4 if self.fp8 else 2 * DI

    @property
    def bytes_read(self) -> tuple[int, int]:
        """Of index keys, and of selected rows of K and V, by one set of inputs."""
        rows = min(self.S * self.k, self.C)
        return self.B * self.index_rows * self.index_row_bytes, self.B * rows * self.row_bytes

    def counts(self, memory: int) -> tuple[int, int]:
        """Sets of inputs, and caches that they are spread over: as many as fit into `memory` bytes, at least one."""
        scored, selected = self.bytes_read
        bytes_a_set = scored + self.B * self.C * self.row_bytes
        sets = max(1, min(-(-CACHED_BYTES // min(selected, scored)), MAX_SETS))
        return sets, max(1, min(sets, memory // bytes_a_set, MAX_CACHES))

    def fill(self, device: str = "cuda") -> None:
        """Random inputs; all rows are as long as the capacity, since dense attention takes no lengths."""
        B, S, C, Hkv, D = self.B, self.S, self.C, self.Hkv, self.D
        free = torch.cuda.mem_get_info()[0] if device == "cuda" else MEMORY
        count, caches = self.counts(min(MEMORY, int(MEMORY_SHARE * free)))
        query_shapes = {"index_q": (B, S, HI, DI), "index_weights": (B, S, HI), "q": (B, self.Hq, S, D)}
        cache_shapes = {"index_k": (B, self.index_rows, DI), "k": (B, Hkv, C, D), "v": (B, Hkv, C, D)}

        def randoms(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
            return {name: torch.randn(shape, device=device, dtype=DTYPE) for name, shape in shapes.items()}

        self.sets = []
        for number in range(count):
            tensors = randoms(query_shapes)
            tensors["lengths"] = torch.full((B,), C, device=device)
            if number >= caches:  # other rows of a cache that is there
                shared = (*cache_shapes, "index_scale")
                tensors |= {name: t for name, t in self.sets[number % caches].items() if name in shared}
            else:
                tensors |= randoms(cache_shapes)
            if self.fp8 and number < caches:
                tensors["index_k"], tensors["index_scale"] = round_keys(tensors["index_k"], "fp8")
            tensors["indices"] = select(tensors, self)
            self.sets.append(tensors)


def select(t: dict[str, Tensor], case: Case) -> Tensor:
    scored = t["index_q"], t["index_weights"], t["index_k"], t["lengths"]
    return index_topk(*scored, case.k, case.sinks, case.window, case.pool, t.get("index_scale"))


def select_within(t: dict[str, Tensor], case: Case, budget: int) -> Tensor:
    from plugins.index_topk import kernel

    scored = t["index_q"], t["index_weights"], t["index_k"], t["lengths"]
    return kernel.index_topk(*scored, case.k, case.sinks, case.window, case.pool, t.get("index_scale"), budget)


def attend(t: dict[str, Tensor], indices: Tensor) -> Tensor:
    return sparse_attention(t["q"], t["k"], t["v"], indices, scale(t))


def scale(t: dict[str, Tensor]) -> float:
    return t["q"].shape[-1] ** -0.5


# ---- what is compared


def dense(backend: SDPBackend, masked: bool = True) -> Call:
    def attention(t: dict[str, Tensor]) -> Tensor:
        S, C = t["q"].shape[2], t["k"].shape[2]
        mask = None if S == 1 or not masked else causal_lower_right(S, C)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask, scale=scale(t), enable_gqa=True)

    return attention


def gather_and_sdpa(t: dict[str, Tensor]) -> Tensor:
    """One query token a sequence: the selected rows copied together, then dense attention over them."""
    _, heads, _, size = t["k"].shape
    rows = t["indices"][:, 0].long()[:, None, :, None].expand(-1, heads, -1, size)
    return F.scaled_dot_product_attention(
        t["q"], t["k"].gather(2, rows), t["v"].gather(2, rows), scale=scale(t), enable_gqa=True
    )


def torch_topk(t: dict[str, Tensor], k: int) -> Tensor:
    return index_scores(t["index_q"], t["index_weights"], t["index_k"]).topk(k, dim=-1).indices


def flex(case: Case) -> Call:
    """flex_attention with a block mask of the selection; making the mask is not timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def attention(t: dict[str, Tensor]) -> Tensor:
        if id(t) not in masks:  # the warm-up's call
            chosen = torch.zeros(case.B, case.C, dtype=torch.bool, device="cuda")
            chosen.scatter_(1, t["indices"][:, 0].long(), True)
            masks[id(t)] = create_block_mask(lambda b, h, q, kv: chosen[b, kv], case.B, None, 1, case.C, device="cuda")
        return compiled(t["q"], t["k"], t["v"], block_mask=masks[id(t)], scale=scale(t), enable_gqa=True)

    return attention


# ---- correctness


def check_selection(t: dict[str, Tensor], case: Case, b: int, s: int) -> str:
    """Empty if a row of indices holds what it must: whole groups, those always selected, the best of the others."""
    visible, pool, device = case.C - case.S + s + 1, case.pool, t["indices"].device
    first = torch.arange(0, visible, pool, device=device)
    count = min(case.k // pool, len(first))
    tokens = t["indices"][b, s].long()
    tokens = tokens[tokens >= 0].sort().values
    groups = (tokens // pool).unique()
    whole = (groups[:, None] * pool + torch.arange(pool, device=device)).flatten()
    if len(groups) != count or not torch.equal(tokens, whole[whole < visible]):
        return f"is not {count} distinct groups of visible tokens"
    always = (first < case.sinks) | (first + pool > visible - case.window)  # and the incomplete group
    if not torch.isin(always.nonzero().flatten(), groups).all():
        return "lacks a token that is always selected"
    scored = t["index_q"][b : b + 1, s : s + 1], t["index_weights"][b : b + 1, s : s + 1], t["index_k"][b : b + 1]
    exact, plain = (index_scores(*(x.to(dtype) for x in scored))[0, 0] for dtype in (torch.float32, DTYPE))
    if "index_scale" in t:
        exact, plain = exact * t["index_scale"][b], plain * t["index_scale"][b]
    exact, plain = exact[: len(first)], plain[: len(first)]
    budget = 4 * (plain - exact).abs().max()
    ranked = exact.masked_fill(always, torch.inf)
    if ranked[groups].min() < ranked.topk(count).values[-1] - budget:
        return "holds a token far below the k-th best score"
    return ""


def check(case: Case) -> str:
    """Empty if both operators are right on the first set, else what is wrong. Rows at the corners are looked at."""
    t = case.sets[0]
    output = attend(t, t["indices"])
    for b in {0, case.B - 1}:
        for s in {0, case.S - 1}:
            if wrong := check_selection(t, case, b, s):
                return f"index_topk: row {b},{s} {wrong}"
            one = slice(b, b + 1), slice(s, s + 1)
            q, k, v = t["q"][b : b + 1, :, s : s + 1], t["k"][b : b + 1], t["v"][b : b + 1]
            exact = sparse_attention_torch(q.float(), k.float(), v.float(), t["indices"][one], scale(t))
            plain = sparse_attention_torch(q, k, v, t["indices"][one], scale(t)).float()
            error = (output[b : b + 1, :, s : s + 1].float() - exact).norm()
            if not error <= 2 * (plain - exact).norm() + 0.002 * exact.norm():
                return f"sparse_attention: row {b},{s} has error {error:.3g}"
    for _ in range(20):
        again = select(t, case)
        if not torch.equal(again, t["indices"]) or not torch.equal(attend(t, again), output):
            return "20 repeats are not bitwise equal"
    return ""


# ---- timing


def milliseconds(call: Call, sets: list[dict[str, Tensor]]) -> float:
    """Median time of one call: replays of a graph that calls once per set, or more often for very few sets."""
    sets = sets * -(-MIN_CALLS // len(sets))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for t in sets:
            call(t)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for t in sets:
                call(t)
        times: list[float] = []
        while (sum(times) < BUDGET_MS and len(times) < 200) or len(times) < 5:
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return statistics.median(times[1:]) / len(sets)


@dataclass(frozen=True)
class Machine:
    name: str
    copy_bytes_per_ms: float  # of a large copy, both directions counted: what the targets are in
    bytes_per_ms: float  # of that or of a large sum, whichever is faster
    flops_per_ms: float


def measure_machine() -> Machine:
    source = torch.randn(2**29, device="cuda")  # 2 GiB: bytes read plus bytes written
    target = torch.empty_like(source)
    for _ in range(WARM_UP_COPIES):  # an idle GPU has low clocks
        target.copy_(source)
    # A kernel: in a graph, copy_ becomes a transfer by a copy engine, at two thirds of the speed.
    copy = milliseconds(lambda t: torch.neg(t["source"], out=t["target"]), [{"source": source, "target": target}])
    total = milliseconds(lambda t: torch.sum(t["source"]), [{"source": source}])
    copied, read = 2 * source.nbytes / copy, source.nbytes / total
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=DTYPE)
    product = milliseconds(lambda t: t["a"] @ t["b"], [{"a": a, "b": b}])
    return Machine(torch.cuda.get_device_name(), copied, max(copied, read), 2 * 8192**3 / product)


def floors(case: Case) -> dict[str, tuple[float, float]]:
    """Bytes and floating-point operations that each part cannot do without."""
    B, S, C, k = case.B, case.S, case.C, min(case.k, case.C)
    visible = C - S / 2
    index_bytes = B * (case.index_rows * case.index_row_bytes + 2 * S * HI * (DI + 1)) + 4 * B * S * k
    index: tuple[float, float] = index_bytes, 2 * B * S * visible / case.pool * HI * DI
    if k == C:  # everything is selected: the scores are skipped
        index = 4 * B * S * k, 0
    # In a prefill chunk many tokens select the same rows: no more than the whole cache has to travel.
    rows = min(S * k, C)
    queries = case.Hq * S * case.D
    attention = B * (case.row_bytes * rows + 4 * queries) + 4 * B * S * k, 4 * B * queries * k
    whole = B * (case.row_bytes * C + 4 * queries), 4 * B * queries * visible
    both = index[0] + attention[0], index[1] + attention[1]
    return {"index_topk": index, "sparse_attention": attention, "both": both, "dense": whole}


def timings(case: Case) -> Iterator[tuple[str, str, Call]]:
    """(name, whose floor, call) of everything that is timed in this case."""
    yield "index_topk", "index_topk", lambda t: select(t, case)
    yield "sparse_attention", "sparse_attention", lambda t: attend(t, t["indices"])
    yield "both operators", "both", lambda t: attend(t, select(t, case))
    if case.S > 1:  # what a larger or smaller tile of scores would change
        for mebibytes in (32, 64, 256):
            yield (
                f"index_topk, {mebibytes} MiB",
                "index_topk",
                partial(select_within, case=case, budget=mebibytes * 2**20),
            )
    yield "dense flash", "dense", dense(SDPBackend.FLASH_ATTENTION)
    yield "dense cuDNN", "dense", dense(SDPBackend.CUDNN_ATTENTION)
    if case.S > 1:  # nearly the same work (half a chunk more keys), in case a backend refuses the mask
        yield "dense flash, no mask", "dense", dense(SDPBackend.FLASH_ATTENTION, masked=False)
    else:
        if not case.fp8 and case.options == {"sinks": 0, "window": 0, "pool": 1}:
            yield "torch.topk on scores", "index_topk", lambda t: torch_topk(t, case.k)
        yield "gather + SDPA", "sparse_attention", gather_and_sdpa
        if (case.B, case.C, case.k) == FLEX_CASE:  # every shape is compiled for long
            yield "flex_attention with a mask", "sparse_attention", flex(case)


def cases() -> list[Case]:
    """The targets first, then the grid that shows where sparse attention begins to win."""
    thousand = 1024
    first = [
        Case("decode", 32, 1, 128 * thousand, 2048),
        Case("decode", 64, 1, 32 * thousand, 2048),
        Case("decode", 1, 1, 128 * thousand, 2048),
        Case("decode", 1, 1, 32 * thousand, 2048),
        Case("prefill", 1, 1024, 128 * thousand, 2048),
        Case("short", 32, 1, 2 * thousand, 2048),
        Case("sinks and window", 32, 1, 128 * thousand, 2048, sinks=4, window=128),
        Case("fp8", 32, 1, 128 * thousand, 2048, fp8=True),
        Case("pooled", 32, 1, 128 * thousand, 2048, pool=4),
        Case("pooled fp8", 32, 1, 128 * thousand, 2048, sinks=4, window=128, pool=4, fp8=True),
        Case("prefill fp8", 1, 1024, 128 * thousand, 2048, fp8=True),
        Case("prefill pooled", 1, 1024, 128 * thousand, 2048, pool=4),
        *(Case("heads of 128", B, 1, 32 * thousand, 2048, Hq=28, Hkv=4, D=128) for B in (32, 1)),
    ]
    grid = [Case("decode", B, 1, C * thousand, k) for B in (1, 8, 32) for C in (8, 32, 64, 128) for k in (512, 2048)]
    known = {(c.B, c.C, c.k) for c in first if c.name == "decode"}
    return first + [c for c in grid if (c.B, c.C, c.k) not in known]


def measure(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    from plugins.index_topk.plan import largest_workspace as topk_workspace
    from plugins.sparse_attention.kernel import largest_workspace as attention_workspace

    shape = {"case": case.name, "B": case.B, "S": case.S, "C": case.C, "k": case.k}
    shape |= case.options | {"index_k": "fp8" if case.fp8 else "bf16"}
    shape |= {"Hq": case.Hq, "Hkv": case.Hkv, "D": case.D, "dtype": "bf16", "gpu": machine.name}
    case.fill()
    if wrong := check(case):
        yield {**shape, "error": wrong}
        return
    rows: dict[str, dict[str, Any]] = {}
    for name, part, call in timings(case):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        try:
            ms = milliseconds(call, case.sets)
        except Exception as error:
            if name in OURS:
                raise
            # An alternative that does not take this shape; torch and its compiler have many kinds of saying so.
            yield {**shape, "what": name, "error": first_line(error)}
            continue
        moved, operations = floors(case)[part]
        floor_bytes, floor_flops = moved / machine.bytes_per_ms, operations / machine.flops_per_ms
        rows[name] = {
            **shape, "what": name, "ms": ms, "floor_bytes_ms": floor_bytes, "floor_flops_ms": floor_flops,
            "fraction_of_floor": max(floor_bytes, floor_flops) / ms, "sets": len(case.sets),
            "fraction_of_copy": moved / machine.copy_bytes_per_ms / ms,
            "peak_extra_bytes": torch.cuda.max_memory_allocated() - before,
        }  # fmt: skip
    best_dense = min((row["ms"] for name, row in rows.items() if name.startswith("dense")), default=None)
    for name, row in rows.items():
        if name == "both operators":
            row["workspace_bytes"] = topk_workspace(
                case.B, case.S, case.index_rows, case.k // case.pool
            ) + attention_workspace(case.B, case.S, case.Hq, case.Hkv, case.D)
            row["times_faster_than_dense"] = best_dense / row["ms"] if best_dense else None
        yield row


def rows_of(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    """The rows of measure(), and one that says so where the GPU's memory did not suffice."""
    try:
        yield from measure(case, machine)
    except torch.OutOfMemoryError:
        shape = {"case": case.name, "B": case.B, "S": case.S, "C": case.C, "k": case.k}
        yield {**shape, "left_out": "this GPU has too little memory"}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.operators", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=path, default=Path("out/bench/operators.jsonl"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="begins no case after this (default: %(default)s)")
    args = parser.parse_args(argv)
    check_output_file(args.out)
    if not torch.cuda.is_available():
        raise UserError("bench.operators times GPU kernels: no CUDA GPU is visible to torch on this machine")
    started = time.monotonic()
    torch.manual_seed(0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = measure_machine()
    copy, most, rate = machine.copy_bytes_per_ms / 1e9, machine.bytes_per_ms / 1e9, machine.flops_per_ms / 1e9
    console.print(f"{machine.name}: copy {copy:.2f}, copy or sum {most:.2f} TB/s, bf16 product {rate:.0f} TFLOP/s")
    failed = False
    with args.out.open("w") as lines:
        for case in cases():
            label = f"{case.name} B={case.B} S={case.S} C={case.C} k={case.k}"
            if time.monotonic() - started > args.minutes * 60:
                why = f"{args.minutes:g} minutes are over"
                console.print(f"{label}: left out, {why}")
                lines.write(json.dumps({"case": label, "left_out": why}) + "\n")
                continue
            console.print(label)
            for row in rows_of(case, machine):
                lines.write(json.dumps(row) + "\n")
                lines.flush()
                if "left_out" in row:
                    console.print(f"  left out: {row['left_out']}")
                    continue
                if "error" in row:
                    failed |= "what" not in row
                    console.print(f"  {row.get('what', 'WRONG'):28} {row['error']}")
                    continue
                gain = row.get("times_faster_than_dense")
                console.print(
                    f"  {row['what']:28} {row['ms'] * 1e3:9.1f} us   floors {row['floor_bytes_ms'] * 1e3:8.1f} (bytes) "
                    f"{row['floor_flops_ms'] * 1e3:8.1f} (FLOP) us   {row['fraction_of_floor']:5.0%} of the floor"
                    + (f"   {gain:.2f}x dense" if gain else "")
                )
            case.sets.clear()
            torch.cuda.empty_cache()
    console.print(f"{args.out}")
    if failed:
        raise UserError("an operator gave a wrong result: see above")


if __name__ == "__main__":
    run(main)
