"""dsa::IndexTopK on a GPU: score, histogram, filter, finish. One source for the interpreter, torch and the plugin.

Shapes: B batch, S query tokens, Hi indexer heads, Di indexer head size, m = pool, C index keys (G in op.py),
K = k / m; see op.py. With m > 1 a "token" of this file is a group of m tokens, one index key: positions become groups
at the beginning (`visible_groups`), and the selected groups tokens at the end.
A row is one query token of one sequence. Rows are worked through in tiles, so that the scores of a tile stay in the
L2 cache; the workspace holds, for the R rows of a tile:

    keys      [R, C']          the scores as 32-bit keys of the same order (C' = C rounded up to ROW_ALIGNMENT)
    counts    [R, P, BINS]     histogram of the keys' highest 11 bits, one per split of the row
    list      [R, LIST]        ascending indices of the tokens at or above the threshold's bin
    state     [R, 4]           threshold bin, number of tokens above it, number of tokens at or above it

Four launches a tile, none of which waits for another program, and no atomic: the result does not depend on timing.

    score      keys of all visible tokens: tensor cores, one read of the index keys
    histogram  counts of each split
    filter     finds the bin that holds the K-th largest key; lists the tokens at or above it, in index order
    finish     resolves the remaining 21 bits among the listed tokens, writes the K indices, ascending, and -1

Rows with at most K visible tokens skip the first three and get 0, 1, 2, ...

FORCED: sinks, a window, or pool > 1 (whose incomplete last group is always selected). The histogram, the first to read
the keys, gives what is always selected the largest key there is, and the ordinary selection does the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plugins.variant import AOT_DTYPES, COMMON_OPTIONS, Variant

ROW_ALIGNMENT = tl.constexpr(128)  # C' is a multiple of it
DECODE_COLUMNS = 16  # (head, query) pairs that a program scores at a time, S <= DECODE_QUERIES
PREFILL_COLUMNS = 128
DECODE_QUERIES = 8
SELECT_BLOCK = tl.constexpr(4096)  # keys that the selection reads at a time
BINS = tl.constexpr(2048)
ZERO_BIN = tl.constexpr(1024)  # the highest 11 bits of the key of 0.0; holds nothing else, see `score_kernel`
E4M3_SCALE = tl.constexpr(2.0**120)
MAX_SPLITS = 32
SPLITS_READ = tl.constexpr(8)
SCORE_PROGRAMS = 512  # enough to fill the largest GPU while every program still pipelines several blocks
SELECT_PROGRAMS = 264
MAX_BLOCKS = 16
DEFAULT_WORKSPACE = 32 * 2**20  # scores beyond the L2 cache (40-50 MB on A100 and H100) would travel to memory and back

HEADS_PADDED = (4, 8, 16)
HEAD_SIZES = (64, 128)
MAX_HEADS = 16
MAX_K = 4096
MAX_CAPACITY = 2**20


@dataclass(frozen=True)
class Plan:
    """How a problem is cut. The C++ shell computes the same numbers; a test compares the two."""

    batch_tile: int  # sequences per tile
    query_tile: int  # query tokens per tile
    block_s: int  # query tokens per scoring program
    blocks: int  # blocks of block_c tokens per scoring program
    splits: int  # selection programs per row
    listed: int  # entries of a row's list
    workspace: int  # bytes


def padded_heads(heads: int) -> int:
    return next(padded for padded in HEADS_PADDED if heads <= padded)


def row_entries(C: int, k: int) -> tuple[int, int]:
    """Entries of a row's keys and of its list."""
    return triton.cdiv(C, ROW_ALIGNMENT.value) * ROW_ALIGNMENT.value, max(2 * SELECT_BLOCK.value, 4 * k)


def workspace_bytes(rows: int, C: int, k: int) -> int:
    """Workspace of a tile of `rows` rows. SELECT_PROGRAMS: rows * splits is at most that, or splits is 1."""
    return 4 * (rows * (sum(row_entries(C, k)) + BINS.value + 4) + SELECT_PROGRAMS * BINS.value)


