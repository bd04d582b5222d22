"""guess, filter, finish: from the keys of a row to its K best tokens."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from plugins.dependent import begin, let_next_start
from plugins.index_topk.keys import ALWAYS, NOTHING, TILE, flip, visible_groups, visible_tokens
from plugins.index_topk.plan import MAX_SPLITS, ROW_ALIGNMENT, SELECT_BLOCK
from plugins.variant import COMMON_OPTIONS

SELECT_WIDTH = tl.constexpr(1024)  # rows of such a tile, see `tile_places`
SCAN_BLOCK = tl.constexpr(2048)
SAMPLE = tl.constexpr(8192)
CLUSTER = tl.constexpr(4)  # sampled keys that stand together: half of the 32 bytes that a read takes at least


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


@triton.jit(do_not_specialize=[*TILE, "TARGET", "LIST"], do_not_specialize_on_alignment=["threshold"])
def guess_kernel(
    kv_lengths,  # [B] int64
    keys,  # [R, C'] int32
    threshold,  # [R] int32, written; behind counts, at any address
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
    rank = tl.maximum(TARGET * SAMPLE // visible, 1)  # the constant second: else no tensor to Triton 3.7's interpreter
    lowest, _ = largest_with_count(sample, tl.full((), SAMPLE, tl.int32), rank, rank + rank // 4)
    tl.store(threshold + row, lowest)


@triton.jit(do_not_specialize=[*TILE, "LIST", "P"], do_not_specialize_on_alignment=["threshold"])
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


@triton.jit(do_not_specialize=[*TILE, "K", "P"], do_not_specialize_on_alignment=["threshold"])
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


GUESS_OPTIONS = {"num_warps": 8, "num_stages": 1, **COMMON_OPTIONS}
FILTER_OPTIONS = {"num_warps": 8, "num_stages": 1, **COMMON_OPTIONS}


def finish_options(listed: int) -> dict[str, Any]:
    return {"num_warps": listed // 1024, "num_stages": 1, **COMMON_OPTIONS}
