"""dsa::IndexTopK on a GPU: score, guess, filter, finish. One source for the interpreter, torch and the plugin.

Shapes: B batch, S query tokens, Hi indexer heads, Di indexer head size, m = pool, C index keys (G in op.py),
K = k / m; see op.py. With m > 1 a "token" of this file is a group of m tokens, one index key: positions become groups
at the beginning (`visible_groups`), and the selected groups tokens at the end.
A row is one query token of one sequence. Rows are worked through in tiles, which bounds the workspace; it holds, for
the R rows of a tile, in 32-bit integers:

    keys       [R, C']         the scores as integers of the same order (C' = C rounded up to ROW_ALIGNMENT)
    listed     [R, P, LIST]    per split of the row: tokens above the threshold
    counts     [R, P]          how many these are
    threshold  [R]

Four launches a tile, none of which waits for a program of its own, and no atomic: the result does not depend on timing.

    score      keys of all visible tokens: tensor cores, one read of the index keys
    guess      a threshold, from a sample of the row's keys
    filter     lists the tokens above it, in index order
    finish     finds the K-th largest of the listed keys, exactly, and writes the K indices and -1

The threshold is a key of such rank in the sample that between K and LIST tokens should lie above it. Where it misses
(about once in 10^3 rows of 1M tokens with independent scores, far more rarely in shorter ones), `finish` reads the
whole row instead, some 30 times: exact, and slow. Masses of equal scores (zeros, after ReLU) do not miss: the threshold
is then their key, and what is lacking beside the tokens above it are the first of them, found in one pass.

Rows with at most K visible tokens skip the first three and get 0, 1, 2, ...; rows of at most LIST skip two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from plugins.dependent import begin, launch_options, let_next_start
from plugins.variant import AOT_DTYPES, COMMON_OPTIONS, Variant

ROW_ALIGNMENT = tl.constexpr(128)  # C' is a multiple of it
DECODE_COLUMNS = 8  # (head, query) pairs that a program scores at a time for S = 1, at least: what a tensor core takes
PREFILL_COLUMNS = 128
SELECT_BLOCK = tl.constexpr(4096)  # keys that the selection reads at a time
SELECT_WIDTH = tl.constexpr(1024)  # rows of such a tile, see `tile_places`
SCAN_BLOCK = tl.constexpr(2048)
SAMPLE = tl.constexpr(8192)
CLUSTER = tl.constexpr(4)  # sampled keys that stand together: half of the 32 bytes that a read takes at least
E4M3_SCALE = tl.constexpr(2.0**120)
SMALLEST = tl.constexpr(2.0**-126)  # normal number of fp32
ALWAYS = tl.constexpr(2**31 - 1)  # the key of what is always selected
NOTHING = tl.constexpr(-(2**31))  # below every key
MAX_SPLITS = tl.constexpr(8)
SHORT_LIST = 8192
LONG_LIST = 16384
SCORE_PROGRAMS = 512  # enough to fill the largest GPU while every program still pipelines several blocks
SELECT_PROGRAMS = 1056
MAX_BLOCKS = 16
SCORE_BYTES = 128 * 2**20  # of a tile: few tiles weigh more than scores that stay in the L2 cache

HEADS_PADDED = (4, 8, 16)
HEAD_SIZES = (64, 128)  # that the plugin library holds
TORCH_HEAD_SIZES = (16, 32, *HEAD_SIZES)
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
    splits: int  # filter programs per row; 0: not needed
    listed: int  # LIST
    workspace: int  # bytes


def padded_heads(heads: int) -> int:
    return next(padded for padded in HEADS_PADDED if heads <= padded)


def list_entries(k: int) -> int:
    """LIST, a power of two: 4 K or more."""
    return SHORT_LIST if 4 * k <= SHORT_LIST else LONG_LIST


def row_entries(C: int) -> int:
    """C'."""
    return triton.cdiv(C, ROW_ALIGNMENT.value) * ROW_ALIGNMENT.value


def split_bytes(rows: int, C: int, k: int) -> int:
    """The lists of a tile of `rows` rows, and of any smaller one."""
    splits = min(rows * MAX_SPLITS.value, SELECT_PROGRAMS) if list_entries(k) < C else 0
    return 4 * splits * (list_entries(k) + 1)


