"""What is measured: contexts, batches and phases; the defaults; the floor of each case.

A case's context n counts the tokens that the last query attends to, itself included. Decoding times one call with one
token per row after n - 1 others; prefill times one call with the last S tokens of n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsa_export.cli import UserError
from engines.artifacts import Engine
from engines.session import chunk_tokens

CONTEXTS = (512, 2048, 8192, 32768)
FLOPS = 1.0e12
"""Bound of the floating-point operations of one pre-filled context among the defaults: seconds on two cores."""
TEACHER_FORCED = 32
"""Tokens over which the outputs are compared at each context."""


@dataclass(frozen=True)
class Case:
    phase: str  # prefill | decode
    batch: int
    context: int
    capacity: int
    queries: int  # S, tokens per row of one call


def plan(
    engines: dict[str, Engine], contexts: Sequence[int] | None, batches: Sequence[int], phase: str, caches: str
) -> list[Case]:
    """The cases in the order of measurement. Raises UserError for a context or batch that the engines cannot hold."""
    dense, sparse = engines["dense"], engines["sparse"]
    limit = min(engine.limits.max_context for engine in engines.values())
    for engine in engines.values():
        if max(batches) > engine.limits.max_batch:
            raise UserError(f"{engine.folder} was built for {engine.limits.max_batch} rows: build with --max-batch")
    chosen = sorted(set(contexts)) if contexts else default_contexts(dense, limit, caches)
    if chosen[-1] > limit:
        raise UserError(
            f"a context of {chosen[-1]} tokens exceeds the engines' capacity of {limit}: build with a larger "
            f"--max-context (the model knows {dense.model.max_position_embeddings} positions)"
        )
    cases = []
    for batch in sorted(set(batches)):
        for context in chosen:
            capacity = max(context, sparse.max_topk)
            chunk = min(chunk_tokens(e, e.limits.prefill_chunk, batch, capacity) for e in engines.values())
            if phase != "prefill":
                cases.append(Case("decode", batch, context, capacity, 1))
            if phase != "decode":
                cases.append(Case("prefill", batch, context, capacity, min(chunk, context)))
    return cases


def default_contexts(engine: Engine, limit: int, caches: str) -> list[int]:
    """Contexts that show the trend and that can be pre-filled within seconds; the shortest one always."""
    affordable = [n for n in CONTEXTS if n <= limit and (caches == "random" or prefill_flops(engine, n) <= FLOPS)]
    return affordable or [min(CONTEXTS[0], limit)]


def prefill_flops(engine: Engine, context: int) -> float:
    """Floating-point operations of a dense prefill: two per weight and token, and the attention's."""
    model = engine.model
    weights = engine.manifest["step_weight_bytes"] / (4 if engine.dtype == "fp32" else 2)
    attention = 2 * context * context * model.query_heads * model.head_dim * model.layers  # half is masked
    return 2 * weights * context + attention


def floor_bytes(engine: Engine, case: Case) -> int:
    """Bytes that one call must read at least: every weight once, and the rows of the caches that it attends to."""
    return engine.manifest["step_weight_bytes"] + case.batch * engine.cache_bytes_read(case.context, case.queries)
