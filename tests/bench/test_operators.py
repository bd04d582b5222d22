"""The GPU operators' timings, as far as they go without a GPU."""

from __future__ import annotations

import pytest

from bench.operators import CACHED_BYTES, MAX_CACHES, MAX_SETS, MEMORY, Case, cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.name}-{case.B}x{case.C}-{case.k}")
def test_no_input_comes_from_the_cache_of_the_gpu(case: Case) -> None:
    """Neither the index keys of all caches nor the rows that all sets select fit into it."""
    sets, caches = case.counts()
    scored, selected = case.bytes_read
    assert 1 <= caches <= min(sets, MAX_CACHES) and sets <= MAX_SETS
    assert caches * scored >= CACHED_BYTES and sets * selected >= CACHED_BYTES
    assert caches * (scored + case.B * case.C * case.row_bytes) <= MEMORY
