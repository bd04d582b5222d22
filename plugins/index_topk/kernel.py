"""dsa::IndexTopK on a GPU: score, guess, filter, finish. One source for the interpreter, torch and the plugin.

Shapes: B batch, S query tokens, Hi indexer heads, Di indexer head size, m = pool, C index keys (G in op.py),
K = k / m; see op.py. With m > 1 a "token" of the kernels is a group of m tokens, one index key: positions become groups
at the beginning (`visible_groups`), and the selected groups tokens at the end.
A row is one query token of one sequence. Rows are worked through in tiles, which bounds the workspace; it holds, for
the R rows of a tile, in 32-bit integers:

    keys       [R, C']         the scores as integers of the same order (C' = C rounded up to ROW_ALIGNMENT)
    listed     [R, P, LIST]    per split of the row: tokens above the threshold
    counts     [R, P]          how many these are
    threshold  [R]

Four launches a tile, none of which waits for a program of its own, and no atomic: the result does not depend on timing.
plan.py cuts the tiles; score.py has the first kernel, selection.py the others.

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

from collections.abc import Iterator
from itertools import product

import torch
import triton
from torch import Tensor

from plugins.dependent import launch_options
from plugins.index_topk.plan import (
    HEAD_SIZES,
    HEADS_PADDED,
    LONG_LIST,
    SCORE_BYTES,
    SHORT_LIST,
    block_c,
    padded_heads,
    plan,
    row_entries,
    scored_queries,
    target,
)
from plugins.index_topk.score import score_kernel, score_options
from plugins.index_topk.selection import (
    FILTER_OPTIONS,
    GUESS_OPTIONS,
    filter_kernel,
    finish_kernel,
    finish_options,
    guess_kernel,
)
from plugins.variant import AOT_DTYPES, Variant


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
