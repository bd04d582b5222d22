"""Times the operators on a GPU against what torch offers, with the physical floor beside each number.

    python -m bench.operators [--out out/bench/operators.jsonl] [--minutes 8]

Every case is checked first; a case that is wrong gets no time. One JSON line per timing. Shapes are those of
Qwen2.5-0.5B (14 query heads, 2 KV heads of 64, indexer 8 x 64), bf16. A time is the median of replays of a CUDA graph
that runs through several sets of inputs, so that they do not come from the L2 cache.

Floors: the bytes that must travel (each input row read once, the output written once) at the bandwidth of a large copy
on this GPU, and the floating-point operations at the rate of a large bf16 matrix product on this GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from dsa_export.cli import UserError, console, run
from plugins.index_topk import index_scores, index_topk
from plugins.sparse_attention import sparse_attention
from plugins.sparse_attention.op import sparse_attention_torch

HQ, HKV, D, HI, DI = 14, 2, 64, 8, 64
SCALE = D**-0.5
DTYPE = torch.bfloat16
OURS = ("index_topk", "sparse_attention", "both operators")
Call = Callable[[dict[str, Tensor]], Any]
CACHED_BYTES = 256 * 2**20  # input sets together exceed this: several times the L2 cache of any GPU


@dataclass
class Case:
    name: str
    B: int
    S: int
    C: int
    k: int
    sets: list[dict[str, Tensor]] = field(default_factory=list)

    def fill(self) -> None:
        """Random inputs; all rows are as long as the capacity, since dense attention takes no lengths."""
        B, S, C = self.B, self.S, self.C
        bytes_a_set = 2 * B * C * (DI + 2 * HKV * D)
        count = max(1, min(16, -(-CACHED_BYTES // bytes_a_set)))
        self.sets = []
        for _ in range(count):
            shapes = {
                "index_q": (B, S, HI, DI), "index_weights": (B, S, HI), "index_k": (B, C, DI),
                "q": (B, HQ, S, D), "k": (B, HKV, C, D), "v": (B, HKV, C, D),
            }  # fmt: skip
            tensors = {name: torch.randn(shape, device="cuda", dtype=DTYPE) for name, shape in shapes.items()}
            tensors["lengths"] = torch.full((B,), C, device="cuda")
            tensors["indices"] = select(tensors, self.k)
            self.sets.append(tensors)


def select(t: dict[str, Tensor], k: int) -> Tensor:
    return index_topk(t["index_q"], t["index_weights"], t["index_k"], t["lengths"], k)


def select_within(t: dict[str, Tensor], k: int, budget: int) -> Tensor:
    from plugins.index_topk import kernel

    return kernel.index_topk(t["index_q"], t["index_weights"], t["index_k"], t["lengths"], k, budget)


def attend(t: dict[str, Tensor], indices: Tensor) -> Tensor:
    return sparse_attention(t["q"], t["k"], t["v"], indices, SCALE)


# ---- what is compared


def dense(backend: SDPBackend, masked: bool = True) -> Call:
    def attention(t: dict[str, Tensor]) -> Tensor:
        S, C = t["q"].shape[2], t["k"].shape[2]
        mask = None if S == 1 or not masked else causal_lower_right(S, C)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(t["q"], t["k"], t["v"], mask, scale=SCALE, enable_gqa=True)

    return attention


def gather_and_sdpa(t: dict[str, Tensor]) -> Tensor:
    """One query token a sequence: the selected rows copied together, then dense attention over them."""
    rows = t["indices"][:, 0].long()[:, None, :, None].expand(-1, HKV, -1, D)
    return F.scaled_dot_product_attention(
        t["q"], t["k"].gather(2, rows), t["v"].gather(2, rows), scale=SCALE, enable_gqa=True
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
        return compiled(t["q"], t["k"], t["v"], block_mask=masks[id(t)], scale=SCALE, enable_gqa=True)

    return attention


# ---- correctness


def check(case: Case) -> str:
    """Empty if both operators are right on the first set, else what is wrong. Rows at the corners are looked at."""
    t = case.sets[0]
    output = attend(t, t["indices"])
    for b in {0, case.B - 1}:
        for s in {0, case.S - 1}:
            visible = case.C - case.S + s + 1
            row = t["indices"][b, s].long()
            count = min(case.k, visible)
            if not (row[count:] == -1).all() or len(row[:count].unique()) != count or row[:count].max() >= visible:
                return f"index_topk: row {b},{s} is not {count} distinct visible tokens"
            one = slice(b, b + 1), slice(s, s + 1)
            scored = t["index_q"][one], t["index_weights"][one], t["index_k"][b : b + 1]
            exact, plain = (
                index_scores(*(x.to(dtype) for x in scored))[0, 0, :visible] for dtype in (torch.float32, DTYPE)
            )
            kth = exact.topk(count).values[-1]
            budget = 4 * (plain - exact).abs().max()
            if exact[row[:count]].min() < kth - budget:
                return f"index_topk: row {b},{s} holds a token far below the k-th best score"
            q, k, v = t["q"][b : b + 1, :, s : s + 1], t["k"][b : b + 1], t["v"][b : b + 1]
            exact = sparse_attention_torch(q.float(), k.float(), v.float(), t["indices"][one], SCALE)
            plain = sparse_attention_torch(q, k, v, t["indices"][one], SCALE).float()
            error = (output[b : b + 1, :, s : s + 1].float() - exact).norm()
            if not error <= 2 * (plain - exact).norm() + 0.002 * exact.norm():
                return f"sparse_attention: row {b},{s} has error {error:.3g}"
    for _ in range(20):
        again = select(t, case.k)
        if not torch.equal(again, t["indices"]) or not torch.equal(attend(t, again), output):
            return "20 repeats are not bitwise equal"
    return ""


# ---- timing


def milliseconds(call: Call, sets: list[dict[str, Tensor]], budget_ms: float = 300) -> float:
    """Median time of one call: replays of a graph that calls once per set."""
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
        while (sum(times) < budget_ms and len(times) < 200) or len(times) < 5:
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
    bytes_per_ms: float
    flops_per_ms: float


def measure_machine() -> Machine:
    source = torch.randn(2**29, device="cuda")  # 2 GiB: bytes read plus bytes written
    target = torch.empty_like(source)
    copy = milliseconds(lambda t: t["target"].copy_(t["source"]), [{"source": source, "target": target}])
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=DTYPE)
    product = milliseconds(lambda t: t["a"] @ t["b"], [{"a": a, "b": b}])
    return Machine(torch.cuda.get_device_name(), 2 * source.nbytes / copy, 2 * 8192**3 / product)


def floors(case: Case) -> dict[str, tuple[float, float]]:
    """Bytes and floating-point operations that each part cannot do without."""
    B, S, C, k = case.B, case.S, case.C, min(case.k, case.C)
    visible = C - S / 2
    index = 2 * B * (C * DI + S * HI * (DI + 1)) + 4 * B * S * k, 2 * B * S * visible * HI * DI
    if k == C:  # everything is selected: the scores are skipped
        index = 4 * B * S * k, 0
    # In a prefill chunk many tokens select the same rows: no more than the whole cache has to travel.
    rows = min(S * k, C)
    attention = 2 * B * (2 * HKV * rows * D + 2 * HQ * S * D) + 4 * B * S * k, 4 * B * S * HQ * k * D
    whole = 2 * B * (2 * HKV * C * D + 2 * HQ * S * D), 4 * B * S * HQ * visible * D
    both = index[0] + attention[0], index[1] + attention[1]
    return {"index_topk": index, "sparse_attention": attention, "both": both, "dense": whole}


def timings(case: Case) -> Iterator[tuple[str, str, Call]]:
    """(name, whose floor, call) of everything that is timed in this case."""
    k = case.k
    yield "index_topk", "index_topk", lambda t: select(t, k)
    yield "sparse_attention", "sparse_attention", lambda t: attend(t, t["indices"])
    yield "both operators", "both", lambda t: attend(t, select(t, k))
    if case.S > 1:  # what a larger or smaller tile of scores would change
        for mebibytes in (16, 64, 128):
            yield f"index_topk, {mebibytes} MiB", "index_topk", partial(select_within, k=k, budget=mebibytes * 2**20)
    yield "dense flash", "dense", dense(SDPBackend.FLASH_ATTENTION)
    yield "dense cuDNN", "dense", dense(SDPBackend.CUDNN_ATTENTION)
    if case.S > 1:  # nearly the same work (half a chunk more keys), in case a backend refuses the mask
        yield "dense flash, no mask", "dense", dense(SDPBackend.FLASH_ATTENTION, masked=False)
    else:
        yield "torch.topk on scores", "index_topk", lambda t: torch_topk(t, k)
        yield "gather + SDPA", "sparse_attention", gather_and_sdpa
        if case.B * case.C <= 2**20:
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
    ]
    grid = [Case("decode", B, 1, C * thousand, k) for B in (1, 8, 32) for C in (8, 32, 64, 128) for k in (512, 2048)]
    known = {(c.B, c.C, c.k) for c in first if c.name == "decode"}
    return first + [c for c in grid if (c.B, c.C, c.k) not in known]


def measure(case: Case, machine: Machine) -> Iterator[dict[str, Any]]:
    from plugins.index_topk.kernel import largest_workspace as topk_workspace
    from plugins.sparse_attention.kernel import largest_workspace as attention_workspace

    shape = {"case": case.name, "B": case.B, "S": case.S, "C": case.C, "k": case.k}
    shape |= {"dtype": "bf16", "gpu": machine.name}
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
            yield {**shape, "what": name, "error": (str(error).splitlines() or [type(error).__name__])[0]}
            continue
        moved, operations = floors(case)[part]
        floor_bytes, floor_flops = moved / machine.bytes_per_ms, operations / machine.flops_per_ms
        rows[name] = {
            **shape, "what": name, "ms": ms, "floor_bytes_ms": floor_bytes, "floor_flops_ms": floor_flops,
            "fraction_of_floor": max(floor_bytes, floor_flops) / ms, "sets": len(case.sets),
            "peak_extra_bytes": torch.cuda.max_memory_allocated() - before,
        }  # fmt: skip
    best_dense = min((row["ms"] for name, row in rows.items() if name.startswith("dense")), default=None)
    for name, row in rows.items():
        if name == "both operators":
            row["workspace_bytes"] = topk_workspace(case.B, case.S, case.C, case.k) + attention_workspace(
                case.B, case.S, HQ, HKV, D, case.k
            )
            row["times_faster_than_dense"] = best_dense / row["ms"] if best_dense else None
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/bench/operators.jsonl"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="begins no case after this (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("bench.operators times GPU kernels: no CUDA GPU is visible to torch on this machine")
    started = time.monotonic()
    torch.manual_seed(0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = measure_machine()
    bandwidth, rate = machine.bytes_per_ms / 1e9, machine.flops_per_ms / 1e9
    console.print(f"{machine.name}: copy {bandwidth:.2f} TB/s, bf16 product {rate:.0f} TFLOP/s")
    failed = False
    with args.out.open("w") as lines:
        for case in cases():
            label = f"{case.name} B={case.B} S={case.S} C={case.C} k={case.k}"
            if time.monotonic() - started > args.minutes * 60:
                console.print(f"{label}: left out, {args.minutes:g} minutes are over")
                lines.write(json.dumps({"case": label, "left_out": True}) + "\n")
                continue
            console.print(label)
            for row in measure(case, machine):
                lines.write(json.dumps(row) + "\n")
                lines.flush()
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
