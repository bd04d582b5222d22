"""What the kernels share: what a query sees, and scores as integers of the same order."""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = tl.constexpr(2.0**-126)  # normal number of fp32
ALWAYS = tl.constexpr(2**31 - 1)  # the key of what is always selected
NOTHING = tl.constexpr(-(2**31))  # below every key
TILE = ["first_batch", "first_query", "query_tile", "S", "C", "POOL"]


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
def flip(bits):
    """fp32 as an integer <-> its key: an integer of the same order."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
