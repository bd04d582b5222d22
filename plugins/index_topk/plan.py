"""How the selection of dsa::IndexTopK is cut into tiles and programs, and the memory that it needs; see kernel.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import triton
import triton.language as tl

ROW_ALIGNMENT = tl.constexpr(128)  # C' is a multiple of it
DECODE_COLUMNS = 8  # (head, query) pairs that a program scores at a time for S = 1, at least: what a tensor core takes
PREFILL_COLUMNS = tl.constexpr(128)
SELECT_BLOCK = tl.constexpr(4096)  # keys that the selection reads at a time
MAX_SPLITS = tl.constexpr(8)
SHORT_LIST = 8192
LONG_LIST = 16384
SCORE_PROGRAMS = 512  # enough to fill the largest GPU while every program still pipelines several blocks
SELECT_PROGRAMS = 1056
MAX_BLOCKS = 16
SCORE_BYTES = 128 * 2**20  # of a tile: few tiles weigh more than scores that stay in the L2 cache

KEY_NUMBERS = 128 * 64  # of the keys that a program scores at a time: 16 KB for either head size

HEADS_PADDED = (4, 8, 16, 64)  # 64: DeepSeek-V3.2
HEAD_SIZES = (64, 128)  # that the plugin library holds
TORCH_HEAD_SIZES = (16, 32, *HEAD_SIZES)
MAX_HEADS = HEADS_PADDED[-1]
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


def most_keys(pool: int) -> int:
    """Index keys of a sequence; a cache of pooled ones has two more than whole groups fit (dsa_export/capacity.py)."""
    return MAX_CAPACITY if pool == 1 else MAX_CAPACITY // pool + 2


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
    """Tokens that a program scores at a time."""
    return KEY_NUMBERS // max(Di, 64)


def scored_queries(heads: int, decode: bool) -> int:
    """BLOCK_S for this padded number of heads."""
    return max(DECODE_COLUMNS // heads, 1) if decode else PREFILL_COLUMNS.value // heads


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


def target(k: int) -> int:
    """Tokens that shall lie above the threshold: as many times k as LIST is times that."""
    return math.isqrt(k * list_entries(k))


def constants() -> dict[str, int | tuple[int, ...]]:
    """The numbers that the C++ shell shares with `plan`."""
    return {
        "ROW_ALIGNMENT": ROW_ALIGNMENT.value,
        "DECODE_COLUMNS": DECODE_COLUMNS,
        "PREFILL_COLUMNS": PREFILL_COLUMNS.value,
        "SELECT_BLOCK": SELECT_BLOCK.value,
        "MAX_SPLITS": MAX_SPLITS.value,
        "SHORT_LIST": SHORT_LIST,
        "LONG_LIST": LONG_LIST,
        "SCORE_PROGRAMS": SCORE_PROGRAMS,
        "SELECT_PROGRAMS": SELECT_PROGRAMS,
        "MAX_BLOCKS": MAX_BLOCKS,
        "SCORE_BYTES": SCORE_BYTES,
        "KEY_NUMBERS": KEY_NUMBERS,
        "HEADS_PADDED": HEADS_PADDED,
        "MAX_HEADS": MAX_HEADS,
        "MAX_K": MAX_K,
        "MAX_CAPACITY": MAX_CAPACITY,
    }
