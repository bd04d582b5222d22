"""dsa::SparseAttention on a GPU: attend over the selected rows, then combine. One source for the interpreter, torch
and the plugin.

Shapes: B batch, S query tokens, C cache capacity, Hq/Hkv query/KV heads (group G = Hq / Hkv), D head size, K = k,
P splits. See op.py.

    attend    program (token, KV head, 16 of its query heads, split of K): gathers its part of the selected K and V rows
              once, for all these heads (padded to 16, the least a tensor core multiplies), online softmax in fp32
    combine   P > 1 only: program (token, query head, up to 128 of D) adds the partial results

Rows are multiplied in two parts, MAIN + TAIL = D: Triton's blocks are powers of two, and rows need not be. A latent row
of DeepSeek-V3 has 512 + 64. For powers of two there is no tail.

The workspace holds, for P > 1, each part's weighted sum [B * S, Hq, P, D], maximum and denominator
[2, B * S, Hq, P], all fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plugins.dependent import begin, launch_options, let_next_start
from plugins.variant import AOT_DTYPES, COMMON_OPTIONS, Variant

GROUP_PADDED = tl.constexpr(16)
MAX_SPLITS = tl.constexpr(32)
# For D up to 64, see `block_k` and `attend_programs`.
BLOCK_K = 32  # rows gathered at a time
LONG_ROW = 128  # of longer rows WIDE_BLOCK_K are gathered at a time: shared memory bounds them
WIDE_BLOCK_K = 16
CHUNK = 128  # of a row that one program of combine adds
ATTEND_PROGRAMS = 1056  # eight on each multiprocessor of the largest GPU: enough loads in flight to fill the memory bus

MAX_GROUP = 128
HEAD_SIZES = (64, 128, 576)  # that the plugin library holds
MIN_HEAD_SIZE, MAX_HEAD_SIZE, HEAD_SIZE_STEP = 16, 576, 8  # from torch: a row of 8 fp16 numbers starts at 16 bytes
MAX_K = 4096
MAX_CAPACITY = 2**20
MAX_TOKENS = 2**17  # of one call, B * S


def block_k(D: int) -> int:
    return BLOCK_K * triton.next_power_of_2(max(D, 64)) // 64 if D <= LONG_ROW else WIDE_BLOCK_K


def row_parts(D: int) -> tuple[int, int]:
    """(MAIN, TAIL): powers of two, MAIN + TAIL ≥ D; TAIL is 0 or at least 16, the least of a product."""
    main = triton.next_power_of_2(D + 1) // 2
    return main, max(triton.next_power_of_2(D - main), 16) if main < D else 0


def head_blocks(Hq: int, Hkv: int) -> int:
    return triton.cdiv(Hq // Hkv, GROUP_PADDED.value)


def attend_programs(D: int) -> int:
    return ATTEND_PROGRAMS * 64 // max(D, 64)


def plan(B: int, S: int, Hq: int, Hkv: int, D: int, k: int) -> tuple[int, int]:
    """(entries per split, splits): splits K where tokens and heads alone would leave multiprocessors idle."""
    wanted = min(max(attend_programs(D) // (B * S * Hkv * head_blocks(Hq, Hkv)), 1), MAX_SPLITS.value)
    share = triton.cdiv(triton.cdiv(k, wanted), block_k(D)) * block_k(D)
    return share, triton.cdiv(k, share)


def workspace_bytes(B: int, S: int, Hq: int, Hkv: int, D: int, k: int) -> int:
    _, splits = plan(B, S, Hq, Hkv, D, k)
    return 4 * B * S * Hq * splits * (D + 2) if splits > 1 else 0


def largest_workspace(B: int, S: int, Hq: int, Hkv: int, D: int) -> int:
    """What any call of at most this shape needs: B * S * splits never exceeds the larger of the two terms."""
    rows = min(B * S * MAX_SPLITS.value, max(attend_programs(D) // (Hkv * head_blocks(Hq, Hkv)), 1))
    return 4 * rows * Hq * (D + 2)


@triton.jit(do_not_specialize=["S", "C", "HKV", "GROUP", "K", "SHARE", "P", "tokens"])
def attend_kernel(
    q,  # [B, HKV * GROUP, S, D]
    k_cache,  # [B, HKV, C, D]
    v_cache,  # [B, HKV, C, D]
    indices,  # [B, S, K] int32
    output,  # [B, HKV * GROUP, S, D], written if P = 1
    sums,  # [B * S, HKV * GROUP, P, D] fp32, written if P > 1
    statistics,  # [2, B * S, HKV * GROUP, P] fp32: maximum (base 2), denominator
    scale,
    tokens,  # B * S
    S,
    C,
    HKV,
    GROUP,
    K,
    SHARE,
    P,
    D: tl.constexpr,
    MAIN: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Program (split, 16 heads of the group, KV head, token), the split fastest: their attention over SHARE of the
    token's K entries."""
    begin(ARCH)
    if P > 1:  # else the next kernel is not ours
        let_next_start(ARCH)
    split = tl.program_id(0) % P
    blocks = tl.cdiv(GROUP, GROUP_PADDED)
    rest = tl.program_id(0) // P
    block_heads = rest % blocks * GROUP_PADDED + tl.arange(0, GROUP_PADDED)
    kv_head = rest // blocks % HKV
    token = (rest // (blocks * HKV)).to(tl.int64)
    batch = token // S
    heads = kv_head * GROUP + block_heads
    is_head = block_heads < GROUP
    dims = tl.arange(0, MAIN)

    q_rows = (batch * HKV * GROUP + heads) * S + token % S
    q_GD = tl.load(q + q_rows[:, None] * D + dims[None, :], mask=is_head[:, None], other=0.0)
    if WIDEN:  # the interpreter multiplies the bit patterns of bf16
        q_GD = q_GD.to(tl.float32)
    if TAIL > 0:
        tail_dims = MAIN + tl.arange(0, TAIL)
        in_tail = tail_dims < D
        tail_mask = is_head[:, None] & in_tail[None, :]
        q_tail_GD = tl.load(q + q_rows[:, None] * D + tail_dims[None, :], mask=tail_mask, other=0.0)
        tail_sum_GD = tl.zeros((GROUP_PADDED, TAIL), tl.float32)
        if WIDEN:
            q_tail_GD = q_tail_GD.to(tl.float32)
    scale *= 1.4426950408889634  # exp(x) = exp2(x * log2(e))
    cache = (batch * HKV + kv_head) * C * D
    k_cache += cache
    v_cache += cache
    indices += token * K

    maximum_G = tl.full((GROUP_PADDED,), float("-inf"), tl.float32)
    denominator_G = tl.zeros((GROUP_PADDED,), tl.float32)
    sum_GD = tl.zeros((GROUP_PADDED, MAIN), tl.float32)
    start = split * SHARE
    stop = tl.minimum(start + SHARE, K)
    entries = start + tl.arange(0, BLOCK_K)
    following = tl.load(indices + entries, mask=entries < stop, other=-1)  # on their way a round before their rows are
    for block in range(start, stop, BLOCK_K):
        slots = following
        entries = block + BLOCK_K + tl.arange(0, BLOCK_K)
        following = tl.load(indices + entries, mask=entries < stop, other=-1)
        valid = (slots >= 0) & (slots < C)
        rows = slots[:, None] * D + dims[None, :]
        k_KD = tl.load(k_cache + rows, mask=valid[:, None], other=0.0)
        v_KD = tl.load(v_cache + rows, mask=valid[:, None], other=0.0)
        if WIDEN:
            k_KD = k_KD.to(tl.float32)
        scores = tl.dot(q_GD, tl.trans(k_KD), input_precision=PRECISION)
        if TAIL > 0:
            tail_rows = slots[:, None] * D + tail_dims[None, :]
            in_tail_row = valid[:, None] & in_tail[None, :]
            k_tail_KD = tl.load(k_cache + tail_rows, mask=in_tail_row, other=0.0)
            v_tail_KD = tl.load(v_cache + tail_rows, mask=in_tail_row, other=0.0)
            if WIDEN:
                k_tail_KD = k_tail_KD.to(tl.float32)
            scores = tl.dot(q_tail_GD, tl.trans(k_tail_KD), scores, input_precision=PRECISION)
        scores *= scale
        scores = tl.where(valid[None, :], scores, float("-inf"))
        new_maximum = tl.maximum(maximum_G, tl.max(scores, 1))
        # A block without a valid entry leaves the maximum at -inf; -inf - -inf would be NaN.
        finite = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        p_GK = tl.exp2(scores - finite[:, None])
        rescale = tl.exp2(maximum_G - finite)
        denominator_G = denominator_G * rescale + tl.sum(p_GK, 1)
        p_GK = p_GK.to(v_KD.dtype)
        if WIDEN:
            p_GK = p_GK.to(tl.float32)
            v_KD = v_KD.to(tl.float32)
        sum_GD = tl.dot(p_GK, v_KD, sum_GD * rescale[:, None], input_precision=PRECISION)
        if TAIL > 0:
            if WIDEN:
                v_tail_KD = v_tail_KD.to(tl.float32)
            tail_sum_GD = tl.dot(p_GK, v_tail_KD, tail_sum_GD * rescale[:, None], input_precision=PRECISION)
        maximum_G = new_maximum

    if P == 1:
        divisor_G1 = tl.where(denominator_G == 0.0, 1.0, denominator_G)[:, None]
        result = (sum_GD / divisor_G1).to(output.dtype.element_ty)
        tl.store(output + q_rows[:, None] * D + dims[None, :], result, mask=is_head[:, None])
        if TAIL > 0:
            result = (tail_sum_GD / divisor_G1).to(output.dtype.element_ty)
            tl.store(output + q_rows[:, None] * D + tail_dims[None, :], result, mask=tail_mask)
    else:
        parts = (token * HKV * GROUP + heads) * P + split
        tl.store(sums + parts[:, None] * D + dims[None, :], sum_GD, mask=is_head[:, None])
        if TAIL > 0:
            tl.store(sums + parts[:, None] * D + tail_dims[None, :], tail_sum_GD, mask=tail_mask)
        tl.store(statistics + parts, maximum_G, mask=is_head)
        tl.store(statistics + tokens.to(tl.int64) * HKV * GROUP * P + parts, denominator_G, mask=is_head)


@triton.jit(do_not_specialize=["S", "HQ", "P", "tokens"])
def combine_kernel(
    sums,  # [B * S, HQ, P, D] fp32
    statistics,  # [2, B * S, HQ, P] fp32
    output,  # [B, HQ, S, D], written
    tokens,  # B * S
    S,
    HQ,
    P,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Program (CHUNK of D, query head, token): adds the parts of a head's attention."""
    begin(ARCH)
    chunks: tl.constexpr = (D + CHUNK - 1) // CHUNK
    head = tl.program_id(0) // chunks % HQ
    token = (tl.program_id(0) // (chunks * HQ)).to(tl.int64)
    splits = tl.arange(0, MAX_SPLITS)
    dims = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    in_row = dims < D
    parts = (token * HQ + head) * P + splits
    here = splits < P
    maximum_P = tl.load(statistics + parts, mask=here, other=float("-inf"))
    denominator_P = tl.load(statistics + tokens.to(tl.int64) * HQ * P + parts, mask=here, other=0.0)
    sum_PD = tl.load(sums + parts[:, None] * D + dims[None, :], mask=here[:, None] & in_row[None, :], other=0.0)
    maximum = tl.max(maximum_P, 0)
    weight_P = tl.exp2(maximum_P - tl.where(maximum == float("-inf"), 0.0, maximum))
    denominator = tl.sum(denominator_P * weight_P, 0)
    result = tl.sum(sum_PD * weight_P[:, None], 0) / tl.where(denominator == 0.0, 1.0, denominator)
    row = (token // S * HQ + head) * S + token % S
    tl.store(output + row * D + dims, result.to(output.dtype.element_ty), mask=in_row)


def sparse_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, indices: Tensor, scale: float) -> Tensor:
    """Launches the kernels; arguments and result as `plugins.sparse_attention.op.sparse_attention`, validated."""
    B, Hq, S, D = q.shape
    Hkv, C = k_cache.shape[1:3]
    K = indices.shape[-1]
    output = torch.empty_like(q)
    if output.numel() == 0:
        return output
    share, splits = plan(B, S, Hq, Hkv, D, K)
    parts = B * S * Hq * splits if splits > 1 else 0
    sums = torch.empty(parts * D, dtype=torch.float32, device=q.device)
    statistics = torch.empty(2 * parts, dtype=torch.float32, device=q.device)
    dtype = "fp32" if q.dtype == torch.float32 else "16 bits"
    precision = "ieee" if dtype == "fp32" else "tf32"
    on_device = launch_options(q.device)
    attend_kernel[(B * S * Hkv * head_blocks(Hq, Hkv) * splits,)](
        q, k_cache, v_cache, indices, output, sums, statistics,
        scale, B * S, S, C, Hkv, Hq // Hkv, K, share, splits,
        **attend_constants(D), PRECISION=precision, WIDEN=triton.knobs.runtime.interpret,
        **attend_options(dtype, D), **on_device,
    )  # fmt: skip
    if splits > 1:
        constants = combine_constants(D)
        combine_kernel[(B * S * Hq * triton.cdiv(D, constants["CHUNK"]),)](
            sums, statistics, output, B * S, S, Hq, splits, **constants, **COMBINE_OPTIONS, **on_device
        )
    return output


def attend_constants(D: int) -> dict[str, int]:
    main, tail = row_parts(D)
    return {"D": D, "MAIN": main, "TAIL": tail, "BLOCK_K": block_k(D)}


def combine_constants(D: int) -> dict[str, int]:
    return {"D": D, "CHUNK": min(triton.next_power_of_2(D), CHUNK)}


COMBINE_OPTIONS = {"num_warps": 4, "num_stages": 1, **COMMON_OPTIONS}


def attend_options(dtype: str, D: int) -> dict[str, Any]:
    warps, stages = (4, 2) if D > 64 else (1, 3)
    if dtype == "fp32":
        return {"num_warps": warps, "num_stages": 1, **COMMON_OPTIONS}
    # With 144 registers, three of the four programs that a multiprocessor is to run would fit.
    registers = {"maxnreg": 128} if 64 < D <= LONG_ROW else {}
    return {"num_warps": warps, "num_stages": stages, **registers, **COMMON_OPTIONS}


def variants() -> Iterator[Variant]:
    """What the plugin library holds."""
    for dtype, D in product(AOT_DTYPES, HEAD_SIZES):
        tensor = f"*{dtype}"
        yield Variant(
            name=f"sparse_attention_attend_{dtype}_{D}",
            kernel=attend_kernel,
            pointers={
                "q": tensor, "k_cache": tensor, "v_cache": tensor, "indices": "*i32", "output": tensor,
                "sums": "*fp32", "statistics": "*fp32", "scale": "fp32",
            },
            constants={**attend_constants(D), "PRECISION": "tf32", "WIDEN": False},
            options=attend_options(dtype, D),
        )  # fmt: skip
        yield Variant(
            name=f"sparse_attention_combine_{dtype}_{D}",
            kernel=combine_kernel,
            pointers={"sums": "*fp32", "statistics": "*fp32", "output": tensor},
            constants=combine_constants(D),
            options=COMBINE_OPTIONS,
        )


def constants() -> dict[str, int]:
    """The numbers that the C++ shell shares with `plan`."""
    return {
        "MAX_SPLITS": MAX_SPLITS.value,
        "ATTEND_PROGRAMS": ATTEND_PROGRAMS,
        "BLOCK_K": BLOCK_K,
        "LONG_ROW": LONG_ROW,
        "WIDE_BLOCK_K": WIDE_BLOCK_K,
        "CHUNK": CHUNK,
        "GROUP_PADDED": GROUP_PADDED.value,
        "MAX_GROUP": MAX_GROUP,
        "MAX_K": MAX_K,
        "MAX_CAPACITY": MAX_CAPACITY,
        "MAX_TOKENS": MAX_TOKENS,
    }
