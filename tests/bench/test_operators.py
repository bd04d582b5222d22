"""The GPU operators' timings, as far as they go without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from bench import operators
from bench.operators import CACHED_BYTES, MAX_CACHES, MAX_SETS, MEMORY, Case, cases


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.name}-{case.B}x{case.C}-{case.k}")
def test_no_input_comes_from_the_cache_of_the_gpu(case: Case) -> None:
    """Neither the index keys of all caches nor the rows that all sets select fit into it."""
    sets, caches = case.counts(MEMORY)
    scored, selected = case.bytes_read
    assert 1 <= caches <= min(sets, MAX_CACHES) and sets <= MAX_SETS
    assert caches * scored >= CACHED_BYTES and sets * selected >= CACHED_BYTES
    assert caches * (scored + case.B * case.C * case.row_bytes) <= MEMORY


def test_a_smaller_gpu_gets_fewer_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU of 24 GiB some 22 are free: a case must leave room for workspaces, results and the check."""
    free = 22 * 2**30
    for case in cases():
        _, caches = case.counts(int(operators.MEMORY_SHARE * free))
        assert caches * (case.bytes_read[0] + case.B * case.C * case.row_bytes) <= 0.65 * free
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    monkeypatch.setattr(Case, "counts", lambda self, memory: asked.append(memory) or (0, 1))
    Case("decode", 1, 1, 64, 16).fill()
    assert asked == [int(operators.MEMORY_SHARE * free)]


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> Iterator[dict[str, object]]:
        yield {"what": "index_topk"}
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(operators, "measure", measure)
    first, second = operators.rows_of(Case("decode", 32, 1, 131072, 2048), SimpleNamespace())  # type: ignore[arg-type]
    assert first == {"what": "index_topk"}
    assert second == {"case": "decode", "B": 32, "S": 1, "C": 131072, "k": 2048} | {
        "left_out": "this GPU has too little memory"
    }