def largest_workspace(B: int, S: int, C: int, k: int, budget: int = DEFAULT_WORKSPACE) -> int:
    """What any call of at most this shape needs."""
    return min(workspace_bytes(B * S, C, k), max(budget, workspace_bytes(1, C, k)))


def _even_tile(count: int, most: int, step: int = 1) -> int:
    """Cuts `count` into the fewest tiles of at most `most`, about equally large, multiples of `step` if possible."""
    stepped = most > step
    most = most // step * step if stepped else most
    tile = triton.cdiv(count, triton.cdiv(count, most))
    return min(count, triton.cdiv(tile, step) * step) if stepped else tile


def block_c(Di: int) -> int:
    """Tokens that a program scores at a time: 16 KB of keys for either head size."""
    return 128 * 64 // max(Di, 64)


def plan(B: int, S: int, C: int, Hi: int, Di: int, k: int, budget: int = DEFAULT_WORKSPACE) -> Plan:
    """Cuts the rows into tiles whose workspace fits into `budget` bytes, or into tiles of one row."""
    columns = DECODE_COLUMNS if S <= DECODE_QUERIES else PREFILL_COLUMNS
    block_s = columns // padded_heads(Hi)
    capacity, listed = row_entries(C, k)
    fixed = workspace_bytes(0, C, k)
    rows = max(1, (budget - fixed) // (workspace_bytes(1, C, k) - fixed))
    query_tile = _even_tile(S, rows, step=block_s)
    batch_tile = _even_tile(B, rows // query_tile)
    work = batch_tile * triton.cdiv(query_tile, block_s) * (capacity // block_c(Di))
    blocks = min(max(work // SCORE_PROGRAMS, 1), MAX_BLOCKS)
    rows = batch_tile * query_tile
    splits = min(max(SELECT_PROGRAMS // rows, 1), MAX_SPLITS, triton.cdiv(C, SELECT_BLOCK.value))
    return Plan(batch_tile, query_tile, block_s, blocks, splits, listed, workspace_bytes(rows, C, k))


@triton.jit
def visible_tokens(kv_lengths, batch, query, S, capacity):
    """Tokens that a query of the sequence sees."""
    length = tl.load(kv_lengths + batch)
    return tl.minimum(tl.maximum(length - S + query + 1, 0), capacity).to(tl.int32)


@triton.jit
def visible_groups(kv_lengths, batch, query, S, C, POOL, FORCED: tl.constexpr):
    """Groups of which a query of the sequence sees a token."""
    if FORCED:
        groups = tl.cdiv(visible_tokens(kv_lengths, batch, query, S, C * POOL), POOL)
    else:
        groups = visible_tokens(kv_lengths, batch, query, S, C)
    return groups


@triton.jit
def decode_e4m3(bits):
    """e4m3 from its bits, exact in fp32; hardware converts from sm_89 on. The exponents' biases are 7 and 127."""
    bits = bits.to(tl.int32)
    number = (((bits & 0x7F) << 20) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True) * E4M3_SCALE
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number)


@triton.jit(do_not_specialize=["first_batch", "first_query", "query_tile", "S", "C", "HI", "K", "BLOCKS"])
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
    BLOCKS,
    HI_PADDED: tl.constexpr,
    DI: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Program (range of BLOCKS * BLOCK_C tokens, BLOCK_S query tokens, sequence): the keys of their scores.

    Of groups (POOL > 1) only complete ones are scored.
    """
    query_blocks = tl.cdiv(query_tile, BLOCK_S)
    batch_local = tl.program_id(1) // query_blocks
    query_local = tl.program_id(1) % query_blocks * BLOCK_S
    batch = (first_batch + batch_local).to(tl.int64)
    query = first_query + query_local

    last_query = tl.minimum(query + BLOCK_S, tl.minimum(first_query + query_tile, S)) - 1
    visible = visible_tokens(kv_lengths, batch, last_query, S, C * POOL)
    start = tl.program_id(0) * BLOCKS * BLOCK_C
    stop = tl.minimum(start + BLOCKS * BLOCK_C, visible // POOL)
    if (visible <= K * POOL) | (start >= stop):
        return

    # Columns: head-major pairs (head, query), so that the sum over heads adds registers instead of lanes.
    columns = tl.arange(0, HI_PADDED * BLOCK_S)
    heads = columns // BLOCK_S
    queries = query + columns % BLOCK_S
    real = (heads < HI) & (queries <= last_query)
    rows = (batch * S + queries) * HI + heads
    dims = tl.arange(0, DI)
    q_ND = tl.load(index_q + rows[:, None] * DI + dims[None, :], mask=real[:, None], other=0.0)
    weights_N = tl.load(index_weights + rows, mask=real, other=0.0).to(tl.float32)
    if WIDEN:  # the interpreter multiplies the bit patterns of bf16
        q_ND = q_ND.to(tl.float32)
    q_DN = tl.trans(q_ND)

    row_keys = tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    outputs = tl.arange(0, BLOCK_S)
    local_rows = (batch_local * query_tile + query_local + outputs).to(tl.int64)
    keys_S = keys + local_rows * row_keys
    row_exists = query + outputs <= last_query
    index_k += batch * C * DI

    for block in range(start, stop, BLOCK_C):
        tokens = block + tl.arange(0, BLOCK_C)
        k_CD = tl.load(index_k + tokens[:, None] * DI + dims[None, :], mask=(tokens < stop)[:, None], other=0)
        if FP8:
            k_CD = decode_e4m3(k_CD).to(index_q.dtype.element_ty)
        if WIDEN:
            k_CD = k_CD.to(tl.float32)
        dots = tl.dot(k_CD, q_DN, input_precision=PRECISION)
        activations = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
        weighted = activations * weights_N[None, :]
        scores = tl.sum(tl.reshape(weighted, (BLOCK_C, HI_PADDED, BLOCK_S)), axis=1)
        if FP8:
            scale_C = tl.load(index_scale + batch * C + tokens, mask=tokens < stop, other=0.0)
            scores *= scale_C[:, None]
        # Numbers below the smallest normal one, and -0.0, count as 0.0: ZERO_BIN then holds equal keys only.
        scores = tl.where(tl.abs(scores) < 1.17549435e-38, 0.0, scores)
        bits = scores.to(tl.int32, bitcast=True)
        # Unsigned order of the key = order of the number: flip the sign bit, of negative numbers all bits.
        key = bits ^ ((bits >> 31) | -2147483648)
        tl.store(keys_S[None, :] + tokens[:, None], key, mask=row_exists[None, :])


@triton.jit(
    do_not_specialize=["first_batch", "first_query", "query_tile", "S", "C", "K", "POOL", "SINKS", "WINDOW", "P"]
)
def histogram_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32; FORCED: written where a key is always selected
    counts,  # [R, P, BINS] int32, written
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    K,
    POOL,
    SINKS,  # groups
    WINDOW,  # tokens
    P,
    FORCED: tl.constexpr,
):
    """Program (split, row of the tile): how many of the split's keys have each value of the highest 11 bits."""
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch = first_batch + row // query_tile
    query = first_query + row % query_tile
    visible = visible_groups(kv_lengths, batch, query, S, C, POOL, FORCED)
    if visible <= K:
        return
    share = tl.cdiv(tl.cdiv(visible, P), SELECT_BLOCK) * SELECT_BLOCK
    start = split * share
    stop = tl.minimum(start + share, visible)
    readable = tl.cdiv(stop, ROW_ALIGNMENT) * ROW_ALIGNMENT  # a mask of whole vectors: 16-byte loads
    keys += row * tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT

    if FORCED:  # the first group that is in the window or incomplete: complete ones hold no later token
        recent = visible_tokens(kv_lengths, batch, query - WINDOW, S, C * POOL) // POOL
    bins = tl.zeros((BINS,), tl.int32)
    for block in range(start, stop, SELECT_BLOCK):
        tokens = block + tl.arange(0, SELECT_BLOCK)
        here = tokens < stop
        key = tl.load(keys + tokens, mask=tokens < readable, other=0)
        if FORCED:
            always = (tokens < SINKS) | (tokens >= recent)
            is_largest = key == -1  # a NaN; it shall rank below
            key = tl.where(always, -1, tl.where(is_largest, -2, key))
            tl.store(keys + tokens, key, mask=here & (always | is_largest))
        bins += tl.histogram((key >> 21) & (BINS - 1), BINS, mask=here)
    tl.store(counts + (row * P + split) * BINS + tl.arange(0, BINS), bins)


@triton.jit(do_not_specialize=["first_batch", "first_query", "query_tile", "S", "C", "K", "POOL", "P", "LIST"])
def filter_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32
    counts,  # [R, P, BINS] int32
    listed,  # [R, LIST] int32, written
    state,  # [R, 4] int32, written
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    K,
    POOL,
    P,
    LIST,
    FORCED: tl.constexpr,
):
    """Program (split, row of the tile): appends the split's tokens at or above the threshold's bin to the row's list.

    Every program sums the row's histograms for itself, and knows from those of the splits before it where to write.
    """
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch = first_batch + row // query_tile
    query = first_query + row % query_tile
    visible = visible_groups(kv_lengths, batch, query, S, C, POOL, FORCED)
    if visible <= K:
        return
    share = tl.cdiv(tl.cdiv(visible, P), SELECT_BLOCK) * SELECT_BLOCK
    start = split * share
    stop = tl.minimum(start + share, visible)
    readable = tl.cdiv(stop, ROW_ALIGNMENT) * ROW_ALIGNMENT  # a mask of whole vectors: 16-byte loads
    keys += row * tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    listed += row * LIST

    bin_ids = tl.arange(0, BINS)
    total = tl.zeros((BINS,), tl.int32)
    before = tl.zeros((BINS,), tl.int32)
    for first in range(0, P, SPLITS_READ):  # several rows in flight: one at a time, this loop would be all latency
        others = first + tl.arange(0, SPLITS_READ)
        cells = (row * P + others)[:, None] * BINS + bin_ids[None, :]
        bins = tl.load(counts + cells, mask=(others < P)[:, None], other=0)
        total += tl.sum(bins, 0)
        before += tl.sum(tl.where((others < split)[:, None], bins, 0), 0)
    at_or_above = visible - tl.cumsum(total, 0) + total
    threshold = tl.sum((at_or_above >= K).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(bin_ids > threshold, total, 0), 0)
    tied = tl.sum(tl.where(bin_ids == threshold, total, 0), 0)
    above_before = tl.sum(tl.where(bin_ids > threshold, before, 0), 0)
    tied_before = tl.sum(tl.where(bin_ids == threshold, before, 0), 0)
    # Exact zeros come in masses (ReLU) and need no further sorting: the first ones win.
    tie_limit = tl.where(threshold == ZERO_BIN, tl.minimum(tied, K - above), tied)
    if split == 0:
        tl.store(state + row * 4, threshold)
        tl.store(state + row * 4 + 1, above)
        tl.store(state + row * 4 + 2, above + tie_limit)

    for block in range(start, stop, SELECT_BLOCK):
        tokens = block + tl.arange(0, SELECT_BLOCK)
        here = tokens < stop
        key = tl.load(keys + tokens, mask=tokens < readable, other=0)
        digit = (key >> 21) & (BINS - 1)
        is_above = here & (digit > threshold)
        is_tied = here & (digit == threshold)
        # Two counters in one scan: a block has 4,096 tokens, so 16 bits each are enough.
        both = is_above.to(tl.int32) + (is_tied.to(tl.int32) << 16)
        ranks = tl.cumsum(both, 0) - both
        above_rank = above_before + (ranks & 0xFFFF)
        tied_rank = tied_before + (ranks >> 16)
        slots = above_rank + tl.minimum(tied_rank, tie_limit)
        keep = (is_above | (is_tied & (tied_rank < tie_limit))) & (slots < LIST)
        tl.store(listed + slots, tokens, mask=keep)
        sums = tl.sum(both, 0)
        above_before += sums & 0xFFFF
        tied_before += sums >> 16


@triton.jit(do_not_specialize=["first_batch", "first_query", "query_tile", "S", "C", "K", "POOL", "LIST"])
def finish_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32
    listed,  # [R, LIST] int32
    state,  # [R, 4] int32
    indices,  # [B, S, K * POOL] int32, written
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    K,
    POOL,
    LIST,
    FORCED: tl.constexpr,
):
    """Program (row of the tile): the K tokens of highest key among the listed ones, ascending; -1 beyond.

    If more tokens share the threshold's bin than the list holds, it reads the whole row instead.
    """
    row = tl.program_id(0).to(tl.int64)
    batch = first_batch + row // query_tile
    query = first_query + row % query_tile
    visible = visible_groups(kv_lengths, batch, query, S, C, POOL, FORCED)
    selected = K
    tokens_seen = visible
    if FORCED:
        selected = K * POOL
        tokens_seen = visible_tokens(kv_lengths, batch, query, S, C * POOL)
    indices += (batch * S + query) * selected
    if visible <= K:
        for block in range(0, selected, SELECT_BLOCK):
            slots = block + tl.arange(0, SELECT_BLOCK)
            tl.store(indices + slots, tl.where(slots < tokens_seen, slots, -1), mask=slots < selected)
        return

    keys += row * tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    listed += row * LIST
    high = tl.load(state + row * 4)
    above = tl.load(state + row * 4 + 1)
    candidates = tl.load(state + row * 4 + 2)
    count = tl.where(candidates <= LIST, candidates, visible)
    from_list = tl.where(candidates <= LIST, candidates, 0)
    bin_ids = tl.arange(0, BINS)

    middle = 0
    low = 0
    if candidates > K:
        bins = tl.zeros((BINS,), tl.int32)
        for block in range(0, count, SELECT_BLOCK):
            slots = block + tl.arange(0, SELECT_BLOCK)
            here = slots < count
            tokens = tl.load(listed + slots, mask=slots < from_list, other=0)
            tokens = tl.where(slots < from_list, tokens, slots)
            key = tl.load(keys + tokens, mask=here, other=0)
            here = here & (((key >> 21) & (BINS - 1)) == high)
            bins += tl.histogram((key >> 10) & (BINS - 1), BINS, mask=here)
        at_or_above = above + tl.sum(bins, 0) - tl.cumsum(bins, 0) + bins
        middle = tl.sum((at_or_above >= K).to(tl.int32), 0) - 1
        above += tl.sum(tl.where(bin_ids > middle, bins, 0), 0)

        bins = tl.zeros((BINS,), tl.int32)
        for block in range(0, count, SELECT_BLOCK):
            slots = block + tl.arange(0, SELECT_BLOCK)
            here = slots < count
            tokens = tl.load(listed + slots, mask=slots < from_list, other=0)
            tokens = tl.where(slots < from_list, tokens, slots)
            key = tl.load(keys + tokens, mask=here, other=0)
            here = here & (((key >> 10) & (BINS * BINS - 1)) == ((high << 11) | middle))
            bins += tl.histogram(key & 1023, BINS, mask=here)
        at_or_above = above + tl.sum(bins, 0) - tl.cumsum(bins, 0) + bins
        low = tl.sum((at_or_above >= K).to(tl.int32), 0) - 1
        above += tl.sum(tl.where(bin_ids > low, bins, 0), 0)

    # Signed comparison after the sign bit is flipped back: the order of the unsigned keys.
    lowest_kept = ((high << 21) | (middle << 10) | low) ^ -2147483648
    resolved = candidates > K
    tie_limit = tl.where(resolved, K - above, K)
    kept_before = 0
    tied_before = 0
    for block in range(0, count, SELECT_BLOCK):
        slots = block + tl.arange(0, SELECT_BLOCK)
        here = slots < count
        tokens = tl.load(listed + slots, mask=slots < from_list, other=0)
        tokens = tl.where(slots < from_list, tokens, slots)
        key = tl.load(keys + tokens, mask=here, other=0) ^ -2147483648
        is_above = here & (key > lowest_kept)
        is_tied = here & (key == lowest_kept)
        both = is_above.to(tl.int32) + (is_tied.to(tl.int32) << 16)
        ranks = tl.cumsum(both, 0) - both
        tied_rank = tied_before + (ranks >> 16)
        slots = kept_before + (ranks & 0xFFFF) + tl.minimum(tied_rank, tie_limit)
        keep = is_above | (is_tied & (tied_rank < tie_limit))
        keep = keep & (slots < K)
        if FORCED:
            for place in range(POOL):
                token = tokens * POOL + place
                tl.store(indices + slots * POOL + place, tl.where(token < tokens_seen, token, -1), mask=keep)
        else:
            tl.store(indices + slots, tokens, mask=keep)
        sums = tl.sum(both, 0)
        kept_before += sums & 0xFFFF
        tied_before += sums >> 16


def index_topk(
    index_q: Tensor,
    index_weights: Tensor,
    index_k: Tensor,
    kv_lengths: Tensor,
    k: int,
    sinks: int = 0,
    window: int = 0,
    pool: int = 1,
    index_scale: Tensor | None = None,
    budget: int = DEFAULT_WORKSPACE,
) -> Tensor:
    """Launches the kernels; arguments and result as `plugins.index_topk.op.index_topk`, already validated."""
    B, S, Hi, Di = index_q.shape
    C = index_k.shape[1]
    indices = torch.empty(B, S, k, dtype=torch.int32, device=index_q.device)
    if indices.numel() == 0:
        return indices
    K = k // pool
    cut = plan(B, S, C, Hi, Di, K, budget)
    rows = cut.batch_tile * cut.query_tile
    capacity, _ = row_entries(C, K)
    memory = torch.empty(cut.workspace // 4, dtype=torch.int32, device=index_q.device)
    sizes = [rows * capacity, rows * cut.listed, rows * 4, rows * cut.splits * BINS.value]
    keys, listed, state, counts = memory[: sum(sizes)].split(sizes)
    dtype = "fp32" if index_q.dtype == torch.float32 else "16 bits"
    precision = "ieee" if dtype == "fp32" else "tf32"
    fp8 = index_scale is not None
    stored_k = index_k.view(torch.uint8) if fp8 else index_k
    select = {"FORCED": bool(sinks or window or pool > 1), **SELECT_OPTIONS}
    for batch in range(0, B, cut.batch_tile):
        for query in range(0, S, cut.query_tile):
            tile = min(cut.query_tile, S - query)
            tile_rows = min(cut.batch_tile, B - batch) * tile
            where = (batch, query, tile, S, C)
            if K < C:
                ranges = triton.cdiv(capacity, cut.blocks * block_c(Di))
                query_blocks = triton.cdiv(tile, cut.block_s) * min(cut.batch_tile, B - batch)
                score_kernel[(ranges, query_blocks)](
                    index_q, index_weights, stored_k, kv_lengths, index_scale, keys, *where, Hi, K, pool, cut.blocks,
                    HI_PADDED=padded_heads(Hi), DI=Di, BLOCK_S=cut.block_s, BLOCK_C=block_c(Di),
                    PRECISION=precision, FP8=fp8, WIDEN=triton.knobs.runtime.interpret,
                    **score_options(dtype, S <= DECODE_QUERIES),
                )  # fmt: skip
                forced = (pool, triton.cdiv(sinks, pool), window)
                histogram_kernel[(cut.splits, tile_rows)](
                    kv_lengths, keys, counts, *where, K, *forced, cut.splits, **select
                )
                filter_kernel[(cut.splits, tile_rows)](
                    kv_lengths, keys, counts, listed, state, *where, K, pool, cut.splits, cut.listed, **select
                )
            finish_kernel[(tile_rows,)](kv_lengths, keys, listed, state, indices, *where, K, pool, cut.listed, **select)
    return indices


SELECT_OPTIONS = {"num_warps": 16, "num_stages": 1, **COMMON_OPTIONS}


def score_options(dtype: str, decode: bool) -> dict[str, Any]:
    if dtype == "fp32":
        return {"num_warps": 4, "num_stages": 1, **COMMON_OPTIONS}
    stages = {"num_warps": 4, "num_stages": 4} if decode else {"num_warps": 8, "num_stages": 3}
    return {**stages, **COMMON_OPTIONS}


def variants() -> Iterator[Variant]:
    """What the plugin library holds."""
    for dtype, Di, heads, decode, fp8 in product(AOT_DTYPES, HEAD_SIZES, HEADS_PADDED, (True, False), (False, True)):
        columns = DECODE_COLUMNS if decode else PREFILL_COLUMNS
        tensor = f"*{dtype}"
        yield Variant(
            name=f"index_topk_score_{dtype}_{Di}_{heads}_{'decode' if decode else 'prefill'}{'_fp8' if fp8 else ''}",
            kernel=score_kernel,
            pointers={
                "index_q": tensor, "index_weights": tensor, "index_k": "*u8" if fp8 else tensor, "kv_lengths": "*i64",
                "index_scale": "*fp32", "keys": "*i32",
            },
            constants={
                "HI_PADDED": heads, "DI": Di, "BLOCK_S": columns // heads, "BLOCK_C": block_c(Di),
                "PRECISION": "tf32", "FP8": fp8, "WIDEN": False,
            },
            options=score_options(dtype, decode),
        )  # fmt: skip
    pointers = {"kv_lengths": "*i64"} | dict.fromkeys(("keys", "counts", "listed", "state", "indices"), "*i32")
    kernels = {"histogram": histogram_kernel, "filter": filter_kernel, "finish": finish_kernel}
    for (name, kernel), forced in product(kernels.items(), (False, True)):
        suffix = "_forced" if forced else ""
        yield Variant(f"index_topk_{name}{suffix}", kernel, pointers, {"FORCED": forced}, SELECT_OPTIONS)


def constants() -> dict[str, int]:
    """The numbers that the C++ shell shares with `plan`."""
    return {
        "ROW_ALIGNMENT": ROW_ALIGNMENT.value,
        "DECODE_COLUMNS": DECODE_COLUMNS,
        "PREFILL_COLUMNS": PREFILL_COLUMNS,
        "DECODE_QUERIES": DECODE_QUERIES,
        "SELECT_BLOCK": SELECT_BLOCK.value,
        "BINS": BINS.value,
        "MAX_SPLITS": MAX_SPLITS,
        "SCORE_PROGRAMS": SCORE_PROGRAMS,
        "SELECT_PROGRAMS": SELECT_PROGRAMS,
        "MAX_BLOCKS": MAX_BLOCKS,
        "DEFAULT_WORKSPACE": DEFAULT_WORKSPACE,
        "MAX_HEADS": MAX_HEADS,
        "MAX_K": MAX_K,
        "MAX_CAPACITY": MAX_CAPACITY,
    }