def workspace_bytes(rows: int, C: int, k: int) -> int:
    """Workspace of a tile of `rows` rows."""
    return 4 * rows * (row_entries(C) + 1) + split_bytes(rows, C, k)


def tile_rows(C: int, budget: int) -> int:
    """Rows whose scores fit into `budget` bytes."""
    return min(max(budget // (4 * max(row_entries(C), 1)), 1), SELECT_PROGRAMS)


def largest_workspace(B: int, S: int, C: int, k: int) -> int:
    """What any call of at most this shape needs; with fewer tokens a tile may have more rows."""
    rows = B * S
    scores = min(4 * rows * row_entries(C), max(SCORE_BYTES, 4 * row_entries(C)))
    return scores + 4 * min(rows, SELECT_PROGRAMS) + split_bytes(min(rows, SELECT_PROGRAMS), C, k)


def _even_tile(count: int, most: int, step: int = 1) -> int:
    """Cuts `count` into the fewest tiles of at most `most`, about equally large, multiples of `step` if possible."""
    stepped = most > step
    most = most // step * step if stepped else most
    tile = triton.cdiv(count, triton.cdiv(count, most))
    return min(count, triton.cdiv(tile, step) * step) if stepped else tile


def block_c(Di: int) -> int:
    """Tokens that a program scores at a time: 16 KB of keys for either head size."""
    return 128 * 64 // max(Di, 64)


def scored_queries(heads: int, decode: bool) -> int:
    """BLOCK_S for this padded number of heads."""
    return max(DECODE_COLUMNS // heads, 1) if decode else PREFILL_COLUMNS // heads


def plan(B: int, S: int, C: int, Hi: int, Di: int, k: int, budget: int = SCORE_BYTES) -> Plan:
    """Cuts the rows into tiles that need at most `budget` bytes for their rows, or into tiles of one row."""
    block_s = scored_queries(padded_heads(Hi), decode=S == 1)
    rows = tile_rows(C, budget)
    query_tile = _even_tile(S, rows, step=block_s)
    batch_tile = _even_tile(B, rows // query_tile)
    work = batch_tile * triton.cdiv(query_tile, block_s) * (row_entries(C) // block_c(Di))
    blocks = min(max(work // SCORE_PROGRAMS, 1), MAX_BLOCKS)
    rows = batch_tile * query_tile
    splits = min(max(SELECT_PROGRAMS // rows, 1), MAX_SPLITS.value, triton.cdiv(C, SELECT_BLOCK.value))
    splits = splits if list_entries(k) < C else 0
    return Plan(batch_tile, query_tile, block_s, blocks, splits, list_entries(k), workspace_bytes(rows, C, k))


@triton.jit
def visible_tokens(kv_lengths, batch, query, S, capacity):
    """Tokens that a query of the sequence sees."""
    length = tl.load(kv_lengths + batch)
    return tl.minimum(tl.maximum(length - S + query + 1, 0), capacity).to(tl.int32)


@triton.jit
def visible_groups(kv_lengths, batch, query, S, C, POOL):
    """Groups of which a query of the sequence sees a token."""
    return tl.cdiv(visible_tokens(kv_lengths, batch, query, S, C * POOL), POOL)


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


@triton.jit
def flip(bits):
    """fp32 as an integer <-> its key: an integer of the same order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


TILE = ["first_batch", "first_query", "query_tile", "S", "C", "POOL"]


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
        k_CD = tl.load(index_k + tokens[:, None] * DI + dims[None, :], mask=has_key[:, None], other=0)
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


@triton.jit
def tile_places(COUNT: tl.constexpr, WIDTH: tl.constexpr, one):
    """0 … COUNT - 1 as [WIDTH, COUNT / WIDTH]; a thread has whole rows, see `ranks`.

    one: 1, which the compiler does not know. If it saw neighbours it would load several at once, and then move the
    address of every scattered store through shared memory, to the layout that stores want.
    """
    return tl.arange(0, WIDTH)[:, None] * (COUNT // WIDTH) + tl.arange(0, COUNT // WIDTH)[None, :] * one


@triton.jit
def ranks(keep):
    """How many are kept before each entry of a 2-D tile, row by row: a scan over the rows instead of all entries."""
    flags = keep.to(tl.int32)
    rows = tl.sum(flags, 1)
    return (tl.cumsum(rows, 0) - rows)[:, None] + tl.cumsum(flags, 1) - flags


@triton.jit
def rough_log(number):
    """A logarithm up to a factor and a constant, linear between powers of two: what stands in fp32's bits."""
    return number.to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def key_at(bottom, width, share):
    """The key of the score at a share of a range of scores."""
    return flip((bottom + width * share).to(tl.int32, bitcast=True))


@triton.jit
def largest_with_count(key, at_low, least, most):
    """(A number with `least` to `most` keys at or above it, how many); the `least`-th largest key if there is none.

    at_low: how many keys there are, at least `least`; other places hold NOTHING. Each step counts the keys above two
    numbers between which the wanted one should lie. They are interpolated, as if the logarithm of the count fell
    linearly with the score (it does where scores are distributed exponentially); every fourth step bisects.
    """
    low = tl.min(tl.where(key == NOTHING, ALWAYS, key))
    is_number = key < ALWAYS - 1
    high = tl.max(tl.where(is_number, key, low))
    at_high = tl.sum((key >= ALWAYS - 1).to(tl.int32))  # keys above `high`
    if at_high >= least:
        low = ALWAYS - 1
        high = ALWAYS
        at_low = at_high
        at_high = 0
    goal = (least + most) * 0.5
    step = 0
    while low < high:
        step += 1
        most_f, fewest_f = at_low.to(tl.float32), at_high.to(tl.float32)
        margin = 0.03 * (most_f - fewest_f) + 0.175 * tl.sqrt(most_f - fewest_f)
        more = tl.maximum(tl.minimum(goal + margin, most_f - 0.5), fewest_f + 0.5)
        fewer = tl.maximum(tl.minimum(goal - margin, most_f - 0.5), fewest_f + 0.5)
        bottom = flip(low).to(tl.float32, bitcast=True)
        width = flip(high).to(tl.float32, bitcast=True) - bottom
        most_log = rough_log(most_f)
        unit = 1.0 / (most_log - rough_log(tl.maximum(fewest_f, 0.5)))
        first = key_at(bottom, width, (most_log - rough_log(more)) * unit)
        second = key_at(bottom, width, (most_log - rough_log(fewer)) * unit)
        half = (low | high) - ((low ^ high) >> 1)  # (low + high + 1) / 2 without overflow
        first = tl.where((step % 4 > 0) & (width == width), first, half)
        first, second = tl.minimum(first, second), tl.maximum(first, second)
        first = tl.minimum(tl.maximum(first, low + 1), high)
        second = tl.minimum(tl.maximum(second, first), high)
        counts = tl.sum((key >= first).to(tl.int32) + ((key >= second).to(tl.int32) << 16))  # 16 bits each are enough
        at_first, at_second = counts & 0xFFFF, counts >> 16
        reached_first, reached_second = at_first >= least, at_second >= least
        high = tl.where(reached_second, high, tl.where(reached_first, second, first) - 1)
        at_high = tl.where(reached_second, at_high, tl.where(reached_first, at_second, at_first))
        low = tl.where(reached_second, second, tl.where(reached_first, first, low))
        at_low = tl.where(reached_second, at_second, tl.where(reached_first, at_first, at_low))
        high = tl.where(at_low <= most, low, high)
    return low, at_low


@triton.jit(do_not_specialize=[*TILE, "TARGET", "LIST"])
def guess_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32
    threshold,  # [R] int32, written
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    POOL,
    TARGET,  # tokens that shall lie above the threshold
    LIST,
    ARCH: tl.constexpr,
):
    """Program (row of the tile): a threshold from one cluster of keys from each of equal parts of the row."""
    begin(ARCH)
    let_next_start(ARCH)
    row = tl.program_id(0).to(tl.int64)
    batch = first_batch + row // query_tile
    query = first_query + row % query_tile
    visible = visible_groups(kv_lengths, batch, query, S, C, POOL)
    if visible <= LIST:
        return
    CLUSTERS: tl.constexpr = SAMPLE // CLUSTER
    part = tl.arange(0, CLUSTERS)
    size = visible // CLUSTERS
    place = part * size + part * (visible % CLUSTERS) // CLUSTERS
    place += ((part * 40503) & 0xFFFF) * size >> 16  # looks random (2^16 / golden ratio): text may have a period
    place = tl.minimum(place // CLUSTER, visible // CLUSTER - 1) * CLUSTER
    keys += row * tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    sample = tl.load(keys + place[:, None] + tl.arange(0, CLUSTER)[None, :])
    rank = tl.maximum(SAMPLE * TARGET // visible, 1)
    lowest, _ = largest_with_count(sample, tl.full((), SAMPLE, tl.int32), rank, rank + rank // 4)
    tl.store(threshold + row, lowest)


@triton.jit(do_not_specialize=[*TILE, "LIST", "P"])
def filter_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32
    listed,  # [R, P, LIST] int32, written
    counts,  # [R, P] int32, written
    threshold,  # [R] int32
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    POOL,
    LIST,
    P,
    ARCH: tl.constexpr,
):
    """Program (split, row of the tile): lists the split's tokens above the threshold."""
    begin(ARCH)
    let_next_start(ARCH)
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch = first_batch + row // query_tile
    query = first_query + row % query_tile
    visible = visible_groups(kv_lengths, batch, query, S, C, POOL)
    if visible <= LIST:
        return
    share = tl.cdiv(tl.cdiv(visible, P), SELECT_BLOCK) * SELECT_BLOCK
    start = split * share
    stop = tl.minimum(start + share, visible)
    keys += row * tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    listed += (row * P + split) * LIST
    lowest = tl.load(threshold + row)
    above = 0
    places = tile_places(SELECT_BLOCK, SELECT_WIDTH, tl.minimum(C, 1))
    tokens = start + places
    key = tl.load(keys + tokens, mask=tokens < stop, other=NOTHING)
    for block in range(start, stop, SELECT_BLOCK):
        tokens = block + places
        is_above = key > lowest
        following = tokens + SELECT_BLOCK  # on their way while these are listed
        key = tl.load(keys + following, mask=following < stop, other=NOTHING)
        slots = above + ranks(is_above)
        tl.store(listed + slots, tokens, mask=is_above & (slots < LIST))
        above += tl.sum(is_above.to(tl.int32))
    tl.store(counts + row * P + split, above)


@triton.jit
def write_tokens(indices, slots, groups, keep, POOL, tokens_seen):
    for place in range(POOL):
        token = groups * POOL + place
        tl.store(indices + slots * POOL + place, tl.where(token < tokens_seen, token, -1), mask=keep)


@triton.jit
def write_in_order(indices, keys, visible, lowest, written, K, POOL, tokens_seen, EQUAL: tl.constexpr):
    """Writes the first groups whose key is above `lowest` (EQUAL: equal to it) behind `written` others, up to K."""
    block = 0
    while (written < K) & (block < visible):
        groups = block + tl.arange(0, SCAN_BLOCK)
        key = tl.load(keys + groups, mask=groups < visible, other=NOTHING)
        keep = (groups < visible) & (key == lowest if EQUAL else key > lowest)
        slots = written + tl.cumsum(keep.to(tl.int32), 0) - 1
        write_tokens(indices, slots, groups, keep & (slots < K), POOL, tokens_seen)
        written += tl.sum(keep.to(tl.int32))
        block += SCAN_BLOCK
    return written


@triton.jit
def write_largest_of_row(indices, keys, visible, K, POOL, tokens_seen):
    """The slow way: no list, some 30 passes over the keys."""
    low = tl.full((), -(2**31), tl.int64)
    high = tl.full((), 2**31 - 1, tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count = 0
        for block in range(0, visible, SCAN_BLOCK):
            groups = block + tl.arange(0, SCAN_BLOCK)
            key = tl.load(keys + groups, mask=groups < visible, other=NOTHING)
            count += tl.sum(((groups < visible) & (key >= middle.to(tl.int32))).to(tl.int32))
        low = tl.where(count >= K, middle, low)
        high = tl.where(count >= K, high, middle - 1)
    lowest = low.to(tl.int32)
    written = tl.full((), 0, tl.int32)
    above = write_in_order(indices, keys, visible, lowest, written, K, POOL, tokens_seen, EQUAL=False)
    write_in_order(indices, keys, visible, lowest, above, K, POOL, tokens_seen, EQUAL=True)


@triton.jit(do_not_specialize=[*TILE, "K", "P"])
def finish_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32
    listed,  # [R, P, LIST] int32
    counts,  # [R, P] int32
    threshold,  # [R] int32
    indices,  # [B, S, K * POOL] int32, written
    first_batch,
    first_query,
    query_tile,
    S,
    C,
    K,
    POOL,
    P,
    LIST: tl.constexpr,
    ARCH: tl.constexpr,
):
    """Program (row of the tile): the K tokens of highest key, -1 beyond."""
    begin(ARCH)
    row = tl.program_id(0).to(tl.int64)
    batch = first_batch + row // query_tile
    query = first_query + row % query_tile
    tokens_seen = visible_tokens(kv_lengths, batch, query, S, C * POOL)
    visible = tl.cdiv(tokens_seen, POOL)
    indices += (batch * S + query) * K * POOL
    if visible <= K:
        for block in range(0, K * POOL, SELECT_BLOCK):
            slots = block + tl.arange(0, SELECT_BLOCK)
            tl.store(indices + slots, tl.where(slots < tokens_seen, slots, -1), mask=slots < K * POOL)
        return

    keys += row * tl.cdiv(C, ROW_ALIGNMENT) * ROW_ALIGNMENT
    listed += row * P * LIST
    slots = tile_places(LIST, LIST // 8, tl.minimum(C, 1))
    above = visible
    groups = slots
    if visible > LIST:
        above = 0
        place = slots  # of the lists' entries, one list behind the other
        for split in tl.static_range(MAX_SPLITS):
            count = tl.load(counts + row * P + split, mask=split < P, other=0)
            above += count
            place += tl.where(slots >= above, LIST - count, 0)
        groups = tl.load(listed + place, mask=slots < tl.where(above <= LIST, above, 0), other=0)

    written = 0
    if (above >= K) & (above <= LIST):
        key = tl.load(keys + groups, mask=slots < above, other=NOTHING)
        lowest, reached = largest_with_count(key, above, K, K)
        keep = key >= lowest
        if reached > K:  # several tie for the last place
            is_equal = key == lowest
            room = K - tl.sum((key > lowest).to(tl.int32))
            keep = (key > lowest) | (is_equal & (ranks(is_equal) < room))
        write_tokens(indices, ranks(keep), groups, keep, POOL, tokens_seen)
        written = K
    elif above < K:  # the threshold is the K-th largest key, or was a miss
        write_tokens(indices, slots, groups, slots < above, POOL, tokens_seen)
        lowest = tl.load(threshold + row)
        written = write_in_order(indices, keys, visible, lowest, above, K, POOL, tokens_seen, EQUAL=True)
    if written < K:
        write_largest_of_row(indices, keys, visible, K, POOL, tokens_seen)


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
    budget: int = SCORE_BYTES,
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
    capacity = row_entries(C)
    memory = torch.empty(cut.workspace // 4, dtype=torch.int32, device=index_q.device)
    per_split = rows * cut.splits
    sizes = [rows * capacity, per_split * cut.listed, per_split, rows]
    keys, listed, counts, threshold = memory[: sum(sizes)].split(sizes)
    dtype = "fp32" if index_q.dtype == torch.float32 else "16 bits"
    precision = "ieee" if dtype == "fp32" else "tf32"
    fp8 = index_scale is not None
    stored_k = index_k.view(torch.uint8) if fp8 else index_k
    on_device = launch_options(index_q.device)
    for batch in range(0, B, cut.batch_tile):
        for query in range(0, S, cut.query_tile):
            tile = min(cut.query_tile, S - query)
            rows_here = min(cut.batch_tile, B - batch) * tile
            where = (batch, query, tile, S, C)
            if K < C:
                ranges = triton.cdiv(capacity, cut.blocks * block_c(Di))
                query_blocks = triton.cdiv(tile, cut.block_s) * min(cut.batch_tile, B - batch)
                score_kernel[(ranges, query_blocks)](
                    index_q, index_weights, stored_k, kv_lengths, index_scale, keys, *where, Hi, K, pool,
                    triton.cdiv(sinks, pool), window, cut.blocks,
                    HI_PADDED=padded_heads(Hi), DI=Di, BLOCK_S=cut.block_s, BLOCK_C=block_c(Di),
                    PRECISION=precision, FP8=fp8, WIDEN=triton.knobs.runtime.interpret,
                    **score_options(dtype, decode=S == 1), **on_device,
                )  # fmt: skip
            if cut.splits:
                guess_kernel[(rows_here,)](
                    kv_lengths, keys, threshold, *where, pool, target(K), cut.listed, **GUESS_OPTIONS, **on_device
                )
                filter_kernel[(cut.splits, rows_here)](
                    kv_lengths, keys, listed, counts, threshold, *where, pool, cut.listed, cut.splits,
                    **FILTER_OPTIONS, **on_device,
                )  # fmt: skip
            finish_kernel[(rows_here,)](
                kv_lengths, keys, listed, counts, threshold, indices, *where, K, pool, cut.splits,
                LIST=cut.listed, **finish_options(cut.listed), **on_device,
            )  # fmt: skip
    return indices


def target(k: int) -> int:
    """Tokens that shall lie above the threshold: as many times k as LIST is times that."""
    return math.isqrt(k * list_entries(k))


GUESS_OPTIONS = {"num_warps": 8, "num_stages": 1, **COMMON_OPTIONS}
FILTER_OPTIONS = {"num_warps": 8, "num_stages": 1, **COMMON_OPTIONS}


def finish_options(listed: int) -> dict[str, Any]:
    return {"num_warps": listed // 1024, "num_stages": 1, **COMMON_OPTIONS}


def score_options(dtype: str, decode: bool) -> dict[str, Any]:
    if dtype == "fp32":
        return {"num_warps": 4, "num_stages": 1, **COMMON_OPTIONS}
    stages = {"num_warps": 4, "num_stages": 4} if decode else {"num_warps": 4, "num_stages": 3}
    return {**stages, **COMMON_OPTIONS}


def variants() -> Iterator[Variant]:
    """What the plugin library holds."""
    for dtype, Di, heads, decode, fp8 in product(AOT_DTYPES, HEAD_SIZES, HEADS_PADDED, (True, False), (False, True)):
        tensor = f"*{dtype}"
        yield Variant(
            name=f"index_topk_score_{dtype}_{Di}_{heads}_{'decode' if decode else 'prefill'}{'_fp8' if fp8 else ''}",
            kernel=score_kernel,
            pointers={
                "index_q": tensor, "index_weights": tensor, "index_k": "*u8" if fp8 else tensor, "kv_lengths": "*i64",
                "index_scale": "*fp32", "keys": "*i32",
            },
            constants={
                "HI_PADDED": heads, "DI": Di, "BLOCK_S": scored_queries(heads, decode), "BLOCK_C": block_c(Di),
                "PRECISION": "tf32", "FP8": fp8, "WIDEN": False,
            },
            options=score_options(dtype, decode),
        )  # fmt: skip
    pointers = {"kv_lengths": "*i64"} | dict.fromkeys(("keys", "listed", "counts", "threshold", "indices"), "*i32")
    yield Variant("index_topk_guess", guess_kernel, pointers, {}, GUESS_OPTIONS)
    yield Variant("index_topk_filter", filter_kernel, pointers, {}, FILTER_OPTIONS)
    for listed in (SHORT_LIST, LONG_LIST):
        options = finish_options(listed)
        yield Variant(f"index_topk_finish_{listed}", finish_kernel, pointers, {"LIST": listed}, options)


def constants() -> dict[str, int]:
    """The numbers that the C++ shell shares with `plan`."""
    return {
        "ROW_ALIGNMENT": ROW_ALIGNMENT.value,
        "DECODE_COLUMNS": DECODE_COLUMNS,
        "PREFILL_COLUMNS": PREFILL_COLUMNS,
        "SELECT_BLOCK": SELECT_BLOCK.value,
        "MAX_SPLITS": MAX_SPLITS.value,
        "SHORT_LIST": SHORT_LIST,
        "LONG_LIST": LONG_LIST,
        "SCORE_PROGRAMS": SCORE_PROGRAMS,
        "SELECT_PROGRAMS": SELECT_PROGRAMS,
        "MAX_BLOCKS": MAX_BLOCKS,
        "SCORE_BYTES": SCORE_BYTES,
        "MAX_HEADS": MAX_HEADS,
        "MAX_K": MAX_K,
        "MAX_CAPACITY": MAX_CAPACITY,
    }
