"""The CPU operators' timings, as far as they go without their kernels."""

from __future__ import annotations

import numpy as np
import pytest

from bench.cpu_operators import HKV, Case, D


@pytest.mark.parametrize(
    ("case", "least"),
    [
        (Case("SparseAttention", "fp32", 1, 4096, 512), 512),
        (Case("SparseAttention", "fp16", 8, 4096, 512), None),  # two queries in a row select some tokens both
    ],
    ids=str,
)
def test_rows_that_several_queries_select_are_read_once(case: Case, least: int | None) -> None:
    rows = case.bytes_read() / (2 * HKV * D * (2 if case.keys == "fp16" else 4))
    selected = len(np.unique(case.inputs(np.random.default_rng(0))["indices"]))
    assert rows == (least or pytest.approx(selected, rel=0.02))
    assert selected == least or least is None


@pytest.mark.parametrize("queries", [1, 128])
def test_dense_attention_reads_every_row_once(queries: int) -> None:
    assert Case("Attention", "fp32", queries, 4096, 0).bytes_read() == 4096 * 2 * HKV * D * 4
