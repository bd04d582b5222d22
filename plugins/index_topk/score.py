"""score: every score, once, as a key."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from plugins.dependent import begin
from plugins.index_topk.keys import ALWAYS, NOTHING, SMALLEST, TILE, flip, visible_tokens
from plugins.index_topk.plan import PREFILL_COLUMNS, ROW_ALIGNMENT
from plugins.variant import COMMON_OPTIONS

E4M3_SCALE = tl.constexpr(2.0**120)


@triton.jit
def decode_e4m3(bits, TYPE: tl.constexpr, ARCH: tl.constexpr):
    """e4m3 from its bits, exactly. Before sm_89 by integer operations; the exponents' biases are 7 and 127."""
    if ARCH >= 89:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(TYPE)
    else:  # Triton compiles what stands behind a branch that returns
        bits = bits.to(tl.int32)
        number = (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * E4M3_SCALE
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), number).to(TYPE)


@triton.jit
def scale_to_fp16(rows):
    """bf16 rows as fp16 numbers up to 2^15, and the powers of two [N] fp32 that they are to be multiplied with.

    e4m3 becomes fp16 in a quarter of the instructions that bf16 takes. Only numbers 2^31 times smaller than the row's
    largest lose bits, far less than the dot product in fp32 rounds.
    """
    rows = rows.to(tl.float32)
    largest = tl.max(tl.abs(rows), 1)
    exponent = tl.minimum(tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 15), 254)
    up, down = (268 - exponent) << 23, (exponent - 14) << 23
    scaled = (rows * up.to(tl.float32, bitcast=True)[:, None]).to(tl.float16)
    return scaled, down.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=[*TILE, "K", "HI", "SINKS", "WINDOW", "BLOCKS"])
def score_kernel(
    index_q,  # [B, S, HI, DI]
    index_weights,  # [B, S, HI]
    index_k,  # [B, C, DI]; FP8: uint8, the bits of e4m3
    kv_lengths,  # [B] int64
    index_scale,  # [B, C] fp32; FP8 only
    keys,  # [R, C'] int32, workspace
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    HI,
    K,
    POOL,
    SINKS,  # groups
    WINDOW,  # tokens
    BLOCKS,
    HI_PADDED: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Program (range of BLOCKS * BLOCK_C tokens, BLOCK_S query tokens, sequence): the keys of their scores.

    What is always selected (sinks, window, an incomplete group) gets the largest key there is.
    """
    begin(ARCH)
    query_blocks = tl.cdiv(query_tile, BLOCK_S)
    # Decoding reads a key once: it must not push the scores out of the L2 cache, which the next kernels read.
    KEEP: tl.constexpr = "evict_first" if HI_PADDED * BLOCK_S < PREFILL_COLUMNS else ""
    batch_local = tl.program_id(1) // query_blocks
    query_local = tl.program_id(1) % query_blocks * BLOCK_S
    batch = (first_batch + batch_local).to(tl.int64)
    query = first_query + query_local

    last_query = tl.minimum(query + BLOCK_S, tl.minimum(first_query + query_tile, S)) - 1
    seen = visible_tokens(kv_lengths, batch, last_query, S, C * POOL)
    start = tl.program_id(0) * BLOCKS * BLOCK_C
    stop = tl.minimum(start + BLOCKS * BLOCK_C, tl.cdiv(seen, POOL))
    if (seen <= K * POOL) | (start >= stop):
        return
    complete = seen // POOL  # an incomplete group has no key yet

    # Columns: head-major pairs (head, query), so that the sum over heads adds registers instead of lanes.
    columns = tl.arange(0, HI_PADDED * BLOCK_S)
    heads = columns // BLOCK_S
    queries = query + columns % BLOCK_S
    real = (heads < HI) & (queries <= last_query)
    rows = (batch * S + queries) * HI + heads
    dims = tl.arange(0, DI)
    q_ND = tl.load(index_q + rows[:, None] * DI + dims[None, :], mask=real[:, None], other=0.0)
    weights_N = tl.load(index_weights + rows, mask=real, other=0.0).to(tl.float32)
    if FP8 and index_q.dtype.element_ty == tl.bfloat16:
        q_ND, scale_N = scale_to_fp16(q_ND)
        weights_N *= scale_N
    key_type: tl.constexpr = q_ND.dtype
    if WIDEN:  # the interpreter multiplies the bit patterns of bf16
        q_ND = q_ND.to(tl.float32)
    q_DN = tl.trans(q_ND)

    row_keys = tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    outputs = tl.arange(0, BLOCK_S)
    local_rows = (batch_local * query_tile + query_local + outputs).to(tl.int64)
    keys_S = keys + local_rows * row_keys
    row_exists = query + outputs <= last_query
    # The first group that is in the window or incomplete: complete ones hold no later token.
    recent_S = visible_tokens(kv_lengths, batch, query + outputs - WINDOW, S, C * POOL) // POOL
    index_k += batch * C * DI

    for block in range(start, stop, BLOCK_C):
        tokens = block + tl.arange(0, BLOCK_C)
        has_key = tokens < tl.minimum(stop, complete)
        places = index_k + tokens[:, None] * DI + dims[None, :]
        k_CD = tl.load(places, mask=has_key[:, None], other=0, eviction_policy=KEEP)
        if FP8:
            k_CD = decode_e4m3(k_CD, key_type, ARCH)
        if WIDEN:
            k_CD = k_CD.to(tl.float32)
        dots = tl.dot(k_CD, q_DN, input_precision=PRECISION)
        activations = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weighted = activations * weights_N[None, :]
        scores = tl.sum(tl.reshape(weighted, (BLOCK_C, HI_PADDED, BLOCK_S)), axis=1)
        if FP8:
            scale_C = tl.load(index_scale + batch * C + tokens, mask=has_key, other=0.0)
            scores *= scale_C[:, None]
        # Numbers below the smallest normal one, and -0.0, count as 0.0.
        scores = tl.where(tl.abs(scores) < SMALLEST, 0.0, scores)
        key = flip(scores.to(tl.int32, bitcast=True))
        always = (tokens < SINKS)[:, None] | (tokens[:, None] >= recent_S[None, :])
        key = tl.where(always, ALWAYS, tl.minimum(tl.maximum(key, NOTHING + 1), ALWAYS - 1))  # NaN ranks below
        tl.store(keys_S[None, :] + tokens[:, None], key, mask=row_exists[None, :])


def score_options(dtype: str, decode: bool) -> dict[str, Any]:
    if dtype == "fp32":
        return {"num_warps": 4, "num_stages": 1, **COMMON_OPTIONS}
    stages = {"num_warps": 4, "num_stages": 4} if decode else {"num_warps": 4, "num_stages": 3}
    return {**stages, **COMMON_OPTIONS}
